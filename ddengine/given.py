"""What configurations and arguments say, turned into the objects that recipes take; and who watches them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any

import torch

from ddengine import data, loop
from ddengine.config import DatasetConfig, GraphDatasetConfig, NetworkConfig
from ddengine.errors import require, unknown
from ddengine.nets.core import NetSpec

Progress = Callable[[int, int, Mapping[str, float]], None]
Notice = Callable[[str], None]


@dataclass(frozen=True)
class Watch:
    """Where a recipe tells what it does: `notice` takes lines, `bar(title)` gives a progress callback."""

    notice: Notice = lambda text: None
    bar: Callable[[str], Progress] = lambda title: lambda done, total, values: None


def load_named(config: Any, watch: Watch) -> Any:
    """The dataset that a configuration names; what its reader noticed is said."""
    if isinstance(config, GraphDatasetConfig):
        graphs = data.load_graphs(**vars(config))
        for note in graphs.notes:
            watch.notice(note)
        return graphs
    dataset = data.load(
        config.name,
        root=config.root,
        size=config.size,
        preprocessing=config.preprocessing,
        on_error=config.on_error,
        download=config.download,
        memory=config.memory,
    )
    for note in dataset.notes:
        watch.notice(note)
    return dataset


def given(config: DatasetConfig | GraphDatasetConfig) -> dict[str, Any]:
    """What of a dataset's configuration is not the default: enough to load it again."""
    default, values = type(config)(), plain(vars(config))
    return {key: value for key, value in values.items() if value != getattr(default, key)}


def plain(load: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `ddengine.data.load` that mean the same in any folder."""
    root = load.get("root")
    return {**load, **({} if root is None else {"root": str(Path(root).expanduser().absolute())})}


def tuples(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as matchers take them: tuples for lists, mappings for groups of options."""
    found = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    return {key: vars(value) if is_dataclass(value) else value for key, value in found.items()}


def network_spec(config: NetworkConfig) -> NetSpec:
    """The network that a configuration names."""
    return NetSpec(config.name, config.width, config.depth, config.norm)


def device_of(name: str) -> torch.device:
    """The device called `name` (UsageError for another name, and for one that is not there)."""
    if name not in ("auto", "cpu", "cuda") and not name.startswith("cuda:"):
        raise unknown("device", name, ("auto", "cpu", "cuda"))
    return loop.as_device(name)


def precision_of(name: str, device: torch.device, bf16: bool = True) -> str:
    """The precision called `name` on `device`: "auto" is bf16 on CUDA where it serves, else fp32."""
    require(name, ("auto", "fp32", "bf16"), "precision")
    if name == "auto":
        return "bf16" if device.type == "cuda" and bf16 else "fp32"
    return name

"""What configurations and arguments say, turned into the objects that recipes take; and who watches them."""

import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ddengine import data, loop
from ddengine.config import DatasetConfig, GraphDatasetConfig, NetworkConfig
from ddengine.errors import require, unknown
from ddengine.nets.core import NetSpec

Progress = Callable[[int, int, Mapping[str, float]], None]
Notice = Callable[[str], None]
UNCOVERED = r"(\S+) does not have a deterministic implementation"  # PyTorch's words


@dataclass(frozen=True)
class Watch:
    """Where a recipe tells what it does: `notice` takes lines, `bar(title)` gives a progress callback."""

    notice: Notice = lambda text: None
    bar: Callable[[str], Progress] = lambda title: lambda done, total, values: None


@contextmanager
def deterministic(on: bool, notice: Notice) -> Iterator[None]:
    """Inside, with `on`, PyTorch takes operators that give the same bits every time, where it has them.

    Others run all the same, and `notice` names them at the end. What was set before is set again.
    """
    if not on:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
    was_on = torch.are_deterministic_algorithms_enabled()
    only_warned = torch.is_deterministic_algorithms_warn_only_enabled()
    names: set[str] = set()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("always", UNCOVERED)
            warnings.showwarning = partial(_gather, names, warnings.showwarning)
            yield
    finally:
        torch.use_deterministic_algorithms(was_on, warn_only=only_warned)
    if names:
        listed = ", ".join(sorted(names))
        notice(f"note: deterministic=true does not cover {listed}: another run may have other bits")


def _gather(names: set[str], show: Callable[..., None], message: Any, *place: Any, **named: Any) -> None:
    """Keep the operator that a warning names, show all other warnings."""
    found = re.match(UNCOVERED, str(message))
    if found:
        names.add(found[1])
    else:
        show(message, *place, **named)


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

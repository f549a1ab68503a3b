"""The command lines that would repeat what a run's files tell: its distillation and its evaluation."""

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import MappingNode, SafeLoader, YAMLError, compose

from ddengine.archives import plain_yaml
from ddengine.artefacts import expert_values
from ddengine.compose import PATHS, composed, spelled
from ddengine.errors import ArtefactError, UsageError
from ddengine.nets import is_import_path

CHOSEN = ("dataset", "matcher", "network")  # groups that a command chooses by name
BARE = re.compile(r"(?!(?:null|true|false|nan|inf)$)[A-Za-z_][\w./-]*", re.IGNORECASE | re.ASCII)


def distill_command(path: Path) -> str | None:
    """The command that has the configuration at `path`, shown without the keys that it need not name."""
    if not path.exists():
        return None
    config = _config(path)
    choices = [word(group, config[group].get("collection", config[group]["name"])) for group in CHOSEN]
    if config.get("experts"):
        choices.append(word("experts", config["experts"]))
    if "collection" in config["dataset"]:
        choices.append(word("dataset.name", config["dataset"]["name"]))
    said = {*(f"{group}.name" for group in CHOSEN), "dataset.collection", "experts"}
    default = _defaults(choices)
    differs = {k: v for k, v in _leaves(config) if k not in default or default[k] != v}
    return _line("distill", *choices, *(word(k, v) for k, v in differs.items() if k not in said))


def _config(path: Path) -> dict[str, Any]:
    try:
        text = plain_yaml(path)
        table = isinstance(compose(text, Loader=SafeLoader), MappingNode)  # OmegaConf fails on a number
        found: Any = OmegaConf.to_container(OmegaConf.create(text)) if table else None
    except (OmegaConfBaseException, YAMLError, ValueError, RecursionError) as error:
        raise ArtefactError(f"{path} is damaged: not YAML", "Restore it from a copy") from error
    groups = [found.get(group) for group in CHOSEN] if isinstance(found, dict) else [None]
    if not all(isinstance(group, dict) and isinstance(group.get("name"), str) for group in groups):
        raise ArtefactError(f"{path} is damaged: not the keys of distill", "Restore it from a copy")
    return dict(found)


def _defaults(choices: Sequence[str]) -> dict[str, Any]:
    """What `distill` takes for all other keys; nothing where a plug-in or the buffer is no longer there.

    Nothing either for a network with an import path: what a file names is not imported.
    """
    if any(is_import_path(choice) for choice in choices if choice.startswith("network=")):
        return {}
    try:
        config = composed("distill", choices, expert_values(choices))
    except (ArtefactError, UsageError):
        return {}
    made = OmegaConf.create({key: value for key, value in vars(config).items() if key != "defaults"})
    return dict(_leaves(OmegaConf.to_container(made)))


def _leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def evaluate_command(path: Path, table: Mapping[str, Any] | None) -> str | None:
    """The command that made `table`, or would make one; None for a table that was made in Python."""
    return _line("evaluate", str(path)) if table is None else table.get("command")


def word(key: str, value: Any) -> str:
    """`key=value` as one types it, with quotes only where hydra needs them."""
    if isinstance(value, list):
        return f"{key}=[{','.join(word('', item)[1:] for item in value)}]"
    if not isinstance(value, str):
        return spelled(key, value)
    typed = key in PATHS and value not in ("", "null") and value[0] not in "'\"" and "${" not in value
    return f"{key}={value}" if typed or BARE.fullmatch(value) else spelled(key, value)


def _line(*words: str) -> str:
    return shlex.join(["ddengine", *words])

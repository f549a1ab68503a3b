"""The command lines that would repeat what a run's files tell: its distillation and its evaluation."""

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from ddengine.artefacts import expert_values, holds_graphs, named
from ddengine.bench import SAME_LABELS, SUBJECT
from ddengine.compose import PATHS, composed, spelled
from ddengine.config import EvaluateConfig, EvaluateGraphsConfig
from ddengine.errors import ArtefactError, UsageError
from ddengine.graph_judge import usual_rows as usual_graph_rows
from ddengine.graph_paper import PAPER
from ddengine.graph_simple import SIMPLE
from ddengine.graph_train import GraphRecipe
from ddengine.nets import resolve
from ddengine.nets.core import NetSpec
from ddengine.nets.graph import resolve_graph
from ddengine.rivals import label_mode, usual_rows
from ddengine.train import AUGMENT_MODES, recipe_of
from synth import DistilledSet

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
        found = OmegaConf.to_container(OmegaConf.create(path.read_text("utf-8")))
    except (OmegaConfBaseException, YAMLError, ValueError) as error:
        raise ArtefactError(f"{path} is damaged: not YAML", "Restore it from a copy") from error
    groups = [found.get(group) for group in CHOSEN] if isinstance(found, dict) else [None]
    if not all(isinstance(group, dict) and isinstance(group.get("name"), str) for group in groups):
        raise ArtefactError(f"{path} is damaged: not the keys of distill", "Restore it from a copy")
    return found  # type: ignore[return-value]


def _defaults(choices: Sequence[str]) -> dict[str, Any]:
    """What `distill` takes for all other keys; nothing where a plug-in or the buffer is no longer there."""
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


def evaluate_command(
    path: Path, table: Mapping[str, Any] | None, distilled: DistilledSet | None
) -> str | None:
    """The command that made `table`; None if it was made in Python from what the command cannot say."""
    if table is None:
        return _line("evaluate", str(path))
    if distilled is None or table.get("source_matches") is False:
        return None
    networks = _network_words(table, distilled)
    graphs, rows = holds_graphs(distilled), table["rows"]
    default = EvaluateGraphsConfig() if graphs else EvaluateConfig()
    if graphs:
        usual = table["recipe"] if table["protocol"] == PAPER else GraphRecipe().to_dict()
    else:
        usual = recipe_of(distilled.manifest, distilled.spec.name).to_dict()
    recipe = {key: value for key, value in table["recipe"].items() if usual.get(key) != value}
    recipe.pop("weights", None)  # follows from ema
    if "augment_mode" in recipe:
        modes = {said: mode for mode, said in AUGMENT_MODES.items()}
        recipe["augment_mode"] = modes.get(recipe["augment_mode"])
    if networks is None or not recipe.keys() <= vars(default.recipe).keys():
        return None
    beside = [name for name in dict.fromkeys(row["name"] for row in rows) if name != SUBJECT]
    found = {"seeds": table.get("seeds", rows[0]["n"]), "seed": table["seed"], "rows": beside}
    if graphs:
        found["protocol"] = table["protocol"]
        if set(beside) == set(usual_graph_rows(distilled.manifest["y_kind"] == "prob")):
            found["rows"] = None
    elif SAME_LABELS in beside and label_mode(distilled.manifest) != "dynamic":
        return None  # its teachers are not in the set
    elif beside == list(usual_rows(label_mode(distilled.manifest), SAME_LABELS in beside)):
        found["rows"] = None
    said = {key: value for key, value in found.items() if getattr(default, key) != value}
    said |= {f"recipe.{key}": value for key, value in recipe.items()}
    return _line("evaluate", str(path), *networks, *(word(key, value) for key, value in said.items()))


def _network_words(table: Mapping[str, Any], distilled: DistilledSet) -> list[str] | None:
    """The words that make `evaluate` judge with the networks of `table`; None where none do."""
    own = named(distilled, "network")
    rows = [row for row in table["rows"] if row["name"] not in SIMPLE]
    wanted = list({row["network"]: row["network_spec"] for row in rows}.values())
    names = [spec.get("name") for spec in wanted]
    options = {key: value for key, value in wanted[0].items() if key != "name" and value is not None}
    for given in ({}, options):
        meant = [{**(own if name == own["name"] else {}), **given, "name": name} for name in names]
        try:
            made = [_resolved(NetSpec(**spec), distilled).to_dict() for spec in meant]
        except (TypeError, UsageError):  # an option that one of the networks lacks
            continue
        if made == wanted:
            chosen = [] if names == [own["name"]] else [word("networks", names)]
            return chosen + [word(f"network.{key}", value) for key, value in given.items()]
    return None


def _resolved(network: NetSpec, distilled: DistilledSet) -> NetSpec:
    return resolve_graph(network) if holds_graphs(distilled) else resolve(network, distilled.spec.shape)


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

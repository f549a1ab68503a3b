"""What a stored set or buffer says of itself: where it lies, what it names, what the commands show of it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints

from ddengine import files
from ddengine.config import DatasetConfig, GraphDatasetConfig, NetworkConfig
from ddengine.data import GRAPH_COLLECTIONS, names
from ddengine.errors import ArtefactError, UsageError, one_line
from ddengine.graphs import GraphSpec
from ddengine.nets import NetSpec, is_import_path
from expert_buffers.manifest import FORMAT, MANIFEST, describe
from expert_buffers.recipes import ExpertRecipe
from expert_buffers.store import ExpertBuffer
from synth import DistilledSet, schema, verify
from synth.card import describe_composites, describe_grids


def artefact(path: Path) -> Path:
    """The folder of the set at `path`: itself, or `distilled` in a run's folder (else ArtefactError).

    UsageError where there is nothing at all.
    """
    require_path(path)
    for folder in (path, path / "distilled"):
        if (folder / "manifest.json").is_file():
            return folder
    if (path / "run.json").is_file():
        raise ArtefactError(f"the run {path} is not finished", "Repeat its distill command to go on")
    raise ArtefactError(
        f"{path} holds no distilled set", "Give the folder of a distilled set or of a finished run"
    )


def require_path(path: Path) -> None:
    """Refuse a path at which there is nothing (UsageError)."""
    if not path.exists():
        raise UsageError(f"{path} does not exist", "Check the path; distill, import and demo name theirs")


def run_of(path: Path) -> Path | None:
    """The run that the set at `path` belongs to, None for a set on its own."""
    folder = artefact(path).parent
    return folder if (folder / "run.json").is_file() else None


def manifest_values(path: Path, words: Sequence[str] = ()) -> dict[str, Any]:
    """Keys and values that make `evaluate` use the dataset and network which the set at `path` names.

    A network with an import path is left out where the `words` of a command say which networks to take.
    Raises UsageError where neither they nor the set name data that a command can load.
    """
    distilled = DistilledSet.load(artefact(path))
    dataset = named(distilled, "dataset")
    group = "collection" if holds_graphs(distilled) else "name"
    options = {f"dataset.{key}": value for key, value in dataset.items() if key != group}
    loaded = (*names(), *GRAPH_COLLECTIONS)
    if dataset[group] not in loaded and not any(word.startswith("dataset=") for word in words):
        raise UsageError(
            f"the set was made from '{dataset[group]}', which is no dataset that a command can load",
            "Give dataset=NAME, or in Python: ddengine.evaluate(PATH, dataset=...) with the data itself",
        )
    values, network = {"dataset": dataset[group], **options}, named(distilled, "network")["name"]
    several = any(word.startswith("networks=") for word in words)
    return values if several and is_import_path(network) else {**values, "network": network}


def holds_graphs(distilled: DistilledSet) -> bool:
    """Whether networks for graphs train on the set."""
    return isinstance(distilled.spec, GraphSpec)


def graph_values(words: Sequence[str]) -> dict[str, Any]:
    """Keys and values that make `distill` use what is usual for graphs where the words name graphs."""
    typed = dict(word.partition("=")[::2] for word in words)
    if typed.get("dataset", "").strip("'\"") not in GRAPH_COLLECTIONS:
        return {}
    return {"matcher": "computation_tree", "network": "gin"}


def expert_values(words: Sequence[str]) -> dict[str, Any]:
    """Keys and values that make `distill experts=DIR` use the dataset and network of that buffer.

    None where a row says what to use.
    """
    typed = dict(word.partition("=")[::2] for word in words)
    path = typed.get("experts", "").strip("'\"")
    if "row" in typed or path in ("", "null"):
        return {}
    buffer = ExpertBuffer(Path(path).expanduser())
    manifest, hints = buffer.manifest, get_type_hints(DatasetConfig)
    dataset, network = manifest["origin"], manifest["networks"][0]
    for key, value in dataset.items():
        if key not in hints or not isinstance(value, hints[key]):
            raise ArtefactError(f"the manifest of {buffer.root} has origin.{key}={value}", "Record it again")
    values = {"dataset": dataset.get("name", manifest["dataset"]["name"])}
    values |= {f"dataset.{key}": value for key, value in dataset.items() if key != "name"}
    values["network"] = network["name"]
    options = {
        f"network.{key}": value for key, value in network.items() if key != "name" and value is not None
    }
    return values | options


def named(distilled: DistilledSet, group: str) -> dict[str, Any]:
    """The `dataset` or `network` that the manifest names, with its options (else ArtefactError)."""
    graphs = holds_graphs(distilled)
    default = {"name": distilled.spec.name if group == "dataset" else "gin" if graphs else "convnet"}
    found = distilled.manifest["recipe"].get(group) or default
    kind = NetworkConfig if group == "network" else GraphDatasetConfig if graphs else DatasetConfig
    hints, needed = get_type_hints(kind), {"name"}
    if kind is GraphDatasetConfig:
        needed = {"name", "collection"}
    if not isinstance(found, dict) or not all(isinstance(found.get(key), str) for key in needed):
        raise ArtefactError(f"the manifest names no {group}: {found}", "Make the set again")
    for key, value in found.items():
        if key not in hints or not isinstance(value, hints[key]):
            raise ArtefactError(f"the manifest's recipe has {group}.{key}={value}", "Make the set again")
    return found


def summary(path: Path) -> dict[str, Any]:
    """What `inspect` shows (plain JSON): of a set after its files were verified, of a buffer its manifest."""
    if is_buffer(path):
        return ExpertBuffer(path).summary()
    folder = artefact(path)
    distilled = DistilledSet.load(folder)
    manifest = distilled.manifest
    keys = ("format", "version", "kind", "count", "y_kind", *schema.OWN.get(manifest["kind"], ()), "tensors")
    tables = ("dataset", "budget", "recipe", "provenance")
    return {"path": str(folder), **{key: manifest[key] for key in (*keys, *tables)}}


def summary_text(found: Mapping[str, Any]) -> str:
    """The same for people."""
    if found["format"] == FORMAT:
        return _buffer_text(found)
    dataset, budget, made = found["dataset"], found["budget"], found["provenance"]
    network, matcher = found["recipe"].get("network"), made.get("matcher")
    parts = [key for key in ("images", "trees", "labels", "extras", "total") if key in budget]
    size = ", ".join(f"{key} {budget[key]:,}" for key in parts)
    kind = matcher.get("type", "?") if isinstance(matcher, dict) else "?"
    run = ", ".join(f"{key} {made.get(key, '?')}" for key in ("steps", "seconds", "seed"))
    what, how = f"items of node labels {dataset.get('node_sizes')}", dataset.get("discretised")
    if "shape" in dataset:
        what, how = f"images of {'x'.join(map(str, dataset['shape']))}", dataset["preprocessing"]
    composed = found["kind"] == "compensated"
    held = {"compensated": describe_composites, "factored": describe_grids}.get(found["kind"])
    lines = [
        f"{found['path']}: {found['kind']}, {found['count']} {'composite ' if composed else ''}{what}",
        *([f"  holds    {held(found)}"] if held else []),
        f"  source   {dataset['name']}, {len(dataset['classes'])} classes, {how}",
        f"  bytes    {size}",
        f"  made by  {kind}, {run}",
        f"  network  {network.get('name', '?') if isinstance(network, dict) else 'none'}",
    ]
    return "\n".join(map(one_line, lines))


def verified(path: Path) -> list[str]:
    """The lines of `verify`: what was checked and found right (else ArtefactError)."""
    return ExpertBuffer(path).verify() if is_buffer(path) else verify(artefact(path))


def is_buffer(path: Path) -> bool:
    """Whether the manifest in the folder `path` says that this is an expert buffer."""
    if not (path / MANIFEST).is_file():
        return False
    found = files.read_json(path / MANIFEST)
    return isinstance(found, dict) and found.get("format") == FORMAT


def _buffer_text(found: Mapping[str, Any]) -> str:
    epochs = " to ".join(dict.fromkeys(map(str, found["epochs"] or [0])))
    networks = ", ".join(describe(NetSpec(**network)) for network in found["networks"])
    known = found["accuracy"] is not None
    accuracy = f"{100 * found['accuracy']:.1f} % of fit images, last epochs" if known else "unknown"
    plain = {**ExpertRecipe().to_dict(), "precision": "fp32", "lr": None}
    recipe = ", ".join(f"{k} {v}" for k, v in found["recipe"].items() if k != "name" and v != plain.get(k))
    lines = [
        f"{found['path']}: {found['experts']} experts of {epochs} epochs",
        f"  source    {found['dataset']}, {found['preprocessing']}",
        f"  bytes     {found['bytes']:,} as {found['encoding']}",
        f"  recipe    {found['recipe'].get('name', '?')}: {recipe}",
        f"  networks  {networks}",
        f"  accuracy  {accuracy}",
    ]
    return "\n".join(map(one_line, lines))

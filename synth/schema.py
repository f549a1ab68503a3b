"""The manifest of a distilled set: what it must look like, and the seal that makes any change to it show."""

import hashlib
import json
import math
import re
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ddengine import files
from ddengine.errors import ArtefactError
from ddengine.graphs import DISCRETISED
from ddengine.types import LABEL_KINDS

FORMAT, VERSION = "ddengine/distilled-set", 1
MANIFEST, DATA = "manifest.json", "data.safetensors"
DTYPES = {"uint8": 1, "int8": 1, "int16": 2, "int32": 4, "float16": 2, "float32": 4}
TENSORS_MAX, FILES_MAX = 600, 64
COLUMNS_MAX, CODES_MAX = 256, 2**20  # label columns of nodes or of edges, and codes of a column
GRAPH_KINDS = ("forest", "graphs")
FACTORS = 16  # cells to a side of an image that is a grid, at most
HEADER_MAX = 1 << 20  # bytes of a safetensors header beside the tensors
REMEDY = "Restore it from a copy or make it again"

Check = Callable[[Any], bool]
Rule = tuple[Check, str] | dict[str, Any]


def damaged(path: Path, what: str) -> ArtefactError:
    """The error for a file that fails verification."""
    return ArtefactError(f"{path} is damaged: {what}", REMEDY)


def _integer(low: int, high: int) -> Rule:
    return (lambda v: type(v) is int and low <= v <= high), f"a whole number in {low}..{high}"


def _number(low: float, high: float) -> Rule:
    return (lambda v: type(v) is float and low <= v <= high), f"a number in {low}..{high}"


def _list(rule: Rule, low: int, high: int) -> Rule:
    def check(value: Any) -> bool:
        return type(value) is list and low <= len(value) <= high and not any(_wrong(v, rule) for v in value)

    return check, f"a list of {low} to {high} entries, each {_says(rule)}"


def _table(name: str, rule: Rule, high: int) -> Rule:
    def check(value: Any) -> bool:
        fits = type(value) is dict and 0 < len(value) <= high
        return fits and all(re.fullmatch(name, k) and not _wrong(v, rule) for k, v in value.items())

    return check, f"a table of at most {high} plain names, each with {_says(rule)}"


def _one_of(*values: str) -> Rule:
    return (lambda v: v in values), f"one of {', '.join(values)}"


def _says(rule: Rule) -> str:
    return f"the fields {', '.join(rule)}" if isinstance(rule, dict) else rule[1]


BYTES = _integer(0, files.TENSORS_LIMIT)
TEXT: Rule = ((lambda v: type(v) is str), "text")
HASH: Rule = ((lambda v: type(v) is str and re.fullmatch("[0-9a-f]{64}", v) is not None), "a SHA-256")
FREE: Rule = ((lambda v: type(v) is dict), "a table")
IPC: Rule = ((lambda v: v is None or (type(v) is int and 0 < v < 2**31)), "a whole number or null")

TENSOR: Rule = {"dtype": _one_of(*DTYPES), "shape": _list(_integer(1, 2**40), 0, 8)}
IMAGES: dict[str, Any] = {
    "name": TEXT,
    "shape": _list(_integer(1, 2**20), 3, 3),
    "classes": _list(TEXT, 1, 2**20),
    "mean": _list(_number(-1e9, 1e9), 1, 2**20),
    "std": _list(_number(1e-9, 1e9), 1, 2**20),
    "preprocessing": _one_of("standard", "zca"),
    "fingerprint": TEXT,
    "licence": TEXT,
}
GRAPHS: dict[str, Any] = {
    "name": TEXT,
    "classes": _list(TEXT, 1, 2**20),
    "node_sizes": _list(_integer(1, CODES_MAX), 1, COLUMNS_MAX),
    "edge_sizes": _list(_integer(1, CODES_MAX), 0, COLUMNS_MAX),
    "discretised": _one_of(*DISCRETISED),
    "codes_from": _one_of("labels", "degree"),
    "fingerprint": TEXT,
    "licence": TEXT,
}
OWN: dict[str, dict[str, Rule]] = {"factored": {"factor": _integer(1, FACTORS)}}  # fields of one kind
PARTS_OF_IMAGES = {"images": "images", "labels": "labels", "zca": "preprocessing"}
PARTS_OF_GRAPHS = {
    **dict.fromkeys(("trees", "items", "graphs"), "trees"),
    **dict.fromkeys(("labels", "weights"), "labels"),
}
SCHEMA: dict[str, Any] = {
    "format": _one_of(FORMAT),
    "version": _integer(VERSION, VERSION),
    "kind": TEXT,
    "tensors": _table(r"[a-z0-9_.]{1,64}", TENSOR, TENSORS_MAX),
    "files": _table(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,99}", {"sha256": HASH, "bytes": BYTES}, FILES_MAX),
    "y_kind": _one_of(*LABEL_KINDS),
    "count": _integer(1, 2**31),
    "recipe": FREE,
    "provenance": FREE,
    "seal": HASH,
}


def _wrong(value: Any, rule: Rule, where: str = "") -> str | None:
    """The first place where `value` breaks `rule`, in words."""
    if not isinstance(rule, dict):
        return None if rule[0](value) else f"field '{where}' is not {rule[1]}"
    if type(value) is not dict:
        return f"field '{where}' is not a table"
    if set(value) != set(rule):
        name = min(set(rule) ^ set(value))
        return f"field {f'{where}.{name}'.lstrip('.')!r} is {'missing' if name in rule else 'unknown'}"
    found = (_wrong(value[name], inner, f"{where}.{name}".lstrip(".")) for name, inner in rule.items())
    return next((text for text in found if text), None)


def seal(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of the manifest without its seal, as sorted compact JSON."""
    rest = {name: value for name, value in manifest.items() if name != "seal"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of the set in `folder`: every field of its type and range, and not one byte changed.

    Raises ArtefactError naming the file, with advice to upgrade when a newer version wrote it.
    """
    path = folder / MANIFEST
    require_regular(path)
    manifest = files.read_json(path)
    if type(manifest) is not dict or manifest.get("format") != FORMAT:
        raise ArtefactError(f"{path} is no manifest of a distilled set", "Give the folder of a distilled set")
    version = manifest.get("version")
    if type(version) is int and VERSION < version < 10**9:
        raise ArtefactError(
            f"{path} has format version {version}, this ddengine reads {VERSION}", "Upgrade ddengine"
        )
    if wrong := _problem(manifest):
        raise damaged(path, wrong)
    _require_sealed(path, manifest)
    return manifest


def require_regular(path: Path) -> None:
    """Refuse what is missing, a link, a pipe or a folder where an artefact has a file (ArtefactError)."""
    try:
        mode = path.lstat().st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ArtefactError(f"{path} is missing", REMEDY) from error
    except OSError as error:
        raise ArtefactError(f"cannot read {path}: {error.strerror}", REMEDY) from error
    if not stat.S_ISREG(mode):
        raise damaged(path, "it is not a regular file")


def tensor_bytes(entry: Mapping[str, Any]) -> int:
    """Bytes of a tensor that a manifest declares."""
    return math.prod(entry["shape"]) * DTYPES[entry["dtype"]]


def declare(tensor: Tensor) -> dict[str, Any]:
    """Type and shape of a tensor, as a manifest declares them."""
    return {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}


def parts(kind: str) -> tuple[str, ...]:
    """The parts of a set of this kind whose bytes make up the total."""
    return ("images", "trees", "labels", "extras") if kind in GRAPH_KINDS else ("images", "labels", "extras")


def part_bytes(tensors: Mapping[str, Mapping[str, Any]], kind: str) -> dict[str, int]:
    """Bytes of declared tensors by part. Whitening matrices are preprocessing and not in the total."""
    counted = dict.fromkeys((*parts(kind), "preprocessing"), 0)
    names = PARTS_OF_GRAPHS if kind in GRAPH_KINDS else PARTS_OF_IMAGES
    for name, entry in tensors.items():
        counted[names.get(name.split(".")[0], "extras")] += tensor_bytes(entry)
    return {**counted, "total": sum(counted[part] for part in parts(kind))}


def packed_bytes(tensors: Mapping[str, Tensor], kind: str) -> dict[str, int]:
    """Bytes of the packed tensors of a form by part, and their total."""
    counted = part_bytes({name: declare(tensor) for name, tensor in tensors.items()}, kind)
    return {part: counted[part] for part in (*parts(kind), "total")}


def dataset_problem(dataset: Mapping[str, Any], kind: str) -> str | None:
    """What is wrong with the fields that describe the source of a set of this kind, in words."""
    wrong = _wrong(dataset, GRAPHS if kind in GRAPH_KINDS else IMAGES, "dataset")
    if wrong or kind in GRAPH_KINDS:
        return wrong
    channels = dataset["shape"][0]
    if not len(dataset["mean"]) == len(dataset["std"]) == channels:
        return f"mean and std do not have one number for each of {channels} channels"
    return None


def _budget(kind: str) -> Rule:
    return {**dict.fromkeys((*parts(kind), "total", "preprocessing"), BYTES), "ipc": IPC}


def _problem(manifest: dict[str, Any]) -> str | None:
    """The first thing that is wrong with the fields of a manifest, one by one and together."""
    named = manifest.get("kind")
    kind = named if type(named) is str else ""
    about = {"dataset": FREE, "budget": _budget(kind), **OWN.get(kind, {})}
    return (
        _wrong(manifest, {**SCHEMA, **about})
        or dataset_problem(manifest["dataset"], kind)
        or _inconsistent(manifest)
    )


def _inconsistent(manifest: Mapping[str, Any]) -> str | None:
    """What does not fit together in a manifest whose fields are each well formed."""
    declared = sum(tensor_bytes(entry) for entry in manifest["tensors"].values())
    stored = manifest["files"].get(DATA, {"bytes": -1})["bytes"]
    if not declared < stored <= declared + HEADER_MAX:
        return f"{DATA} cannot have {stored} bytes when its tensors have {declared}"
    counted = part_bytes(manifest["tensors"], manifest["kind"])
    wrong = [part for part, count in counted.items() if manifest["budget"][part] != count]
    return f"budget.{wrong[0]} is not the bytes of the tensors" if wrong else None


def _require_sealed(path: Path, manifest: Mapping[str, Any]) -> None:
    try:
        canonical = files.json_bytes(manifest)
        intact = seal(manifest) == manifest["seal"] and path.read_bytes() == canonical
    except (ValueError, RecursionError, OSError) as error:
        raise damaged(path, type(error).__name__) from error
    if not intact:
        raise damaged(path, "its text was changed after it was sealed")

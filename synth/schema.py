"""The manifest of a distilled set: what it must look like, and the seal that makes any change to it show."""

import hashlib
import json
import math
import re
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ddengine import files
from ddengine.errors import ArtefactError
from ddengine.types import LABEL_KINDS

FORMAT, VERSION = "ddengine/distilled-set", 1
MANIFEST, DATA = "manifest.json", "data.safetensors"
DTYPES = {"uint8": 1, "int16": 2, "int32": 4, "float16": 2, "float32": 4}
TENSORS_MAX, FILES_MAX = 64, 64
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
BUDGET: dict[str, Any] = dict.fromkeys(("images", "labels", "extras", "total", "preprocessing"), BYTES)

SCHEMA: dict[str, Any] = {
    "format": _one_of(FORMAT),
    "version": _integer(VERSION, VERSION),
    "kind": TEXT,
    "tensors": _table(r"[a-z_.]{1,64}", TENSOR, TENSORS_MAX),
    "files": _table(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,99}", {"sha256": HASH, "bytes": BYTES}, FILES_MAX),
    "dataset": {
        "name": TEXT,
        "shape": _list(_integer(1, 2**20), 3, 3),
        "classes": _list(TEXT, 1, 2**20),
        "mean": _list(_number(-1e9, 1e9), 1, 2**20),
        "std": _list(_number(1e-9, 1e9), 1, 2**20),
        "preprocessing": _one_of("standard", "zca"),
        "fingerprint": TEXT,
        "licence": TEXT,
    },
    "y_kind": _one_of(*LABEL_KINDS),
    "count": _integer(1, 2**31),
    "budget": {**BUDGET, "ipc": IPC},
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
    if wrong := _wrong(manifest, SCHEMA) or _inconsistent(manifest):
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


def part_bytes(tensors: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """Bytes of declared tensors by part. Whitening matrices are preprocessing and not in the total."""
    parts = {"images": 0, "labels": 0, "extras": 0, "preprocessing": 0}
    names = {"images": "images", "labels": "labels", "zca": "preprocessing"}
    for name, entry in tensors.items():
        parts[names.get(name.split(".")[0], "extras")] += tensor_bytes(entry)
    return {**parts, "total": parts["images"] + parts["labels"] + parts["extras"]}


def _inconsistent(manifest: Mapping[str, Any]) -> str | None:
    """What does not fit together in a manifest whose fields are each well formed."""
    dataset, tensors = manifest["dataset"], manifest["tensors"]
    channels = dataset["shape"][0]
    if not len(dataset["mean"]) == len(dataset["std"]) == channels:
        return f"mean and std do not have one number for each of {channels} channels"
    declared = sum(tensor_bytes(entry) for entry in tensors.values())
    stored = manifest["files"].get(DATA, {"bytes": -1})["bytes"]
    if not declared < stored <= declared + HEADER_MAX:
        return f"{DATA} cannot have {stored} bytes when its tensors have {declared}"
    counted = part_bytes(tensors)
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

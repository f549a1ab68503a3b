"""The manifest of an expert buffer: what makes two buffers the same, and the seal that shows any change."""

import hashlib
import json
import math
import re
import stat
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ddengine import files
from ddengine.errors import ArtefactError, DDError, one_line, require
from ddengine.nets import NetSpec, build, resolve
from ddengine.rng import Rng
from ddengine.types import DataSpec
from expert_buffers.params import ParamSpec
from expert_buffers.trajectory import ENCODINGS, layout

FORMAT, VERSION = "ddengine/experts", 1
MANIFEST = "manifest.json"
IDENTITY = ("seed", "recipe", "dataset", "networks", "encoding")
FILE = re.compile(r"expert_(\d{5})(?:_e\d{4,9})?\.safetensors")
PARTIAL = re.compile(r"partial_\d{5}\.safetensors")  # epochs of an expert that is not committed yet
ROWS_MAX, HEADER_MAX = 1 << 20, 1 << 20  # checkpoints of an expert; bytes of a safetensors header
REMEDY = "Restore it from a copy or record it again"

Check = Callable[[Any], bool]


def _text(value: Any) -> bool:
    return type(value) is str


def _table(value: Any) -> bool:
    return type(value) is dict


def _hash(value: Any) -> bool:
    return _text(value) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _integer(low: int, high: int) -> Check:
    return lambda value: type(value) is int and low <= value <= high


def _list(check: Check, low: int, high: int) -> Check:
    return lambda value: type(value) is list and low <= len(value) <= high and all(map(check, value))


def _number(value: Any) -> bool:
    return type(value) is float and abs(value) < 1e39


def _optional(check: Check) -> Check:
    return lambda value: value is None or check(value)


NETWORK: dict[str, Check] = {
    "name": _text, "width": _optional(_integer(1, 2**20)), "depth": _optional(_integer(1, 2**20)),
    "norm": _optional(_text),
}  # fmt: skip
ARCHITECTURE: dict[str, Check] = {
    "network": _table,
    "parameters": lambda v: type(v) is list and len(v) > 0,
    "statistics": _list(lambda item: True, 0, 2**16),
}
DATASET: dict[str, Check] = {
    "name": _text, "fingerprint": _text, "preprocessing": lambda v: v in ("standard", "zca"),
    "preprocessing_hash": _hash, "shape": _list(_integer(1, 2**20), 3, 3), "classes": _list(_text, 1, 2**20),
}  # fmt: skip
EXPERT: dict[str, Check] = {
    "file": lambda v: _text(v) and FILE.fullmatch(v) is not None,
    "architecture": _text, "checkpoints": _integer(1, ROWS_MAX), "encoding": lambda v: v in ENCODINGS,
    "sha256": _hash, "bytes": _integer(1, files.TENSORS_LIMIT), "loss": _optional(_number),
    "accuracy": _optional(_number),
}  # fmt: skip
HEAD: dict[str, Check] = {
    "format": lambda v: v == FORMAT, "version": _integer(VERSION, VERSION), "dataset": _table,
    "networks": _list(_table, 1, 2**10), "architectures": _table, "recipe": _table,
    "seed": _integer(-(2**63), 2**63), "encoding": lambda v: v in ENCODINGS, "origin": _table,
}  # fmt: skip
SCHEMA: dict[str, Check] = {**HEAD, "plan": _table, "experts": _table, "seal": _hash}


def header(
    spec: DataSpec,
    networks: Sequence[NetSpec],
    recipe: Mapping[str, Any],
    seed: int,
    encoding: str,
    origin: Mapping[str, Any],
) -> dict[str, Any]:
    """What makes two buffers the same, as plain JSON; `origin` alone (where the data lay) may differ.

    `recipe` is fully spelled; `networks` are resolved for the images of `spec`, and their parameter layouts
    are stored. UsageError for a network that cannot be built or an unknown encoding.
    """
    require(encoding, ENCODINGS, "encoding")
    resolved = [resolve(network, spec.shape) for network in networks]
    found = [_architecture(network, spec) for network in resolved]
    head = {
        "format": FORMAT,
        "version": VERSION,
        "dataset": {
            "name": spec.name,
            "fingerprint": spec.fingerprint,
            "preprocessing": spec.preprocessing,
            "preprocessing_hash": preprocessing_hash(spec),
            "shape": list(spec.shape),
            "classes": list(spec.classes),
        },
        "networks": [network.to_dict() for network in resolved],
        "architectures": {architecture_hash(entry): entry for entry in found},
        "recipe": dict(recipe),
        "seed": seed,
        "encoding": encoding,
        "origin": dict(origin),
    }
    return json.loads(json.dumps(head, allow_nan=False))


def _architecture(network: NetSpec, spec: DataSpec) -> dict[str, Any]:
    net = build(network, spec.shape, len(spec.classes), Rng(0).torch("layout"))
    layouts = {"parameters": ParamSpec.of(net).to_json(), "statistics": ParamSpec.of_buffers(net).to_json()}
    return {"network": network.to_dict(), **layouts}


def architecture_hash(entry: Mapping[str, Any]) -> str:
    """The name of an architecture: 16 hex digits of the SHA-256 of its network and layouts."""
    return hashlib.sha256(compact(entry)).hexdigest()[:16]


def preprocessing_hash(spec: DataSpec) -> str:
    """SHA-256 of what takes pixels to model input: mean and std, or the whitening's scale, to three digits.

    The last bits of a whitening depend on the threads and the machine that fit it, and are left out.
    """
    if spec.zca is None:
        return hashlib.sha256(compact([list(spec.mean), list(spec.std)])).hexdigest()
    parts = (spec.zca.mean, spec.zca.matrix, spec.zca.inverse)
    scales = [f"{float(part.detach().double().square().mean().sqrt()):.2e}" for part in parts]
    return hashlib.sha256(compact(["zca", *scales])).hexdigest()


def describe(network: NetSpec) -> str:
    """A network in words: its name and the options that it has."""
    options = network.to_dict()
    return " ".join([options.pop("name"), *(f"{k}={v}" for k, v in options.items() if v is not None)])


def mismatch(dataset: Mapping[str, Any], spec: DataSpec) -> str:
    """The first thing in which a task's data differ from those of a buffer, in words; or ""."""
    name, old, new = dataset["name"], dataset["fingerprint"], spec.fingerprint
    if old != new:
        return (
            f"the buffer was recorded on '{name}' (fingerprint {old[:12] or 'unknown'}), "
            f"this task is '{spec.name}' ({new[:12] or 'unknown'})"
        )
    if dataset["preprocessing"] != spec.preprocessing:
        return f"the buffer was made with {dataset['preprocessing']}, this task has {spec.preprocessing}"
    if dataset["preprocessing_hash"] != preprocessing_hash(spec):
        return f"the buffer's {spec.preprocessing} preprocessing has other values than this task's"
    if dataset["shape"] != list(spec.shape):
        return f"the buffer has images of shape {dataset['shape']}, this task of {list(spec.shape)}"
    if dataset["classes"] != list(spec.classes):
        return f"the buffer's {len(dataset['classes'])} classes are not the {len(spec.classes)} of this task"
    return ""


def damaged(path: Path, what: str) -> ArtefactError:
    """The error for a file that fails verification."""
    return ArtefactError(f"{path} is damaged: {one_line(what)}", REMEDY)


def require_regular(path: Path) -> None:
    """Refuse what is missing, a link, a pipe or a folder where a buffer has a file (ArtefactError)."""
    try:
        mode = path.lstat().st_mode
    except OSError as error:
        raise ArtefactError(f"cannot read {path}: {error.strerror}", REMEDY) from error
    if not stat.S_ISREG(mode):
        raise damaged(path, "it is not a regular file")


def write_manifest(root: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Write `manifest` sealed, atomically; returns it as it was written."""
    sealed = {**manifest, "seal": _seal(manifest)}
    files.write_json(root / MANIFEST, sealed)
    return sealed


def read_manifest(root: Path) -> dict[str, Any]:
    """The manifest of the buffer in `root`: every field of its type and range, and not one byte changed.

    Raises ArtefactError naming the file, with advice to upgrade when a newer version wrote it.
    """
    path = root / MANIFEST
    require_regular(path)
    text, manifest = _read(path)
    if type(manifest) is not dict or manifest.get("format") != FORMAT:
        raise ArtefactError(f"{path} is no manifest of an expert buffer", "Give the folder of a buffer")
    version = manifest.get("version")
    if type(version) is int and VERSION < version < 10**9:
        raise ArtefactError(
            f"{path} has format version {version}, this ddengine reads {VERSION}", "Upgrade ddengine"
        )
    try:
        wrong = _wrong(manifest, SCHEMA, "") or _wrong(manifest["dataset"], DATASET, "dataset.")
        wrong = wrong or _wrong_architectures(manifest) or _wrong_experts(manifest)
    except (DDError, OverflowError) as error:
        raise damaged(path, str(error).splitlines()[0]) from error
    if wrong:
        raise damaged(path, wrong)
    _require_sealed(path, text, manifest)
    return manifest


def _read(path: Path) -> tuple[bytes, Any]:
    """The text of a manifest and what it says, from one reading: another process may replace it any time."""
    try:
        with path.open("rb") as file:
            text = file.read(files.JSON_LIMIT + 1)
        return text, json.loads(text) if len(text) <= files.JSON_LIMIT else None
    except OSError as error:
        raise ArtefactError(f"cannot read {path}: {error.strerror}", REMEDY) from error
    except (ValueError, RecursionError) as error:
        raise damaged(path, "not JSON") from error


def _wrong(value: Any, rules: Mapping[str, Check], where: str) -> str | None:
    """The first field of `value` that is missing, unknown or breaks its rule, in words."""
    if type(value) is not dict:
        return f"field '{where.rstrip('.')}' is not a table"
    for name in sorted({*value, *rules}):
        if name not in value or name not in rules:
            return f"field {where + name!r} is {'missing' if name in rules else 'unknown'}"
        if not rules[name](value[name]):
            return f"field '{where}{name}' is not of its type or range"
    return None


def _wrong_architectures(manifest: Mapping[str, Any]) -> str | None:
    for name, entry in manifest["architectures"].items():
        where = f"architectures.{name}."
        if wrong := _wrong(entry, ARCHITECTURE, where) or _wrong(entry["network"], NETWORK, where):
            return wrong
        NetSpec(**entry["network"])
        ParamSpec.from_json(entry["parameters"])
        ParamSpec.from_json(entry["statistics"])
        if name != architecture_hash(entry):
            return f"the architecture {name!r} is not the one that its name says"
    found = [entry["network"] for entry in manifest["architectures"].values()]
    same = all(n in found for n in manifest["networks"]) and all(n in manifest["networks"] for n in found)
    return None if same else "networks and architectures disagree"


def _wrong_experts(manifest: Mapping[str, Any]) -> str | None:
    for key, entry in manifest["experts"].items():
        where = f"experts.{key}."
        if wrong := _wrong(entry, EXPERT, where):
            return wrong
        found = FILE.fullmatch(entry["file"])
        if found is None or str(int(found[1])) != key:
            return f"expert {key!r} cannot have the file {entry['file']}"
        if entry["architecture"] not in manifest["architectures"]:
            return f"field '{where}architecture' names none of the architectures"
        if (entry["loss"] is None) != (entry["accuracy"] is None):
            return f"expert {key!r} has only one of loss and accuracy"
        low, high = (declared_bytes(manifest, entry, momentum=momentum) for momentum in (False, True))
        if not low < entry["bytes"] <= high + HEADER_MAX:
            return f"{entry['file']} cannot have {entry['bytes']} bytes when its tensors have {low}"
    return None


def extent(manifest: Mapping[str, Any], entry: Mapping[str, Any]) -> tuple[int, int, int]:
    """Rows, parameters and statistics of the expert of an entry."""
    found = manifest["architectures"][entry["architecture"]]
    p, s = (sum(ParamSpec.from_json(found[key]).sizes) for key in ("parameters", "statistics"))
    return entry["checkpoints"], p, s


def declared_bytes(manifest: Mapping[str, Any], entry: Mapping[str, Any], momentum: bool) -> int:
    """Bytes of the tensors of the expert of an entry, without the header."""
    measured = entry["loss"] is not None
    declared = layout(entry["encoding"], *extent(manifest, entry), measured, momentum).values()
    return sum(math.prod(shape) * dtype.itemsize for dtype, shape in declared)


def _seal(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(compact({k: v for k, v in manifest.items() if k != "seal"})).hexdigest()


def compact(value: Any) -> bytes:
    """JSON in its one shortest spelling, which is what gets hashed. ValueError for NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _require_sealed(path: Path, text: bytes, manifest: Mapping[str, Any]) -> None:
    try:
        intact = _seal(manifest) == manifest["seal"] and text == files.json_bytes(manifest)
    except (ValueError, RecursionError) as error:
        raise damaged(path, type(error).__name__) from error
    if not intact:
        raise damaged(path, "its text was changed after it was sealed")

"""States on disk: any tree of frozen dataclasses, dicts and tuples over tensors and plain values.

A checkpoint is a folder `step_000042` with `state.safetensors` and a sealed `manifest.json`, made under a
temporary name and renamed, so that one that exists is complete. Reading needs a template state: files hold
values, never code.
"""

import hashlib
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from ddengine import files
from ddengine.errors import ArtefactError
from ddengine.types import DataSpec

S = TypeVar("S")
FORMAT, VERSION = "ddengine/checkpoint", 1
KEEP = 2
_NAME = re.compile(r"step_(\d{6,})")


def leaves(state: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(path, value) of every tensor and plain value in `state`; a DataSpec is a constant and is left out."""
    if isinstance(state, DataSpec):
        return
    children = _children(state)
    if children is None:
        yield path, state
        return
    for key, value in children:
        yield from leaves(value, _below(path, key))


def _children(state: Any) -> list[tuple[str, Any]] | None:
    if is_dataclass(state) and not isinstance(state, type):
        return [(f.name, getattr(state, f.name)) for f in fields(state)]
    if isinstance(state, dict):
        return sorted(((str(key), value) for key, value in state.items()), key=lambda item: item[0])
    if isinstance(state, tuple | list):
        return [(str(i), value) for i, value in enumerate(state)]
    return None


def _below(path: str, key: str) -> str:
    """The path of a child, as in a JSON pointer: no two leaves share one, whatever their keys hold."""
    return f"{path}/{key.replace('~', '~0').replace('/', '~1')}"


def rebuild(template: S, values: Mapping[str, Any], path: str = "") -> S:
    """A state of the template's form with the leaves of `values`; ArtefactError when one is missing."""
    if isinstance(template, DataSpec):
        return template
    children = _children(template)
    if children is None:
        if path not in values or isinstance(template, Tensor) != isinstance(values[path], Tensor):
            raise ArtefactError(
                f"the checkpoint has no '{path}' of the right kind", "Remove it and repeat the command"
            )
        value = values[path]
        # A copy, for tensors read from a buffer may lie unaligned, on which a product's last bit can depend.
        return value.to(template.device, copy=True) if isinstance(template, Tensor) else value
    made = {key: rebuild(value, values, _below(path, key)) for key, value in children}
    if is_dataclass(template):
        return replace(template, **made)  # type: ignore[type-var]
    if isinstance(template, dict):
        return {key: made[str(key)] for key in template}  # type: ignore[return-value]
    named = hasattr(template, "_make")  # a named tuple takes its values one by one
    return type(template)(*made.values()) if named else type(template)(made.values())  # type: ignore[call-arg,return-value]


def save(folder: Path, step: int, state: Any, extra: Mapping[str, Any]) -> Path:
    """Write the checkpoint of `step` below `folder` and leave the last KEEP up to it.

    Later ones, which no run could go on from, go too. `extra` is JSON. UsageError when the system refuses.
    """
    files.make_folder(folder)
    listed = list(leaves(state))
    found = dict(listed)
    assert len(found) == len(listed), "a dict in the state has two keys of one spelling"
    tensors = {path: value for path, value in found.items() if isinstance(value, Tensor)}
    plain = {path: value for path, value in found.items() if path not in tensors}
    target, work = folder / f"step_{step:06d}", folder / f"{files.TEMPORARY}step_{step:06d}"
    try:
        shutil.rmtree(work, ignore_errors=True)
        with files.refused(f"write {target}"):
            work.mkdir()
        entry = files.write_tensors(work / "state.safetensors", tensors)
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "step": step,
            "plain": plain,
            "state.safetensors": entry,
        }
        manifest["extra"] = dict(extra)
        files.write_json(work / "manifest.json", {**manifest, "seal": _seal(manifest)})
        with files.refused(f"write {target}", entry["bytes"]):
            _remove(target)
            work.replace(target)
            files.sync_folder(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    kept = [number for number in steps(folder) if number <= step][:KEEP]
    for number in set(steps(folder)) - set(kept):
        _remove(folder / f"step_{number:06d}")
    return target


def _remove(path: Path) -> None:
    """Take a checkpoint away at one stroke, so that one which bears its name is whole; if it can be."""
    gone = path.with_name(f"{files.TEMPORARY}{path.name}.old")
    shutil.rmtree(gone, ignore_errors=True)
    with suppress(OSError):
        path.replace(gone)
    shutil.rmtree(gone, ignore_errors=True)


def _seal(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of the manifest without its seal."""
    return hashlib.sha256(files.json_bytes({k: v for k, v in manifest.items() if k != "seal"})).hexdigest()


def steps(folder: Path) -> list[int]:
    """Steps of which there are checkpoints below `folder`, newest first."""
    names = [_NAME.fullmatch(path.name) for path in folder.glob("step_*")] if folder.is_dir() else []
    return sorted((int(found[1]) for found in names if found), reverse=True)


def load(folder: Path, step: int, template: S) -> tuple[S, dict[str, Any]]:
    """The state of `step` in the template's form and on its devices, and its `extra` (else ArtefactError)."""
    path = folder / f"step_{step:06d}"
    manifest = files.read_json(path / "manifest.json")
    if (
        not isinstance(manifest, dict)
        or manifest.get("format") != FORMAT
        or manifest.get("version") != VERSION
    ):
        raise ArtefactError(
            f"{path} is not a checkpoint of version {VERSION}", "Remove it and repeat the command"
        )
    try:
        if _seal(manifest) != manifest["seal"]:
            raise ArtefactError(f"{path / 'manifest.json'} was changed", "Remove it and repeat the command")
        tensors = files.read_tensors(path / "state.safetensors", manifest["state.safetensors"])
        return rebuild(template, {**manifest["plain"], **tensors}), dict(manifest["extra"])
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, ArtefactError):
            raise
        raise ArtefactError(
            f"{path} is damaged: {type(error).__name__}", "Remove it and repeat the command"
        ) from error


def clean(folder: Path) -> None:
    """Remove what a killed process left in `folder`: temporary names, and all but the last KEEP states."""
    for left in folder.glob(f"{files.TEMPORARY}*") if folder.is_dir() else []:
        shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)
    for number in steps(folder)[KEEP:]:
        _remove(folder / f"step_{number:06d}")

"""Reading and writing that loses nothing and trusts nothing: atomic writes, hashes, size limits.

Every write goes to a temporary name in the same folder, is flushed to disk, and is renamed. Only
safetensors and JSON are ours; nothing here can run code from a file.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from ddengine.errors import ArtefactError, UsageError

JSON_LIMIT = 16 << 20
TENSORS_LIMIT = 64 << 30
TEMPORARY = ".tmp-"


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file, read in 1 MiB pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def write_bytes(path: Path, data: bytes) -> None:
    """Replace `path` atomically. Raises UsageError naming the path when the system refuses."""
    try:
        handle, name = tempfile.mkstemp(prefix=TEMPORARY, dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            Path(name).chmod(0o666 & ~_umask())
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise UsageError(
            f"cannot write {path} ({len(data)} bytes): {error.strerror}",
            "Choose a folder that you may write to and that has room, or free some, then repeat the command",
        ) from error
    sync_folder(path.parent)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries, so that a rename survives a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(path: Path) -> None:
    """Create a folder and its parents (UsageError naming the path when that is refused)."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"cannot create the folder {path}: {error.strerror}", "Choose another out=DIR"
        ) from error


def json_bytes(value: Any) -> bytes:
    """JSON as our files spell it: indented, ASCII, a final newline. ValueError for NaN or infinity."""
    return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()


def write_json(path: Path, value: Any) -> None:
    """Replace `path` atomically by indented JSON (no NaN)."""
    write_bytes(path, json_bytes(value))


def read_json(path: Path) -> Any:
    """Parse a JSON file of at most 16 MiB; ArtefactError names one that is missing, large or damaged."""
    try:
        size = path.stat().st_size
        data = path.read_bytes() if size <= JSON_LIMIT else b""
    except OSError as error:
        raise ArtefactError(
            f"cannot read {path}: {error.strerror}", "Give the folder of an artefact"
        ) from error
    if size > JSON_LIMIT:
        raise ArtefactError(f"{path} is larger than {JSON_LIMIT} bytes", "This is not a file of ddengine")
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ArtefactError(
            f"{path} is damaged: not JSON", "Restore it from a copy or make it again"
        ) from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write a safetensors file atomically; returns its manifest entry, `{"sha256": ..., "bytes": ...}`."""
    data = safetensors.torch.save(_unshared(tensors))
    write_bytes(path, data)
    return {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, contiguous, no two of them in one storage, which safetensors refuses."""
    own: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        dense = tensor.detach().cpu().contiguous()
        own[name] = dense.clone() if dense.untyped_storage().data_ptr() in seen else dense
        seen.add(dense.untyped_storage().data_ptr())
    return own


def read_tensors(path: Path, entry: Mapping[str, Any]) -> dict[str, Tensor]:
    """Read a safetensors file whose size and hash are those of the manifest `entry` (else ArtefactError)."""
    remedy = "Restore it from a copy or make it again"
    try:
        size = path.stat().st_size
        if path.is_symlink() or size != entry["bytes"] or size > TENSORS_LIMIT:
            raise ArtefactError(
                f"{path} is damaged: {size} bytes where the manifest says {entry['bytes']}", remedy
            )
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != entry["sha256"]:
            raise ArtefactError(f"{path} is damaged: its SHA-256 is not the manifest's", remedy)
        return safetensors.torch.load(data)
    except OSError as error:
        raise ArtefactError(f"cannot read {path}: {error.strerror}", remedy) from error
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, ArtefactError):
            raise
        raise ArtefactError(f"{path} is damaged: {type(error).__name__}", remedy) from error


def append_json_line(path: Path, value: Mapping[str, Any]) -> None:
    """Append one record to a log and flush it to disk; a torn last line is cut off first."""
    line = (json.dumps(value, allow_nan=False) + "\n").encode()
    try:
        with path.open("ab+") as file:
            end = file.tell()
            if end:
                file.seek(end - 1)
                if file.read(1) != b"\n":
                    file.seek(0)
                    file.truncate(file.read().rfind(b"\n") + 1)
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UsageError(f"cannot append to {path}: {error.strerror}", "Free some room and repeat") from error


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Records of a log in order; a torn last line is dropped, a damaged line is an ArtefactError."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict):
            raise ArtefactError(f"{path}, line {number} is damaged", "Remove that line")
        yield record

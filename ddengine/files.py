"""Reading and writing that loses nothing and trusts nothing: atomic writes, hashes, size limits.

Every write goes to a temporary name in the same folder, is flushed to disk, and is renamed. Only
safetensors and JSON are ours; nothing here can run code from a file.
"""

import ctypes
import errno
import fcntl
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
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


@contextmanager
def refused(what: str, nbytes: int | None = None) -> Iterator[None]:
    """Turn what the system refuses inside into a UsageError: "cannot {what} (n bytes): the reason"."""
    try:
        yield
    except OSError as error:
        size = "" if nbytes is None else f" ({nbytes} bytes)"
        raise UsageError(
            f"cannot {what}{size}: {error.strerror or error}",
            "Choose a folder that you may write to and that has room, or free some, then repeat the command",
        ) from error


def write_bytes(path: Path, data: bytes) -> None:
    """Replace `path` atomically. Raises UsageError naming the path when the system refuses."""
    with refused(f"write {path}", len(data)):
        handle, work = _temporary(path.parent)
        try:
            _write(handle, data)
            os.fchmod(handle, 0o666 & ~_umask())
            os.fsync(handle)
            work.replace(path)
        except BaseException:
            with suppress(OSError):
                work.unlink()
            raise
        finally:
            os.close(handle)
        sync_folder(path.parent)


def _temporary(folder: Path) -> tuple[int, Path]:
    """A new file, locked so that `sweep` leaves it alone for as long as this process lives."""
    while True:
        handle, name = tempfile.mkstemp(prefix=TEMPORARY, dir=folder)
        with suppress(OSError):  # a file system without locks, on which nothing is swept
            fcntl.flock(handle, fcntl.LOCK_EX)
        if os.fstat(handle).st_nlink:
            return handle, Path(name)
        os.close(handle)  # swept between its making and its locking


def sweep(folder: Path) -> None:
    """Remove temporary files of processes that were killed from `folder`, one of ours; others' stay."""
    for path in folder.glob(f"{TEMPORARY}*"):
        if path.is_symlink() or not path.is_file():
            continue
        with suppress(OSError):
            handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
            finally:
                os.close(handle)


def _write(handle: int, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(handle, left[: 1 << 30]) :]


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries, so that a rename survives a power cut; OSError where that fails."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot flush a folder on its own
            raise
    finally:
        os.close(handle)


def exchange(one: Path, other: Path) -> bool:
    """Let two names change places at one stroke; False, with nothing done, where the system cannot.

    Linux offers it as renameat2 with RENAME_EXCHANGE (2), macOS as renamex_np with RENAME_SWAP (2).
    """
    library, names = ctypes.CDLL(None, use_errno=True), (os.fsencode(one), os.fsencode(other))
    if sys.platform == "darwin":
        done = library.renamex_np(*names, 2)
    elif hasattr(library, "renameat2"):
        here = -100  # AT_FDCWD: paths are taken from the current folder
        done = library.renameat2(here, names[0], here, names[1], 2)
    else:
        return False
    if done and ctypes.get_errno() not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EXDEV):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(other))
    return done == 0


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
    """Append one record to a log and flush it to disk; a torn last line is cut off first.

    Raises UsageError naming the path when the system refuses; the log is then as it was.
    """
    line = (json.dumps(value, allow_nan=False) + "\n").encode()
    with refused(f"append to {path}", len(line)):
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        try:
            size, end = os.fstat(handle).st_size, _whole_lines(handle)
            if end < size:
                os.ftruncate(handle, end)
            try:
                _write(handle, line)
                os.fsync(handle)
            except BaseException:
                with suppress(OSError):
                    os.ftruncate(handle, end)
                raise
        finally:
            os.close(handle)
        if end == 0:
            sync_folder(path.parent)


def _whole_lines(handle: int) -> int:
    """Bytes up to the end of the last whole line."""
    size = os.fstat(handle).st_size
    if size == 0 or os.pread(handle, 1, size - 1) == b"\n":
        return size
    return os.pread(handle, size, 0).rfind(b"\n") + 1


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


def difference(old: Any, new: Any, path: str = "") -> str:
    """The first value in which two JSON trees differ, as "recipe.lr is 0.01 there and 0.02 here"; or ""."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = dict.fromkeys([*old, *new])
        found = (difference(old.get(k), new.get(k), f"{path}.{k}" if path else k) for k in keys)
        return next((text for text in found if text), "")
    return "" if old == new else f"{path} is {old} there and {new} here"

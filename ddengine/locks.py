"""One writer for a folder: a lock that the kernel takes back when its process ends, however it ends."""

import errno
import fcntl
import json
import os
import platform
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

from ddengine import files
from ddengine.errors import UsageError

LOCK, RESULTS = ".lock", "results.jsonl"
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)
COMMAND_MAX = 200  # characters of a command that a refusal shows
_open: set[int] = set()  # handles of the locks that this process holds

Notice = Callable[[str], None]
Log = Callable[[Mapping[str, Any]], None]


@contextmanager
def writing(folder: Path | None, notice: Notice | None = None) -> Iterator[None]:
    """Inside, no other process writes into `folder`, which is made where it is missing; None locks nothing.

    Where it fails with nothing written, a folder that was made here is removed. Raises UsageError naming the
    process that has the folder. A folder that this process may not write in is
    not locked: a first write will say so. `notice` hears of a file system that has no locks.
    """
    if folder is None:
        yield
        return
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"out={folder} is a file", "Choose another out=DIR")
    made = not folder.exists()
    files.make_folder(folder)
    if not os.access(folder, os.W_OK):
        yield
        return
    try:
        with alone(folder / LOCK, f"out={folder}", notice):
            yield
    except BaseException:
        if made:
            with suppress(OSError):  # it holds something, or another process took it
                folder.rmdir()
        raise


@contextmanager
def results_log(folder: Path | None, notice: Notice | None = None) -> Iterator[Log | None]:
    """Inside, a function that appends to `results.jsonl` in `folder`, which is locked; None without folder.

    What a killed process left half written there is removed first. Raises UsageError as `writing` does.
    """
    with writing(folder, notice):
        path = None if folder is None else folder / RESULTS
        if path is not None and path.exists():
            files.sweep(path.parent)
        yield None if path is None else partial(files.append_json_line, path)


@contextmanager
def alone(path: Path, name: str, notice: Notice | None = None) -> Iterator[None]:
    """Inside, this process alone holds the lock file `path`; it is removed at the end.

    A process that is killed leaves the file and not the lock; forked processes do not inherit it. Raises
    UsageError saying who is writing `name`. `notice` hears of a file system that has no locks.
    """
    note = _note()
    with files.refused(f"write {name}", len(note)):
        handle = _taken(path, name, note)
    if handle is None:
        if notice is not None:
            notice(f"note: the file system of {path.parent} has no locks: run one command at a time on it")
        yield
        return
    owner = os.getpid()
    try:
        yield
    finally:
        if os.getpid() == owner:  # and not in a copy of this process that leaves the block too
            with suppress(OSError):
                path.unlink()
            _open.discard(handle)
            os.close(handle)


def others(folder: Path) -> list[str]:
    """Names in `folder`, sorted, but for its lock and for what is half written."""
    names = (path.name for path in folder.iterdir())
    return sorted(name for name in names if name != LOCK and not name.startswith(files.TEMPORARY))


def _taken(path: Path, name: str, note: bytes) -> int | None:
    """The handle of the locked file `path`, None where there are no locks.

    A file that its last owner removed between our opening and our locking it locks nothing: try again.
    """
    _drop_in_copies()
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is(path, handle):
                os.ftruncate(handle, 0)
                os.write(handle, note)
                _open.add(handle)
                return handle
        except BlockingIOError as error:
            owner = _owner(handle)
            os.close(handle)
            remedy = "Wait until that process has ended, or choose another out=DIR"
            raise UsageError(f"{name} is being written by {owner}", remedy) from error
        except OSError as error:
            if _is(path, handle):
                path.unlink()
            os.close(handle)
            if error.errno in NO_LOCKS:
                return None
            raise
        os.close(handle)


def _is(path: Path, handle: int) -> bool:
    """Whether `path` still names the open file."""
    try:
        return os.path.samestat(os.fstat(handle), os.lstat(path))
    except FileNotFoundError:
        return False


def _note() -> bytes:
    """What a locked file says of who holds it, for those whom it refuses."""
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])[:COMMAND_MAX]
    found = {"process": os.getpid(), "host": platform.node(), "command": command}
    return (json.dumps(found) + "\n").encode()


def _owner(handle: int) -> str:
    """Who holds a lock, as its file says: "process 123 on HOST (ddengine distill ...)"."""
    try:
        found: Any = json.loads(os.pread(handle, 4096, 0))
        number, host, command = int(found["process"]), str(found["host"]), str(found["command"])
    except (ValueError, KeyError, TypeError, RecursionError):  # it is just being signed, or is not ours
        return "another process"
    where = "" if host == platform.node() else f" on {host}"
    return f"process {number}{where} ({command[:COMMAND_MAX]})"


@cache
def _drop_in_copies() -> None:
    """See to it, once, that a forked process closes the locks of its parent, which end with the parent."""
    os.register_at_fork(after_in_child=_drop)


def _drop() -> None:
    for handle in _open:
        with suppress(OSError):
            os.close(handle)
    _open.clear()

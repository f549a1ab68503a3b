"""What a command does to the disk below one folder, step by step, and how to cut it off or refuse it there.

A command runs in a forked process in which the functions of `os` that change files are wrapped: each call
below the folder is a point, named by its phase and its path. `Fault(at=k, ...)` kills the process with
SIGKILL at point k (a write after half of its bytes), or makes that point and all later ones fail.
"""

import errno
import json
import os
import re
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

WRITING = os.O_CREAT | os.O_WRONLY | os.O_RDWR
FULL = ("open", "mkdir", "write", "fsync", "rename", "exchange")  # what a full disk may refuse
PHASES = (*FULL, "truncate", "remove")
REFUSED = {
    "ENOSPC": FULL, "EDQUOT": FULL,
    "EROFS": ("open", "mkdir", "rename", "exchange", "remove"),
    "EACCES": ("open", "mkdir", "rename", "exchange", "remove"),
}  # fmt: skip


@dataclass(frozen=True)
class Fault:
    """What happens from point `at` on (counted from 0): a kill, or the error `name` of REFUSED."""

    at: int
    name: str = "SIGKILL"


@dataclass(frozen=True)
class Outcome:
    """How a command ended: its exit code (negative: the signal), stderr, its points, and its seconds."""

    code: int
    err: str
    points: list[str]
    seconds: float


def named(phase: str, path: str) -> str:
    """The name of a point: numbers and random letters of temporary names do not tell points apart."""
    path = re.sub(r"\.tmp-[a-z0-9_]{8}(?=$|/)", ".tmp-*", path)
    return f"{phase} {re.sub(r'[0-9]{3,}', 'N', re.sub(r'[0-9a-f]{64}', 'HASH', path))}"


class Points:
    """The wrapped functions of the process of a command, and of workers that start as copies of it."""

    def __init__(self, root: Path, fault: Fault | None) -> None:
        self.root, self.fault, self.command = root.resolve(), fault, os.getpid()
        self.seen: list[str] = []
        self.handles: dict[int, str] = {}

    def below(self, path: object, dir_fd: int | None = None) -> str | None:
        """The path from the root, None for one that is elsewhere."""
        if isinstance(path, int):
            return self.handles.get(path)
        within = Path() if dir_fd is None else Path(f"/proc/self/fd/{dir_fd}").readlink()
        given = within / os.fsdecode(path)  # type: ignore[arg-type]
        full = given.parent.resolve() / given.name
        return str(full.relative_to(self.root)) if full.is_relative_to(self.root) else None

    def reach(self, phase: str, path: str | None) -> bool:
        """Pass a point, dying or failing as the fault says; True where a write is to be cut off half way."""
        if path is None:
            return False
        number = len(self.seen)
        self.seen.append(named(phase, path))
        fault = self.fault
        if fault is None or number < fault.at:
            return False
        if fault.name == "SIGKILL":
            if phase == "write":
                return True
            self.kill()
        if phase in REFUSED[fault.name]:
            if phase == "write":
                return True
            self.refuse(path)
        return False

    def kill(self) -> None:
        """Kill the command, and this process where it is a worker of it."""
        os.kill(self.command, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

    def refuse(self, path: str) -> None:
        number = getattr(errno, self.fault.name)  # type: ignore[union-attr]
        raise OSError(number, os.strerror(number), path)

    def install(self) -> None:
        """Wrap the functions of `os` and the exchange of two names in this process."""
        from ddengine import files

        real = {name: getattr(os, name) for name in ("open", "close", "write")}

        def opened(path, flags, mode=0o777, *, dir_fd=None):
            below = self.below(path, dir_fd)
            if flags & WRITING:
                self.reach("open", below)
            handle = real["open"](path, flags, mode, dir_fd=dir_fd)
            if below is not None:
                self.handles[handle] = below
            return handle

        def closed(handle):
            self.handles.pop(handle, None)
            return real["close"](handle)

        def write(handle, data):
            if self.reach("write", self.handles.get(handle)):
                real["write"](handle, memoryview(data)[: len(data) // 2])
                if self.fault.name == "SIGKILL":  # type: ignore[union-attr]
                    self.kill()
                self.refuse(self.handles[handle])
            return real["write"](handle, data)

        os.open, os.close, os.write = opened, closed, write
        for name, phase in (
            ("fsync", "fsync"), ("ftruncate", "truncate"), ("mkdir", "mkdir"),
            ("rename", "rename"), ("replace", "rename"),
            ("unlink", "remove"), ("remove", "remove"), ("rmdir", "remove"),
        ):  # fmt: skip
            setattr(os, name, self.wrapped(phase, getattr(os, name)))
        files.exchange = self.wrapped("exchange", files.exchange)

    def wrapped(self, phase, function):
        def called(path, *others, **named):
            # A rename is named by where it goes to, where that is not a temporary name.
            lasting = phase == "rename" and not Path(others[0]).name.startswith(".tmp-")
            self.reach(phase, self.below(others[0] if lasting else path, named.get("dir_fd")))
            return function(path, *others, **named)

        return called


def run(words: list[str], folder: Path, fault: Fault | None = None, kill_after: float | None = None):
    """Run `ddengine WORDS` in `folder` in a process of its own; `kill_after` are seconds until SIGKILL."""
    err, told = folder.parent / f"{folder.name}.err", folder.parent / f"{folder.name}.points"
    told.unlink(missing_ok=True)
    sys.stdout.flush()
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        _command(words, folder, fault, err, told)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    points = json.loads(told.read_text()) if told.exists() else []
    return Outcome(os.waitstatus_to_exitcode(status), err.read_text(), points, time.monotonic() - began)


def _command(words: list[str], folder: Path, fault: Fault | None, err: Path, told: Path) -> None:
    """What the forked process does; it never returns."""
    code = 70
    try:
        os.chdir(folder)
        for number, path in ((1, os.devnull), (2, err)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666), number)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        sys.argv = ["ddengine", *words]
        from ddengine.cli import main

        points = Points(folder, fault)
        points.install()
        code = main(words, pinned=False)
        points.fault = None
        told.write_text(json.dumps(points.seen))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)

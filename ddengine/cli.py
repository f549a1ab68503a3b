"""The command line: finds command and flags, hands the rest to hydra, and turns errors into two lines.

Nothing here imports torch, numpy or hydra; a command does when it runs.
"""

import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from ddengine import __version__, origins
from ddengine.actions import HANDLERS, result_alone, show
from ddengine.errors import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_USAGE,
    DDError,
    UsageError,
    one_line,
    unknown,
)
from ddengine.usage import COMMANDS, FLAGS, KEYS, OWN_FLAGS, VALUED, help_text, matcher_options, overview

__all__ = ["COMMANDS", "KEYS", "main"]


def main(arguments: Sequence[str] | None = None, *, pinned: bool = True) -> int:
    """Run one command and return its exit code; `pinned` makes our packages win over their namesakes."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if pinned:
            origins.pin()
        with _terminable():
            return _run(given)
    except DDError as error:
        return _fail(error.cause, error.remedy, error.code, error)
    except KeyboardInterrupt as error:
        return _fail("interrupted", "Repeat the same command", EXIT_INTERRUPTED, error)
    except SystemExit as error:  # of a plug-in or a network of the user's: nothing of ours calls it
        return _fail(
            f"code that was run ended the process: sys.exit({error.code!r})",
            "Repair the plug-in or network that calls sys.exit; DDENGINE_DEBUG=1 shows where",
            EXIT_FAILED,
            error,
        )
    except OSError as error:
        remedy = "Check the path, your rights to it, and the room on its disk"
        refused = f"the system refuses {error.filename}: {error.strerror}" if error.filename else str(error)
        return _fail(refused, remedy, EXIT_USAGE if error.filename else EXIT_FAILED, error)
    except Exception as error:
        return _fail(
            f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
            "This is a defect or a lack of memory or disk; DDENGINE_DEBUG=1 shows where",
            EXIT_FAILED,
            error,
        )


@contextmanager
def _terminable() -> Iterator[None]:
    """Inside, SIGTERM is taken as Ctrl-C (in the main thread, where alone Python lets one choose)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _terminated)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminated(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _fail(cause: str, remedy: str, code: int, error: BaseException) -> int:
    if os.environ.get("DDENGINE_DEBUG") == "1":
        traceback.print_exception(error)
    print(f"error: {one_line(cause)}", file=sys.stderr)
    if remedy:
        print(f"  fix: {one_line(remedy)}", file=sys.stderr)
    return code


def _run(given: list[str]) -> int:
    if not given or given[0] in ("--help", "-h", "help"):
        show(overview())
        return EXIT_DONE if given else EXIT_USAGE
    if given[0] in ("--version", "-V"):
        show(f"ddengine {__version__}")
        return EXIT_DONE
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")  # or torch reads all packages' entry points
    command, rest = given[0], given[1:]
    if command not in COMMANDS:
        raise unknown("command", command, COMMANDS)
    known = VALUED.get(command, {})
    rest, values = _values(rest, known)
    flags = [word for word in rest if word.startswith("-")]
    for flag in flags:
        if flag not in (*FLAGS, *OWN_FLAGS.get(command, {})):
            raise _unknown_flag(command, flag)
    if "--help" in flags or "-h" in flags:
        chosen = [word.partition("=")[2] for word in rest if word.startswith("matcher=")]
        show(help_text(command) + (matcher_options(chosen[-1]) if chosen and command == "distill" else ""))
        return EXIT_DONE
    words = [word for word in rest if not word.startswith("-")]
    if origins.SiblingFinder not in sys.meta_path:
        origins.check()
    own = {flag.removeprefix("--"): True for flag in OWN_FLAGS.get(command, {}) if flag in flags}
    with result_alone():
        return HANDLERS[command](words, "--json" in flags, **values, **own)


def _unknown_flag(command: str, flag: str) -> UsageError:
    """The error for a flag that a command does not have; a key that was typed as a flag is shown as a key."""
    key = flag.lstrip("-").partition("=")[0]
    if key in {word.partition("=")[0] for word in KEYS.get(command, "").split()}:
        return UsageError(f"unknown flag '{flag}'", f"Write it as a key: {key}=VALUE")
    return unknown("flag", flag, (*FLAGS, *VALUED.get(command, {}), *OWN_FLAGS.get(command, {})))


def _values(words: list[str], known: Mapping[str, str]) -> tuple[list[str], dict[str, str]]:
    """The words without the flags `known`, and these with their values: `--flag VALUE` or `--flag=VALUE`."""
    others, values, left = [], {}, list(words)
    while left:
        flag, joined, value = left.pop(0).partition("=")
        if flag not in known:
            others.append(flag + joined + value)
            continue
        if not joined and left and not left[0].startswith("-"):
            value = left.pop(0)
        if not value:
            raise UsageError(f"{flag} names no {known[flag].lower()}", f"Write: {flag} {known[flag]}")
        values[flag.removeprefix("--")] = value
    return others, values

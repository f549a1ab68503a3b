"""Errors that a user can act on: one line for the cause, one for the remedy, and an exit code."""

import difflib
from collections.abc import Iterable

EXIT_DONE, EXIT_FAILED, EXIT_USAGE, EXIT_ARTEFACT, EXIT_INTERRUPTED = 0, 1, 2, 3, 130


class DDError(Exception):
    """A failure with a cause and a remedy; `code` is what the command line exits with."""

    code = EXIT_FAILED

    def __init__(self, cause: str, remedy: str = "") -> None:
        super().__init__(f"{cause}\n{remedy}" if remedy else cause)
        self.cause, self.remedy = cause, remedy


class UsageError(DDError, ValueError):
    """A value, a path or a dataset that cannot be used as it is (exit code 2)."""

    code = EXIT_USAGE


class ArtefactError(DDError, ValueError):
    """A stored artefact that fails verification (exit code 3)."""

    code = EXIT_ARTEFACT


class Interrupted(DDError):
    """The run was stopped by a signal after its state was saved (exit code 130)."""

    code = EXIT_INTERRUPTED


def unknown(kind: str, name: object, known: Iterable[str]) -> UsageError:
    """The error for a name that is in no registry: lists what is known and the nearest of it."""
    names = sorted(known)
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    hint = f"Did you mean '{near[0]}'? " if near else ""
    return UsageError(f"unknown {kind} '{name}'", f"{hint}Known: {', '.join(names)}")


def one_line(text: object) -> str:
    """`text` with line breaks, terminal codes and other unprintable characters spelled out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def require(value: object, allowed: Iterable[object], name: str) -> None:
    """Refuse `value` unless it is one of `allowed` (UsageError)."""
    if value not in tuple(allowed):
        raise unknown(name, value, [str(a) for a in allowed])


def require_positive(name: str, value: float | int, *, zero: bool = False) -> None:
    """Refuse a number that is not finite and positive (or zero, where `zero` allows it)."""
    if not (value == value and abs(value) != float("inf") and (value > 0 or (zero and value == 0))):
        rule = "zero or positive" if zero else "positive"
        raise UsageError(f"{name}={value} is out of range", f"Give a {rule} number for {name}")

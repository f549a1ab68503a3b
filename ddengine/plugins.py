"""What other distributions add through entry points: listed from metadata, imported only when asked for.

Each entry of the groups `ddengine.matchers`, `ddengine.networks` and `ddengine.datasets` gives a name of that
kind. A name of ours stays ours, and one that two distributions give is nobody's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import Distribution, EntryPoint, PackageNotFoundError, distribution, distributions
from typing import Any

from ddengine.errors import UsageError, one_line

GROUPS = {kind: f"ddengine.{kind}" for kind in ("matchers", "networks", "datasets")}
FILE = "entry_points.txt"
Problem = Callable[[Any], str | None]  # what is wrong with a loaded plug-in, as in "has no steps"


@dataclass(frozen=True)
class Plugin:
    """One entry point: `kind` is a key of GROUPS, `value` where it points, such as "my_package:MINE"."""

    kind: str
    name: str
    value: str
    distribution: str
    version: str
    summary: str

    @property
    def origin(self) -> str:
        """The distribution and its version."""
        return f"{self.distribution} {self.version}"

    @property
    def description(self) -> str:
        """The distribution's summary, or where the entry points if it has none."""
        return self.summary or self.value

    def load(self, problem: Problem) -> Any:
        """Import what the entry points to; UsageError where that fails or `problem` finds one."""
        if EntryPoint.pattern.match(self.value) is None:
            raise self.refused("points to no MODULE:NAME")
        try:
            found = EntryPoint(self.name, self.value, GROUPS[self.kind]).load()
            wrong = problem(found)
        except UsageError:
            raise
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            raise self.refused(f"does not load: {said(error)}") from error
        if wrong:
            raise self.refused(wrong)
        return found

    def refused(self, what: str) -> UsageError:
        """The error that this plug-in `what`, such as "does not load"."""
        return UsageError(
            f"{self.kind[:-1]} '{self.name}' {what} (plug-in of {self.origin}, {self.value})",
            f"Repair, update or uninstall {self.distribution}; ddengine doctor looks at every plug-in",
        )


def of(kind: str) -> list[Plugin]:
    """The plug-ins of a kind by name, then by distribution; nothing is imported."""
    return sorted((p for p in _scan()[0] if p.kind == kind), key=lambda p: (p.name, p.distribution))


def find(kind: str, name: str) -> Plugin | None:
    """The plug-in of that kind and name, None if there is none, UsageError if there are several."""
    found = [plugin for plugin in of(kind) if plugin.name == name]
    if len(found) > 1:
        raise UsageError(
            f"{kind[:-1]} '{name}' is given by {' and by '.join(p.origin for p in found)}",
            f"Uninstall one of them: {', '.join(p.distribution for p in found)}",
        )
    return found[0] if found else None


def damaged() -> list[str]:
    """A line for each distribution whose entry points name our groups and cannot be read."""
    return _scan()[1]


def said(error: BaseException) -> str:
    """An error of foreign code on one line, its type included where that is no import error."""
    text = " ".join(str(error).split())
    return one_line(text if isinstance(error, ImportError) else f"{type(error).__name__}: {text}")[:300]


def _scan() -> tuple[list[Plugin], list[str]]:
    found: list[Plugin] = []
    unread = []
    for dist in _adding():
        try:
            found += _read(dist)
        except Exception as error:
            unread.append(f"{_about(dist, 'Name')}: its {FILE} cannot be read ({said(error)})")
    return found, unread


def _adding() -> list[Distribution]:
    """The distributions whose entry points mention our groups, each once: the first on the path counts."""
    found: dict[str, Distribution] = {}
    for dist in filter(_mentions, distributions()):
        name = _about(dist, "Name")
        first = _first(name) or dist
        if _mentions(first):
            found.setdefault(name, first)
    return list(found.values())


def _mentions(dist: Distribution) -> bool:
    try:
        text = dist.read_text(FILE) or ""
    except OSError:
        return False
    except UnicodeError:  # which `_read` will say of it
        return True
    return any(f"[{group}]" in text for group in GROUPS.values())


def _first(name: str) -> Distribution | None:
    try:
        return distribution(name)
    except (PackageNotFoundError, ValueError):
        return None


def _about(dist: Distribution, key: str, empty: str = "?") -> str:
    """A field of a distribution's metadata, which may be missing altogether."""
    try:
        return one_line(dist.metadata[key] or empty)
    except Exception:  # versions of Python differ in what they raise
        return empty


def _read(dist: Distribution) -> list[Plugin]:
    kinds = {group: kind for kind, group in GROUPS.items()}
    origin = _about(dist, "Name"), _about(dist, "Version"), _about(dist, "Summary", "")
    return [
        Plugin(kinds[entry.group], one_line(entry.name), entry.value, *origin)
        for entry in dist.entry_points
        if entry.group in kinds
    ]

"""Matchers: one file, one algorithm. `MATCHERS` maps names to default values; `find` and `make` use it.

A distribution adds its own through the entry-point group `ddengine.matchers`, each entry a matcher value.
"""

from dataclasses import replace
from importlib.metadata import entry_points
from typing import Any

from ddengine.errors import UsageError, unknown
from ddengine.nets.core import NetSpec
from ddengine.types import Matcher
from matchers.attention import AttentionMatching
from matchers.distribution import DistributionMatching
from matchers.subset import SubsetSelection

MATCHERS: dict[str, Any] = {
    "attention": AttentionMatching(),
    "distribution": DistributionMatching(),
    "random": SubsetSelection("random"),
    "herding": SubsetSelection("herding"),
    "kmeans": SubsetSelection("kmeans"),
    "kcenter": SubsetSelection("kcenter"),
}
GROUP = "ddengine.matchers"


def names() -> list[str]:
    """Every name that `find` knows, ours first."""
    return [*MATCHERS, *sorted({e.name for e in entry_points(group=GROUP)} - set(MATCHERS))]


def find(name: str) -> Any:
    """The matcher called `name` with its default options (UsageError lists the known and the nearest)."""
    if name in MATCHERS:
        return MATCHERS[name]
    for entry in entry_points(group=GROUP):
        if entry.name == name:
            return entry.load()
    raise unknown("matcher", name, names())


def make(name: str, network: NetSpec | None = None, **options: Any) -> Matcher[Any]:
    """The matcher called `name` with these options and this network; unknown options are a UsageError."""
    prototype = find(name)
    known = set(prototype.options.__dataclass_fields__)
    for key in options:
        if key not in known:
            raise unknown(f"option of matcher '{name}'", key, known)
    try:
        made = replace(prototype, options=type(prototype.options)(**options))
    except TypeError as error:
        raise UsageError(f"matcher {name}: {error}", "Give each option a value of its type") from error
    return made if network is None else replace(made, network=network)

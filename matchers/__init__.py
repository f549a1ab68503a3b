"""Matchers: one file, one algorithm. `MATCHERS` maps names to default values; `find` and `make` use it.

A distribution adds its own through the entry-point group `ddengine.matchers`, each entry a matcher value.
"""

from collections.abc import Mapping
from dataclasses import is_dataclass, replace
from importlib.metadata import entry_points
from typing import Any

from ddengine.errors import UsageError, unknown
from ddengine.nets.core import NetSpec
from ddengine.types import Matcher
from matchers.attention import AttentionMatching
from matchers.compensator import CompensatorMatching
from matchers.computation_tree import ComputationTree
from matchers.distribution import DistributionMatching
from matchers.subset import SubsetSelection
from matchers.trajectory import TrajectoryMatching
from matchers.tree_herding import TreeHerding

MATCHERS: dict[str, Any] = {
    "attention": AttentionMatching(),
    "distribution": DistributionMatching(),
    "trajectory": TrajectoryMatching(),
    "compensator": CompensatorMatching(),
    "computation_tree": ComputationTree(),
    "tree_herding": TreeHerding(),
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


def _group(said: str, prototype: Any, key: str, value: Any) -> Any:
    """The value of an option; one that is a group of options may be given as a mapping, or by its name."""
    kind = type(prototype.options.__dataclass_fields__[key].default)
    if is_dataclass(kind) and isinstance(value, str) and "name" in kind.__dataclass_fields__:
        value = {"name": value}
    if not is_dataclass(kind) or not isinstance(value, Mapping):
        return value
    for inner in value:
        if inner not in kind.__dataclass_fields__:
            raise unknown(f"option of matcher '{said}'", inner, kind.__dataclass_fields__)
    return kind(**value)


def make(name: str, network: NetSpec | None = None, **options: Any) -> Matcher[Any]:
    """The matcher called `name` with these options and this network; unknown options are a UsageError."""
    prototype = find(name)
    known = set(prototype.options.__dataclass_fields__)
    for key in options:
        if key not in known:
            raise unknown(f"option of matcher '{name}'", key, known)
    try:
        nested = {key: _group(f"{name}.{key}", prototype, key, value) for key, value in options.items()}
        made = replace(prototype, options=type(prototype.options)(**nested))
    except TypeError as error:
        raise UsageError(f"matcher {name}: {error}", "Give each option a value of its type") from error
    return made if network is None else replace(made, network=network)

"""Matchers: one file, one algorithm. `MATCHERS` maps names to default values; `find` and `make` use it.

A distribution adds its own through the entry-point group `ddengine.matchers`, each entry a matcher value:
a frozen dataclass with the fields `options`, a frozen dataclass of defaults, and `network`, a NetSpec.
"""

from collections.abc import Mapping
from dataclasses import is_dataclass, replace
from typing import Any

from ddengine import plugins
from ddengine.errors import UsageError, unknown
from ddengine.nets.core import NetSpec
from ddengine.types import Accepts, Matcher
from matchers.attention import AttentionMatching
from matchers.characteristic import CharacteristicMatching
from matchers.compensator import CompensatorMatching
from matchers.computation_tree import ComputationTree
from matchers.distribution import DistributionMatching
from matchers.subset import SubsetSelection
from matchers.trajectory import TrajectoryMatching
from matchers.tree_herding import TreeHerding

MATCHERS: dict[str, Any] = {
    "attention": AttentionMatching(),
    "distribution": DistributionMatching(),
    "characteristic": CharacteristicMatching(),
    "trajectory": TrajectoryMatching(),
    "compensator": CompensatorMatching(),
    "computation_tree": ComputationTree(),
    "tree_herding": TreeHerding(),
    "random": SubsetSelection("random"),
    "herding": SubsetSelection("herding"),
    "kmeans": SubsetSelection("kmeans"),
    "kcenter": SubsetSelection("kcenter"),
}
VERBS = ("accepts", "steps", "prepare", "init", "step", "finish")  # of the protocol
FIELDS = ("options", "network")  # that `make` fills in


def names() -> list[str]:
    """Every name that `find` knows, ours first."""
    return [*MATCHERS, *sorted({plugin.name for plugin in plugins.of("matchers")} - set(MATCHERS))]


def find(name: str) -> Any:
    """The matcher called `name` with its default options (UsageError lists the known and the nearest).

    A plug-in that does not load, that is no matcher, or whose name two distributions give, is a UsageError.
    """
    if name in MATCHERS:
        return MATCHERS[name]
    plugin = plugins.find("matchers", name)
    if plugin is None:
        raise unknown("matcher", name, names())
    return plugin.load(problem)


def problem(found: Any) -> str | None:
    """What keeps a value from being a matcher, as in "has no steps"; None for a matcher."""
    if isinstance(found, type):
        return f"is a class; it must be a value of it: {found.__name__}()"
    lacking = [verb for verb in VERBS if not hasattr(found, verb)]
    if lacking:
        return f"is a {type(found).__name__} and no matcher: it has no {', '.join(lacking)}"
    if not _is_frozen(found):
        return "is no frozen dataclass"
    lacking = [key for key in FIELDS if key not in found.__dataclass_fields__]
    if lacking:
        return f"has no field {' and no field '.join(lacking)}"
    return _odd_value(found)


def _odd_value(found: Any) -> str | None:
    """What is wrong with the values of a frozen dataclass that has all verbs and fields."""
    if not _is_frozen(found.options):
        return "has options that are no frozen dataclass"
    if not isinstance(found.accepts, Accepts):
        return f"has a {type(found.accepts).__name__} as accepts, which must be an Accepts"
    return None


def _is_frozen(value: Any) -> bool:
    parameters = getattr(type(value), "__dataclass_params__", None)
    return parameters is not None and parameters.frozen


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

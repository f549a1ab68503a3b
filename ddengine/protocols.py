"""Evaluation protocols: named, versioned ways to train and to choose, read from YAML files.

`standard-v1` is ours. Those under `paper/` are publications' own recipes, to compare with their published
rows only; where they look at the test part to choose, so do these, and the table says so.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from ddengine.errors import UsageError, require, require_positive
from ddengine.train import Recipe, is_like, recipe_of

RATES = ("validation", "fixed", "learned")
BEST_ON_TEST = "best on test"
SELECTIONS = ("last step", BEST_ON_TEST)


@dataclass(frozen=True)
class Protocol:
    """How networks are trained and chosen for every row; `source` says whose recipe it is.

    `recipe` holds fields of Recipe; `augment` "auto" is the dataset's DSA string. `epochs` counts passes over
    the set (`epochs_dynamic` where teachers label at training time) in place of its steps. With `own_recipe`
    a set's manifest and the command may replace parts of the recipe. `rates` says how one of the recipe's
    rates is chosen: on validation; the only one; the rate learned with the set, else the only one. `select`
    says which weights are scored; "best on test" looks at the test part `looks` times while it trains, as
    some publications do. `seeds` is the usual number of networks. Raises UsageError for a value out of range.
    """

    name: str
    version: int
    source: str
    recipe: Mapping[str, Any] = field(default_factory=dict)
    epochs: int | None = None
    epochs_dynamic: int | None = None
    own_recipe: bool = False
    rates: str = "validation"
    select: str = SELECTIONS[0]
    looks: int = 1
    seeds: int = 5

    def __post_init__(self) -> None:
        require(self.rates, RATES, "protocol.rates")
        require(self.select, SELECTIONS, "protocol.select")
        for key in ("version", "looks", "seeds", "epochs", "epochs_dynamic"):
            if getattr(self, key) is not None:
                require_positive(f"protocol.{key}", getattr(self, key))
        if self.rates != "validation" and len(self.recipe.get("lrs", ())) != 1:
            raise UsageError(f"protocol.rates={self.rates} needs one rate in recipe.lrs", "Give lrs: [0.01]")
        if self.epochs is not None and "steps" in self.recipe:
            raise UsageError("protocol.epochs and recipe.steps are both given", "Give one of them")

    def to_dict(self) -> dict[str, Any]:
        """The protocol as plain JSON values, without its recipe, which the table spells by itself."""
        skip = ("recipe", "epochs_dynamic") if self.epochs_dynamic is None else ("recipe",)
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in skip}

    def recipe_for(
        self, manifest: Mapping[str, Any], dataset: str, images: int, dynamic: bool = False
    ) -> Recipe:
        """The recipe for a set that trains on `images` images of `dataset`, teachers labelling or not.

        Raises ArtefactError for a manifest that asks for the impossible.
        """
        values = {key: value for key, value in self.recipe.items() if (key, value) != ("augment", "auto")}
        epochs = self.epochs_dynamic if dynamic and self.epochs_dynamic else self.epochs
        if epochs is not None:
            batch = min(values.get("batch_size", Recipe.batch_size), images)
            values["steps"] = epochs * math.ceil(images / batch)
        return recipe_of(manifest if self.own_recipe else {}, dataset, values)


STANDARD = Protocol("standard-v1", 1, "ddengine", own_recipe=True)


def parse_protocol(values: Any, where: str) -> Protocol:
    """The protocol that a YAML file holds; UsageError names `where` and the entry that is wrong."""
    if not isinstance(values, dict):
        raise UsageError(f"{where} is no protocol: it holds no table", "Write name, version, source, recipe")
    known = {f.name: f.type for f in fields(Protocol)}
    for key in values:
        if key not in known:
            raise UsageError(f"{where} has the unknown entry {key}", f"Known: {', '.join(known)}")
    for key, kind in (("name", str), ("version", int), ("source", str)):
        if type(values.get(key)) is not kind:
            raise UsageError(f"{where} has {key}: {values.get(key)}", f"Give a {kind.__name__}")
    for key, kind in (("epochs", int), ("epochs_dynamic", int), ("looks", int), ("seeds", int)):
        if values.get(key) is not None and type(values[key]) is not kind:
            raise UsageError(f"{where} has {key}: {values[key]}", "Give a whole number")
    recipe = _recipe(values.get("recipe", {}), where)
    try:
        return Protocol(**{**values, "recipe": recipe})
    except UsageError as error:
        raise UsageError(f"{where}: {error.cause}", error.remedy) from error


def _recipe(given: Any, where: str) -> dict[str, Any]:
    """Fields of Recipe with values of their types, rates as a tuple (UsageError otherwise)."""
    known = {f.name: f.default for f in fields(Recipe)}
    if not isinstance(given, dict):
        raise UsageError(f"{where} has recipe: {given}", "Give a table of a recipe's fields")
    for key, value in given.items():
        if key not in known or not is_like(value, known[key]):
            raise UsageError(
                f"{where} has recipe.{key}: {value}", f"Give one of {', '.join(known)}, of its type"
            )
    found: dict[str, Any] = {
        key: tuple(map(float, v)) if isinstance(v, list) else v for key, v in given.items()
    }
    try:
        Recipe(**{k: v for k, v in found.items() if (k, v) != ("augment", "auto")})
    except UsageError as error:
        raise UsageError(f"{where}: {error.cause}", error.remedy) from error
    return found

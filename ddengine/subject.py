"""What a set asks to be judged with, beside what a command or a call gives; and whether the two agree."""

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

from ddengine import graph_paper
from ddengine.artefacts import holds_graphs, named
from ddengine.config import AuditConfig, ContinualConfig, EvaluateConfig, EvaluateGraphsConfig
from ddengine.data import Dataset, GraphDataset
from ddengine.errors import ArtefactError, UsageError
from ddengine.given import Watch
from ddengine.graph_train import GraphRecipe
from ddengine.nets import import_network, is_import_path
from ddengine.nets.core import NetSpec
from ddengine.train import Recipe
from ddengine.types import class_order
from synth import DistilledSet

Judging = EvaluateConfig | EvaluateGraphsConfig | ContinualConfig | AuditConfig


def chosen(config: Judging, distilled: DistilledSet) -> list[NetSpec]:
    """The networks to judge with; the manifest's own has its options there where the command gives none."""
    own = own_network(distilled, getattr(config, "protocol", None))
    given = {key: value for key, value in vars(config.network).items() if key != "name" and value is not None}
    several = getattr(config, "networks", None)
    names = [config.network.name] if several is None else several
    return [NetSpec(**{**(own if name == own["name"] else {}), **given, "name": name}) for name in names]


def own_network(distilled: DistilledSet, protocol: str | None) -> dict[str, Any]:
    """The network that the manifest names; the publication has a width and a depth of its own."""
    own = named(distilled, "network")
    return {"name": own["name"]} if protocol == graph_paper.PAPER else own


def networks_of(names: Sequence[str | NetSpec] | None, own: NetSpec) -> list[NetSpec]:
    """Specs of networks given by name or as specs; `own` stands for its name and for None."""
    if names is None:
        return [own]
    for name in names:  # a person gives them, so that they may be imported
        if is_import_path(name if isinstance(name, str) else name.name):
            import_network(name if isinstance(name, str) else name.name)
    return [(own if name == own.name else NetSpec(name)) if isinstance(name, str) else name for name in names]


def check_kind(distilled: DistilledSet, *given: Any) -> None:
    """Refuse a dataset or recipe for graphs beside a set of images, and the other way round (UsageError)."""
    graphs = holds_graphs(distilled)
    for value in given:
        if isinstance(value, (Dataset, Recipe) if graphs else (GraphDataset, GraphRecipe)):
            kind, other = ("graphs", "images") if graphs else ("images", "graphs")
            said = f"the set of '{distilled.spec.name}' holds {kind}, a {type(value).__name__} is for {other}"
            raise UsageError(said, f"Give a dataset and a recipe for {kind}")


def check_same(distilled: DistilledSet, dataset: Dataset | GraphDataset, watch: Watch) -> None:
    """Refuse a dataset of other classes, or graphs that the set may know; a warning for other images."""
    mine, theirs = distilled.classes, dataset.spec.classes
    if mine != theirs:
        first = next(pair for pair in zip_longest(mine, theirs, fillvalue="nothing") if pair[0] != pair[1])
        raise UsageError(
            f"the set's {len(mine)} classes are not the {len(theirs)} of '{dataset.spec.name}': "
            f"'{first[0]}' there is '{first[1]}' here",
            "Evaluate with the dataset that the set was made from",
        )
    if distilled.manifest["recipe"].get("class_order", class_order(mine)) != class_order(mine):
        raise ArtefactError("the set's recipe.class_order is not that of its classes", "Make the set again")
    if distilled.spec.fingerprint != dataset.spec.fingerprint:
        if isinstance(dataset, GraphDataset) and distilled.spec.name == dataset.spec.name:
            raise UsageError(
                f"this '{dataset.spec.name}' or its split is not the one that the set was made from: "
                "graphs that the set knows may be among those to test on",
                "Give dataset.root and dataset.split as they were when it was distilled",
            )
        watch.notice(
            "warning: this dataset is not the one that the set was made from (their fingerprints differ)"
        )

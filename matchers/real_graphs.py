"""Real graphs as a distilled set: how deep their trees are, and which graphs fill a budget."""

from jaxtyping import Int
from torch import Tensor

from ddengine.errors import UsageError
from ddengine.nets.core import NetSpec
from ddengine.nets.graph import resolve_graph
from ddengine.ops.dag import histogram, trees_of
from ddengine.rng import Rng
from ddengine.types import Task, no_budget
from synth.graph_starts import GRAPH_SELECTIONS, per_class, within_bytes
from synth.graph_subset import stored_graphs


def depth_of(network: NetSpec, hops: int | None, degree: bool | None) -> tuple[int, bool]:
    """Levels of the trees and whether their first colours tell degrees apart.

    What is None follows from the network: as many hops as it has layers, degrees for GCN. Raises UsageError
    for fewer hops than layers, and for GCN without degrees.
    """
    found = resolve_graph(network)
    assert found.depth is not None
    if hops is not None and hops < found.depth:
        raise UsageError(
            f"matcher.hops={hops} is less than the {found.depth} layers of network '{found.name}'",
            f"Give matcher.hops={found.depth}" + (f" or network.depth={hops}" if hops > 0 else ""),
        )
    if found.name == "gcn" and degree is False:
        raise UsageError(
            "matcher.degree=false with network=gcn: its norm needs the degrees of leaves",
            "Give matcher.degree=true or another network",
        )
    return found.depth if hops is None else hops, found.name == "gcn" if degree is None else degree


def pick(task: Task, selection: str, hops: int, degree: bool, rng: Rng) -> Int[Tensor, " m"]:
    """Indices of real graphs that fill the budget: `ipc` of each class, or as many as `nbytes` holds.

    A graph counts as stored in the smaller of our two forms. Raises UsageError for a selection that works on
    images only, for a class with too few graphs and for a budget that not one graph a class fits.
    """
    if selection not in GRAPH_SELECTIONS:
        raise UsageError(
            f"matcher={selection} works on images only",
            f"For graphs give one of {', '.join(GRAPH_SELECTIONS)}",
        )
    graphs, budget = task.graphs, task.budget
    if budget is None:
        raise no_budget()
    counts = histogram(trees_of(graphs, hops, degree=degree))
    limit = max(graphs.counts) if budget.ipc is None else budget.ipc
    ranked = GRAPH_SELECTIONS[selection](counts, graphs.y, limit, rng)
    if budget.nbytes is None:
        return per_class(ranked, limit)

    def size(index: Tensor) -> int:
        return stored_graphs(graphs.take(index), hops, degree).nbytes["total"]

    return within_bytes(ranked, budget.nbytes, size)

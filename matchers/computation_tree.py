"""Graphs condensed to computation trees, without any training of networks: trees *are* what networks see.

Two selections. `evidence` (own; see `tree_evidence`) keeps the most frequent trees, each with a soft label
that says what it speaks for. `itemsets` is Mirage (Gupta, Manchanda, Kodamana, Ranu, ICLR 2024): sets of
trees that are frequent in a class, mined exactly; `variant=mirage` is the published form.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from ddengine.errors import UsageError, require, require_positive
from ddengine.nets.core import NetSpec
from ddengine.ops.dag import Trees, histogram, take, trees_of
from ddengine.ops.refinement import color_refinement
from ddengine.rng import Rng
from ddengine.types import Accepts, Metrics, SynthSet, Task, Workspace, no_budget
from matchers.itemsets import WALKS, absolute_support, mine, top
from matchers.real_graphs import depth_of
from matchers.tree_evidence import evidence_set, tree_frequency, tree_scores
from matchers.tree_sets import Mined, item_trees, scaled, without_common
from synth import Forest
from synth.graph_starts import within_bytes

__all__ = ["ComputationTree", "ComputationTreeOptions", "TreeState", "color_refinement"]

SELECTIONS = ("evidence", "itemsets")
SHARED_BELOW = 2.0  # nodes per colour under which hardly any tree occurs twice
LEAST_BYTES = 3  # of one more item: its size, a colour, a label
SETS_MAX = 2000  # itemsets of a class that a budget in bytes is filled from
# supports of class 0 and 1 and hops in the authors' scripts; the layers there exceed the hops on some sets
MIRAGE = {
    "NCI1": ((440, 570), 2),
    "IMDB-BINARY": ((13, 14), 2),
    "DD": ((15, 9), 1),
    "ogbg-molbace": ((150, 104), 3),
    "ogbg-molhiv": ((1800, 115), 3),
    "ogbg-molbbbp": ((24, 109), 2),
}


@dataclass(frozen=True)
class ComputationTreeOptions:
    """`hops` and `degree` follow from the network where they are None; `select` from whether an option of
    sets of trees is given, from `variant` on. `support` has a number of graphs or a fraction of a class for
    each class, or one for all; where it is empty the budget decides. `limit` stops a mining that finds more
    sets. `weighting` "support" weighs trees by their frequency, sets by their support.
    """

    hops: int | None = None
    degree: bool | None = None
    select: str | None = None
    weighting: str = "support"
    variant: str = "own"
    support: tuple[float | int, ...] = ()
    itemsets: str = "closed"
    counts: str = "binary"
    class_balance: bool = True
    drop_common: bool = False
    limit: int = 100_000

    def __post_init__(self) -> None:
        require(self.select, (None, *SELECTIONS), "matcher.select")
        require(self.variant, ("own", "mirage"), "matcher.variant")
        require(self.itemsets, WALKS, "matcher.itemsets")
        require(self.counts, ("binary", "mean"), "matcher.counts")
        require(self.weighting, ("none", "support"), "matcher.weighting")
        require_positive("matcher.limit", self.limit)
        for support in self.support:
            absolute_support(support, 1)  # refuses what is neither a number of graphs nor a fraction
        if self.select == "evidence" and self.of_sets:
            raise UsageError(
                f"matcher.{self.of_sets[0]} is for sets of trees, not for select=evidence",
                "Leave it out, or give matcher.select=itemsets",
            )
        fixed = [name for name in self.of_sets if name not in ("variant", "support", "limit")]
        if self.variant == "mirage" and (fixed or self.weighting != "support"):
            raise UsageError(
                f"matcher.{[*fixed, 'weighting'][0]} is fixed by the published form, variant=mirage",
                "Leave it out, or leave matcher.variant out",
            )

    @property
    def of_sets(self) -> list[str]:
        """The options of sets of trees that are not at their default."""
        names = ("variant", "support", "itemsets", "counts", "class_balance", "drop_common", "limit")
        return [
            name for name in names if getattr(self, name) != type(self).__dataclass_fields__[name].default
        ]


@dataclass(frozen=True)
class TreeState:
    """What is known so far: the sets of the classes that were mined, or the trees' scores."""

    step: int
    mined: tuple[Mined, ...]
    scores: Float[Tensor, "c k"]


@dataclass(frozen=True)
class ComputationTree:
    """One step mines all classes, or fits the evidence of all trees; `finish` fills the budget."""

    options: ComputationTreeOptions = ComputationTreeOptions()
    network: NetSpec = NetSpec("gin")

    @property
    def accepts(self) -> Accepts:
        """Graphs; supports that are given say how much the set holds."""
        sized = bool(self.options.support) or self.options.variant == "mirage"
        return Accepts(source="graphs", bf16=False, budget=not sized)

    @property
    def evidence(self) -> bool:
        """Whether single trees with soft labels are selected, and no sets of trees."""
        return self.options.select == "evidence" or (self.options.select is None and not self.options.of_sets)

    def settled(self, task: Task) -> ComputationTreeOptions:
        """The options for this task: those of the published form where it is asked for."""
        o = self.options
        if o.variant != "mirage":
            return o
        support, hops = MIRAGE.get(task.graphs.spec.name, ((), None))
        if not (o.support or support):
            raise UsageError(
                f"matcher.variant=mirage has no published supports for '{task.graphs.spec.name}'",
                f"Give matcher.support=[A,B]; published are those of {', '.join(MIRAGE)}",
            )
        return replace(
            o,
            select="itemsets",
            variant="own",
            support=o.support or support,
            hops=hops if o.hops is None else o.hops,
            itemsets="all",
            counts="binary",
            weighting="none",
            class_balance=False,
            drop_common=True,
        )

    def steps(self, task: Task) -> int:
        """One: a run whose options give no set is refused before its folder holds anything."""
        return 1

    def prepare(self, task: Task, rng: Rng) -> Workspace:
        """The trees of all graphs on one DAG."""
        hops, degree = depth_of(self.network, self.settled(task).hops, self.options.degree)
        trees = trees_of(task.graphs, hops, degree=degree)
        return Workspace(task, task.graphs, {"trees": trees}, _notes(trees, len(task.graphs.x)))

    def init(self, task: Task, rng: Rng) -> TreeState:
        """Nothing is known yet; nothing is drawn."""
        if task.budget is None and self.accepts.budget:
            raise no_budget()
        depth_of(self.network, self.settled(task).hops, self.options.degree)
        nothing = tuple(Mined.of([]) for _ in task.graphs.spec.classes)
        return TreeState(0, nothing, torch.zeros(0, len(nothing), dtype=torch.float64))

    def step(self, state: TreeState, work: Workspace, rng: Rng) -> tuple[TreeState, Metrics]:
        """Fit the trees' evidence, or mine the sets of each class."""
        trees = work.extra["trees"]
        if self.evidence:
            scores, accuracy = tree_scores(trees)
            after = replace(state, step=1, scores=scores)
            metrics = {"model_accuracy": accuracy, "trees": float(len(scores))}
        else:
            mined = tuple(self._mine(work.task, trees, c) for c in range(len(state.mined)))
            after = replace(state, step=1, mined=mined)
            metrics = {f"sets_{c}": float(len(found.sizes)) for c, found in enumerate(mined)}
        self.finish(after, work, rng)  # a budget that nothing fits is refused here, not after the run began
        return after, metrics

    def _mine(self, task: Task, trees: Trees, c: int) -> Mined:
        o, classes = self.settled(task), len(task.graphs.spec.classes)
        graphs = histogram(trees)[(task.graphs.y == c).numpy()]
        if o.support:
            if len(o.support) not in (1, classes):
                raise UsageError(
                    f"matcher.support={list(o.support)} for {classes} classes",
                    "Give one support for each class, or one for all",
                )
            least = absolute_support(o.support[c % len(o.support)], graphs.shape[0])
            return Mined.of(mine(graphs, least, kind=o.itemsets, limit=o.limit))
        assert task.budget is not None
        count = task.budget.ipc or min(SETS_MAX, (task.budget.nbytes or 0) // (LEAST_BYTES * classes) + 1)
        return Mined.of(top(graphs, count, o.itemsets, limit=o.limit))

    def finish(self, state: TreeState, work: Workspace, rng: Rng) -> SynthSet:
        """The forest that fills the budget: the most frequent trees, or of each class the first sets."""
        trees = work.extra["trees"]
        if self.evidence:
            return _most_frequent(trees, state.scores, work.task, self.options.weighting != "none")
        o = self.settled(work.task)
        mined = without_common(state.mined) if o.drop_common else list(state.mined)
        _refuse_empty(state.mined, mined, trees.spec.classes, self.options.variant)
        items = item_trees(trees, mined, counts=o.counts, weighting=o.weighting)
        return _filled(items, work.task, o.class_balance)


def _refuse_empty(
    mined: Sequence[Mined], kept: Sequence[Mined], classes: Sequence[str], variant: str
) -> None:
    for name, found, left in zip(classes, mined, kept, strict=True):
        if not len(found.sizes):
            raise UsageError(
                f"no set of trees is frequent in class '{name}' at these supports", "Lower matcher.support"
            )
        if not len(left.sizes):
            raise UsageError(
                f"each of the {len(found.sizes)} sets that are frequent in class '{name}' is so in another",
                "Give other supports" + (" or matcher.drop_common=false" if variant == "own" else ""),
            )


def _notes(trees: Trees, nodes: int) -> tuple[str, ...]:
    colors = trees.dag.sizes[-1]
    each = nodes / colors
    said = (
        f"{nodes:,} nodes have {colors:,} different trees of {trees.dag.hops} hops: {each:.1f} nodes a tree"
    )
    if each >= SHARED_BELOW:
        return (said,)
    return (f"warning: {said}; almost no tree occurs twice, so trees say little here: fewer hops share more",)


def _filled(items: Trees, task: Task, balance: bool) -> Forest:
    """The forest of what the budget allows: the first items of each class, weighed among themselves."""

    def forest(index: Tensor) -> Forest:
        return Forest.of(scaled(take(items, index), balance))

    budget, everything = task.budget, torch.arange(len(items))
    if budget is None:
        return forest(everything)
    numbers = everything.split(torch.bincount(items.y).tolist())
    if budget.ipc is not None:
        return forest(torch.cat([part[: budget.ipc] for part in numbers]))
    what = "one set of trees of each class"
    return forest(within_bytes(numbers, budget.nbytes or 0, lambda i: forest(i).nbytes["total"], what))


def _most_frequent(trees: Trees, scores: Tensor, task: Task, weighted: bool) -> Forest:
    """The forest of the most frequent trees: `ipc` for each class, or what fits in the bytes."""
    frequency = tree_frequency(trees)
    order = frequency.argsort(descending=True, stable=True)

    def forest(count: int) -> Forest:
        return Forest.of(evidence_set(trees, scores, frequency, order[:count], weighted))

    budget = task.budget
    assert budget is not None
    if budget.ipc is not None:
        return forest(min(budget.ipc * len(trees.spec.classes), len(order)))
    every = [torch.arange(len(order))]
    chosen = within_bytes(every, budget.nbytes or 0, lambda i: forest(len(i)).nbytes["total"], "one tree")
    return forest(len(chosen))

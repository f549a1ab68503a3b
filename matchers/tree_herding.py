"""Herding of real graphs in the space of computation trees: no network and no training.

A graph is the square roots of its level-L colour counts (Weisfeiler-Lehman histogram, Shervashidze et al.,
JMLR 2011), and graphs are chosen one by one so that their mean follows the class mean (Welling, ICML 2009).
"""

from dataclasses import dataclass
from typing import ClassVar

from ddengine.nets.core import NetSpec
from ddengine.rng import Rng
from ddengine.types import Accepts, Metrics, SynthSet, Task, Workspace
from matchers.real_graphs import depth_of, pick
from matchers.subset import SubsetState
from synth.graph_subset import stored_graphs


@dataclass(frozen=True)
class TreeHerdingOptions:
    """`hops` are the levels of the trees, at least the network's layers; `degree` tells nodes apart by their
    degree from the start, as GCN needs. What is None follows from the network.
    """

    hops: int | None = None
    degree: bool | None = None


@dataclass(frozen=True)
class TreeHerding:
    """A matcher of no steps: `init` picks, `finish` copies the real graphs."""

    options: TreeHerdingOptions = TreeHerdingOptions()
    network: NetSpec = NetSpec("gin")

    accepts: ClassVar[Accepts] = Accepts(source="graphs", bf16=False)

    @property
    def depth(self) -> tuple[int, bool]:
        """Levels of the trees, and whether degrees are told apart."""
        return depth_of(self.network, self.options.hops, self.options.degree)

    def steps(self, task: Task) -> int:
        """None to do."""
        return 0

    def prepare(self, task: Task, rng: Rng) -> Workspace:
        """The task and its source."""
        return Workspace(task, task.graphs)

    def init(self, task: Task, rng: Rng) -> SubsetState:
        """The graphs that fill the budget; nothing is drawn."""
        return SubsetState(0, pick(task, "herding", *self.depth, rng.fold("start")))

    def step(self, state: SubsetState, work: Workspace, rng: Rng) -> tuple[SubsetState, Metrics]:
        """The pick is final: the same state."""
        return state, {}

    def finish(self, state: SubsetState, work: Workspace, rng: Rng) -> SynthSet:
        """The chosen graphs, as they are or as their trees: whichever is smaller."""
        return stored_graphs(work.data.take(state.indices), *self.depth)

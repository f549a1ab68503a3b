"""Subset baselines through the matcher contract: real images or graphs chosen without any training.

`random` (uniform), `herding` (Welling 2009), `kmeans` (the real image nearest each centre), `kcenter` (greedy
farthest point): the selections are `synth.starts` and, for graphs in the space of their computation trees,
`synth.graph_starts`; here they become sets of real uint8 images or graphs.
"""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Int
from torch import Tensor

from ddengine.errors import require
from ddengine.nets.core import NetSpec
from ddengine.nets.graph import usual_graph
from ddengine.rng import Rng
from ddengine.types import Accepts, Metrics, SynthSet, Task, Workspace
from matchers.real_graphs import depth_of, pick
from synth import Subset
from synth.graph_subset import stored_graphs
from synth.starts import SELECTIONS


@dataclass(frozen=True)
class SubsetState:
    """The pick: indices into the source, class by class."""

    step: int
    indices: Int[Tensor, " m"]


@dataclass(frozen=True)
class SubsetOptions:
    """A selection has no options: its name is the matcher's."""


@dataclass(frozen=True)
class SubsetSelection:
    """A matcher of no steps: `init` picks, `finish` copies the real images or graphs."""

    selection: str = "random"
    options: SubsetOptions = SubsetOptions()
    network: NetSpec = NetSpec()

    accepts: ClassVar[Accepts] = Accepts(source="any", batch_norm=True)

    def __post_init__(self) -> None:
        require(self.selection, SELECTIONS, "selection")

    @property
    def _depth(self) -> tuple[int, bool]:
        return depth_of(usual_graph(self.network), None, None)

    def steps(self, task: Task) -> int:
        """None to do."""
        return 0

    def prepare(self, task: Task, rng: Rng) -> Workspace:
        """The task and its source."""
        return Workspace(task, task.source)

    def init(self, task: Task, rng: Rng) -> SubsetState:
        """The selection at `task.ipc` images per class, of graphs what fills the budget."""
        if task.kind == "graphs":
            return SubsetState(0, pick(task, self.selection, *self._depth, rng.fold("start")))
        return SubsetState(0, SELECTIONS[self.selection](task.images, task.ipc, rng.fold("start")))

    def step(self, state: SubsetState, work: Workspace, rng: Rng) -> tuple[SubsetState, Metrics]:
        """The pick is final: the same state."""
        return state, {}

    def finish(self, state: SubsetState, work: Workspace, rng: Rng) -> SynthSet:
        """A uint8 copy of the chosen images, their labels and their indices; graphs in their smaller form."""
        if work.task.kind == "graphs":
            return stored_graphs(
                work.data.take(state.indices), *depth_of(usual_graph(self.network), None, None)
            )
        return Subset.of(work.data, state.indices)

"""Subset baselines through the matcher contract: real images chosen without any training.

`random` (uniform), `herding` (Welling 2009), `kmeans` (the real image nearest each centre), `kcenter` (greedy
farthest point): the selections are `synth.starts`; here they become sets of real uint8 images.
"""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Int
from torch import Tensor

from ddengine.errors import require
from ddengine.nets.core import NetSpec
from ddengine.rng import Rng
from ddengine.types import Accepts, Metrics, SynthSet, Task, Workspace
from synth import Subset
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
    """A matcher of no steps: `init` picks, `finish` copies the real images."""

    selection: str = "random"
    options: SubsetOptions = SubsetOptions()
    network: NetSpec = NetSpec()

    accepts: ClassVar[Accepts] = Accepts(source="images", batch_norm=True)

    def __post_init__(self) -> None:
        require(self.selection, SELECTIONS, "selection")

    def steps(self, task: Task) -> int:
        """None to do."""
        return 0

    def prepare(self, task: Task, rng: Rng) -> Workspace:
        """The task and its source."""
        return Workspace(task, task.source)

    def init(self, task: Task, rng: Rng) -> SubsetState:
        """The selection at `task.ipc` images per class."""
        return SubsetState(0, SELECTIONS[self.selection](task.source, task.ipc, rng.fold("start")))

    def step(self, state: SubsetState, work: Workspace, rng: Rng) -> tuple[SubsetState, Metrics]:
        """The pick is final: the same state."""
        return state, {}

    def finish(self, state: SubsetState, work: Workspace, rng: Rng) -> SynthSet:
        """A uint8 copy of the chosen images, their labels and their indices."""
        return Subset.of(work.data, state.indices)

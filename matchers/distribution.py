"""Distribution matching (DM, Zhao and Bilen, WACV 2023): mean embeddings of classes over fresh networks.

    L = scale * sum_k |mean psi(A(real_k)) - mean psi(A(syn_k))|^2

psi is the flattened trunk of a randomly drawn network (a sum over its dimensions, not a mean), A one siamese
augmentation a class. Pixel SGD, rate 1 (10 from 100 images per class on), momentum .5, 256 real images a
class, 20,000 steps. Published, CIFAR-10, ConvNet-3: 26.0 / 48.9 / 63.0 % at 1 / 10 / 50 images per class.
It is attention matching without its attention term: the same step, the same draws, the same bits.
"""

from dataclasses import dataclass

from torch import Tensor

from ddengine.errors import require_positive
from ddengine.nets.core import NetSpec, Network
from ddengine.rng import Rng
from ddengine.types import Accepts, Metrics, SynthSet, Task, Workspace
from expert_buffers.segment import Window
from matchers import descent
from matchers.attention import image_statistics, mmd_term
from matchers.descent import PixelState
from matchers.descent_options import check_options, width_factor
from matchers.parametrised import FormOptions


@dataclass(frozen=True)
class DistributionOptions:
    """Options of the `distribution` matcher; the meanings are those of attention matching."""

    steps: int = 20000
    scale: float | int = 1.0
    follow_width: bool = True
    real_per_class: int = 256
    lr: float | int = 1.0
    momentum: float | int = 0.5
    schedule: str = "constant"
    augment: str = "auto"
    start: str = "real"
    networks: str = "random"
    window: Window = Window()
    networks_per_step: int = 1
    chunk: int = 128
    codec: str = "uint8"
    synth: FormOptions = FormOptions()
    compile: str = "auto"
    bank: str = "off"
    bank_reuse: int = 5
    bank_real: int | None = None

    def __post_init__(self) -> None:
        require_positive("matcher.scale", self.scale)
        check_options(self)


@dataclass(frozen=True)
class DistributionMatching:
    """Distribution matching of pixels over freshly drawn networks (see the head of this file)."""

    options: DistributionOptions = DistributionOptions()
    network: NetSpec = NetSpec()

    @property
    def accepts(self) -> Accepts:
        """Images, and experts with `networks` "buffer"."""
        return descent.accepted(self.options)

    def steps(self, task: Task) -> int:
        """Descent steps: the option."""
        return self.options.steps

    def prepare(self, task: Task, rng: Rng) -> Workspace:
        """Data, one network and its embedding on the device."""
        measured = {"p": None, "layers": ()}
        return descent.workspace(task, self.network, self.options, self.options.steps, _embedding, measured)

    def init(self, task: Task, rng: Rng) -> PixelState:
        """Pixels at the chosen start, at rest."""
        return descent.start(task, rng, self.options)

    def step(self, state: PixelState, work: Workspace, rng: Rng) -> tuple[PixelState, Metrics]:
        """One descent on the squared distance of class mean embeddings."""

        def loss(real: list[Tensor], synthetic: list[Tensor]) -> Tensor:
            factor = width_factor(real[0].shape[1], self.options.follow_width)
            return self.options.scale * factor * mmd_term(real[0], synthetic[0])

        return descent.step(state, work, rng, self.options, self.options.steps, loss)

    def finish(self, state: PixelState, work: Workspace, rng: Rng) -> SynthSet:
        """The set as it stands; it is quantised when it is packed."""
        return state.synth


def _embedding(net: Network, x: Tensor) -> list[Tensor]:
    return [image_statistics(net, x, layers=())[1]]

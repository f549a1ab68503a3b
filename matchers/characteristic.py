"""Characteristic function matching (NCFM, Wang et al., CVPR 2025): the whole distribution of embeddings.

The empirical characteristic function of embeddings phi_i of unit length at a frequency t is the mean of
exp(j t.phi_i). Real and synthetic images should have the same one at frequencies drawn from N(0, I):

    L = scale * sum_k mean_t sqrt( alpha (|R| - |S|)^2 + 2 beta (|R| |S| - Re R Re S - Im R Im S) )

with R, S the functions of class k's real and synthetic images at t: a term of amplitude, how diverse the
images are, and one of phase, how realistic. At alpha = beta = 1/2 the root is |R - S| / sqrt(2).
Published, CIFAR-10, ConvNet-3, factor 2, with soft labels: 49.5 / 71.8 / 77.4 % at 1 / 10 / 50 images per
class, best on test; 65.6 % at 10 without the sampler and soft labels. Of the paper these parts are not here:
the network that learns where to sample frequencies, blends of fresh and trained networks (`networks` are
drawn anew, or come from a buffer), calibration by a finished network's cross-entropy, AdamW on the pixels.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ddengine.errors import UsageError, require_positive
from ddengine.nets import build, resolve
from ddengine.nets.core import NetSpec, Network
from ddengine.rng import Rng
from ddengine.types import Accepts, Metrics, SynthSet, Task, Workspace
from expert_buffers.segment import Window
from matchers import descent
from matchers.attention import image_statistics
from matchers.descent import PixelState
from matchers.descent_options import check_options
from matchers.parametrised import FormOptions

EPSILON = 1e-12  # under the root, whose slope is infinite at 0; above what float32 rounds |R - S|^2 to


def characteristic_function(x: Float[Tensor, "n d"], t: Float[Tensor, "q d"]) -> Float[Tensor, "2 q"]:
    """Real and imaginary part of the mean over x of exp(j t.x): what samples say of their distribution."""
    angle = x @ t.T
    return torch.stack([angle.cos().mean(0), angle.sin().mean(0)])


def discrepancy(
    real: Float[Tensor, "2 *q"],
    synthetic: Float[Tensor, "2 *q"],
    alpha: float | int = 0.5,
    beta: float | int = 0.5,
) -> Float[Tensor, "*q"]:
    """sqrt(alpha (|R| - |S|)^2 + 2 beta (|R| |S| - Re R Re S - Im R Im S) + e) - sqrt(e), e = 1e-12.

    Real and imaginary parts come first. 0 where R = S, with a finite slope. Source: NCFM, eqs. 4-6.
    """
    amplitude = (_length(real) - _length(synthetic)).square()
    # |R - S|^2 is the sum of both terms at weight 1, and does not cancel where R is near S
    squared = beta * (real - synthetic).square().sum(0) + (alpha - beta) * amplitude
    return (squared + EPSILON).sqrt() - math.sqrt(EPSILON)


def _length(parts: Float[Tensor, "2 *q"]) -> Float[Tensor, "*q"]:
    return torch.linalg.vector_norm(parts, dim=0)  # whose slope at 0 is 0, where that of a root is not finite


def characteristic_loss(
    real: Float[Tensor, "n d"],
    synthetic: Float[Tensor, "m d"],
    t: Float[Tensor, "q d"],
    alpha: float | int = 0.5,
    beta: float | int = 0.5,
) -> Float[Tensor, ""]:
    """Mean over frequencies t of the `discrepancy` of two samples: 0 for equal ones, in any order.

    At the default weights it is at most sqrt(2). Source: NCFM, eqs. 4-6. Raises UsageError where dimensions
    differ, a sample or t is empty, or a weight is negative.
    """
    if len({real.shape[1], synthetic.shape[1], t.shape[1]}) > 1 or not min(len(real), len(synthetic), len(t)):
        shapes = ", ".join(str(list(x.shape)) for x in (real, synthetic, t))
        raise UsageError(f"samples and frequencies of shapes {shapes}", "Give rows of as many numbers each")
    for key, value in (("alpha", alpha), ("beta", beta)):
        require_positive(key, value, zero=True)
    r, s = (characteristic_function(x, t) for x in (real, synthetic))
    return discrepancy(r, s, alpha, beta).mean()


class Frequencies:
    """`count` frequencies in `dimensions`, N(0, I), drawn anew in place for each network."""

    def __init__(self, count: int, dimensions: int, device: torch.device) -> None:
        self.t = torch.empty(count, dimensions, device=device)
        self.draw(Rng(0))

    def draw(self, rng: Rng) -> None:
        """Replace all of them by those of the stream `rng`."""
        self.t.copy_(torch.randn(self.t.shape, generator=rng.torch("frequencies")))

    def statistics(self, net: Network, x: Float[Tensor, "n c h w"]) -> list[Tensor]:
        """Per image the real and imaginary parts [n q] at these frequencies, in float32."""
        embedding = image_statistics(net, x, layers=())[1]
        with torch.autocast(x.device.type, enabled=False):
            angle = F.normalize(embedding, dim=1) @ self.t.to(embedding).T
            return [angle.cos(), angle.sin()]


@dataclass(frozen=True)
class CharacteristicOptions:
    """Options of the `characteristic` matcher: `frequencies` drawn for each network, and `alpha`, the weight
    of amplitudes, with 1 - alpha for phases. The meanings of the others are those of attention matching.

    The paper's rate is AdamW's; `lr` is of SGD, where .3, 1 and 3 are alike on digits and 10 is too much.
    """

    steps: int = 20000
    frequencies: int = 1024
    alpha: float | int = 0.5
    scale: float | int = 300.0
    real_per_class: int = 1024
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
        require_positive("matcher.frequencies", self.frequencies)
        if not isinstance(self.frequencies, int):
            raise UsageError(
                f"matcher.frequencies={self.frequencies} is not a whole number", "Give a whole number"
            )
        if not 0 <= self.alpha <= 1:
            raise UsageError(f"matcher.alpha={self.alpha} is out of range", "Give 0 <= alpha <= 1")
        check_options(self)


@dataclass(frozen=True)
class CharacteristicMatching:
    """Characteristic function matching of pixels over drawn networks (see the head of this file)."""

    options: CharacteristicOptions = CharacteristicOptions()
    network: NetSpec = NetSpec()

    @property
    def accepts(self) -> Accepts:
        """Images, and experts with `networks` "buffer"."""
        return descent.accepted(self.options)

    def steps(self, task: Task) -> int:
        """Descent steps: the option."""
        return self.options.steps

    def prepare(self, task: Task, rng: Rng) -> Workspace:
        """Data, one network and room for its frequencies on the device."""
        o = self.options
        drawn = Frequencies(o.frequencies, _dimensions(task, self.network), task.device)
        measured = {"frequencies": o.frequencies}
        work = descent.workspace(task, self.network, o, o.steps, drawn.statistics, measured)
        work.extra["on_draw"] = drawn.draw
        return work

    def init(self, task: Task, rng: Rng) -> PixelState:
        """Pixels at the chosen start, at rest."""
        return descent.start(task, rng, self.options)

    def step(self, state: PixelState, work: Workspace, rng: Rng) -> tuple[PixelState, Metrics]:
        """One descent on the discrepancy of class characteristic functions at fresh frequencies."""
        o = self.options

        def loss(real: list[Tensor], synthetic: list[Tensor]) -> Tensor:
            r, s = (torch.stack(parts) for parts in (real, synthetic))
            return o.scale * discrepancy(r, s, o.alpha, 1 - o.alpha).mean(1).sum()

        return descent.step(state, work, rng, o, o.steps, loss)

    def finish(self, state: PixelState, work: Workspace, rng: Rng) -> SynthSet:
        """The set as it stands; it is quantised when it is packed."""
        return state.synth


@torch.no_grad()
def _dimensions(task: Task, network: NetSpec) -> int:
    """Dimensions of the network's embedding of one image."""
    spec = task.images.spec
    net = build(resolve(network, spec.shape), spec.shape, len(spec.classes), Rng(0).torch("weights")).eval()
    return image_statistics(net, torch.zeros(1, *spec.shape), layers=())[1].shape[1]  # type: ignore[arg-type]

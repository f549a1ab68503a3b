"""Attention matching (DataDAM, Sajedi et al., ICCV 2023).

Per class, the mean normalised spatial attention of every ReLU layer but the last and the mean embedding of
the synthetic images follow those of real images, over freshly drawn networks:

    L = scale * sum_k ( sum_l |mean z_l(real_k) - mean z_l(syn_k)|^2
                        + mmd_weight * |mean psi(real_k) - mean psi(syn_k)|^2 )

with z = vec(sum_c |f_c|^p) / |.|_2 per image (eqs. 1-4) and psi the flattened pooled trunk. The paper's
weight of the second term is .01 at low resolution; its pixel rate 1 belongs to scale 100, so that the second
term is exactly distribution matching (Zhao and Bilen 2023). Published, CIFAR-10, ConvNet-3 of width 128:
32.0 / 54.2 / 67.0 % at 1 / 10 / 50 images per class, best of 11 checkpoints on test; ours are in the README,
chosen on validation.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ddengine.errors import UsageError, require, require_positive
from ddengine.nets.core import NetSpec, Network
from ddengine.ops import instance_block
from ddengine.rng import Rng
from ddengine.types import Accepts, Metrics, SynthSet, Task, Workspace
from expert_buffers.segment import Window
from matchers import descent
from matchers.descent import PixelState
from matchers.descent_options import check_options, width_factor
from matchers.parametrised import FormOptions


class Statistics(NamedTuple):
    """Class means: `maps[l]` [k hw_l] of the normalised attention of layer l, and `embedding` [k d]."""

    maps: tuple[Tensor, ...]
    embedding: Tensor


def attention_map(f: Float[Tensor, "n c h w"], p: float | int = 4) -> Float[Tensor, "n h*w"]:
    """Spatial attention of feature maps: sum over channels of |f|^p, flattened, of unit L2 norm per image.

    A map that is zero everywhere stays zero; scaling f by s > 0 changes nothing. Half precision is computed
    in float32. Source: DataDAM, eq. 1. Raises UsageError unless f has four axes and 1 <= p < infinity.
    """
    if f.ndim != 4:
        raise UsageError(f"feature maps of shape {tuple(f.shape)}", "Give maps of shape [n, c, h, w]")
    if not 1 <= p < math.inf:
        raise UsageError(
            f"attention power p={p}", "Give a finite p >= 1 (4 in the paper, 1 in the released code)"
        )
    f = f.float() if f.dtype in (torch.float16, torch.bfloat16) else f
    return _unit(_power(f, p).sum(1).flatten(1))


def _unit(sums: Float[Tensor, "n _"]) -> Float[Tensor, "n _"]:
    return F.normalize(_over_peak(sums), dim=1)


def _power(f: Tensor, p: float | int) -> Tensor:
    """|f|^p, up to a factor for each image: exact and fast where p is 1 or 4, without overflow elsewhere."""
    if p == 4:
        return f.square().square()
    return f.abs() if p == 1 else _over_peak(f.abs()).pow(p)


def _over_peak(x: Tensor) -> Tensor:
    """x over the largest value of each image, a factor that a unit norm takes out again."""
    peak = x.detach().flatten(1).amax(1)
    return x / torch.where(peak > 0, peak, 1).view(-1, *[1] * (x.ndim - 1))


def mmd_term(real: Float[Tensor, "k d"], synthetic: Float[Tensor, "k d"]) -> Float[Tensor, ""]:
    """Squared distance of class mean embeddings, summed over dimensions and classes (DM, DataDAM: eq. 4)."""
    _same_shape(real, synthetic)
    return (real - synthetic).square().sum()


def attention_matching_loss(
    real: Statistics,
    synthetic: Statistics,
    mmd_weight: float | int = 0.01,
    scale: float | int = 100,
    sam_weight: float | int = 1,
) -> Float[Tensor, ""]:
    """scale * (sam_weight * sum_l |maps_l real - synthetic|^2 + mmd_weight * |embedding real - synthetic|^2).

    Summed over classes. Source: DataDAM, eqs. 2-5. Raises UsageError when layers or shapes differ.
    """
    if len(real.maps) != len(synthetic.maps):
        raise UsageError(
            f"{len(real.maps)} real and {len(synthetic.maps)} synthetic attention layers",
            "Give the same layers",
        )
    sam = real.embedding.new_zeros(())
    for a, b in zip(real.maps, synthetic.maps, strict=True):
        _same_shape(a, b)
        sam = sam + (a - b).square().sum()
    return scale * (sam_weight * sam + mmd_weight * mmd_term(real.embedding, synthetic.embedding))


def _same_shape(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape:
        raise UsageError(
            f"real statistics {tuple(a.shape)} against synthetic {tuple(b.shape)}",
            "Give the same classes and layers",
        )


def image_statistics(
    net: Network, x: Float[Tensor, "n c h w"], p: float | int = 4, layers: Sequence[int] | None = None
) -> tuple[list[Tensor], Tensor]:
    """Normalised attention [n hw_l] of each layer in `layers` (None: all ReLU layers but the last; () : none)
    and the embedding [n d], per image, float32 or wider.
    """
    if instance_block.applies(net, x, p):
        count = len(net.convs)  # type: ignore[attr-defined]
        wanted = tuple(range(count - 1)) if layers is None else tuple(layers)
        _check_layers(layers, count)
        embedding, sums = instance_block.features(net, x, p, wanted)  # type: ignore[arg-type]
        found_at = dict(zip(sorted(set(wanted)), map(_unit, sums), strict=True))
        return [found_at[layer] for layer in wanted], embedding

    def tap(level: int, f: Tensor) -> Tensor | None:
        return attention_map(f, p) if layers is None or level in layers else None

    found = net.features(x, None if layers is not None and not layers else tap)
    _check_layers(layers, len(found.taps))
    maps = found.taps[:-1] if layers is None else [found.taps[layer] for layer in layers]
    wide = (
        found.embedding.float()
        if found.embedding.dtype in (torch.float16, torch.bfloat16)
        else found.embedding
    )
    return maps, wide


def _check_layers(layers: Sequence[int] | None, count: int) -> None:
    if layers is not None and any(not 0 <= layer < count for layer in layers):
        raise UsageError(f"layers={tuple(layers)}", f"The network has ReLU layers 0 to {count - 1}")


# what the two published forms differ in: the paper's table, and the authors' released code (also batch norm
# in train mode, where the paper has the instance norm that is ConvNet's default)
VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {"p": 4.0, "steps": 8000, "real_per_class": 128, "schedule": "constant"},
    "released": {"p": 1.0, "steps": 20000, "real_per_class": 64, "schedule": "drop"},
}


@dataclass(frozen=True)
class AttentionOptions:
    """Options of the `attention` matcher; None means the value of `variant` (see VARIANTS).

    `lr` is the pixel rate at `scale` 100 and `schedule` its course (constant, cosine, drop); `layers` are
    numbers of ReLU layers (None: all but the last); `augment` a DSA string, "auto" the papers' (no flip on
    digits); `networks` are "random" (drawn anew) or come from a "buffer" of experts at epochs of `window`;
    `chunk` bounds the images in one forward, so that memory grows neither with classes nor with the
    batch; the gradient is averaged over `networks_per_step` fresh networks; `follow_width` weights the
    embedding term, a sum over its d dimensions, by 2048 / d, so that narrow networks keep the published
    balance of the two terms; `synth` says what is free: pixels, or bases and compensators; `compile` is on,
    off, or auto: on in long runs on a GPU. With `bank` "on" a pair of network and
    augmentation serves `bank_reuse` steps, and its real targets, of `bank_real` images a class (None:
    `real_per_class`), are computed once and kept (see `matchers.target_bank`).
    """

    variant: str = "paper"
    steps: int | None = None
    p: float | int | None = None
    layers: tuple[int, ...] | None = None
    sam_weight: float | int = 1.0
    mmd_weight: float | int = 0.01
    follow_width: bool = True
    scale: float | int = 100.0
    real_per_class: int | None = None
    lr: float | int = 1.0
    momentum: float | int = 0.5
    schedule: str | None = None
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
        require(self.variant, VARIANTS, "matcher.variant")
        for key in ("sam_weight", "mmd_weight"):
            require_positive(f"matcher.{key}", getattr(self, key), zero=True)
        require_positive("matcher.scale", self.scale)
        if self.p is not None and not 1 <= self.p < math.inf:
            raise UsageError(
                f"matcher.p={self.p} is out of range",
                "Give a finite p >= 1 (4: the paper, 1: the released code)",
            )
        check_options(self)

    def resolved(self) -> "AttentionOptions":
        """The same options with the variant's values filled in."""
        values = VARIANTS[self.variant]
        missing = {
            f.name: values[f.name] for f in fields(self) if f.name in values and getattr(self, f.name) is None
        }
        return replace(self, **missing)


@dataclass(frozen=True)
class AttentionMatching:
    """Attention matching of pixels over freshly drawn networks (see the head of this file)."""

    options: AttentionOptions = AttentionOptions()
    network: NetSpec = NetSpec()

    @property
    def accepts(self) -> Accepts:
        """Images, and experts with `networks` "buffer"."""
        return descent.accepted(self.options)

    def __post_init__(self) -> None:
        """Fill in what the variant decides, so that a manifest tells what was really used."""
        object.__setattr__(self, "options", self.options.resolved())
        if self.options.variant == "released" and self.network.norm is None:
            object.__setattr__(self, "network", replace(self.network, norm="batch"))

    def steps(self, task: Task) -> int:
        """Descent steps: the option, or the variant's 8,000 or 20,000."""
        return int(self.options.steps or 0)

    def prepare(self, task: Task, rng: Rng) -> Workspace:
        """Data, one network and its statistics on the device."""
        o = self.options
        p, layers = o.p or 4, o.layers if o.sam_weight else ()

        def statistics(net: Network, x: Tensor) -> list[Tensor]:
            maps, embedding = image_statistics(net, x, p, layers)
            return [*maps, embedding]

        measured = {"p": float(p) if layers != () else None, "layers": layers}
        return descent.workspace(task, self.network, o, self.steps(task), statistics, measured)

    def init(self, task: Task, rng: Rng) -> PixelState:
        """Pixels at the chosen start, at rest."""
        return descent.start(task, rng, self.options)

    def step(self, state: PixelState, work: Workspace, rng: Rng) -> tuple[PixelState, Metrics]:
        """One descent on the attention matching loss of `networks_per_step` fresh networks."""
        o = self.options

        def loss(real: list[Tensor], synthetic: list[Tensor]) -> Tensor:
            pair = [Statistics(tuple(s[:-1]), s[-1]) for s in (real, synthetic)]
            weight = o.mmd_weight * width_factor(real[-1].shape[1], o.follow_width)
            return attention_matching_loss(pair[0], pair[1], weight, o.scale, o.sam_weight)

        return descent.step(state, work, rng, o, self.steps(work.task), loss)

    def finish(self, state: PixelState, work: Workspace, rng: Rng) -> SynthSet:
        """The set as it stands; it is quantised when it is packed."""
        return state.synth

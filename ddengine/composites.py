"""Composites: base images and their sums with shared compensators, made when they are asked for.

Image v * b + i is base i for v = 0 and base i plus compensator v - 1 of its group for v = 1..m, so that b
bases and g * m compensators stand for n = b * (m + 1) images (INFER, Zhang et al. 2024).
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ddengine.errors import UsageError
from ddengine.types import DataSpec, Images


@dataclass(frozen=True)
class Composites:
    """What trains a network in place of `Images`, without the memory of all its images.

    `bases` [b c h w] are uint8 pixels, with `compensators` [g m c h w] in units of pixels in [0, 1] and sums
    clipped to [0, 1]; or floats in model-input space, with compensators there too and nothing clipped.
    `group` says which of the g groups a base is in; `y` has a class number [n] or a row of probabilities or
    logits [n k] (`y_kind`) for each composite. Raises UsageError where shapes disagree.
    """

    bases: Tensor
    compensators: Float[Tensor, "g m c h w"]
    group: Int[Tensor, " b"]
    y: Tensor
    spec: DataSpec
    y_kind: str = "class"

    def __post_init__(self) -> None:
        b, (g, m) = len(self.bases), self.compensators.shape[:2]
        shapes = {tuple(self.bases.shape[1:]), tuple(self.compensators.shape[2:]), self.spec.shape}
        if len(shapes) > 1 or len(self.group) != b or len(self.y) != b * (m + 1):
            raise UsageError(
                f"{b} bases, {g} x {m} compensators, {len(self.group)} groups and {len(self.y)} labels",
                "Give one group for each base, one label for each composite, and images of one shape",
            )
        if b and not 0 <= int(self.group.min()) <= int(self.group.max()) < max(g, 1):
            raise UsageError(f"groups outside 0..{g - 1}", "Give each base the number of its group")

    def __len__(self) -> int:
        return len(self.y)

    @property
    def classes(self) -> Int[Tensor, " n"]:
        """Hard class of each composite: the label, or the largest soft label."""
        return self.y if self.y_kind == "class" else self.y.argmax(1)

    def model_input(self, index: Tensor | slice | None = None) -> Float[Tensor, "n c h w"]:
        """The chosen composites in model-input space; differentiable in float bases and in compensators."""
        every = torch.arange(len(self), device=self.bases.device)
        chosen = every if index is None else every[index]
        base, variant = chosen % len(self.bases), chosen // len(self.bases)
        x = self.bases[base]
        pixels = x.dtype == torch.uint8
        x = x.float() / 255 if pixels else x
        added = (variant > 0).nonzero().squeeze(1)
        if len(added):
            u = self.compensators[self.group[base[added]], variant[added] - 1]
            moved = x[added] + u
            x = x.index_copy(0, added, moved.clamp(0, 1) if pixels else moved)
        return self.spec.normalise(x) if pixels else x

    def take(self, index: Int[Tensor, " n"]) -> Images:
        """The chosen composites as images in model-input space."""
        return Images(self.model_input(index), self.y[index.to(self.y.device)], self.spec, self.y_kind)

    def to(self, device: torch.device | str) -> "Composites":
        """The same composites on `device`."""
        moved = {key: getattr(self, key).to(device) for key in ("bases", "compensators", "group", "y")}
        return replace(self, **moved)


def in_pixels(u: Float[Tensor, "v c h w"], spec: DataSpec) -> Float[Tensor, "v c h w"]:
    """What is added in model-input space, as what is added to pixels in [0, 1]."""
    return spec.denormalise(u) - spec.denormalise(torch.zeros_like(u))

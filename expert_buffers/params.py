"""A network's parameters as one flat vector, and back: the layout that expert trajectories are stored in."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ddengine.errors import ArtefactError, UsageError

ENTRIES, ELEMENTS = 1 << 16, 1 << 34  # limits of a stored layout, far above any network's


@dataclass(frozen=True)
class ParamSpec:
    """Names and shapes of a network's parameters or statistics in registration order.

    Offsets in the vector follow from them. A layout without tensors is the empty vector.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @staticmethod
    def of(net: nn.Module) -> "ParamSpec":
        """The layout of `net`."""
        named = list(net.named_parameters())
        return ParamSpec(tuple(name for name, _ in named), tuple(tuple(p.shape) for _, p in named))

    @staticmethod
    def of_buffers(net: nn.Module) -> "ParamSpec":
        """The layout of the statistics of `net`: its buffers, which only batch norm has."""
        named = list(net.named_buffers())
        return ParamSpec(tuple(name for name, _ in named), tuple(tuple(b.shape) for _, b in named))

    @staticmethod
    def from_json(value: Any) -> "ParamSpec":
        """The layout that `to_json` gave; ArtefactError for anything else."""
        if not (type(value) is list and len(value) <= ENTRIES and all(_is_entry(item) for item in value)):
            raise ArtefactError("a layout is not a list of names and shapes", "Restore it from a copy")
        spec = ParamSpec(tuple(name for name, _ in value), tuple(tuple(shape) for _, shape in value))
        if len(set(spec.names)) < len(spec.names) or sum(spec.sizes) > ELEMENTS:
            raise ArtefactError("a layout has a name twice or is too large", "Restore it from a copy")
        return spec

    def to_json(self) -> list[list[Any]]:
        """A list of [name, shape], plain JSON."""
        return [[name, list(shape)] for name, shape in zip(self.names, self.shapes, strict=True)]

    @property
    def sizes(self) -> list[int]:
        """Numbers of elements, in order."""
        return [math.prod(shape) for shape in self.shapes]

    def flatten(self, params: Mapping[str, Tensor]) -> Float[Tensor, " p"]:
        """The vector of `params`, differentiable; counters among statistics become float32, exact below 2^24.

        UsageError when names or shapes are not this layout's.
        """
        found = {name: tuple(p.shape) for name, p in params.items()}
        if found != dict(zip(self.names, self.shapes, strict=True)):
            raise UsageError(
                "the parameters are not of this layout", "Use a network of the same architecture"
            )
        parts = [params[name].reshape(-1) for name in self.names]
        return torch.cat(
            [part if part.is_floating_point() else part.float() for part in parts] or [torch.empty(0)]
        )

    def unflatten(self, vector: Float[Tensor, " p"]) -> dict[str, Tensor]:
        """Views of a vector [p] by name, differentiable. UsageError when its length is not p."""
        if vector.shape != (sum(self.sizes),):
            raise UsageError(
                f"a vector of shape {tuple(vector.shape)} for {sum(self.sizes)} parameters",
                "Use a network of the same architecture",
            )
        parts = vector.split(self.sizes) if self.names else ()
        return {n: part.view(shape) for n, part, shape in zip(self.names, parts, self.shapes, strict=True)}


def _is_entry(item: Any) -> bool:
    """Whether a JSON value is [name, shape] with a shape of small numbers."""
    if not (type(item) is list and len(item) == 2 and type(item[0]) is str and type(item[1]) is list):
        return False
    return len(item[1]) <= 8 and all(type(n) is int and 0 <= n < 1 << 32 for n in item[1])

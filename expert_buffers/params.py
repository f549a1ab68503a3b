"""A network's parameters as one flat vector, and back: the layout that expert trajectories are stored in."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ddengine.errors import UsageError


@dataclass(frozen=True)
class ParamSpec:
    """Names and shapes of a network's parameters in registration order; offsets follow from them."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @staticmethod
    def of(net: nn.Module) -> "ParamSpec":
        """The layout of `net`."""
        named = list(net.named_parameters())
        return ParamSpec(tuple(name for name, _ in named), tuple(tuple(p.shape) for _, p in named))

    @property
    def sizes(self) -> list[int]:
        """Numbers of elements, in order."""
        return [torch.Size(shape).numel() for shape in self.shapes]

    def flatten(self, params: Mapping[str, Tensor]) -> Float[Tensor, " p"]:
        """The vector of `params`, differentiable. UsageError when names or shapes are not this layout's."""
        found = {name: tuple(p.shape) for name, p in params.items()}
        if found != dict(zip(self.names, self.shapes, strict=True)):
            raise UsageError(
                "the parameters are not of this layout", "Use a network of the same architecture"
            )
        return torch.cat([params[name].reshape(-1) for name in self.names])

    def unflatten(self, vector: Float[Tensor, " p"]) -> dict[str, Tensor]:
        """Views of a vector [p] by name, differentiable. UsageError when its length is not p."""
        if vector.shape != (sum(self.sizes),):
            raise UsageError(
                f"a vector of shape {tuple(vector.shape)} for {sum(self.sizes)} parameters",
                "Use a network of the same architecture",
            )
        parts = vector.split(self.sizes)
        return {n: part.view(shape) for n, part, shape in zip(self.names, parts, self.shapes, strict=True)}

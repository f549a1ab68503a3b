"""MLP of the distillation papers' cross-architecture tables: three linear layers of width 128."""

import math
from itertools import pairwise
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from ddengine.nets.core import Features, Tap, check_input


class MLP(nn.Module):
    """`depth` linear layers, ReLU between them; `depth` 1 is multinomial logistic regression."""

    @staticmethod
    def defaults(shape: tuple[int, int, int]) -> dict[str, Any]:
        """Options that this network has, and what they are for images of `shape` where nothing is given."""
        return {"width": 128, "depth": 3}

    def __init__(self, shape: tuple[int, int, int], classes: int, width: int, depth: int) -> None:
        super().__init__()
        self.shape = shape
        sizes = [math.prod(shape), *[width] * (depth - 1)]
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.classifier = nn.Linear(sizes[-1], classes)

    def features(self, x: Float[Tensor, "n c h w"], tap: Tap | None = None) -> Features:
        """What the last layer reads [n d] and `tap(level, map)` of each hidden layer, a map [n width 1 1]."""
        check_input(x, self.shape)
        z, taps = x.flatten(1), []
        for level, layer in enumerate(self.hidden):
            z = layer(z).relu()
            if tap is not None:
                taps.append(tap(level, z[:, :, None, None]))
        return Features(z, taps)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k"]:
        """Logits."""
        return self.classifier(self.features(x).embedding)

"""LeNet, AlexNet and VGG11 in the small-image forms of dataset condensation (DC, Zhao et al. 2021).

The embedding is what the last linear layer reads. The papers' nets are fixed to 28 and 32 pixels; the rules
that fit them to other sizes are stated with each class and leave those two sizes as published.
"""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ddengine.nets.core import Features, Tap, check_input, grows, normalisation

UNPADDED_FROM = 20  # pixels at which two unpadded 5x5 convolutions and poolings leave a 2x2 map


class LeNet(nn.Module):
    """Two [conv 5x5 - ReLU - max pool 2] of 6 and 16 channels, then linear layers of 120, 84 and `classes`.

    Convolutions are unpadded, but for the first on 28-pixel grey images and both under 20 pixels (by 2).
    """

    @staticmethod
    def defaults(shape: tuple[int, int, int]) -> dict[str, Any]:
        """LeNet has no options."""
        return {}

    def __init__(self, shape: tuple[int, int, int], classes: int) -> None:
        super().__init__()
        self.shape = shape
        small = min(shape[1:]) < UNPADDED_FROM
        paddings = (2 if small or grows(shape) else 0, 2 if small else 0)
        sides = list(shape[1:])
        for padding in paddings:
            sides = [(side + 2 * padding - 4) // 2 for side in sides]
        self.conv1 = nn.Conv2d(shape[0], 6, 5, padding=paddings[0])
        self.conv2 = nn.Conv2d(6, 16, 5, padding=paddings[1])
        self.linear1 = nn.Linear(16 * sides[0] * sides[1], 120)
        self.linear2 = nn.Linear(120, 84)
        self.classifier = nn.Linear(84, classes)

    def features(self, x: Float[Tensor, "n c h w"], tap: Tap | None = None) -> Features:
        """What the last layer reads [n 84], `tap(level, map)` of the 4 ReLU maps (linear ones [n d 1 1])."""
        check_input(x, self.shape)
        first = self.conv1(x).relu()
        second = self.conv2(F.max_pool2d(first, 2)).relu()
        third = self.linear1(F.max_pool2d(second, 2).flatten(1)).relu()
        fourth = self.linear2(third).relu()
        maps = (first, second, third[:, :, None, None], fourth[:, :, None, None])
        return Features(fourth, [] if tap is None else [tap(level, z) for level, z in enumerate(maps)])

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k"]:
        """Logits."""
        return self.classifier(self.features(x).embedding)


class AlexNet(nn.Module):
    """Five [conv - norm - ReLU] of width x (1, 1.5, 2, 1.5, 1.5), max pool 2 after 1, 2 and 5.

    Kernels are 5, 5, 3, 3, 3; one linear layer follows. The first convolution pads 28-pixel grey images
    to 32. Images too small for a pooling go without it (see `pooling`).
    """

    @staticmethod
    def defaults(shape: tuple[int, int, int]) -> dict[str, Any]:
        """Options that this network has, and what they are for images of `shape` where nothing is given."""
        return {"width": 128, "norm": "none"}

    def __init__(self, shape: tuple[int, int, int], classes: int, width: int, norm: str) -> None:
        super().__init__()
        self.shape = shape
        channels = [max(1, width * ratio // 2) for ratio in (2, 3, 4, 3, 3)]
        self.convs = _convolutions(shape, channels, (5, 5, 3, 3, 3))
        self.norms = nn.ModuleList(normalisation(norm, c) for c in channels)
        self.pools, last = pooling(shape, (True, True, False, False, True))
        self.classifier = nn.Linear(channels[-1] * last, classes)

    def features(self, x: Float[Tensor, "n c h w"], tap: Tap | None = None) -> Features:
        """Trunk output [n d] and `tap(level, map)` of each ReLU map (after the norm, before the pool)."""
        check_input(x, self.shape)
        return _plain_features(x, self.convs, self.norms, self.pools, tap)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k"]:
        """Logits."""
        return self.classifier(self.features(x).embedding)


class VGG11(nn.Module):
    """Eight [conv 3x3 - norm - ReLU] of width x (1, 2, 4, 4, 8, 8, 8, 8), max pool 2 after 1, 2, 4, 6 and 8.

    One linear layer follows. The first convolution pads 28-pixel grey images to 32. Images too small for a
    pooling go without it (see `pooling`).
    """

    @staticmethod
    def defaults(shape: tuple[int, int, int]) -> dict[str, Any]:
        """Options that this network has, and what they are for images of `shape` where nothing is given."""
        return {"width": 64, "norm": "instance"}

    def __init__(self, shape: tuple[int, int, int], classes: int, width: int, norm: str) -> None:
        super().__init__()
        self.shape = shape
        channels = [width * ratio for ratio in (1, 2, 4, 4, 8, 8, 8, 8)]
        self.convs = _convolutions(shape, channels, (3,) * 8)
        self.norms = nn.ModuleList(normalisation(norm, c) for c in channels)
        self.pools, last = pooling(shape, (True, True, False, True, False, True, False, True))
        self.classifier = nn.Linear(channels[-1] * last, classes)

    def features(self, x: Float[Tensor, "n c h w"], tap: Tap | None = None) -> Features:
        """Trunk output [n d] and `tap(level, map)` of each ReLU map (after the norm, before the pool)."""
        check_input(x, self.shape)
        return _plain_features(x, self.convs, self.norms, self.pools, tap)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k"]:
        """Logits."""
        return self.classifier(self.features(x).embedding)


def pooling(shape: tuple[int, int, int], wanted: Sequence[bool]) -> tuple[list[bool], int]:
    """Which of the `wanted` poolings (one flag a convolution) an image of `shape` allows, and positions left.

    A pooling is left out where it would leave the next convolution a side of one pixel, because instance
    norm of a single value is constant; the last may pool to one pixel.
    """
    sides = [side + 4 * grows(shape) for side in shape[1:]]
    pools = []
    for level, pool in enumerate(wanted):
        least = 2 if level == len(wanted) - 1 else 4
        pools.append(pool and min(sides) >= least)
        sides = [side // 2 for side in sides] if pools[-1] else sides
    return pools, sides[0] * sides[1]


def _convolutions(
    shape: tuple[int, int, int], channels: Sequence[int], kernels: Sequence[int]
) -> nn.ModuleList:
    convs, before = nn.ModuleList(), shape[0]
    for level, (after, kernel) in enumerate(zip(channels, kernels, strict=True)):
        extra = 2 if level == 0 and grows(shape) else 0
        convs.append(nn.Conv2d(before, after, kernel, padding=kernel // 2 + extra))
        before = after
    return convs


def _plain_features(
    x: Tensor, convs: nn.ModuleList, norms: nn.ModuleList, pools: Sequence[bool], tap: Tap | None
) -> Features:
    taps = []
    for level, (conv, norm, pool) in enumerate(zip(convs, norms, pools, strict=True)):
        x = norm(conv(x)).relu()
        if tap is not None:
            taps.append(tap(level, x))
        x = F.max_pool2d(x, 2) if pool else x
    return Features(x.flatten(1), taps)

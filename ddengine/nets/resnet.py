"""ResNet-18 (He et al. 2016) from torchvision's basic blocks, with a small-image and a large-image stem."""

from functools import partial
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ddengine.nets.core import Features, Tap, check_input, normalisation

SMALL = 64  # pixels of the shorter side up to which the stem keeps the resolution


class ResNet18(nn.Module):
    """Stem, four stages of two basic blocks of width x (1, 2, 4, 8), global average pool, one linear layer.

    Up to 64 pixels the stem is a 3x3 convolution of stride 1; above, it is torchvision's 7x7 of stride 2 and
    max pool, and all weights have the names and shapes of torchvision's resnet18 (`fc` is `classifier`).
    A stage halves the map only while that leaves it more than one pixel.
    """

    @staticmethod
    def defaults(shape: tuple[int, int, int]) -> dict[str, Any]:
        """Options that this network has, and what they are for images of `shape` where nothing is given."""
        return {"width": 64, "norm": "batch"}

    def __init__(self, shape: tuple[int, int, int], classes: int, width: int, norm: str) -> None:
        super().__init__()
        self.shape = shape
        self.large = min(shape[1:]) > SMALL
        kernel, stride = (7, 2) if self.large else (3, 1)
        self.conv1 = nn.Conv2d(shape[0], width, kernel, stride, padding=kernel // 2, bias=False)
        self.bn1 = normalisation(norm, width)
        side = -(-min(shape[1:]) // 4) if self.large else min(shape[1:])
        channels = width
        for stage in range(4):
            stride = 2 if stage and side > 2 else 1
            side = -(-side // stride)
            self.add_module(f"layer{stage + 1}", _stage(channels, width << stage, stride, norm))
            channels = width << stage
        self.classifier = nn.Linear(channels, classes)

    def features(self, x: Float[Tensor, "n c h w"], tap: Tap | None = None) -> Features:
        """Trunk output [n d], `tap(level, map)` of the 17 ReLU maps: the stem's, then two of each block."""
        check_input(x, self.shape)
        taps: list[Any] = []

        def relu(z: Tensor) -> Tensor:
            z = z.relu()
            if tap is not None:
                taps.append(tap(len(taps), z))
            return z

        block: Any
        x = relu(self.bn1(self.conv1(x)))
        x = F.max_pool2d(x, 3, 2, padding=1) if self.large else x
        for stage in range(4):
            for block in self.get_submodule(f"layer{stage + 1}").children():
                inner = relu(block.bn1(block.conv1(x)))
                shortcut = x if block.downsample is None else block.downsample(x)
                x = relu(block.bn2(block.conv2(inner)) + shortcut)
        return Features(x.mean((2, 3)), taps)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k"]:
        """Logits."""
        return self.classifier(self.features(x).embedding)


def _stage(before: int, after: int, stride: int, norm: str) -> nn.Sequential:
    from torchvision.models.resnet import BasicBlock  # here, as importing torchvision takes seconds

    downsample = None
    if stride > 1 or before != after:
        downsample = nn.Sequential(
            nn.Conv2d(before, after, 1, stride, bias=False), normalisation(norm, after)
        )
    layer = partial(normalisation, norm)
    return nn.Sequential(
        BasicBlock(before, after, stride, downsample, norm_layer=layer),
        BasicBlock(after, after, norm_layer=layer),
    )

"""ConvNet-D, which the distillation papers share (DC, DSA, DM, MTT): D blocks of conv-norm-ReLU-pool."""

import math
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ddengine.errors import UsageError
from ddengine.nets.core import Features, Tap, check_input, grows, normalisation


def default_depth(size: int) -> int:
    """Blocks for images of `size` pixels: 3 at 28-32, 4 at 64, 5 at 128 (published), never under 2."""
    return max(2, round(math.log2(size)) - 2)


def _average_pool(x: Tensor) -> Tensor:
    """Means of 2x2 pixels [n c h/2 w/2], a last odd row or column left out.

    On the CPU as sums of halves, up to four times as fast as torch's kernel on contiguous maps: measured at a
    fifth of a training step of ConvNet-3 on 28x28 images.
    """
    if x.device.type != "cpu" or x.stride(1) == 1:  # channels innermost, where torch's is fast
        return F.avg_pool2d(x, 2)
    h, w = (side // 2 * 2 for side in x.shape[2:])
    up, down = x[:, :, :h, :w].unflatten(2, (-1, 2)).unbind(3)
    left, right = (up + down).unflatten(3, (-1, 2)).unbind(4)
    return (left + right) * 0.25


class ConvNet(nn.Module):
    """`depth` x [conv 3x3 (`width`) - norm - ReLU - average pool 2], then one linear layer.

    The first convolution pads by 3 on 28-pixel grey images, so that 28 becomes 32. A depth whose poolings
    leave nothing of the image is a UsageError.
    """

    @staticmethod
    def defaults(shape: tuple[int, int, int]) -> dict[str, Any]:
        """Options that this network has, and what they are for images of `shape` where nothing is given."""
        return {"width": 128, "depth": default_depth(min(shape[1:])), "norm": "instance"}

    def __init__(self, shape: tuple[int, int, int], classes: int, width: int, depth: int, norm: str) -> None:
        super().__init__()
        channels, height, width_px = shape
        self.shape = shape
        grow = 4 if grows(shape) else 0
        if (min(height, width_px) + grow) >> depth == 0:
            raise UsageError(
                f"network.depth={depth} halves {height}x{width_px} images to nothing",
                f"Give at most network.depth={(min(height, width_px) + grow).bit_length() - 1}",
            )
        self.convs, self.norms = nn.ModuleList(), nn.ModuleList()
        for level in range(depth):
            padding = 3 if level == 0 and grow else 1
            self.convs.append(nn.Conv2d(channels if level == 0 else width, width, 3, padding=padding))
            self.norms.append(normalisation(norm, width))
        last = ((height + grow) >> depth) * ((width_px + grow) >> depth)
        self.classifier = nn.Linear(width * last, classes)

    def features(self, x: Float[Tensor, "n c h w"], tap: Tap | None = None) -> Features:
        """Trunk output [n d] and `tap(level, map)` of each ReLU map (after the norm, before the pool)."""
        check_input(x, self.shape)
        taps = []
        for level, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = norm(conv(x)).relu()
            if tap is not None:
                taps.append(tap(level, x))
            x = _average_pool(x)
        return Features(x.flatten(1), taps)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k"]:
        """Logits."""
        return self.classifier(self.features(x).embedding)

"""A small vision transformer (Dosovitskiy et al. 2021): patches, pre-norm blocks, mean of the tokens."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ddengine.errors import UsageError
from ddengine.nets.core import Features, Tap, check_input

HEAD = 32  # dimensions of a head: width 128 has 4 heads
PATCH, GRID = 4, 16  # the smallest patch, and the most patches along a side


def patch_size(height: int, width: int) -> int:
    """Pixels of a patch: 4 up to 64-pixel images, doubled until no side has more than 16 patches."""
    patch = PATCH
    while -(-max(height, width) // patch) > GRID:
        patch *= 2
    return patch


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + perceptron(norm(x)) (GELU, factor 4).

    Attention is spelled out because PyTorch's fused kernels have no second derivative, which unrolled
    training needs.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Float[Tensor, "n t d"]) -> Float[Tensor, "n t d"]:
        """The tokens after this block."""
        x = x + self.attend(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))

    def attend(self, x: Float[Tensor, "n t d"]) -> Float[Tensor, "n t d"]:
        """Multi-head self-attention."""
        qkv = self.qkv(x).unflatten(2, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each [n heads t d/heads]
        weights = (q @ k.transpose(2, 3) * q.shape[3] ** -0.5).softmax(3)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


class ViT(nn.Module):
    """Linear patch embedding, learned positions, `depth` blocks of `width`, norm, mean, linear layer.

    Sides that the patch (see `patch_size`) does not divide are padded with zeros at the right and the bottom.
    Heads have 32 dimensions; a width under 64 has one head, and others must be a multiple of their number.
    """

    @staticmethod
    def defaults(shape: tuple[int, int, int]) -> dict[str, Any]:
        """Options that this network has, and what they are for images of `shape` where nothing is given."""
        return {"width": 128, "depth": 6}

    def __init__(self, shape: tuple[int, int, int], classes: int, width: int, depth: int) -> None:
        super().__init__()
        self.shape = shape
        heads = max(1, width // HEAD)
        if width % heads:
            raise UsageError(
                f"network.width={width} does not divide into {heads} heads",
                f"Give a multiple of {HEAD}, for example network.width={heads * HEAD}",
            )
        patch = patch_size(*shape[1:])
        self.padding = (0, -shape[2] % patch, 0, -shape[1] % patch)
        tokens = -(-shape[1] // patch) * -(-shape[2] // patch)
        self.embed = nn.Conv2d(shape[0], width, patch, stride=patch)
        self.position = nn.Parameter(torch.empty(1, tokens, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, classes)

    def features(self, x: Float[Tensor, "n c h w"], tap: Tap | None = None) -> Features:
        """Mean of the normalised tokens [n width], `tap(level, map)` of the token grid after each block."""
        check_input(x, self.shape)
        grid = self.embed(F.pad(x, self.padding))  # [n width rows columns]
        tokens, taps = grid.flatten(2).transpose(1, 2) + self.position, []
        for level, block in enumerate(self.blocks):
            tokens = block(tokens)
            if tap is not None:
                taps.append(tap(level, tokens.transpose(1, 2).unflatten(2, grid.shape[2:])))
        return Features(self.norm(tokens).mean(1), taps)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k"]:
        """Logits."""
        return self.classifier(self.features(x).embedding)

"""A network of one's own: it is told the shape of an image (c, h, w) and the number of classes."""

import math

from torch import nn


class SmallNet(nn.Module):
    """Two layers; the engine draws its initial weights anew from a seed of its own."""

    def __init__(self, shape, classes):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), 64), nn.ReLU())
        self.head = nn.Linear(64, classes)

    def forward(self, x):
        """Logits."""
        return self.head(self.body(x))

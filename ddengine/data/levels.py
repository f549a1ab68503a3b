"""Grey levels counted channel by channel, and mean and std from the counts: exact in any order of images."""

from math import sqrt

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

FLOOR = 1 / 255  # a constant channel is scaled as if it varied by one grey level
CHUNK = 1 << 22  # pixels counted at a time
Statistics = tuple[tuple[float, ...], tuple[float, ...], tuple[str, ...]]


def level_counts(x: UInt8[Tensor, "n c h w"]) -> Int[Tensor, "c 256"]:
    """How many pixels of each channel have each of the 256 levels."""
    counts = torch.zeros(x.shape[1], 256, dtype=torch.int64)
    for channel in range(x.shape[1]):
        for piece in x[:, channel].split(max(1, CHUNK // x[0, 0].numel())):
            counts[channel] += torch.bincount(piece.flatten().int(), minlength=256)
    return counts


def statistics_of(counts: Int[Tensor, "c 256"]) -> Statistics:
    """Mean and population std of each channel of pixels in [0, 1], and a note for each constant channel.

    Computed from integer sums, so the order of images does not matter to the last bit.
    """
    level = torch.arange(256)
    means, stds, notes = [], [], []
    for channel, row in enumerate(counts):
        n, s1, s2 = (int((row * level**power).sum()) for power in (0, 1, 2))
        std = sqrt(n * s2 - s1 * s1) / n / 255
        if std == 0:
            notes.append(f"channel {channel} is constant over the fit part: its std is set to 1/255")
        means.append(s1 / n / 255)
        stds.append(std or FLOOR)
    return tuple(means), tuple(stds), tuple(notes)


def channel_statistics(x: UInt8[Tensor, "n c h w"]) -> Statistics:
    """`statistics_of` the levels of images."""
    return statistics_of(level_counts(x))

"""The six augmentation operators for one image, pixel by pixel, in Python floats.

An image is a float64 tensor [c h w]; each function takes the operator's numbers as plain values.
"""

import itertools
import math

import torch


def pixels(x):
    return itertools.product(*map(range, x.shape))


def color(x, brightness, saturation, contrast):
    c, h, w = x.shape
    out = x + (brightness - 0.5) * 1.0
    for i, j in itertools.product(range(h), range(w)):
        grey = sum(float(out[k, i, j]) for k in range(c)) / c
        for k in range(c):
            out[k, i, j] = (out[k, i, j] - grey) * (2 * saturation) + grey
    level = sum(float(out[at]) for at in pixels(out)) / (c * h * w)
    return (out - level) * (contrast + 0.5) + level


def crop(x, down, right):
    out = torch.zeros_like(x)
    for k, i, j in pixels(x):
        if 0 <= i + down < x.shape[1] and 0 <= j + right < x.shape[2]:
            out[k, i, j] = x[k, i + down, j + right]
    return out


def cutout(x, row, column):
    out = x.clone()
    height, width = (math.floor(side * 0.5 + 0.5) for side in x.shape[1:])
    for k, i, j in pixels(x):
        if 0 <= i - (row - height // 2) < height and 0 <= j - (column - width // 2) < width:
            out[k, i, j] = 0
    return out


def flip(x, flipped):
    out = x.clone()
    for k, i, j in pixels(x):
        out[k, i, j] = x[k, i, x.shape[2] - 1 - j] if flipped else x[k, i, j]
    return out


def warp(x, matrix):
    """Bilinear sampling at `matrix` applied to pixel centres (the image spans [-1, 1]); zeros outside."""
    h, w = x.shape[1:]
    out = torch.zeros_like(x)
    for i, j in itertools.product(range(h), range(w)):
        at_x, at_y = (2 * j + 1) / w - 1, (2 * i + 1) / h - 1
        from_x = matrix[0][0] * at_x + matrix[0][1] * at_y
        from_y = matrix[1][0] * at_x + matrix[1][1] * at_y
        column, row = ((from_x + 1) * w - 1) / 2, ((from_y + 1) * h - 1) / 2
        for r, s in itertools.product(
            (math.floor(row), math.floor(row) + 1), (math.floor(column), math.floor(column) + 1)
        ):
            if 0 <= r < h and 0 <= s < w:
                out[:, i, j] += x[:, r, s] * (1 - abs(row - r)) * (1 - abs(column - s))
    return out


def scale(x, factor_x, factor_y):
    return warp(x, [[factor_x, 0], [0, factor_y]])


def rotate(x, angle):
    return warp(x, [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])

"""What expert recipes add to SGD, number by number in Python floats."""

import itertools
import math


def norm(values):
    return math.sqrt(sum(v * v for v in values))


def gsam(gradient, w, rho, alpha):
    """g_p - alpha * g_orthogonal of adaptive GSAM; `gradient` maps a list of weights to a list."""
    g = gradient(w)
    length = norm([abs(a) * b for a, b in zip(w, g, strict=True)]) + 1e-12
    above = gradient([a + rho * a * a * b / length for a, b in zip(w, g, strict=True)])
    shadow = sum(a * b for a, b in zip(g, above, strict=True)) / norm(above) ** 2
    return [b - alpha * (a - shadow * b) for a, b in zip(g, above, strict=True)]


def gradient_penalty(total, x, step=1e-5):
    """Mean over images and pixels of (length over channels of d total / dx - 1)^2, by central differences."""
    n, c, h, w = x.shape
    found = 0.0
    for i, row, column in itertools.product(range(n), range(h), range(w)):
        slopes = []
        for channel in range(c):
            high, low = x.clone(), x.clone()
            high[i, channel, row, column] += step
            low[i, channel, row, column] -= step
            slopes.append((float(total(high)) - float(total(low))) / (2 * step))
        found += (norm(slopes) - 1) ** 2
    return found / (n * h * w)

"""The handwritten digits that come with scikit-learn: the set that every machine has."""

import torch
from torch import Tensor

from ddengine.data.decode import resize
from ddengine.data.source import Part, Request, Source

LICENCE = "BSD-3-Clause (scikit-learn copy of UCI Optical Recognition of Handwritten Digits, CC BY 4.0)"
LEVELS = 16  # the images count ink in 4x4 blocks: 0..16


def load_digits(request: Request) -> Source:
    """1,797 grey images of 8x8 pixels in 10 classes; a hashed fifth of each class is the test part."""
    from sklearn.datasets import load_digits as bundled

    images, labels = bundled(return_X_y=True)
    x: Tensor = torch.from_numpy(images).reshape(-1, 1, 8, 8)
    pixels = (x * 255 / LEVELS).round().to(torch.uint8)
    part = Part(resize(pixels, request.size), torch.from_numpy(labels).long())
    return Source(tuple("0123456789"), part, test_fraction=0.2, licence=LICENCE)

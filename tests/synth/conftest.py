"""What the tests of synthetic sets share: real digits, and sets of prime, unequal sizes."""

import shutil

import pytest
import torch
from sklearn.datasets import load_digits

from ddengine.types import DataSpec, Images
from synth import DistilledSet, Pixels

SHAPE, CLASSES = (3, 7, 5), ("ant", "bee", "cat", "dog", "elk")
COUNT = 11


@pytest.fixture(scope="session")
def digits() -> Images:
    """All 1,797 digits of scikit-learn, uint8, class-sorted."""
    bunch = load_digits()
    x = torch.from_numpy((bunch.images / 16 * 255).round()).to(torch.uint8)[:, None]
    spec = DataSpec("digits", (1, 8, 8), tuple("0123456789"), (0.3,), (0.37,), "f" * 64, "CC BY 4.0")
    return Images(x, torch.from_numpy(bunch.target).long(), spec).sorted_by_class()


@pytest.fixture(scope="session")
def spec() -> DataSpec:
    return DataSpec("small", SHAPE, CLASSES, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3), "a" * 64, "CC0-1.0")


@pytest.fixture(scope="session")
def pixels(spec) -> Pixels:
    g = torch.Generator().manual_seed(3)
    images = torch.randn((COUNT, *SHAPE), generator=g)
    return Pixels(images, torch.randint(0, len(CLASSES), (COUNT,), generator=g), spec, student_lr=0.0123)


@pytest.fixture(scope="session")
def pristine(pixels, tmp_path_factory):
    """A saved set of every optional part but whitening, to copy from."""
    made = DistilledSet.make(pixels, recipe={"lr": 0.01}, provenance={"seed": 5})
    return made.save(tmp_path_factory.mktemp("pristine") / "distilled")


@pytest.fixture
def saved(pristine, tmp_path):
    """A saved set that a test may damage; its folder."""
    return shutil.copytree(pristine, tmp_path / "distilled")

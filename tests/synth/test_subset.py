"""Real images as a synthetic set."""

from dataclasses import replace

import pytest
import torch
from jaxtyping import TypeCheckError

from ddengine.errors import UsageError
from ddengine.types import SynthSet
from synth import Subset


@pytest.fixture
def subset(digits) -> Subset:
    return Subset.of(digits, torch.tensor([1796, 0, 41, 500, 3]))


def test_a_subset_decodes_to_the_model_input_of_its_source(subset, digits):
    images = subset.decode(torch.tensor([0, 3]))
    assert torch.equal(images.x, digits.model_input(torch.tensor([1796, 500])))
    assert images.y.tolist() == [int(digits.y[1796]), int(digits.y[500])]
    assert len(subset.decode()) == 5 and images.x.dtype == torch.float32


def test_a_subset_has_nothing_free(subset):
    assert isinstance(subset, SynthSet) and subset.params() == {} and subset.replace({}) is subset
    with pytest.raises(UsageError, match="images"):
        subset.replace({"images": torch.zeros(5, 1, 8, 8)})


def test_nbytes_are_the_bytes_of_the_packed_tensors(subset):
    sizes = {name: t.numel() * t.element_size() for name, t in subset.pack().items()}
    expected = {"images": sizes["images"], "labels": sizes["labels"], "extras": sizes["indices"]}
    assert subset.nbytes == {**expected, "total": sum(sizes.values())} and sizes["images"] == 5 * 64


def test_packing_loses_nothing(subset):
    back = Subset.unpack(subset.pack(), {"y_kind": "class"}, subset.spec)
    for name in ("pixels", "indices", "labels"):
        assert torch.equal(getattr(back, name), getattr(subset, name))


def test_sources_that_hold_no_real_pixels_are_refused(digits):
    with pytest.raises(UsageError, match="float32"):
        Subset.of(replace(digits, x=digits.model_input()), torch.tensor([0]))


def test_indices_must_match_the_images(subset):
    with pytest.raises((UsageError, TypeCheckError), match="indices"):
        replace(subset, indices=torch.arange(4))
    with pytest.raises(UsageError, match="-1"):
        replace(subset, indices=torch.arange(5) - 1)

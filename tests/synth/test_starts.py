"""Selections of real images and starts of synthetic ones, against brute force."""

import itertools
import time

import numpy as np
import pytest
import torch

from ddengine.errors import UsageError
from ddengine.rng import Rng
from ddengine.types import DataSpec, Images
from synth.starts import SELECTIONS, STARTS, herding, kcenter, kmeans, random_total, start_images

COUNTS = (7, 13, 5)


@pytest.fixture
def small() -> Images:
    """Three unequal classes of uint8 images of unequal sides."""
    g = torch.Generator().manual_seed(11)
    x = torch.randint(0, 256, (sum(COUNTS), 2, 3, 5), generator=g, dtype=torch.uint8)
    y = torch.arange(3).repeat_interleave(torch.tensor(COUNTS))
    return Images(x, y, DataSpec("small", (2, 3, 5), ("x", "y", "z"), (0.5, 0.1), (0.2, 0.9)))


def one_class(n, shape) -> Images:
    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (n, *shape), generator=g, dtype=torch.uint8)
    return Images(x, torch.zeros(n, dtype=torch.long), DataSpec("one", shape, ("a",), (0.5,), (0.5,)))


def classes_of(source):
    """First index and float64 features of each class."""
    x, first = source.model_input().flatten(1).double().numpy(), 0
    for n in source.counts:
        yield first, x[first : first + n]
        first += n


def naive_herding(x, count):
    chosen = []
    for _ in range(count):
        left = [i for i in range(len(x)) if i not in chosen]
        chosen.append(min(left, key=lambda i: np.linalg.norm(x[[*chosen, i]].mean(0) - x.mean(0))))
    return chosen


def naive_kcenter(x, count):
    chosen = [int(np.linalg.norm(x - x.mean(0), axis=1).argmin())]
    while len(chosen) < count:
        left = [i for i in range(len(x)) if i not in chosen]
        chosen.append(max(left, key=lambda i: min(np.linalg.norm(x[i] - x[j]) for j in chosen)))
    return chosen


@pytest.mark.parametrize("ipc", [1, 2, 5])
@pytest.mark.parametrize(("fast", "naive"), [(herding, naive_herding), (kcenter, naive_kcenter)])
def test_greedy_selections_equal_brute_force(small, fast, naive, ipc):
    expected = [first + i for first, x in classes_of(small) for i in naive(x, ipc)]
    assert fast(small, ipc, Rng(0)).tolist() == expected


def test_herding_equals_brute_force_on_real_digits(digits):
    first_class = digits.take(torch.arange(digits.counts[0]))
    source = Images(first_class.x, first_class.y, DataSpec("zero", (1, 8, 8), ("0",), (0.3,), (0.37,)))
    x = next(classes_of(source))[1]
    assert herding(source, 7, Rng(0)).tolist() == naive_herding(x, 7)


def test_herding_nears_the_class_mean_faster_than_random(digits):
    def miss(indices):
        chosen = digits.model_input(indices).reshape(10, 11, -1).mean(1)
        means = torch.stack([torch.from_numpy(x.mean(0)) for _, x in classes_of(digits)])
        return (chosen - means).norm(dim=1).mean()

    assert miss(herding(digits, 11, Rng(0))) < 0.5 * miss(SELECTIONS["random"](digits, 11, Rng(0)))


def test_kmeans_with_one_centre_is_the_image_nearest_the_class_mean(digits):
    expected = [f + int(np.linalg.norm(x - x.mean(0), axis=1).argmin()) for f, x in classes_of(digits)]
    assert kmeans(digits, 1, Rng(0)).tolist() == expected


def test_kmeans_takes_one_image_of_each_well_separated_cluster():
    g = torch.Generator().manual_seed(0)
    x = torch.tensor([10, 90, 170, 250])[torch.arange(4).repeat_interleave(9)].reshape(-1, 1, 1, 1)
    x = (x + torch.randint(-5, 6, (36, 1, 2, 3), generator=g)).to(torch.uint8)
    source = Images(x, torch.zeros(36, dtype=torch.long), DataSpec("c", (1, 2, 3), ("a",), (0.5,), (0.5,)))
    assert sorted((kmeans(source, 4, Rng(1)) // 9).tolist()) == [0, 1, 2, 3]


def test_kmeans_on_a_large_class_works_on_mini_batches():
    source = one_class(5003, (1, 2, 2))
    picked = kmeans(source, 7, Rng(1))
    assert len(set(picked.tolist())) == 7 and torch.equal(picked, kmeans(source, 7, Rng(1)))


@pytest.mark.parametrize("name", SELECTIONS)
@pytest.mark.parametrize("ipc", [1, 3, 5])
def test_selections_are_distinct_balanced_and_in_label_order(small, name, ipc):
    picked = SELECTIONS[name](small, ipc, Rng(2))
    assert picked.dtype == torch.long and len(set(picked.tolist())) == 3 * ipc
    assert small.y[picked].tolist() == [c for c in range(3) for _ in range(ipc)]


@pytest.mark.parametrize("name", SELECTIONS)
def test_selections_stay_distinct_when_all_images_are_equal(name):
    source = Images(torch.full((6, 1, 2, 2), 9, dtype=torch.uint8), torch.arange(2).repeat_interleave(3),
                    DataSpec("e", (1, 2, 2), ("a", "b"), (0.5,), (0.5,)))  # fmt: skip
    assert sorted(SELECTIONS[name](source, 3, Rng(0)).tolist()) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("name", STARTS)
def test_starts_repeat_with_the_seed_and_leave_the_global_generators_alone(small, name):
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    images = start_images(name, small, 3, Rng(4))
    assert torch.equal(images, start_images(name, small, 3, Rng(4)))
    assert images.shape == (9, 2, 3, 5) and images.dtype == torch.float32
    assert torch.equal(before, torch.get_rng_state())
    assert np.array_equal(numpy_before, np.random.get_state()[1])


@pytest.mark.parametrize("name", ["random", "kmeans"])
def test_another_seed_gives_another_draw(digits, name):
    draws = {tuple(SELECTIONS[name](digits, 7, Rng(seed)).tolist()) for seed in range(3)}
    assert len(draws) == 3


@pytest.mark.parametrize(
    ("start", "selection"), [("real", "random"), *((n, n) for n in ("kmeans", "herding"))]
)
def test_real_starts_are_the_selected_images_in_model_input_space(small, start, selection):
    expected = small.spec.normalise(small.x[SELECTIONS[selection](small, 2, Rng(5))])
    assert torch.equal(start_images(start, small, 2, Rng(5)), expected)


def test_noise_is_standard_normal(digits):
    noise = start_images("noise", digits, 50, Rng(0))
    assert noise.shape == (500, 1, 8, 8) and abs(float(noise.mean())) < 0.03
    assert abs(float(noise.std()) - 1) < 0.03


@pytest.mark.parametrize("name", SELECTIONS)
def test_more_images_than_the_class_has_are_refused_by_name(small, name):
    with pytest.raises(UsageError, match=r"ipc=6 is more than class 'z' has: 5") as caught:
        SELECTIONS[name](small, 6, Rng(0))
    assert "at most 5" in caught.value.remedy


@pytest.mark.parametrize("ipc", [0, -1])
@pytest.mark.parametrize("name", STARTS)
def test_no_images_per_class_are_refused(small, name, ipc):
    with pytest.raises(UsageError, match="ipc="):
        start_images(name, small, ipc, Rng(0))


def test_unknown_starts_and_unsorted_sources_are_refused(small):
    with pytest.raises(UsageError, match="kmean") as caught:
        start_images("kmean", small, 1, Rng(0))
    assert "Did you mean 'kmeans'" in caught.value.remedy
    with pytest.raises(UsageError, match="not sorted"):
        herding(small.take(torch.arange(25).flip(0)), 1, Rng(0))


def naive_shares(counts, total):
    """The most even split: images are handed out one at a time to a class that has fewest and has room."""
    shares = [0] * len(counts)
    for _ in range(total):
        shares[min((i for i in range(len(counts)) if shares[i] < counts[i]), key=lambda i: shares[i])] += 1
    return shares


@pytest.mark.parametrize("total", range(1, 26))
def test_a_total_is_spread_as_evenly_as_the_classes_allow(small, total):
    picked = random_total(small, total, Rng(6))
    shares = small.y[picked].bincount(minlength=3).tolist()
    assert len(set(picked.tolist())) == total and sorted(shares) == sorted(naive_shares(COUNTS, total))
    assert all(share <= count for share, count in zip(shares, COUNTS, strict=True))


def test_the_remainder_goes_to_classes_drawn_at_random(small):
    draws = [small.y[random_total(small, 4, Rng(seed))] for seed in range(30)]
    lucky = {tuple(labels.bincount(minlength=3).tolist()) for labels in draws}
    assert lucky == set(itertools.permutations((2, 1, 1)))


def test_a_balanced_total_is_the_balanced_draw(small):
    assert torch.equal(random_total(small, 9, Rng(7)), SELECTIONS["random"](small, 3, Rng(7)))


def test_a_total_beyond_the_source_is_refused(small):
    with pytest.raises(UsageError, match="count=26 of 25"):
        random_total(small, 26, Rng(0))


def test_herding_a_class_of_5400_is_fast():
    source = one_class(5400, (1, 28, 28))
    herding(source, 1, Rng(0))
    began = time.process_time()
    herding(source, 10, Rng(0))
    assert time.process_time() - began < 1

import time

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddengine.data.split import TEST, VALIDATION, by_class_and_content, content_hashes, held_out, split

labels = st.lists(st.integers(0, 4), min_size=1, max_size=60)
fractions = st.sampled_from([0.1, 1 / 9, 0.2, 0.5])


def images(n: int, seed: int = 0, levels: int = 256) -> torch.Tensor:
    draw = np.random.default_rng(seed).integers(0, levels, (n, 1, 2, 3), dtype=np.uint8)
    return torch.from_numpy(draw)


def rows(x: torch.Tensor, y: torch.Tensor, index: torch.Tensor) -> list[tuple[int, bytes]]:
    return sorted((int(y[i]), x[i].numpy().tobytes()) for i in index)


@given(labels, fractions)
@settings(deadline=None)
def test_split_is_a_partition_with_the_stated_share_of_each_class(y, fraction):
    y = torch.tensor(y)
    kept, out = split(images(len(y)), y, fraction, TEST)
    assert sorted([*kept.tolist(), *out.tolist()]) == list(range(len(y)))
    for label in range(5):
        n, held = int((y == label).sum()), int((y[out] == label).sum())
        assert held == (0 if n < 2 else max(1, int(n * fraction + 0.5)))
        assert n == 0 or n > held


@given(labels, fractions, st.randoms(use_true_random=False), st.sampled_from([2, 256]))
@settings(deadline=None)
def test_split_does_not_depend_on_the_order_of_images(y, fraction, random, levels):
    y, x = torch.tensor(y), images(len(y), levels=levels)
    order = list(range(len(y)))
    random.shuffle(order)
    shuffled_x, shuffled_y = x[order], y[order]
    for ours, theirs in zip(
        split(x, y, fraction, TEST), split(shuffled_x, shuffled_y, fraction, TEST), strict=True
    ):
        assert rows(x, y, ours) == rows(shuffled_x, shuffled_y, theirs)


def test_order_sorts_by_class_and_is_the_same_from_any_start():
    y = torch.tensor([2, 0, 1] * 7)
    x = images(21)
    shuffled = torch.from_numpy(np.random.default_rng(1).permutation(21))
    ours, theirs = by_class_and_content(x, y), by_class_and_content(x[shuffled], y[shuffled])
    assert y[ours].tolist() == sorted(y.tolist())
    assert torch.equal(x[ours], x[shuffled][theirs])


def test_splits_with_different_salts_are_independent():
    x, y = images(2000), torch.zeros(2000, dtype=torch.long)
    _, first = split(x, y, 0.5, TEST)
    _, second = split(x, y, 0.5, VALIDATION)
    shared = len(set(first.tolist()) & set(second.tolist()))
    assert 420 < shared < 580  # 500 expected, standard deviation 11


def test_ties_between_equal_images_go_by_index():
    x, y = torch.zeros(10, 1, 2, 3, dtype=torch.uint8), torch.zeros(10, dtype=torch.long)
    _, out = split(x, y, 0.2, TEST)
    assert out.tolist() == [0, 1]


def test_hash_reads_pixels_not_memory_order():
    x = images(5)
    assert (
        content_hashes(x, b"s") == content_hashes(x.transpose(2, 3).contiguous().transpose(2, 3), b"s")
    ).all()
    assert len(set(content_hashes(images(100), b"s").tolist())) == 100


def test_a_held_out_share_is_at_least_one_and_never_the_whole_class():
    assert [held_out(n, 0.1) for n in (0, 1, 2, 9, 14, 15, 100)] == [0, 0, 1, 1, 1, 2, 10]
    assert held_out(2, 0.9) == 1


def test_sixty_thousand_images_split_in_about_a_second():
    x = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (60_000, 1, 28, 28), dtype=np.uint8))
    y = torch.arange(60_000) % 10
    start = time.process_time()
    _, out = split(x, y, 0.1, VALIDATION)
    assert len(out) == 6000
    assert time.process_time() - start < 2

"""Rankings of real graphs and what is taken of them, against dense loops and plain turns."""

import numpy as np
import pytest
import torch
from global_rng import global_rng_untouched
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_herding_graphs import naive_herding, naive_kcenter, naive_round_robin, tu_histogram
from scipy import sparse

from ddengine.errors import UsageError
from ddengine.rng import Rng
from synth.graph_starts import GRAPH_SELECTIONS, herding, kcenter, per_class, random, within_bytes

GREEDY = [(herding, naive_herding), (kcenter, naive_kcenter)]
COUNTS, COLORS = (7, 13, 5), 11
EVERY = sum(COUNTS)


def collection(seed, high=4):
    """Counts of colours, of which some graphs share all, and classes in mixed order."""
    g = np.random.default_rng(seed)
    counts = g.integers(0, high, (EVERY, COLORS)) * g.integers(0, 2, (EVERY, COLORS))
    counts[:, 0] += 1
    counts[g.integers(0, EVERY, 5)] = counts[g.integers(0, EVERY, 5)]
    y = g.permutation(np.repeat(np.arange(3), COUNTS))
    return counts.astype(float), torch.from_numpy(y)


def expected(naive, counts, y, count):
    """The naive ranking of each class, as indices into the collection."""
    graphs = [np.flatnonzero(y.numpy() == c) for c in range(int(y.max()) + 1)]
    return [which[naive(np.sqrt(counts[which]), min(count, len(which)))].tolist() for which in graphs]


def ranked(select, counts, y, limit, seed=0):
    return [ranking.tolist() for ranking in select(sparse.csr_array(counts), y, limit, Rng(seed))]


@pytest.mark.parametrize(("fast", "naive"), GREEDY)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), limit=st.sampled_from([1, 6, 13]), high=st.sampled_from([2, 30]))
def test_greedy_rankings_are_those_of_a_dense_loop(fast, naive, seed, limit, high):
    counts, y = collection(seed, high)
    assert ranked(fast, counts, y, limit) == expected(naive, counts, y, limit)


@pytest.mark.parametrize(("fast", "naive"), GREEDY)
def test_greedy_rankings_of_real_molecules_are_those_of_a_dense_loop(graph_sets, fast, naive):
    histogram, y = tu_histogram(graph_sets, "MUTAG", 2)
    y = torch.from_numpy(y)
    rankings = [ranking.tolist() for ranking in fast(histogram, y, 67, Rng(0))]
    assert [len(ranking) for ranking in rankings] == [63, 67]
    assert rankings == expected(naive, histogram.toarray(), y, 67)


@pytest.mark.parametrize("select", [herding, kcenter])
def test_greedy_rankings_know_neither_seed_nor_numbering_of_colors(select):
    counts, y = collection(2)
    permuted = counts[:, np.random.default_rng(5).permutation(COLORS)]
    assert ranked(select, counts, y, 13) == ranked(select, permuted, y, 13, seed=1)


@pytest.mark.parametrize("select", [herding, kcenter])
def test_equal_graphs_are_taken_by_their_index(select):
    assert ranked(select, np.full((7, 3), 2.0), torch.zeros(7, dtype=torch.long), 7) == [[*range(7)]]


@pytest.mark.parametrize("select", GRAPH_SELECTIONS.values(), ids=GRAPH_SELECTIONS)
def test_a_shorter_ranking_is_a_prefix_of_a_longer_one(select):
    counts, y = collection(3)
    whole = ranked(select, counts, y, EVERY)
    assert [sorted(ranking) for ranking in whole] == [(y == c).nonzero().flatten().tolist() for c in range(3)]
    for limit in (1, 5, 6):
        assert ranked(select, counts, y, limit) == [ranking[:limit] for ranking in whole]


def test_random_orders_are_uniform_and_differ_by_seed_and_class():
    y = torch.arange(2).repeat_interleave(5)
    firsts = torch.tensor([ranked(random, np.ones((10, 1)), y, 1, seed) for seed in range(1000)])[..., 0]
    assert (torch.bincount(firsts.flatten(), minlength=10) - 200).abs().max() < 50  # four deviations
    assert len({tuple(pair) for pair in firsts.tolist()}) == 25


@pytest.mark.parametrize("select", GRAPH_SELECTIONS.values(), ids=GRAPH_SELECTIONS)
def test_rankings_touch_neither_a_global_generator_nor_the_counts(select):
    counts, y = collection(4)
    histogram = sparse.csr_array(counts)
    with global_rng_untouched():
        select(histogram, y, 5, Rng(7))
    assert np.array_equal(histogram.toarray(), counts)


@pytest.mark.parametrize("select", GRAPH_SELECTIONS.values(), ids=GRAPH_SELECTIONS)
def test_a_class_without_graphs_has_an_empty_ranking(select):
    rankings = ranked(select, np.ones((3, 2)), torch.tensor([0, 2, 2]), 5)
    assert [len(ranking) for ranking in rankings] == [1, 0, 2]


@pytest.mark.parametrize("select", GRAPH_SELECTIONS.values(), ids=GRAPH_SELECTIONS)
def test_a_limit_below_one_is_refused(select):
    with pytest.raises(UsageError, match="limit=0 is out of range"):
        ranked(select, np.ones((3, 2)), torch.zeros(3, dtype=torch.long), 0)


def test_per_class_takes_the_head_of_each_ranking():
    rankings = [torch.tensor([4, 0, 2]), torch.tensor([1, 3])]
    assert per_class(rankings, 2).tolist() == [4, 0, 1, 3]
    with pytest.raises(UsageError, match="3 graphs of each class, but class 1 has 2\nGive at most 2"):
        per_class(rankings, 3)
    with pytest.raises(UsageError, match="class 0 has 0\nGive graphs of every class"):
        per_class([torch.tensor([], dtype=torch.long), rankings[1]], 1)
    with pytest.raises(UsageError, match="count=0 is out of range"):
        per_class(rankings, 0)


class Bytes:
    """Bytes of a selection: each distinct colour and each entry of a histogram."""

    def __init__(self, counts):
        self.counts, self.calls = counts, 0

    def __call__(self, index):
        self.calls += 1
        used = self.counts[np.asarray(index)] > 0
        return 5 * int(used.sum()) + 12 * int(used.any(0).sum())


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), nbytes=st.integers(300, 900))
def test_within_bytes_takes_turns_until_nothing_fits(seed, nbytes):
    counts, y = collection(seed)
    rankings, size = random(sparse.csr_array(counts), y, EVERY, Rng(seed)), Bytes(counts)
    chosen = within_bytes(rankings, nbytes, size)
    assert chosen.tolist() == naive_round_robin(rankings, nbytes, size)
    assert size(chosen) <= nbytes
    taken = torch.bincount(y[chosen], minlength=3).tolist()
    for c, ranking in enumerate(rankings):
        if taken[c] < len(ranking):
            assert size([*chosen.tolist(), int(ranking[taken[c]])]) > nbytes


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), nbytes=st.integers(300, 900), more=st.integers(0, 200))
def test_more_bytes_are_used_at_least_as_well(seed, nbytes, more):
    counts, y = collection(seed)
    rankings, size = herding(sparse.csr_array(counts), y, EVERY, Rng(0)), Bytes(counts)
    few, many = (within_bytes(rankings, allowed, size) for allowed in (nbytes, nbytes + more))
    assert size(few) <= size(many)
    assert torch.bincount(y[few]).min() <= torch.bincount(y[many]).min()


def test_bytes_for_exactly_one_graph_of_each_class_are_enough_and_one_less_is_refused():
    counts, y = collection(6)
    rankings, size = herding(sparse.csr_array(counts), y, EVERY, Rng(0)), Bytes(counts)
    least = size(per_class(rankings, 1))
    assert len(within_bytes(rankings, least, size)) >= 3
    with pytest.raises(UsageError, match=f"takes {least} bytes, and nbytes={least - 1}\nGive {least} bytes"):
        within_bytes(rankings, least - 1, size)


def test_sizes_are_asked_for_seldom():
    counts = np.eye(1994)
    rankings, size = [torch.arange(997), torch.arange(997, 1994)], Bytes(counts)
    assert len(within_bytes(rankings, 17 * 1000 + 16, size)) == 1000
    assert size.calls < 40
    uneven = [rankings[0][:3], rankings[1]]
    size.calls = 0
    assert len(within_bytes(uneven, 17 * 500, size)) == 500
    assert size.calls < 40


def test_real_molecules_within_bytes_are_balanced_until_a_class_runs_out(graph_sets):
    histogram, y = tu_histogram(graph_sets, "MUTAG", 2)
    y, size = torch.from_numpy(y), Bytes(histogram.toarray())
    rankings = herding(histogram, y, 200, Rng(0))
    first, second = torch.bincount(y[within_bytes(rankings, 3001, size)]).tolist()
    assert abs(first - second) <= 3 and min(first, second) >= 10
    assert len(within_bytes(rankings, 10**9, size)) == 188

"""The miner of frequent itemsets, against definitions and on the colours of real graphs."""

import time
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_herding_graphs import tu_histogram
from naive_itemsets import naive_itemsets, support_of
from scipy import sparse

from ddengine.errors import UsageError
from matchers.itemsets import WALKS, Itemset, _table_counts, absolute_support, mine, top

KINDS = list(WALKS)
ITEMS = (2, 3, 5, 7, 11, 13, 17, 1000003)
baskets = st.lists(st.sets(st.sampled_from(ITEMS)), max_size=11)
times = st.sampled_from([1, 17])  # 11 * 17 transactions need three words
thorough = settings(max_examples=25, deadline=None)


def by_items(found):
    return {itemset.items: itemset.support for itemset in found}


def matrix(transactions):
    """A sparse matrix whose entries are counts, with stored zeros and entries listed twice."""
    entries = [(i, item, value) for i, t in enumerate(transactions) for item in t for value in (2.0, 1.0)]
    entries += [(i, item, 0.0) for i, t in enumerate(transactions) for item in ITEMS[:3] if item not in t]
    row, column, value = np.array(entries).T if entries else np.zeros((3, 0))
    where = (row.astype(int), column.astype(int))
    return sparse.coo_array((value, where), shape=(len(transactions), max(ITEMS) + 1))


@pytest.mark.parametrize("kind", KINDS)
@thorough
@given(baskets=baskets, times=times, support=st.integers(1, 5))
def test_sets_and_supports_are_those_of_the_definitions(kind, baskets, times, support):
    found = mine(baskets * times, support * times, kind=kind)
    assert len(found) == len(by_items(found))
    assert by_items(found) == naive_itemsets(baskets * times, support * times, kind)


@thorough
@given(baskets=baskets, support=st.integers(1, 5))
def test_closed_sets_determine_all_supports(baskets, support):
    closed = mine(baskets, support)
    for itemset in mine(baskets, support, kind="all"):
        above = [c.support for c in closed if set(itemset.items) <= set(c.items)]
        assert max(above) == itemset.support


@thorough
@given(baskets=baskets, support=st.integers(1, 5))
def test_every_frequent_set_lies_in_a_maximal_one(baskets, support):
    maximal = [set(m.items) for m in mine(baskets, support, kind="maximal")]
    assert all(any(set(s.items) <= m for m in maximal) for s in mine(baskets, support, kind="all"))
    assert not any(a <= b for a in maximal for b in maximal if a is not b)


@pytest.mark.parametrize("kind", KINDS)
@thorough
@given(baskets=baskets, support=st.integers(1, 4))
def test_a_sparse_matrix_of_counts_is_its_sets_of_columns(kind, baskets, support):
    assert mine(matrix(baskets).tocsr(), support, kind=kind) == mine(baskets, support, kind=kind)
    assert mine(matrix(baskets), support, kind=kind) == mine(baskets, support, kind=kind)


def test_an_item_listed_twice_counts_once():
    assert mine([[4, 4], [4, 6, 6]], 2, kind="all") == [Itemset((4,), 2)]
    assert mine([[4, 4], [5]], 2, kind="all") == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "transactions", [[], [[]], [[], []], sparse.csr_array((0, 5)), sparse.csr_array((5, 0))]
)
def test_nothing_to_mine_gives_nothing(kind, transactions):
    assert mine(transactions, 1, kind=kind) == []


def test_one_transaction_is_its_own_closed_and_maximal_set():
    assert mine([{9, 4}], 1) == mine([{9, 4}], 1, kind="maximal") == [Itemset((4, 9), 1)]
    assert mine([{9, 4}], 2, kind="all") == []


def test_order_is_support_then_size_then_items():
    found = mine([{1, 2, 3}, {1, 2, 3}, {3, 4}, {1, 2}], 2, kind="all")
    assert [(s.support, s.items) for s in found] == [
        (3, (1, 2)), (3, (1,)), (3, (2,)), (3, (3,)), (2, (1, 2, 3)), (2, (1, 3)), (2, (2, 3)),
    ]  # fmt: skip


@thorough
@given(baskets=baskets.flatmap(lambda drawn: st.tuples(st.just(drawn), st.permutations(drawn))))
def test_the_order_of_transactions_does_not_matter(baskets):
    drawn, permuted = baskets
    assert mine(drawn, 2) == mine(permuted, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_as_many_sets_as_the_limit_pass_and_one_more_stops(kind):
    transactions = [set(t) for t in combinations(range(7), 4)]
    found = mine(transactions, 3, kind=kind)
    assert mine(transactions, 3, kind=kind, limit=len(found)) == found
    with pytest.raises(UsageError, match=f"support=3 gives more {kind} .* limit of {len(found) - 1}"):
        mine(transactions, 3, kind=kind, limit=len(found) - 1)


def test_the_stop_names_what_gives_fewer_sets():
    stopped = {}
    for kind in KINDS:
        with pytest.raises(UsageError) as stop:
            mine([{1, 2}, {1}, {2, 3}, {3}], 1, kind=kind, limit=1)
        stopped[kind] = stop.value.remedy
    assert stopped == {
        "all": "Raise the support or give itemsets=closed or give itemsets=maximal",
        "closed": "Raise the support or give itemsets=maximal",
        "maximal": "Raise the support",
    }


def test_closed_and_maximal_sets_are_found_where_all_sets_are_too_many():
    motif, other = set(range(60)), set(range(40, 97))
    transactions = [motif, motif, other, motif | other]
    with pytest.raises(UsageError, match="limit of 5003"):
        mine(transactions, 2, kind="all", limit=5003)
    assert by_items(mine(transactions, 2)) == {
        tuple(sorted(motif)): 3, tuple(sorted(other)): 2, tuple(sorted(motif & other)): 4,
    }  # fmt: skip
    assert len(mine(transactions, 2, kind="maximal")) == 2


def test_maximal_sets_do_not_cost_a_walk_of_all_closed_ones():
    every = set(range(17))
    transactions = [every - {i} for i in every]  # 131,070 closed sets
    start = time.process_time()
    found = mine(transactions, 1, kind="maximal")
    assert time.process_time() - start < 5  # about .1 s
    assert {s.items for s in found} == {tuple(sorted(t)) for t in transactions}


def test_chains_deeper_than_the_stack_of_calls():
    transactions = [range(n) for n in range(1, 1014)]
    assert [s.support for s in mine(transactions, 1)] == list(range(1013, 0, -1))
    assert mine(transactions, 1, kind="maximal") == [Itemset(tuple(range(1013)), 1)]


def test_bit_counts_from_the_table_are_those_of_the_words():
    words = np.random.default_rng(3).integers(0, 2**64, (5, 7), dtype=np.uint64)
    words[2, 3:5] = 0, 2**64 - 1
    expected = [sum(int(word).bit_count() for word in row) for row in words]
    assert _table_counts(words).sum(1).tolist() == expected
    assert _table_counts(words[:, ::2]).sum(1).tolist() == [
        sum(int(word).bit_count() for word in row[::2]) for row in words
    ]


@pytest.mark.parametrize("support", [0, -3])
def test_a_support_below_one_is_refused(support):
    with pytest.raises(UsageError, match=f"support={support} is out of range"):
        mine([{1}], support)


def test_an_unknown_kind_is_refused_with_the_nearest():
    with pytest.raises(UsageError, match="unknown itemsets 'close'\nDid you mean 'closed'"):
        mine([{1}], 1, kind="close")
    with pytest.raises(UsageError, match="unknown itemsets 'close'"):
        top([{1}], 1, "close")


@pytest.mark.parametrize(
    ("support", "transactions", "expected"),
    [(440, 999, 440), (1, 7, 1), (3.0, 7, 3), (0.1, 30, 3), (0.5, 7, 4), (1e-9, 7, 1), (0.5, 0, 1)],
)
def test_supports_are_whole_numbers_or_fractions_rounded_up(support, transactions, expected):
    assert absolute_support(support, transactions) == expected


@pytest.mark.parametrize("support", [0, 0.0, -2, -0.5, 1.5, float("nan"), float("inf")])
def test_other_supports_are_refused(support):
    with pytest.raises(UsageError, match=f"support={support} is neither"):
        absolute_support(support, 7)


@pytest.mark.parametrize("kind", KINDS)
@thorough
@given(baskets=baskets, count=st.integers(1, 9))
def test_top_is_the_head_of_the_highest_support_with_enough_sets(kind, baskets, count):
    enough = [s for s in range(1, len(baskets) + 1) if len(naive_itemsets(baskets, s, kind)) >= count]
    found = top(baskets, count, kind)
    assert found == mine(baskets, max(enough, default=1), kind=kind)[:count]
    assert len(found) == count if enough else by_items(found) == naive_itemsets(baskets, 1, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_top_of_too_few_sets_are_all_there_are(kind):
    assert top([], 3, kind) == top([[], []], 3, kind) == []
    assert top([{4, 9}, {4}], 7, "closed") == [Itemset((4,), 2), Itemset((4, 9), 1)]
    assert top([{4, 9}, {4}], 7, kind) == mine([{4, 9}, {4}], 1, kind=kind)


@pytest.mark.parametrize("count", [0, -1])
def test_a_count_below_one_is_refused(count):
    with pytest.raises(UsageError, match=f"count={count} is out of range"):
        top([{1}], count)


@pytest.fixture(scope="module")
def nci1(graph_sets):
    return tu_histogram(graph_sets, "NCI1", 2)


# For class 0 and 1 of the whole set: number of sets, sum of their supports, sum of their sizes.
MUTAG_8_16 = {"all": [(275, 3945, 952), (1527, 39543, 6748)],
              "closed": [(24, 438, 113), (104, 3482, 573)],
              "maximal": [(9, 77, 46), (17, 313, 110)]}  # fmt: skip
NCI1_150 = {"all": [(166, 41628, 336), (798, 181668, 2242)],
            "closed": [(152, 39035, 314), (651, 152423, 1815)],
            "maximal": [(65, 11156, 151), (207, 34720, 665)]}  # fmt: skip


def summary(found):
    return len(found), sum(s.support for s in found), sum(len(s.items) for s in found)


def check_real(histogram, y, supports, expected):
    assert {
        kind: [summary(mine(histogram[y == c], supports[c], kind=kind)) for c in (0, 1)] for kind in KINDS
    } == expected
    rows = histogram[y == 0]
    transactions = [set(rows[[i]].indices.tolist()) for i in range(rows.shape[0])]
    for kind in KINDS:
        assert by_items(mine(rows, supports[0], kind=kind)) == naive_itemsets(transactions, supports[0], kind)
    for itemset in mine(rows, supports[0])[::7]:
        assert support_of(itemset.items, transactions) == itemset.support


def test_real_molecules_of_mutag_give_the_sets_of_the_definitions(graph_sets):
    check_real(*tu_histogram(graph_sets, "MUTAG", 2), (8, 16), MUTAG_8_16)


def test_real_molecules_of_nci1_give_the_sets_of_the_definitions(nci1):
    assert nci1[0].shape == (4110, 4058)
    check_real(*nci1, (150, 150), NCI1_150)


def test_mining_nci1_takes_well_under_a_second(nci1):
    histogram, y = nci1
    start = time.process_time()
    for c in (0, 1):
        mine(histogram[y == c], 150)
    assert time.process_time() - start < 1  # about .05 s


def test_the_top_closed_sets_of_nci1_head_those_of_a_lower_support(nci1):
    rows = nci1[0][nci1[1] == 1]
    assert top(rows, 23) == mine(rows, 150)[:23]

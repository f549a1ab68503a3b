"""Sets of trees as items: what is common to classes, counts and weights, from their definitions."""

from dataclasses import replace

import naive_trees
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_itemsets import naive_itemsets, support_of
from random_graphs import random_graphs

from ddengine.ops.dag import trees_of, trees_problem
from matchers.itemsets import WALKS, Itemset, mine
from matchers.tree_sets import Mined, item_trees, scaled, without_common

KINDS = list(WALKS)
COUNT, CLASSES, HOPS = 17, 3, 1
some = settings(max_examples=15, deadline=None)


def collection(seed):
    """Random graphs of few trees, of three classes in turn."""
    graphs = random_graphs(seed, count=COUNT, node_sizes=(2,), edges=5, classes=CLASSES)
    return replace(graphs, y=torch.arange(COUNT) % CLASSES)


def transactions_of(graphs):
    """For each class its graphs as {tree number: nodes}; trees are numbered as they first come."""
    nested = (graphs.x.tolist(), graphs.edge_index.tolist(), graphs.edge_attr.tolist())
    color = naive_trees.first_occurrence(naive_trees.trees(*nested, HOPS))
    found = [{} for _ in range(COUNT)]
    for tree, graph in zip(color, graphs.batch.tolist(), strict=True):
        found[graph][tree] = found[graph].get(tree, 0) + 1
    return [found[c::CLASSES] for c in range(CLASSES)]


def mined(transactions, supports, kind="all"):
    each = zip(transactions, supports, strict=True)
    return [Mined.of(mine([set(t) for t in rows], support, kind=kind)) for rows, support in each]


def items_of(trees):
    """The colours with their counts of each item, in order."""
    found = [{} for _ in range(len(trees))]
    for item, color, count in zip(*(v.tolist() for v in (trees.item, trees.color, trees.count)), strict=True):
        found[item][color] = count
    return found


def test_itemsets_become_flat_tensors_and_back():
    found = Mined.of([Itemset((2, 5), 7), Itemset((3,), 4), Itemset((1, 2, 11), 4)])
    assert found.colors.tolist() == [2, 5, 3, 1, 2, 11]
    assert found.sizes.tolist() == [2, 1, 3] and found.support.tolist() == [7, 4, 4]
    assert found.sets == [(2, 5), (3,), (1, 2, 11)]
    kept = found.keep([True, False, True])
    assert kept.sets == [(2, 5), (1, 2, 11)] and kept.support.tolist() == [7, 4]
    assert Mined.of([]).sets == [] and found.keep([False] * 3).sets == []


@pytest.mark.parametrize("kind", KINDS)
@some
@given(seed=st.integers(0, 10**6), supports=st.tuples(*[st.integers(2, 4)] * CLASSES))
def test_a_set_is_common_exactly_where_it_is_frequent_in_another_class(kind, seed, supports):
    transactions = transactions_of(collection(seed))
    kept = without_common(mined(transactions, supports, kind))
    for c, found in enumerate(kept):
        others = [j for j in range(CLASSES) if j != c]
        assert dict(zip(found.sets, found.support.tolist(), strict=True)) == {
            items: support
            for items, support in naive_itemsets(transactions[c], supports[c], kind).items()
            if all(support_of(items, transactions[j]) < supports[j] for j in others)
        }


def test_common_sets_leave_all_classes_and_the_rest_stays_in_order():
    first = Mined.of([Itemset((1,), 9), Itemset((1, 2), 5), Itemset((4,), 5), Itemset((3,), 2)])
    second = Mined.of([Itemset((5,), 8), Itemset((1,), 3), Itemset((3, 7), 3)])
    assert [found.sets for found in without_common([first, second])] == [[(1, 2), (4,)], [(5,), (3, 7)]]
    assert [found.sets for found in without_common([first])] == [first.sets]


@some
@given(seed=st.integers(0, 10**6))
def test_items_hold_each_tree_of_their_set_once(seed):
    graphs = collection(seed)
    sets = mined(transactions_of(graphs), (2, 3, 2), "closed")
    made = item_trees(trees_of(graphs, HOPS), sets, counts="binary", weighting="none")
    assert trees_problem(made) is None and made.y_kind == "class"
    assert items_of(made) == [dict.fromkeys(s, 1) for found in sets for s in found.sets]
    assert made.y.tolist() == [c for c, found in enumerate(sets) for _ in found.sets]
    assert made.weight.tolist() == [1] * len(made)


@some
@given(seed=st.integers(0, 10**6))
def test_mean_counts_are_those_of_the_graphs_that_have_the_whole_set(seed):
    graphs = collection(seed)
    transactions = transactions_of(graphs)
    sets = mined(transactions, (2, 2, 2), "closed")
    made = item_trees(trees_of(graphs, HOPS), sets, counts="mean", weighting="none")
    expected = []
    for c, found in enumerate(sets):
        for items in found.sets:
            having = [t for t in transactions[c] if set(items) <= set(t)]
            expected.append({i: round(sum(t[i] for t in having) / len(having)) for i in items})
    assert items_of(made) == expected


def test_a_mean_count_of_a_half_goes_to_the_even_number():
    graphs = random_graphs(0, count=2, node_sizes=(2,), edges=0, classes=1)
    nodes = torch.tensor([0, 0, 0, 1, 0, 0, 1, 1])  # 3 and 2 nodes of code 0, 1 and 2 of code 1
    graphs = replace(
        graphs, x=nodes[:, None], batch=torch.tensor([0] * 4 + [1] * 4), y=torch.zeros(2, dtype=torch.int64)
    )
    sets = [Mined.of([Itemset((0, 1), 2)])]
    made = item_trees(trees_of(graphs, HOPS), sets, counts="mean", weighting="none")
    assert items_of(made) == [{0: 2, 1: 2}]


def weighed(supports_of_classes, weighting, balance):
    """Weights of items whose sets, each one tree, have these supports."""
    sets = [Mined.of([Itemset((i,), n) for i, n in enumerate(each)]) for each in supports_of_classes]
    trees = trees_of(collection(3), HOPS)
    return scaled(item_trees(trees, sets, counts="binary", weighting=weighting), balance).weight


@pytest.mark.parametrize(
    ("weighting", "balance", "expected"),
    [
        ("none", False, [1, 1, 1, 1, 1]),
        ("none", True, [5 / 9, 5 / 9, 5 / 9, 5 / 3, 5 / 3]),
        ("support", False, [35 / 60, 20 / 60, 5 / 60, 110 / 60, 130 / 60]),
        ("support", True, [35 / 36, 20 / 36, 5 / 36, 5 / 3, 5 / 3]),
    ],
)
def test_weights_are_supports_or_ones_balanced_or_not_with_mean_1(weighting, balance, expected):
    found = weighed([(7, 4, 1), (22,), (26,)], weighting, balance)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)
    assert found.mean().item() == pytest.approx(1, abs=1e-6)


def test_weights_that_differ_by_rounding_alone_are_ones():
    assert weighed([(7, 7, 7), (3, 3, 3), (11, 11, 11)], "support", True).tolist() == [1.0] * 9


def test_a_class_without_items_does_not_disturb_the_balance():
    found = weighed([(6, 2), (), (4,)], "support", True)
    np.testing.assert_allclose(found.numpy(), [1.5 * 6 / 8, 1.5 * 2 / 8, 1.5], rtol=1e-6)

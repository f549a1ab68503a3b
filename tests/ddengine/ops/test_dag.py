from collections import Counter
from copy import copy
from dataclasses import fields, replace

import naive_trees
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddengine.errors import UsageError
from ddengine.graphs import Graphs, GraphSpec
from ddengine.ops import dag as dags
from ddengine.ops.dag import (
    ColorDAG,
    Trees,
    closed,
    dag_problem,
    histogram,
    level_counts,
    lowered,
    node_trees,
    take,
    trees_of,
    trees_problem,
)
from ddengine.rng import Rng


def collection(graphs=7, seed=0, edge_columns=2, classes=3):
    """Graphs of 1 to 7 nodes with two label columns and random edges, repeated ones and self-loops too."""
    generator = Rng(seed).numpy("collection")
    sizes = generator.integers(1, 8, graphs)
    batch = np.repeat(np.arange(graphs), sizes)
    source = generator.integers(0, sizes.sum(), 2 * sizes.sum())
    starts = sizes.cumsum() - sizes
    target = starts[batch[source]] + generator.integers(0, 2**31, len(source)) % sizes[batch[source]]
    return Graphs(
        x=torch.from_numpy(generator.integers(0, (2, 3), (len(batch), 2))),
        edge_index=torch.from_numpy(np.stack([source, target])),
        edge_attr=torch.from_numpy(generator.integers(0, 2, (len(source), edge_columns))),
        batch=torch.from_numpy(batch),
        y=torch.from_numpy(generator.integers(0, classes, graphs)),
        spec=GraphSpec("noise", ("a", "b", "c"), (2, 3), (2,) * edge_columns),
    )


def lists(graphs):
    return graphs.x.tolist(), graphs.edge_index.tolist(), graphs.edge_attr.tolist()


def unrolled(dag, level, color):
    """The canonical tree that a colour stands for, by following the DAG alone."""
    if level == 0:
        degree = () if dag.degree is None else (int(dag.degree[color]),)
        return ((*dag.x[color].tolist(), *degree), ())
    rows = dag.levels[level - 1]
    below, children = unrolled(dag, level - 1, int(rows.own[color])), []
    for i in (rows.row == color).nonzero()[:, 0].tolist():
        child = (tuple(dag.edge_attr[rows.edge[i]].tolist()), unrolled(dag, level - 1, int(rows.child[i])))
        children += [child] * int(rows.times[i])
    return (below[0], tuple(sorted(children)))


def forest(trees):
    """For each item the multiset of its trees, by following the DAG alone."""
    found = [Counter() for _ in range(len(trees))]
    for item, color, count in zip(*(t.tolist() for t in (trees.item, trees.color, trees.count)), strict=True):
        found[item][unrolled(trees.dag, trees.dag.hops, color)] += count
    return found


def truth(graphs, hops, degree=False):
    """The same from explicit trees of the graphs."""
    found = [Counter() for _ in range(len(graphs))]
    for graph, tree in zip(
        graphs.batch.tolist(), naive_trees.trees(*lists(graphs), hops, degree), strict=True
    ):
        found[graph][tree] += 1
    return found


def same(left, right):
    """Whether two values of our types hold the same tensors."""
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, tuple):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, Trees | ColorDAG | dags.Level):
        return all(same(getattr(left, f.name), getattr(right, f.name)) for f in fields(left))
    return left == right


@given(st.integers(0, 10**6), st.integers(0, 3), st.booleans(), st.integers(0, 2))
@settings(deadline=None, max_examples=40)
def test_the_dag_unrolls_to_the_trees_of_every_graph(seed, hops, degree, edge_columns):
    graphs = collection(5, seed, edge_columns)
    trees = trees_of(graphs, hops, degree=degree, check=True)
    assert trees_problem(trees) is None
    assert forest(trees) == truth(graphs, hops, degree)
    distinct = [len({*naive_trees.trees(*lists(graphs), level, degree)}) for level in range(hops + 1)]
    assert trees.dag.sizes == distinct


def test_own_and_rows_of_a_colour_are_those_of_each_of_its_nodes():
    graphs = collection(11, seed=4)
    dag, colors = trees_of(graphs, 3).dag, [
        naive_trees.first_occurrence(naive_trees.trees(*lists(graphs), level)) for level in range(4)
    ]  # fmt: skip
    received = naive_trees.neighbours(len(graphs.x), *lists(graphs)[1:])
    for number, level in enumerate(dag.levels, start=1):
        rows = [Counter() for _ in level.own]
        for row, child, edge, times in zip(
            *(t.tolist() for t in (level.row, level.child, level.edge, level.times)), strict=True
        ):
            label = tuple(dag.edge_attr[edge].tolist())
            assert (label, child) not in rows[row]
            rows[row][label, child] = times
        for node, color in enumerate(colors[number]):
            assert level.own[color] == colors[number - 1][node]
            assert rows[color] == Counter((label, colors[number - 1][u]) for label, u in received[node])


def test_tables_hold_each_label_once_in_sorted_order():
    graphs = collection(13)
    dag = trees_of(graphs, 1, degree=True).dag
    assert dag.edge_attr.tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    pairs = torch.column_stack([dag.x, dag.degree]).tolist()
    seen = torch.column_stack([graphs.x, graphs.degree]).tolist()
    assert pairs == [list(pair) for pair in dict.fromkeys(map(tuple, seen))]
    assert trees_of(collection(3, edge_columns=0), 1).dag.edge_attr.shape == (1, 0)
    assert trees_of(collection(3), 1).dag.degree is None


def test_items_keep_classes_nodes_and_weights_of_one():
    graphs = collection(13)
    trees = trees_of(graphs, 2)
    assert torch.equal(trees.y, graphs.y) and trees.weight.tolist() == [1.0] * 13
    assert trees.spec is graphs.spec and trees.y_kind == "class"
    counts = histogram(trees)
    assert counts.dtype == np.float64 and counts.shape == (13, trees.dag.sizes[-1])
    assert counts.sum(1).tolist() == graphs.nodes.tolist()


def test_renumbered_edges_give_the_same_trees_bit_by_bit():
    graphs = collection(13)
    order = torch.from_numpy(Rng(1).numpy("edges").permutation(len(graphs.edge_attr)))
    shuffled = replace(
        graphs, edge_index=graphs.edge_index[:, order], edge_attr=graphs.edge_attr[order]
    )  # fmt: skip
    assert same(trees_of(shuffled, 3), trees_of(graphs, 3))


def test_graphs_in_another_order_give_the_same_items_in_that_order():
    graphs, order = collection(13), torch.tensor([5, 0, 12, 3, 7, 1, 11, 2, 10, 4, 9, 6, 8])
    before, after = forest(trees_of(graphs, 2)), forest(trees_of(graphs.take(order), 2))
    assert after == [before[i] for i in order.tolist()]


@pytest.mark.parametrize("degree", [False, True])
def test_node_trees_are_the_trees_of_every_node_by_itself(degree):
    graphs = collection(7, seed=3)
    nodes = node_trees(graphs, 2, degree=degree)
    assert trees_problem(nodes) is None
    assert nodes.dag.sizes == [len(graphs.x)] * 3
    assert forest(nodes) == forest(trees_of(graphs, 2, degree=degree))
    assert [unrolled(nodes.dag, 2, v) for v in range(len(graphs.x))] == naive_trees.trees(
        *lists(graphs), 2, degree
    )
    received = torch.zeros(len(graphs.x), dtype=torch.int64)
    received.index_add_(0, nodes.dag.levels[0].row, nodes.dag.levels[0].times)
    assert torch.equal(received, graphs.degree)


def test_taken_items_come_in_the_order_asked_and_repeat():
    graphs, index = collection(13), torch.tensor([11, 2, 2, 0])
    trees = trees_of(graphs, 2)
    chosen = take(replace(trees, weight=torch.arange(13.0) + 1), index)
    assert trees_problem(chosen) is None
    assert chosen.dag is trees.dag
    assert forest(chosen) == truth(graphs.take(index), 2)
    assert torch.equal(chosen.y, graphs.y[index]) and chosen.weight.tolist() == [12.0, 3.0, 3.0, 1.0]


def test_no_items_can_be_taken():
    none = take(trees_of(collection(5), 2), torch.tensor([], dtype=torch.int64))
    assert len(none) == len(none.item) == 0 and trees_problem(none) is None
    assert closed(none).dag.sizes == [0, 0, 0] and len(closed(none).dag.edge_attr) == 0


def test_soft_labels_are_taken_with_their_items():
    soft = torch.softmax(torch.randn(13, 3, generator=Rng(0).torch("soft")), 1)
    trees = replace(trees_of(collection(13), 1), y=soft, y_kind="prob")
    assert trees_problem(trees) is None
    assert torch.equal(take(trees, torch.tensor([7, 3])).y, soft[[7, 3]])


@pytest.mark.parametrize("degree", [False, True])
@pytest.mark.parametrize("edge_columns", [0, 2])
def test_the_closure_of_taken_items_is_the_dag_of_their_graphs_alone(degree, edge_columns):
    graphs, index = collection(31, 2, edge_columns), torch.tensor([4, 9, 30])
    whole = trees_of(graphs, 3, degree=degree)
    alone = trees_of(graphs.take(index), 3, degree=degree)
    small = closed(take(whole, index))
    assert trees_problem(small) is None
    assert small.dag.sizes == alone.dag.sizes and max(small.dag.sizes) < max(whole.dag.sizes)
    assert torch.equal(small.dag.edge_attr, alone.dag.edge_attr)
    assert forest(small) == forest(alone)


def test_the_closure_keeps_the_old_order_and_drops_unused_edge_labels():
    graphs = collection(31, seed=2)
    only = graphs.take(torch.tensor([17]))
    trees = trees_of(graphs, 2)
    small = closed(take(trees, torch.tensor([17])))
    assert len(small.dag.edge_attr) == len({*map(tuple, only.edge_attr.tolist())})
    places = [[*map(tuple, trees.dag.x.tolist())].index(tuple(row)) for row in small.dag.x.tolist()]
    assert places == sorted(places)
    assert same(closed(trees), trees) and same(closed(small), small)


@pytest.mark.parametrize("level", [0, 1, 2, 3])
def test_lowered_trees_are_the_trees_of_fewer_hops(level):
    graphs = collection(13)
    for degree in (False, True):
        cut = lowered(trees_of(graphs, 3, degree=degree), level)
        assert same(cut, trees_of(graphs, level, degree=degree))


@pytest.mark.parametrize("level", [-1, 4])
def test_a_level_that_is_not_there_is_refused(level):
    with pytest.raises(UsageError, match=rf"level {level} of a DAG with levels 0\.\.3"):
        lowered(trees_of(collection(3), 3), level)


def test_level_counts_are_the_nodes_of_each_colour():
    graphs, index = collection(13), torch.tensor([3, 8, 3])
    trees = trees_of(graphs, 3)
    names = [naive_trees.first_occurrence(naive_trees.trees(*lists(graphs), level)) for level in range(4)]
    nodes = [v for i in index.tolist() for v in (graphs.batch == i).nonzero()[:, 0].tolist()]
    for level, counts in enumerate(level_counts(take(trees, index))):
        assert (
            counts.tolist()
            == np.bincount([names[level][v] for v in nodes], minlength=trees.dag.sizes[level]).tolist()
        )


def test_negative_hops_are_refused():
    for build in (trees_of, node_trees):
        with pytest.raises(UsageError, match="hops=-1"):
            build(collection(3), -1)


def forced(value, **change):
    """The value with other fields, shapes unchecked, as a reader might meet them."""
    changed = copy(value)
    for name, field in change.items():
        object.__setattr__(changed, name, field)
    return changed


def with_level(trees, number, **change):
    levels = list(trees.dag.levels)
    levels[number] = forced(levels[number], **change)
    return forced(trees, dag=forced(trees.dag, levels=tuple(levels)))


def put(tensor, place, value):
    changed = tensor.clone()
    changed[place] = value
    return changed


BREAKS = {
    r"level 1: own is outside 0\.\.": lambda t, one: with_level(t, 0, own=put(one.own, 0, t.dag.sizes[0])),
    r"level 1: own": lambda t, one: with_level(t, 0, own=put(one.own, -1, -1)),
    r"level 1: child": lambda t, one: with_level(t, 0, child=put(one.child, 2, t.dag.sizes[0])),
    r"level 1: edge": lambda t, one: with_level(t, 0, edge=put(one.edge, 2, len(t.dag.edge_attr))),
    r"level 1: row decreases": lambda t, one: with_level(t, 0, row=one.row.flip(0)),
    r"level 1: row .* leaves": lambda t, one: with_level(t, 0, row=put(one.row, -1, t.dag.sizes[1])),
    r"level 1: times is below 1": lambda t, one: with_level(t, 0, times=put(one.times, 0, 0)),
    r"level 1: row, child, edge": lambda t, one: with_level(t, 0, times=one.times[1:]),
    r"level 1: a colour's messages": lambda t, one: with_level(t, 0, times=one.times + 1),
    r"level 2: a colour's messages": lambda t, one: with_level(t, 1, times=t.dag.levels[1].times + 1),
    r"degree does not give": lambda t, one: forced(
        t, dag=forced(t.dag, degree=put(t.dag.degree, 0, -1))
    ),
    r"item decreases": lambda t, one: forced(t, item=t.item.flip(0)),
    r"item .* leaves": lambda t, one: forced(t, item=put(t.item, -1, len(t))),
    r"a colour of an item": lambda t, one: forced(t, color=put(t.color, 0, t.dag.sizes[-1])),
    r"a count is below 1": lambda t, one: forced(t, count=put(t.count, 0, 0)),
    r"differ in length": lambda t, one: forced(t, color=t.color[1:]),
    r"an item has no node": lambda t, one: forced(t, item=t.item.clamp(max=len(t) - 2)),
    r"weight does not": lambda t, one: forced(t, weight=put(t.weight, 0, 0.0)),
    r"weight .* finite": lambda t, one: forced(t, weight=put(t.weight, 0, float("inf"))),
    r"class labels outside 0\.\.2": lambda t, one: forced(t, y=put(t.y, 0, 3)),
    r"not probabilities of 3": lambda t, one: forced(t, y=torch.full((len(t), 3), 0.5), y_kind="prob"),
    r"node codes do not fit": lambda t, one: forced(t, dag=forced(t.dag, x=put(t.dag.x, (0, 0), 2))),
    r"edge codes do not fit": lambda t, one: forced(
        t, dag=forced(t.dag, edge_attr=t.dag.edge_attr[:, :1])
    ),
}  # fmt: skip


@pytest.mark.parametrize("words", BREAKS)
def test_a_broken_rule_is_named(words):
    trees = trees_of(collection(13), 2, degree=True)
    broken = BREAKS[words](trees, trees.dag.levels[0])
    assert trees_problem(trees) is None and dag_problem(trees.dag) is None
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(trees_problem(broken))


def test_a_degree_for_other_colours_is_named():
    dag = trees_of(collection(13), 0, degree=True).dag
    problem = dag_problem(forced(dag, degree=dag.degree[1:]))
    assert problem == "degree does not give each first colour a number >= 0"

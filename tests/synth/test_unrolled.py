"""Computation trees written out."""

import sys
from collections import Counter
from dataclasses import replace

import naive_trees
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddengine.errors import UsageError
from ddengine.graphs import Graphs, GraphSpec
from ddengine.ops.dag import trees_of
from ddengine.rng import Rng
from synth.unrolled import subtree_sizes, to_pyg, unroll_trees


def collection(seed, graphs=5, edge_columns=1, dense=1.5):
    """Graphs of 1 to 6 nodes with two label columns and random directed edges, some of them repeated."""
    generator = Rng(seed).numpy("collection")
    sizes = generator.integers(1, 7, graphs)
    batch, starts = np.repeat(np.arange(graphs), sizes), sizes.cumsum() - sizes
    of = generator.integers(0, graphs, int(dense * sizes.sum()))
    ends = starts[of] + generator.integers(0, 2**31, (2, len(of))) % sizes[of]
    return Graphs(
        x=torch.from_numpy(generator.integers(0, (2, 3), (len(batch), 2))),
        edge_index=torch.from_numpy(ends),
        edge_attr=torch.from_numpy(generator.integers(0, 2, (len(of), edge_columns))),
        batch=torch.from_numpy(batch),
        y=torch.from_numpy(generator.integers(0, 3, graphs)),
        spec=GraphSpec("noise", ("a", "b", "c"), (2, 3), (2,) * edge_columns),
    )


def both_ways(pairs, n, graph_of=None):
    """Unlabelled graphs of `n` nodes with these undirected edges."""
    ends = torch.tensor([*pairs, *((b, a) for a, b in pairs)], dtype=torch.int64).reshape(-1, 2).T
    batch = torch.zeros(n, dtype=torch.int64) if graph_of is None else torch.tensor(graph_of)
    none = torch.zeros((ends.shape[1], 0), dtype=torch.int64)
    y = torch.zeros(int(batch.max()) + 1, dtype=torch.int64)
    return Graphs(torch.zeros((n, 1), dtype=torch.int64), ends, none, batch, y, GraphSpec("s", ("a",), (1,)))


def by_item(batch, trees, items):
    found = [Counter() for _ in range(items)]
    for item, tree in zip(batch.tolist(), trees, strict=True):
        found[item][tree] += 1
    return found


def lists(graphs):
    return graphs.x.tolist(), graphs.edge_index.tolist(), graphs.edge_attr.tolist()


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10**6), hops=st.integers(0, 3), edge_columns=st.integers(0, 2))
def test_the_unrolled_trees_are_the_breadth_first_unrollings_of_all_nodes(seed, hops, edge_columns):
    graphs = collection(seed, edge_columns=edge_columns)
    forest = unroll_trees(trees_of(graphs, hops))
    roots = forest.root.nonzero()[:, 0].tolist()
    received = naive_trees.neighbours(len(forest.x), forest.edge_index.tolist(), forest.edge_attr.tolist())
    labels = [tuple(row) for row in forest.x.tolist()]
    found = [naive_trees.canonical(root, hops, labels, received) for root in roots]
    expected = naive_trees.trees(*lists(graphs), hops)
    assert by_item(forest.batch[roots], found, 5) == by_item(graphs.batch, expected, 5)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6), hops=st.integers(0, 3))
def test_each_node_but_a_root_has_one_edge_to_a_parent_one_level_above_in_its_item(seed, hops):
    forest = unroll_trees(trees_of(collection(seed), hops))
    child, parent = forest.edge_index
    assert sorted(child.tolist()) == (~forest.root).nonzero()[:, 0].tolist()
    assert torch.equal(forest.depth[child], forest.depth[parent] + 1)
    assert torch.equal(forest.batch[child], forest.batch[parent])
    assert torch.equal(forest.root, forest.depth == 0)
    assert bool((forest.batch.diff() >= 0).all())


def size_of(tree):
    return 1 + sum(size_of(child) for _, child in tree[1])


def merged_size_of(tree):
    return 1 + sum(merged_size_of(child) for _, child in set(tree[1]))


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6), hops=st.integers(0, 3))
def test_sizes_are_those_of_the_brute_force_trees(seed, hops):
    graphs = collection(seed)
    trees = trees_of(graphs, hops)
    expected = naive_trees.trees(*lists(graphs), hops)
    item, color, count = trees.item.numpy(), trees.color.numpy(), trees.count.numpy()
    for merged, size in ((False, size_of), (True, merged_size_of)):
        sizes = subtree_sizes(trees.dag, merged=merged)[-1][color]
        for i in range(5):
            there = [
                size(tree) for tree, graph in zip(expected, graphs.batch.tolist(), strict=True) if graph == i
            ]
            assert sorted(np.repeat(sizes[item == i], count[item == i])) == sorted(there)
    assert len(unroll_trees(trees).x) == sum(map(size_of, expected))


def test_children_with_multiplicity_are_repeated():
    star = both_ways([(0, leaf) for leaf in range(1, 8)], 8)
    forest = unroll_trees(trees_of(star, 1))
    assert torch.bincount(forest.depth).tolist() == [8, 7 + 7]
    received = torch.bincount(forest.edge_index[1], minlength=len(forest.x))
    assert sorted(received[forest.root].tolist()) == [1] * 7 + [7]


def test_an_isolated_node_is_a_root_alone():
    forest = unroll_trees(trees_of(both_ways([(1, 2)], 3, [0, 1, 1]), 2))
    assert (forest.batch == 0).sum() == 1
    assert torch.bincount(forest.depth).tolist() == [3, 2, 2]


def test_without_hops_each_node_stands_alone():
    graphs = collection(3)
    forest = unroll_trees(trees_of(graphs, 0))
    assert forest.root.all() and forest.edge_index.shape == (2, 0) and forest.edge_attr.shape == (0, 1)
    assert sorted(forest.x.tolist()) == sorted(graphs.x.tolist())


def test_chosen_items_are_unrolled_in_the_order_asked_for():
    trees = trees_of(collection(7), 2)
    chosen = unroll_trees(trees, torch.tensor([4, 1, 4]))
    for place, item in enumerate((4, 1, 4)):
        alone, inside = unroll_trees(trees, torch.tensor([item])), chosen.batch == place
        assert torch.equal(chosen.x[inside], alone.x) and torch.equal(chosen.depth[inside], alone.depth)
    for wrong in (5, -1):
        with pytest.raises(UsageError, match=rf"items \[{wrong}\] are not all in 0\.\.4"):
            unroll_trees(trees, torch.tensor([wrong]))


def test_more_nodes_than_the_limit_are_refused_and_as_many_are_not():
    trees = trees_of(collection(7), 2)
    nodes = len(unroll_trees(trees).x)
    assert len(unroll_trees(trees, limit=nodes).x) == nodes
    with pytest.raises(
        UsageError, match=f"unroll to {nodes} nodes, more than limit={nodes - 1}\n.*raise limit"
    ):
        unroll_trees(trees, limit=nodes - 1)
    with pytest.raises(UsageError, match="limit=0"):
        unroll_trees(trees, limit=0)


def test_trees_too_large_to_build_are_counted_exactly():
    complete = both_ways([(a, b) for a in range(13) for b in range(a)], 13)
    for hops, said in (
        (4, f"unroll to {13 * sum(12**i for i in range(5))} nodes"),
        (60, r"about 10\^65 nodes"),
    ):
        trees = trees_of(complete, hops)
        assert subtree_sizes(trees.dag)[-1].tolist() == [sum(12**level for level in range(hops + 1))]
        with pytest.raises(UsageError, match=said):
            unroll_trees(trees)


def test_a_message_passing_network_computes_at_the_roots_what_it_computes_at_the_nodes():
    nn = pytest.importorskip("torch_geometric.nn")
    graphs, generator = collection(11, graphs=13), Rng(5).torch("weights")
    trees = trees_of(graphs, 2)
    layers = [nn.GINConv(torch.nn.Linear(a, b).double(), eps=0.3) for a, b in ((5, 7), (7, 3))]
    for layer in layers:
        for weight in layer.parameters():
            weight.data = torch.randn(weight.shape, generator=generator, dtype=torch.float64)

    def embedded(x, edge_index):
        h = graphs.spec.features(x).double()
        for layer in layers:
            h = layer(h, edge_index).tanh()
        return h.detach()

    nodes, forest = embedded(graphs.x, graphs.edge_index), unroll_trees(trees)
    roots = embedded(forest.x, forest.edge_index)[forest.root]
    for i in range(13):
        there, here = nodes[graphs.batch == i].numpy(), roots[forest.batch[forest.root] == i].numpy()
        gap = np.abs(there[:, None] - here[None]).max(2)
        assert gap.shape == (len(there), len(there))
        assert gap.min(1).max() < 1e-12 and gap.min(0).max() < 1e-12
        assert np.abs(there.sum(0) - here.sum(0)).max() < 1e-12


def test_items_become_data_objects_that_a_loader_batches():
    loaders = pytest.importorskip("torch_geometric.loader")
    trees = replace(trees_of(collection(2, graphs=7), 2), weight=torch.arange(1.0, 8.0))
    data = to_pyg(trees)
    forest = unroll_trees(trees)
    batch = next(iter(loaders.DataLoader(data, batch_size=7)))
    for name in ("x", "edge_index", "edge_attr", "root", "batch"):
        assert torch.equal(getattr(batch, name), getattr(forest, name)), name
    assert torch.equal(batch.y, trees.y) and torch.equal(batch.weight, trees.weight)
    assert len(data) == 7 and all(one.validate() for one in data)


def test_soft_labels_stay_rows_of_data_objects():
    pytest.importorskip("torch_geometric")
    hard = trees_of(collection(2, graphs=3), 1)
    soft = replace(hard, y=torch.tensor([[0.5, 0.3, 0.2]] * 3), y_kind="prob")
    assert [one.y.shape for one in to_pyg(soft)] == [(1, 3)] * 3


def test_data_objects_heed_the_limit():
    pytest.importorskip("torch_geometric")
    with pytest.raises(UsageError, match="limit=5"):
        to_pyg(trees_of(collection(2), 2), limit=5)


def test_without_torch_geometric_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_geometric", None)
    with pytest.raises(UsageError, match=r'pip install "ddengine\[graph\]"'):
        to_pyg(trees_of(collection(2), 1))

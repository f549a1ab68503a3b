"""Real graphs as a synthetic set: every node and edge is kept, at few bytes, and damage is named."""

import re
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_graphs import mutated, random_graphs, same_bits

from ddengine.errors import UsageError
from ddengine.graphs import Graphs
from ddengine.ops.dag import trees_of
from ddengine.types import SynthSet
from synth import Forest, GraphSubset, stored_graphs

SIZES = st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple)
RANDOM = {
    "seed": st.integers(0, 2**20),
    "count": st.integers(1, 7),
    "node_sizes": SIZES,
    "edge_sizes": st.just(()) | SIZES,
    "directed": st.booleans(),
    "edges": st.sampled_from([0, 3, 11]),
}


@pytest.fixture
def subset() -> GraphSubset:
    return GraphSubset.of(random_graphs(5, edge_sizes=(4, 2)))


def arcs(graphs):
    """How often each directed edge with its label is there."""
    listed = (graphs.edge_index.T.tolist(), graphs.edge_attr.tolist())
    return Counter((*ends, *label) for ends, label in zip(*listed, strict=True))


@settings(max_examples=60, deadline=None)
@given(**RANDOM)
def test_unpacking_gives_back_every_bit(**options):
    subset = GraphSubset.of(random_graphs(**options))
    packed = subset.pack()
    assert GraphSubset.problem(packed, "class", subset.spec) is None
    back = GraphSubset.unpack(packed, {"y_kind": "class"}, subset.spec)
    assert same_bits(back.decode(), subset.decode())
    assert all(torch.equal(t, packed[name]) for name, t in back.pack().items())


@settings(max_examples=40, deadline=None)
@given(**RANDOM)
def test_every_node_and_edge_of_the_source_is_there(**options):
    source = random_graphs(**options)
    graphs = GraphSubset.of(source).decode()
    assert arcs(graphs) == arcs(source)
    for name in ("x", "batch", "y"):
        assert torch.equal(getattr(graphs, name), getattr(source, name))


@settings(max_examples=20, deadline=None)
@given(**RANDOM)
def test_edges_are_listed_once_exactly_where_all_are_there_both_ways(**options):
    source = random_graphs(**options)
    counted = arcs(source)
    both = all(n == counted[(v, u, *label)] for (u, v, *label), n in counted.items())
    packed = GraphSubset.of(source).pack()
    if not counted:
        assert not {"graphs.edges", "graphs.arcs", "graphs.edges_per"} & packed.keys()
    elif both:
        loops = sum(n for (u, v, *_), n in counted.items() if u == v)
        assert packed["graphs.edges"].shape[1] == (sum(counted.values()) + loops) // 2
    else:
        assert packed["graphs.arcs"].shape[1] == sum(counted.values())


def test_a_subset_has_nothing_free(subset):
    assert isinstance(subset, SynthSet) and subset.params() == {} and subset.replace({}) is subset
    with pytest.raises(UsageError, match="images"):
        subset.replace({"images": torch.zeros(1)})


def test_nbytes_are_the_bytes_of_the_packed_tensors(subset):
    sizes = {name: t.numel() * t.element_size() for name, t in subset.pack().items()}
    trees = sum(size for name, size in sizes.items() if name.startswith("graphs."))
    total = sum(sizes.values())
    assert total == trees + 7
    assert subset.nbytes == {"images": 0, "trees": trees, "labels": 7, "extras": 0, "total": total}


def test_a_triangle_with_a_tail_costs_the_bytes_counted_by_hand():
    spec = replace(random_graphs(0).spec, classes=("a", "b"))
    once = torch.tensor([[0, 1, 2, 2], [1, 2, 0, 3]])
    zeros = torch.zeros(4, dtype=torch.int64)
    none = torch.zeros((8, 0), dtype=torch.int64)
    graphs = Graphs(
        torch.tensor([[0], [1], [2], [0]]), torch.cat([once, once.flip(0)], 1), none, zeros, zeros[:1], spec
    )
    packed = GraphSubset.of(graphs).pack()
    assert {name: t.tolist() for name, t in packed.items()} == {
        "graphs.nodes": [4],
        "graphs.x": [[0], [1], [2], [0]],
        "graphs.edges": [[0, 0, 1, 2], [1, 2, 2, 3]],
        "graphs.edges_per": [4],
        "labels": [0],
    }
    assert GraphSubset.of(graphs).nbytes["total"] == 1 + 4 + 8 + 1 + 1


def test_chosen_graphs_are_decoded_in_the_order_asked(subset):
    index = torch.tensor([6, 0, 6])
    assert same_bits(subset.decode(index), subset.decode().take(index))
    assert torch.equal(subset.decode(index).y, subset.decode().y[index])


def test_edges_in_another_order_give_the_same_set(subset):
    graphs = subset.graphs
    order = torch.randperm(graphs.edge_index.shape[1], generator=torch.Generator().manual_seed(0))
    shuffled = replace(graphs, edge_index=graphs.edge_index[:, order], edge_attr=graphs.edge_attr[order])
    assert same_bits(GraphSubset.of(shuffled), subset)


def test_ends_are_places_in_their_graph_and_so_stay_narrow():
    source = random_graphs(1, count=97)
    packed = GraphSubset.of(source).pack()
    assert len(source.x) > 256 and packed["graphs.edges"].dtype == torch.uint8


def test_no_graphs_are_refused():
    graphs = random_graphs(1)
    with pytest.raises(UsageError, match="no graphs"):
        GraphSubset.of(graphs.take(torch.zeros(0, dtype=torch.int64)))


def test_the_form_of_fewer_bytes_is_taken():
    one = random_graphs(8, count=3)
    many = one.take(torch.arange(3).repeat(40))  # the same trees forty times
    for graphs, kind in ((one, GraphSubset), (many, Forest)):
        found = stored_graphs(graphs, 2, False)
        sizes = [Forest.of(trees_of(graphs, 2)).nbytes["total"], GraphSubset.of(graphs).nbytes["total"]]
        assert isinstance(found, kind) and found.nbytes["total"] == min(sizes) < max(sizes)


@pytest.mark.parametrize("degree", [True, False])
def test_trees_tell_degrees_apart_where_asked(degree):
    many = random_graphs(8, count=3).take(torch.arange(3).repeat(40))
    found = stored_graphs(many, 3, degree)
    assert found.trees.dag.hops == 3 and (found.trees.dag.degree is not None) == degree


def put(tensors, name, index, value):
    changed = tensors[name].clone()
    changed[index] = value
    return {**tensors, name: changed}


def without(tensors, *names):
    return {name: t for name, t in tensors.items() if name not in names}


BROKEN = {
    "'graphs.x' is missing": lambda t: without(t, "graphs.x"),
    "'graphs.nodes' is missing": lambda t: without(t, "graphs.nodes"),
    "'code' does not belong": lambda t: {**t, "code": torch.zeros(1)},
    "'graphs.edges' does not belong": lambda t: {**t, "graphs.arcs": t["graphs.edges"]},
    "graphs.x is torch.int64": lambda t: {**t, "graphs.x": t["graphs.x"].long()},
    "graphs.x is .* 1 columns": lambda t: {**t, "graphs.x": t["graphs.x"].repeat(1, 2)},
    r"graphs.nodes is .*\[\]": lambda t: {**t, "graphs.nodes": torch.tensor(7, dtype=torch.uint8)},
    "graphs.edges is .*float": lambda t: {**t, "graphs.edges": t["graphs.edges"].float()},
    "graphs.edges_per holds a number below 0": lambda t: put(
        {**t, "graphs.edges_per": t["graphs.edges_per"].short()}, "graphs.edges_per", 0, -1
    ),
    "edges are listed in 3 rows": lambda t: {**t, "graphs.edges": t["graphs.edges"][[0, 1, 1]]},
    "graphs.edges is .* a table": lambda t: {**t, "graphs.edges": t["graphs.edges"].flatten()},
    "graphs.x has": lambda t: put(t, "graphs.nodes", 0, 200),
    "graphs.edges_per has": lambda t: {**t, "graphs.edges_per": t["graphs.edges_per"][1:]},
    "graphs.labels has": lambda t: {**t, "graphs.labels": t["graphs.labels"][1:]},
    "edges of each graph add up to": lambda t: put(t, "graphs.edges_per", 0, 99),
    "edges of each graph add up to 0": lambda t: without(t, "graphs.edges_per"),
    "0 labels": lambda t: without(t, "graphs.labels"),
    "an edge ends outside the nodes": lambda t: put(t, "graphs.edges", (1, 0), 9),
    "with its larger end first": lambda t: {**t, "graphs.edges": t["graphs.edges"].flip(0)},
    "each of 7 graphs a node": lambda t: (
        put(put(t, "graphs.nodes", 0, 0), "graphs.nodes", 1, int(t["graphs.nodes"][:2].sum()))
        | without_edges(t)
    ),
    "node label column 0": lambda t: put(t, "graphs.x", (3, 0), 3),
    "edge label column 1": lambda t: put(t, "graphs.labels", (3, 1), 2),
    r"labels lie outside 0\.\.2": lambda t: put(t, "labels", 3, 3),
    "labels are": lambda t: {**t, "labels": t["labels"][1:]},
}


def without_edges(tensors):
    """Entries that move all edges of the first graph to the second, which has all nodes of both."""
    per = tensors["graphs.edges_per"].clone()
    per[1], per[0] = per[:2].sum(), 0
    return {"graphs.edges_per": per}


@pytest.mark.parametrize("words", BROKEN)
def test_stored_tensors_that_break_a_rule_are_named(subset, words):
    tensors = subset.pack()
    assert GraphSubset.problem(tensors, "class", subset.spec) is None
    problem = GraphSubset.problem(BROKEN[words](tensors), "class", subset.spec)
    assert problem is not None and "\n" not in problem and re.search(words, problem), problem


def test_soft_labels_are_named(subset):
    assert "not 'prob'" in GraphSubset.problem(subset.pack(), "prob", subset.spec)


@settings(max_examples=100, deadline=None)
@given(data=st.data(), seed=st.integers(0, 30))
def test_mutated_tensors_are_named_or_make_a_set(data, seed):
    subset = GraphSubset.of(random_graphs(seed, count=3, edge_sizes=(3,), directed=seed % 2 == 0))
    tensors = mutated(data.draw, subset.pack())
    if GraphSubset.problem(tensors, "class", subset.spec) is None:
        graphs = GraphSubset.unpack(tensors, {}, subset.spec).decode()
        assert same_bits(GraphSubset.of(graphs).decode(), graphs)

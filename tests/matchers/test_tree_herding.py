"""Herding of real graphs by their trees: against a dense loop, in the smaller of the two stored forms."""

from dataclasses import replace

import naive_trees
import numpy as np
import pytest
import torch
from global_rng import global_rng_untouched
from naive_herding_graphs import naive_herding, naive_kcenter, naive_round_robin
from random_graphs import random_graphs, same_bits

import matchers
from ddengine.errors import UsageError
from ddengine.graphs import as_graph_source
from ddengine.nets import NetSpec
from ddengine.ops.dag import trees_of
from ddengine.rng import Rng
from ddengine.types import Budget, Task
from matchers.real_graphs import depth_of, pick
from synth import Forest, GraphSubset

COUNT, CLASSES = 29, 3
GIN = NetSpec("gin", width=4, depth=2)
NAIVE = {"herding": naive_herding, "kcenter": naive_kcenter}


def collection(seed, **options):
    """Random graphs with edge labels, sorted by class."""
    graphs = random_graphs(seed, count=COUNT, edge_sizes=(2,), classes=CLASSES, **options)
    return as_graph_source(replace(graphs, y=torch.arange(COUNT) % CLASSES))


def rankings(graphs, hops, degree, naive=naive_herding):
    """The naive order of each class, on counts of written-out trees."""
    nested = (graphs.x.tolist(), graphs.edge_index.tolist(), graphs.edge_attr.tolist())
    color = naive_trees.first_occurrence(naive_trees.trees(*nested, hops, degree))
    counts = np.zeros((COUNT, max(color) + 1))
    for tree, graph in zip(color, graphs.batch.tolist(), strict=True):
        counts[graph, tree] += 1
    members = [np.flatnonzero(graphs.y.numpy() == c) for c in range(CLASSES)]
    return [which[naive(np.sqrt(counts[which]), len(which))].tolist() for which in members]


def smaller_form(graphs, index, hops, degree):
    """These graphs as their trees or as they are: the form of fewer bytes, as they are where equal."""
    chosen = graphs.take(torch.tensor(index))
    forms = [GraphSubset.of(chosen), Forest.of(trees_of(chosen, hops, degree=degree))]
    return min(forms, key=lambda form: form.nbytes["total"])


def distilled(matcher, graphs, budget, seed=0):
    task, rng = Task(graphs, budget), Rng(seed)
    return matcher.finish(matcher.init(task, rng), matcher.prepare(task, rng), rng)


def make(network=GIN, **options):
    return matchers.make("tree_herding", network, **options)


@pytest.mark.parametrize("options", [{}, {"hops": 3}, {"degree": True}, {"hops": 4, "degree": True}])
def test_the_chosen_graphs_are_those_of_naive_herding(options):
    hops, degree = options.get("hops", 2), options.get("degree", False)
    for seed in range(3):
        graphs = collection(seed)
        expected = [i for ranking in rankings(graphs, hops, degree) for i in ranking[:4]]
        matcher = make(**options)
        assert matcher.init(Task(graphs, Budget(ipc=4)), Rng(0)).indices.tolist() == expected
        found = distilled(matcher, graphs, Budget(ipc=4))
        assert same_bits(found, smaller_form(graphs, expected, hops, degree))


@pytest.mark.parametrize("name", NAIVE)
def test_selections_of_graphs_have_the_depth_of_the_network(name):
    graphs, network = collection(5), NetSpec("gcn", depth=3)
    expected = [i for ranking in rankings(graphs, 3, True, NAIVE[name]) for i in ranking[:5]]
    matcher = matchers.make(name, network)
    assert matcher.init(Task(graphs, Budget(ipc=5)), Rng(0)).indices.tolist() == expected
    found = distilled(matcher, graphs, Budget(ipc=5))
    assert same_bits(found, smaller_form(graphs, expected, 3, True))


def test_the_smaller_form_is_trees_where_graphs_repeat_and_graphs_where_they_do_not():
    graphs = collection(7)
    assert isinstance(distilled(make(), graphs, Budget(ipc=9)), GraphSubset)
    one_of_each = graphs.take(torch.tensor([0, COUNT // 2, COUNT - 1]))
    alike = one_of_each.take(torch.arange(3).repeat_interleave(9))
    found = distilled(make(), alike, Budget(ipc=9))
    assert isinstance(found, Forest) and len(found.decode()) == 27
    assert found.nbytes["total"] < GraphSubset.of(alike).nbytes["total"]


@pytest.mark.parametrize("nbytes", [110, 211, 331, 10_000])
def test_a_budget_in_bytes_takes_from_each_class_in_turn_what_fits(nbytes):
    graphs = collection(3, edges=6)

    def size(index):
        return smaller_form(graphs, index, 2, False).nbytes["total"]

    expected = naive_round_robin(rankings(graphs, 2, False), nbytes, size)
    found = distilled(make(), graphs, Budget(nbytes=nbytes))
    assert found.nbytes["total"] <= nbytes and same_bits(found, smaller_form(graphs, expected, 2, False))
    assert (len(expected) == COUNT) == (nbytes == 10_000)


def test_nothing_is_drawn_and_no_seed_matters():
    graphs = collection(1)
    with global_rng_untouched():
        first = distilled(make(), graphs, Budget(ipc=3), seed=1)
    assert same_bits(first, distilled(make(), graphs, Budget(ipc=3), seed=2))


def test_a_class_with_fewer_graphs_than_asked_for_is_refused():
    assert collection(1).counts == [10, 10, 9]
    with pytest.raises(UsageError, match="10 graphs of each class, but class 2 has 9\nGive at most 9"):
        make().init(Task(collection(1), Budget(ipc=10)), Rng(0))


def test_bytes_that_hold_not_one_graph_of_each_class_are_refused_with_how_many_do():
    graphs = collection(1)
    firsts = [ranking[0] for ranking in rankings(graphs, 2, False)]
    least = smaller_form(graphs, firsts, 2, False).nbytes["total"]
    with pytest.raises(UsageError, match=f"takes {least} bytes, and nbytes={least - 1}\nGive {least} bytes"):
        make().init(Task(graphs, Budget(nbytes=least - 1)), Rng(0))
    assert len(distilled(make(), graphs, Budget(nbytes=least)).decode()) == CLASSES


def test_selections_of_images_alone_and_no_budget_are_refused():
    with pytest.raises(UsageError, match="matcher=kmeans works on images only"):
        pick(Task(collection(1), Budget(ipc=1)), "kmeans", 2, False, Rng(0))
    with pytest.raises(UsageError, match="a budget needs either ipc or nbytes"):
        pick(Task(collection(1), None), "herding", 2, False, Rng(0))


@pytest.mark.parametrize(
    ("network", "hops", "degree", "expected"),
    [
        (NetSpec("gin"), None, None, (2, False)),
        (NetSpec("gin", depth=3), None, None, (3, False)),
        (NetSpec("sage"), 5, None, (5, False)),
        (NetSpec("gat"), None, True, (2, True)),
        (NetSpec("gcn", depth=1), None, None, (1, True)),
        (NetSpec("gcn"), 2, True, (2, True)),
    ],
)
def test_hops_are_the_networks_layers_and_degrees_told_apart_for_gcn(network, hops, degree, expected):
    assert depth_of(network, hops, degree) == expected


@pytest.mark.parametrize(("hops", "other"), [(1, " or network.depth=1"), (0, ""), (-2, "")])
def test_fewer_hops_than_layers_are_refused(hops, other):
    with pytest.raises(UsageError) as refused:
        make(hops=hops).init(Task(collection(1), Budget(ipc=1)), Rng(0))
    assert refused.value.cause == f"matcher.hops={hops} is less than the 2 layers of network 'gin'"
    assert refused.value.remedy == f"Give matcher.hops=2{other}"


def test_gcn_without_degrees_is_refused():
    with pytest.raises(
        UsageError, match="matcher.degree=false with network=gcn: its norm .*\nGive matcher.d"
    ):
        make(NetSpec("gcn"), degree=False).init(Task(collection(1), Budget(ipc=1)), Rng(0))


def test_a_network_of_images_is_refused_with_those_of_graphs():
    with pytest.raises(UsageError, match="network convnet works on images; graphs take: .*gin"):
        make(NetSpec("convnet")).init(Task(collection(1), Budget(ipc=1)), Rng(0))

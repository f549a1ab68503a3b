"""The layers on the colour DAG give what torch_geometric's layers give node by node."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddengine.data.graph_source import load_graphs
from ddengine.errors import UsageError
from ddengine.graphs import Graphs, GraphSpec, joined
from ddengine.nets import NetSpec
from ddengine.nets.graph import GRAPH_NETWORKS, build_graph_networks
from ddengine.nets.graph_plan import Sparse, plan, product, selection, sparse
from ddengine.ops.dag import node_trees, trees_of
from ddengine.rng import Rng

pytest.importorskip("torch_geometric", reason="the oracle torch_geometric (extra 'graph') is not installed")
from pyg_twins import LAYERS, Twin

SIZES = (1, 2, 5, 3, 7, 13, 11)


def noise(seed=0, per_node=1.7, edge_columns=1):
    """Graphs of prime sizes, the first without an edge: labels 2 x 3, repeated edges, isolated nodes."""
    rng = Rng(seed).numpy("graphs")
    batch = np.repeat(np.arange(len(SIZES)), SIZES)
    starts, sizes = (np.cumsum(SIZES) - SIZES)[batch], np.array(SIZES)[batch]
    source = rng.permutation(np.repeat(np.arange(len(batch)), 2))[: int(per_node * len(batch))]
    source = source[sizes[source] > 1]
    inside = source - starts[source]
    target = starts[source] + (inside + rng.integers(1, sizes[source])) % sizes[source]
    edges = np.stack([source, target])
    edges = np.concatenate([edges, edges[:, :5]], axis=1)
    return Graphs(
        x=torch.from_numpy(rng.integers(0, (2, 3), (len(batch), 2))),
        edge_index=torch.from_numpy(edges),
        edge_attr=torch.from_numpy(rng.integers(0, 3, (edges.shape[1], edge_columns))),
        batch=torch.from_numpy(batch),
        y=torch.from_numpy(rng.integers(0, 3, len(SIZES))),
        spec=GraphSpec("noise", ("a", "b", "c"), (2, 3), (3,) * edge_columns),
    )


@pytest.fixture(scope="module")
def mutag(graph_sets):
    found = load_graphs("tu", "MUTAG", root=graph_sets, download=False)
    return joined([found.fit, found.validation, found.test])


def networks(name, graphs, copies=2, seed=0, pool="mean", **options):
    """Networks in float64 with every parameter moved off its start, so that none is 0 or 1."""
    generators = [Rng(seed).fold(i).torch("weights") for i in range(copies)]
    spec = NetSpec(name, width=options.pop("width", 7), **options)
    nets = build_graph_networks(spec, graphs.spec, generators, pool=pool).double()
    shift = Rng(seed).torch("shift")
    with torch.no_grad():
        for parameter in nets.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=shift)
    return nets


def agrees_with_the_twins(nets, graphs, trees):
    """Logits, and gradients of a random function of them: ours on `trees`, torch_geometric on the nodes."""
    nets.zero_grad()
    ours = nets(trees)
    direction = torch.randn(ours.shape, generator=Rng(0).torch("direction")).double()
    (ours * direction).sum().backward()
    for copy, row in enumerate(ours):
        twin = Twin(nets, copy).train(nets.training)
        assert {id(p) for p, _ in twin.pairs} == {id(p) for p in nets.parameters()}
        theirs = twin(graphs)
        torch.testing.assert_close(row, theirs, atol=1e-12, rtol=1e-12)
        (theirs * direction[copy]).sum().backward()
        for mine, its in twin.pairs:
            torch.testing.assert_close(twin.as_theirs(mine.grad, its), its.grad, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("pool", ["mean", "sum"])
@pytest.mark.parametrize("name", GRAPH_NETWORKS)
def test_networks_are_those_of_torch_geometric(name, pool, depth):
    graphs = noise()
    nets = networks(name, graphs, pool=pool, depth=depth)
    agrees_with_the_twins(nets, graphs, trees_of(graphs, depth, degree=name == "gcn"))
    agrees_with_the_twins(nets, graphs, node_trees(graphs, depth, degree=name == "gcn"))


@pytest.mark.parametrize("name", GRAPH_NETWORKS)
def test_networks_are_those_of_torch_geometric_on_molecules(name, mutag):
    nets = networks(name, mutag, depth=3)
    trees = trees_of(mutag, 3, degree=name == "gcn")
    assert trees.dag.sizes[-1] < len(mutag.x) / 2
    agrees_with_the_twins(nets, mutag, trees)
    whole = nets(node_trees(mutag, 3, degree=name == "gcn"))
    torch.testing.assert_close(nets(trees), whole, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("name", GRAPH_NETWORKS)
def test_trees_with_more_hops_than_layers_serve_too(name):
    graphs = noise(3)
    nets = networks(name, graphs, depth=1, norm="batch")
    agrees_with_the_twins(nets, graphs, trees_of(graphs, 3, degree=True))


@pytest.mark.parametrize("name", GRAPH_NETWORKS)
def test_graphs_without_any_edge_are_no_exception(name):
    full = noise(2)
    graphs = replace(full, edge_index=full.edge_index[:, :0], edge_attr=full.edge_attr[:0])
    nets = networks(name, graphs, depth=2)
    agrees_with_the_twins(nets, graphs, trees_of(graphs, 2, degree=name == "gcn"))


@pytest.mark.parametrize("name", ["gat", "gatv2"])
def test_large_scores_do_not_overflow(name):
    graphs = noise(4)
    nets = networks(name, graphs, depth=1)
    with torch.no_grad():
        nets.layers[0].sender.weight *= 3000
    assert torch.isfinite(nets(trees_of(graphs, 1))).all()
    torch.testing.assert_close(nets(trees_of(graphs, 1))[1], Twin(nets, 1)(graphs), atol=1e-9, rtol=1e-9)


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 2**20),
    name=st.sampled_from(sorted(GRAPH_NETWORKS)),
    per_node=st.floats(0.2, 2),
    depth=st.integers(1, 2),
    norm=st.sampled_from(["none", "batch"]),
)
def test_agreement_does_not_hang_on_the_graphs(seed, name, per_node, depth, norm):
    graphs = noise(seed, per_node)
    nets = networks(name, graphs, copies=1, depth=depth, norm=norm, seed=seed)
    agrees_with_the_twins(nets, graphs, trees_of(graphs, depth, degree=name == "gcn"))


@pytest.mark.parametrize("name", ["gin", "gat", "gcn"])
def test_batch_norm_in_training_has_outputs_and_statistics_of_torch(name):
    graphs, depth = noise(5), 2
    nets = networks(name, graphs, depth=depth, norm="batch")
    trees, twins = trees_of(graphs, depth, degree=name == "gcn"), [Twin(nets, copy) for copy in range(2)]
    for _ in range(3):
        ours = nets(trees)
        for copy, twin in enumerate(twins):
            torch.testing.assert_close(ours[copy], twin(graphs), atol=1e-12, rtol=1e-12)
    for copy, twin in enumerate(twins):
        for mine, its in zip(nets.norms, twin.norms, strict=True):
            torch.testing.assert_close(mine.running_mean[copy], its.running_mean, atol=1e-12, rtol=0)
            torch.testing.assert_close(mine.running_var[copy], its.running_var, atol=1e-12, rtol=0)
    assert (nets.norms[0].running_mean[0] - nets.norms[0].running_mean[1]).abs().max() > 1e-3
    evaluated = nets.eval()(trees)
    for copy, twin in enumerate(twins):
        torch.testing.assert_close(evaluated[copy], twin.eval()(graphs), atol=1e-12, rtol=1e-12)
    assert (evaluated - ours).abs().max() > 1e-3


def test_gcn_is_refused_without_degrees_and_would_be_wrong(mutag):
    nets, trees = networks("gcn", mutag), trees_of(mutag, 2)
    with pytest.raises(UsageError, match=r"(?s)gcn needs the degree.*matcher\.degree=true"):
        nets(trees)
    with pytest.raises(UsageError, match="gcn needs the degree"):
        nets(plan(trees, 2, torch.float64))
    mean = torch.zeros(len(trees.dag.x)).index_add_(0, mutag.x[:, 0], mutag.degree.float())
    label = torch.bincount(mutag.x[:, 0])
    guess = (mean / label).round().long()[trees.dag.x[:, 0]]
    wrong = nets(replace(trees, dag=replace(trees.dag, degree=guess)))[0]
    truth = Twin(nets, 0)(mutag)
    assert (wrong - truth).abs().max() > 1e-3
    torch.testing.assert_close(nets(trees_of(mutag, 2, degree=True))[0], truth, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("name", GRAPH_NETWORKS)
def test_initial_weights_have_the_spread_of_torch_geometric(name):
    spec = replace(noise().spec, node_sizes=(31, 30))
    generators = [Rng(0).fold(i).torch("weights") for i in range(3)]
    nets = build_graph_networks(NetSpec(name, width=53, depth=1), spec, generators)
    # an independent start of torch_geometric's, drawn inside a fork of the global generator
    with torch.random.fork_rng(devices=[]):
        conv = LAYERS[name][0](61, 53, 3)
    for ours, theirs in LAYERS[name][1](nets.layers[0], conv):
        bound, its = float(ours.detach().abs().max()), float(theirs.detach().abs().max())
        assert bound == pytest.approx(its, rel=0.3) if its else bound == 0


def dense(matrix):
    found = torch.zeros(len(matrix.starts) - 1, len(matrix.back[0]) - 1, dtype=matrix.weight.dtype)
    rows = torch.repeat_interleave(torch.arange(len(found)), matrix.starts.diff())
    return found.index_put_((rows, matrix.column), matrix.weight, accumulate=True)


def random_matrix(entries, seed=0):
    rng = Rng(seed).numpy("matrix")
    row = torch.from_numpy(np.sort(rng.integers(0, 5, entries)))
    column, weight = torch.from_numpy(rng.integers(0, 7, entries)), torch.from_numpy(rng.random(entries))
    whole = torch.zeros(5, 7).double().index_put_((row, column), weight, accumulate=True)
    return sparse(row, column, weight, (5, 7)), whole


@pytest.mark.parametrize("entries", [0, 1, 23])
def test_products_are_those_of_the_dense_matrix_to_the_second_derivative(entries):
    matrix, whole = random_matrix(entries)
    assert isinstance(matrix, Sparse)
    torch.testing.assert_close(dense(matrix), whole)
    torch.testing.assert_close(dense(matrix.transposed), whole.T)
    h = torch.randn((7, 2, 3), generator=Rng(0).torch("h"), dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(product(matrix, h), torch.einsum("rc,csd->rsd", whole, h))
    assert torch.autograd.gradcheck(lambda h: product(matrix, h), h)
    assert torch.autograd.gradgradcheck(lambda h: product(matrix, h).square(), h)


def test_a_selection_takes_rows_and_adds_their_gradients_up():
    index = torch.tensor([3, 0, 3, 1])
    h = torch.randn((5, 2), generator=Rng(0).torch("h"), dtype=torch.float64, requires_grad=True)
    taken = product(selection(index, 5, torch.float64), h)
    assert torch.equal(taken, h[index])
    taken.sum().backward()
    assert h.grad[:, 0].tolist() == [1, 1, 0, 2, 0]

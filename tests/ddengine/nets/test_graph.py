"""Graph networks: options, errors, several at once, dropout."""

from dataclasses import replace

import pytest
import torch
from global_rng import global_rng_untouched

from ddengine.errors import UsageError
from ddengine.graphs import Graphs, GraphSpec
from ddengine.nets import NETWORKS, NetSpec
from ddengine.nets.graph import (
    ACTIVATIONS,
    GRAPH_NETWORKS,
    Plan,
    build_graph_networks,
    plan,
    resolve_graph,
)
from ddengine.nets.graph_layers import StackedBatchNorm
from ddengine.ops.dag import level_counts, node_trees, take, trees_of
from ddengine.rng import Rng

SPEC = GraphSpec("toy", ("a", "b"), (3,), (2,))


def toy():
    """Five graphs: a lone node, a pair, a triangle, a star of four, a path of five with an isolated node."""
    sizes = [1, 2, 3, 5, 6]
    ends = [
        [(0, 1)],
        [(0, 1), (1, 2), (0, 2)],
        [(0, 1), (0, 2), (0, 3), (0, 4)],
        [(i, i + 1) for i in range(4)],
    ]
    starts = [1, 3, 6, 11]
    edges = [(a + s, b + s) for s, part in zip(starts, ends, strict=True) for a, b in part]
    both = torch.tensor([*edges, *[(b, a) for a, b in edges]]).T
    return Graphs(
        x=(torch.arange(sum(sizes)) % 3)[:, None],
        edge_index=both,
        edge_attr=(torch.arange(len(edges)) % 2).repeat(2)[:, None],
        batch=torch.repeat_interleave(torch.arange(5), torch.tensor(sizes)),
        y=torch.tensor([0, 1, 0, 1, 1]),
        spec=SPEC,
    )


def generators(count=3, seed=0):
    return [Rng(seed).fold(i).torch("weights") for i in range(count)]


def built(name="gin", count=3, seed=0, spec=SPEC, pool="mean", dropout=0.0, **options):
    options = {"width": 5, **options}
    return build_graph_networks(
        NetSpec(name, **options), spec, generators(count, seed), pool=pool, dropout=dropout
    )


def alone(name, number, **options):
    spec = NetSpec(name, width=5, **options)
    return build_graph_networks(spec, SPEC, [generators(number + 1)[number]])


def trees(hops=2):
    return trees_of(toy(), hops, degree=True)


def test_defaults_are_filled_in():
    assert resolve_graph(NetSpec("gat")) == NetSpec("gat", 64, 2, "none")
    assert resolve_graph(NetSpec("gcn", 7, 3, "batch")) == NetSpec("gcn", 7, 3, "batch")


def test_networks_of_images_are_refused_by_name():
    with pytest.raises(UsageError, match="convnet works on images; graphs take: gcn, gin, gine, sage"):
        resolve_graph(NetSpec())
    assert not set(NETWORKS) & set(GRAPH_NETWORKS)


def test_unknown_networks_name_the_nearest():
    with pytest.raises(UsageError, match="Did you mean 'gatv2'"):
        resolve_graph(NetSpec("gatv3"))


def test_norms_of_images_are_refused():
    with pytest.raises(UsageError, match=r"network\.norm=instance.*none, batch"):
        resolve_graph(NetSpec("gin", norm="instance"))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"pool": "max"}, "unknown pool 'max'"),
        ({"dropout": 1.0}, r"dropout=1\.0 is out of range"),
        ({"dropout": -0.1}, "out of range"),
        ({"dropout": float("nan")}, "out of range"),
        ({"count": 0}, "number of networks=0"),
        ({"name": "gine", "spec": replace(SPEC, edge_sizes=())}, "gine reads edge labels"),
    ],
)
def test_options_out_of_range_are_refused(options, says):
    with pytest.raises(UsageError, match=says):
        built(**options)


def test_more_layers_than_hops_are_refused():
    with pytest.raises(UsageError, match=r"(?s)gin has 3 layers, the trees 2 hops.*depth=2.*matcher\.hops=3"):
        built(depth=3)(trees(2))
    with pytest.raises(UsageError, match=r"3 layers on trees of 2 hops"):
        plan(trees(2), 3)


def test_trees_with_other_labels_are_refused():
    other = replace(SPEC, node_sizes=(4,))
    with pytest.raises(UsageError, match="features of 3 and 2 numbers.*built for 4 and 2"):
        built(spec=other)(trees())


def test_plans_of_another_depth_or_dtype_are_refused():
    with pytest.raises(UsageError, match="a plan of 1 hops"):
        built(depth=2)(plan(trees(), 1))
    with pytest.raises(UsageError, match=r"in torch\.float64"):
        built()(plan(trees(), 2, torch.float64))


def test_every_network_has_its_activation():
    assert set(ACTIVATIONS) == set(GRAPH_NETWORKS)


@pytest.mark.parametrize("name", GRAPH_NETWORKS)
@pytest.mark.parametrize("norm", ["none", "batch"])
def test_networks_at_once_are_each_alone(name, norm):
    together, ready = built(name, norm=norm).double(), trees()
    logits = together(ready)
    logits.square().sum().backward()
    assert logits.shape == (3, 5, 2)
    for number in range(3):
        single = alone(name, number, norm=norm)
        starts = zip(built(name, norm=norm).parameters(), single.parameters(), strict=True)
        assert all(torch.equal(many[number], one[0]) for many, one in starts)
        single = single.double()
        row = single(ready)
        torch.testing.assert_close(logits[number], row[0], atol=1e-12, rtol=1e-12)
        row.square().sum().backward()
        for (label, many), one in zip(together.named_parameters(), single.parameters(), strict=True):
            torch.testing.assert_close(many.grad[number], one.grad[0], atol=1e-12, rtol=1e-12, msg=label)
        for many, one in zip(together.buffers(), single.buffers(), strict=True):
            torch.testing.assert_close(many[number], one[0], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("name", GRAPH_NETWORKS)
def test_gradients_reach_every_parameter(name):
    nets = built(name, depth=2, width=11)
    nets(trees()).square().sum().backward()
    for label, parameter in nets.named_parameters():
        moved = parameter.grad.flatten(1).abs().amax(1)
        assert (moved > 0).all(), label


@pytest.mark.parametrize("name", ["gine", "sage"])
def test_training_fits_labels_that_a_network_can_see(name):
    target = toy().y.expand(2, -1)
    nets = built(name, count=2, width=16)
    optimiser, planned = torch.optim.Adam(nets.parameters(), 0.05), nets.plan(trees())
    for _ in range(40):
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(nets(planned).flatten(0, 1), target.flatten()).backward()
        optimiser.step()
    assert torch.equal(nets(planned).argmax(2), target)


def test_a_plan_gives_the_bits_of_its_trees():
    nets, ready = built("gatv2"), trees(3)
    planned = nets.plan(ready)
    assert isinstance(planned, Plan)
    assert torch.equal(nets(planned), nets(ready)) and torch.equal(nets(planned), nets(planned))


def test_items_may_be_taken_in_any_order():
    nets, index = built("gine", norm="none"), torch.tensor([4, 1, 1])
    whole, part = nets(trees()), nets(take(trees(), index))
    torch.testing.assert_close(part, whole[:, index])


def test_pools_differ_by_the_number_of_nodes():
    mean, total = built(pool="mean").double(), built(pool="sum").double()
    bias, nodes = mean.classifier.bias[:, None], toy().nodes[:, None]
    torch.testing.assert_close(total(trees()) - bias, (mean(trees()) - bias) * nodes)


def test_batch_norm_counts_nodes_and_not_colors():
    layer, ready = StackedBatchNorm(2, 3).double(), trees(1)
    counts = level_counts(ready)[1]
    h = torch.randn((len(counts), 2, 3), generator=Rng(0).torch("h"), dtype=torch.float64)
    nodes = h.repeat_interleave(counts, dim=0)
    out = layer(h, counts.double()).repeat_interleave(counts, dim=0)
    truth = torch.nn.BatchNorm1d(6).double()
    torch.testing.assert_close(out.flatten(1), truth(nodes.flatten(1)), atol=1e-12, rtol=0)
    torch.testing.assert_close(layer.running_var.flatten(), truth.running_var, atol=1e-12, rtol=0)
    assert counts.max() > 1


def test_batch_norm_over_one_node_is_refused():
    with pytest.raises(UsageError, match="over 1 node"):
        built(norm="batch")(take(trees(), torch.tensor([0])))


def test_dropout_is_a_function_of_its_generators():
    nets, ready = built(dropout=0.5), trees()
    first, again = (nets(ready, generator=Rng(0).torch("mask")) for _ in range(2))
    other = nets(ready, generator=Rng(1).torch("mask"))
    assert torch.equal(first, again) and not torch.equal(first, other)
    quiet = built(dropout=0.0)
    assert torch.equal(nets.eval()(ready), quiet.eval()(ready))


def test_dropout_at_once_is_dropout_alone():
    ready = trees()
    masks = lambda: [Rng(0).fold(i).torch("mask") for i in range(3)]
    logits = built(dropout=0.3).double()(ready, generator=masks())
    for number in range(3):
        weights = [generators()[number]]
        single = build_graph_networks(NetSpec("gin", width=5), SPEC, weights, dropout=0.3).double()
        row = single(ready, generator=masks()[number])[0]
        torch.testing.assert_close(logits[number], row, atol=1e-12, rtol=1e-12)


def test_dropout_keeps_the_mean_of_the_logits():
    nets, repeats = built(count=1, dropout=0.4).double(), 4000
    same = take(trees(), torch.full((repeats,), 3))
    with torch.no_grad():
        drawn = nets(same, generator=Rng(0).torch("mask"))[0]
        still = nets.eval()(trees())[0, 3]
    error = drawn.std(0) / repeats**0.5
    assert drawn.std(0).min() > 0
    assert ((drawn.mean(0) - still).abs() < 4 * error).all()


@pytest.mark.parametrize(("given", "says"), [(None, "no generator was"), (2, "2 generators were")])
def test_dropout_needs_a_generator_for_each_network(given, says):
    given = given and generators(given)
    with pytest.raises(UsageError, match=f"dropout=0.5 draws for 3 networks in training, and {says} given"):
        built(dropout=0.5)(trees(), generator=given)


@pytest.mark.parametrize("name", GRAPH_NETWORKS)
def test_no_global_generator_is_touched(name):
    with global_rng_untouched():
        nets = built(name, norm="batch", dropout=0.5)
        nets(trees(), generator=Rng(0).torch("mask")).sum().backward()


@pytest.mark.parametrize("name", GRAPH_NETWORKS)
def test_float32_is_near_float64(name):
    near, exact = built(name)(trees()), built(name).double()(node_trees(toy(), 2, degree=True))
    assert near.dtype == torch.float32
    torch.testing.assert_close(near.double(), exact, atol=1e-5, rtol=1e-5)

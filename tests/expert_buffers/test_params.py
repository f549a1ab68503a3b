"""Flat vectors and named parameters are two views of the same network."""

import json

import pytest
import torch
from torch import nn
from torch.func import functional_call

from ddengine.errors import ArtefactError, UsageError
from ddengine.nets import NetSpec, build
from ddengine.rng import Rng
from expert_buffers import ParamSpec

SPECS = [NetSpec("convnet", width=3, depth=2), NetSpec("mlp", width=7), NetSpec("vit", width=8, depth=1)]


def network(spec, seed=0):
    return build(spec, (1, 8, 8), 5, Rng(seed).torch("weights"))


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_a_network_called_with_an_unflattened_vector_is_the_network(spec):
    net, other, x = network(spec), network(spec, 1), randn(3, 1, 8, 8)
    layout = ParamSpec.of(net)
    vector = layout.flatten(dict(net.named_parameters()))
    assert not torch.equal(net(x), other(x))
    assert torch.equal(functional_call(other, layout.unflatten(vector), (x,)), net(x))


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_flatten_and_unflatten_undo_each_other(spec):
    layout = ParamSpec.of(network(spec))
    vector = randn(sum(layout.sizes))
    params = layout.unflatten(vector)
    assert torch.equal(layout.flatten(params), vector)
    assert torch.equal(layout.flatten(dict(reversed(params.items()))), vector)
    assert [(name, tuple(p.shape)) for name, p in params.items()] == list(
        zip(layout.names, layout.shapes, strict=True)
    )


def test_the_vector_has_torchs_own_order():
    net = network(SPECS[0])
    vector = ParamSpec.of(net).flatten(dict(net.named_parameters()))
    assert torch.equal(vector, nn.utils.parameters_to_vector(net.parameters()))
    last = net.to(memory_format=torch.channels_last)
    assert torch.equal(ParamSpec.of(last).flatten(dict(last.named_parameters())), vector)


def test_unflattened_tensors_are_views_of_the_vector():
    layout = ParamSpec(("a", "b"), ((2, 3), (5,)))
    vector = torch.arange(22.0)[::2]
    params = layout.unflatten(vector)
    assert params["a"].tolist() == [[0, 2, 4], [6, 8, 10]] and params["b"].tolist() == [12, 14, 16, 18, 20]
    vector[0] = -1
    assert params["a"][0, 0] == -1


def test_gradients_flow_both_ways():
    net = network(SPECS[1])
    layout, x = ParamSpec.of(net), randn(3, 1, 8, 8)
    vector = layout.flatten(dict(net.named_parameters())).detach().requires_grad_()
    (flat,) = torch.autograd.grad(functional_call(net, layout.unflatten(vector), (x,)).square().sum(), vector)
    named = torch.autograd.grad(net(x).square().sum(), list(net.parameters()))
    torch.testing.assert_close(flat, torch.cat([g.flatten() for g in named]))
    leaves = {name: p.detach().requires_grad_() for name, p in net.named_parameters()}
    through = torch.autograd.grad(layout.flatten(leaves).square().sum(), list(leaves.values()))
    assert all(torch.equal(g, 2 * p) for g, p in zip(through, leaves.values(), strict=True))


def test_scalars_and_empty_parameters_have_their_place():
    layout = ParamSpec(("one", "none", "two"), ((), (0, 3), (2,)))
    assert layout.sizes == [1, 0, 2]
    params = layout.unflatten(torch.tensor([1.0, 2.0, 3.0]))
    assert params["one"] == 1 and params["none"].shape == (0, 3) and params["two"].tolist() == [2, 3]


def test_what_is_not_of_the_layout_is_refused():
    layout = ParamSpec(("a", "b"), ((2, 3), (5,)))
    for params in ({"a": randn(2, 3)}, {"a": randn(3, 2), "b": randn(5)}, {"a": randn(2, 3), "c": randn(5)}):
        with pytest.raises(UsageError, match="not of this layout\nUse a network of the same architecture"):
            layout.flatten(params)
    with pytest.raises(UsageError, match=r"a vector of shape \(12,\) for 11 parameters"):
        layout.unflatten(randn(12))


def test_statistics_of_batch_norm_come_back_with_their_counters():
    spec = NetSpec("convnet", width=3, depth=2, norm="batch")
    net, other, x = network(spec), network(spec, 1), randn(7, 1, 8, 8)
    for _ in range(3):
        net(x)
    layout = ParamSpec.of_buffers(net)
    vector = layout.flatten(dict(net.named_buffers()))
    assert vector.dtype == torch.float32 and len(vector) == 2 * (3 + 3 + 1)
    for name, value in layout.unflatten(vector).items():
        other.get_buffer(name).copy_(value)
    before, after = (dict(n.named_buffers()) for n in (net, other))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [int(after[name]) for name in after if name.endswith("num_batches_tracked")] == [3, 3]


def test_a_network_without_statistics_has_an_empty_layout():
    layout = ParamSpec.of_buffers(network(SPECS[0]))
    assert layout == ParamSpec((), ()) and layout.sizes == []
    assert layout.flatten({}).shape == (0,) and layout.unflatten(torch.empty(0)) == {}
    with pytest.raises(UsageError, match="not of this layout"):
        layout.flatten({"a": randn(2)})
    with pytest.raises(UsageError, match="for 0 parameters"):
        layout.unflatten(randn(2))


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_a_layout_survives_json(spec):
    layout = ParamSpec.of(network(spec))
    assert ParamSpec.from_json(json.loads(json.dumps(layout.to_json()))) == layout
    assert ParamSpec.from_json(ParamSpec((), ()).to_json()) == ParamSpec((), ())


JUNK = [
    None, {}, "ab", [1], [["a"]], [["a", 3]], [[1, [3]]], [["a", [3.0]]], [["a", [-1]]], [["a", [True]]],
    [["a", [2**40]]], [["a", [1] * 9]], [["a", [2**31, 2**31]]], [["a", [1]], ["a", [1]]], [["a", [1], 2]],
]  # fmt: skip


@pytest.mark.parametrize("junk", JUNK, ids=repr)
def test_json_that_is_no_layout_is_refused(junk):
    with pytest.raises(ArtefactError, match="a layout"):
        ParamSpec.from_json(junk)

"""Blocks worked on in place against the network's own forward: numbers, gradients, pieces, refusals."""

import pytest
import torch
from torch import nn

from ddengine.errors import UsageError
from ddengine.nets import NetSpec, build
from ddengine.nets.convnet import ConvNet
from ddengine.nets.core import initialise
from ddengine.ops import instance_block

SHAPE = (3, 13, 11)


def network(shape=SHAPE, width=5, depth=3, norm="instance", seed=0):
    """A frozen float64 ConvNet whose norms have gains of both signs and offsets of their own."""
    generator = torch.Generator().manual_seed(seed)
    net = initialise(ConvNet(shape, 3, width, depth, norm), generator).double().requires_grad_(False)
    for module in net.norms:
        for parameter in module.parameters():
            parameter.normal_(0.3, 1.0, generator=generator)
    return net


def images(count, shape=SHAPE, seed=1):
    return torch.randn((count, *shape), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def as_written(net, x, p, levels):
    """Embedding and power sums by the network's own forward."""
    found = net.features(x, lambda level, f: (f**p).sum(1).flatten(1))
    return found.embedding, [found.taps[level] for level in sorted(levels)]


def score(found):
    """A number to differentiate, in which nothing cancels."""
    embedding, sums = found
    return embedding.sin().sum() + sum((1 + level) * s.sqrt().cos().sum() for level, s in enumerate(sums))


@pytest.mark.parametrize("shape", [SHAPE, (1, 28, 28), (2, 8, 16)])
@pytest.mark.parametrize("p", instance_block.POWERS)
def test_features_are_those_of_the_networks_own_forward(p, shape):
    net, x = network(shape), images(7, shape)
    for levels in ((), (0,), (0, 1), (1, 2)):
        ours, theirs = (f(net, x, p, levels) for f in (instance_block.features, as_written))
        torch.testing.assert_close(ours[0], theirs[0], rtol=1e-11, atol=1e-12)
        assert len(ours[1]) == len(levels)
        for a, b in zip(ours[1], theirs[1], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("shape", [SHAPE, (1, 28, 28)])
@pytest.mark.parametrize("p", instance_block.POWERS)
def test_the_gradient_for_the_images_is_that_of_the_networks_own_forward(p, shape):
    net = network(shape)
    gradients = []
    for compute in (instance_block.features, as_written):
        x = images(5, shape).requires_grad_()
        found = compute(net, x, p, (0, 1))
        total = found[0].sin().sum() + sum((1 + i) * (1 + s).log().sum() for i, s in enumerate(found[1]))
        gradients.append(torch.autograd.grad(total, x)[0])
    assert gradients[1].abs().max() > 0.1
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-11)


def test_pieces_change_nothing(monkeypatch):
    net, x = network(), images(11)
    whole = instance_block.features(net, x, 4, (0, 1))
    for count in (1, 3):
        monkeypatch.setattr(instance_block, "CACHE", 4 * 5 * 13 * 11 * count)
        assert instance_block.images_at_once(net, x) == count
        parts = instance_block.features(net, x, 4, (0, 1))
        torch.testing.assert_close(parts[0], whole[0], rtol=1e-12, atol=1e-13)
        for a, b in zip(parts[1], whole[1], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_images_and_weights_are_left_as_they_were():
    net, x = network(), images(3)
    before = [x.clone(), *(parameter.clone() for parameter in net.parameters())]
    live = x.requires_grad_()
    torch.autograd.grad(score(instance_block.features(net, live, 4, (0, 1))), live)
    with torch.no_grad():
        instance_block.features(net, x, 1, (0,))
    for a, b in zip(before, [x, *net.parameters()], strict=True):
        assert torch.equal(a, b)


def test_constant_images_give_finite_numbers_and_gradients():
    net = network().float()
    x = torch.full((3, *SHAPE), 0.7).requires_grad_()
    embedding, sums = instance_block.features(net, x, 4, (0, 1))
    (gradient,) = torch.autograd.grad(embedding.sum() + sum(s.sum() for s in sums), x)
    assert embedding.isfinite().all() and gradient.isfinite().all()


def test_half_precision_convolutions_have_float32_statistics_and_gradients():
    net, x = network(width=8).float(), images(6).float()
    wide = instance_block.features(net, x, 4, (0, 1))
    live = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        embedding, sums = instance_block.features(net, live, 4, (0, 1))
    assert {t.dtype for t in (embedding, *sums)} == {torch.float32}
    assert not torch.equal(embedding, wide[0])
    assert (embedding - wide[0]).norm() < 0.05 * wide[0].norm()
    (gradient,) = torch.autograd.grad(embedding.square().sum(), live)
    exact = x.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(instance_block.features(net, exact, 4, ())[0].square().sum(), exact)
    assert gradient.dtype == torch.float32
    assert nn.functional.cosine_similarity(gradient.flatten(), wanted.flatten(), dim=0) > 0.98


def test_it_applies_to_frozen_instance_norm_convnets_and_powers_it_has():
    x = images(2)
    assert all(instance_block.applies(network(), x, p) for p in (1, 2, 4, 4.0))
    assert not any(instance_block.applies(network(), x, p) for p in (1.5, 3, 8))
    assert not any(instance_block.applies(network(norm=norm), x, 4) for norm in ("batch", "group", "none"))
    assert not instance_block.applies(network().requires_grad_(), x, 4)
    other = build(NetSpec("lenet"), (3, 16, 16), 3, torch.Generator()).requires_grad_(False)
    assert not instance_block.applies(other, x, 4)


def test_images_of_another_shape_are_refused():
    with pytest.raises(UsageError, match=r"\(3, 11, 13\) do not fit a network built for \(3, 13, 11\)"):
        instance_block.features(network(), images(2, (3, 11, 13)), 4, (0,))

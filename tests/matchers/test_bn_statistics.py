"""The distance of batch-norm statistics, against loops, finite differences and its limits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_recovery import batch_norm_inputs, naive_statistics
from torch import nn

from ddengine.errors import UsageError
from ddengine.nets import NetSpec, build
from ddengine.rng import Rng
from matchers.bn_statistics import (
    Moments,
    bn_statistics_loss,
    moments,
    observed,
    running_average,
    running_moments,
)


def drawn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def small_net(seed=0):
    """Two batch norms of 3 and 5 channels with running statistics that are not 0 and 1; smooth, float64."""
    rng = Rng(seed)
    net = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Softplus(),
        nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Softplus(), nn.Flatten(), nn.Linear(5 * 9, 7),
    ).double().eval()  # fmt: skip
    with torch.no_grad():
        for number, parameter in enumerate(net.parameters()):
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=rng.torch(f"p{number}")))
        for number, module in enumerate(m for m in net if isinstance(m, nn.BatchNorm2d)):
            module.running_mean.copy_(
                torch.randn(module.running_mean.shape, generator=rng.torch(f"m{number}"))
            )
            module.running_var.copy_(
                torch.rand(module.running_var.shape, generator=rng.torch(f"v{number}")) + 0.3
            )
    return net.requires_grad_(False)


def statistics(net, x, sizes=None):
    """Moments of each part at each layer, and the running ones."""
    with observed(net, sizes or [len(x)]) as found:
        net(x)
    parts = [[moments[i] for _, moments in found] for i in range(len(sizes or [0]))]
    return parts, [running_moments(layer) for layer, _ in found]


@pytest.mark.parametrize("weighting", ["released", "normalised"])
@pytest.mark.parametrize("first_weight", [10.0, 1.0, 0.0])
def test_it_equals_loops_over_every_value(weighting, first_weight):
    net, x = small_net(), drawn(1, 4, 2, 5, 5)
    (mine,), running = statistics(net, x)
    inputs, layers, _ = batch_norm_inputs(net, x)
    expected = naive_statistics(inputs, layers, first_weight, weighting == "normalised")
    assert float(bn_statistics_loss(mine, running, first_weight, weighting)) == pytest.approx(
        expected, rel=1e-12
    )


@pytest.mark.parametrize("weighting", ["released", "normalised"])
def test_its_gradient_is_that_of_finite_differences(weighting):
    net, x = small_net(), drawn(2, 3, 2, 5, 5)

    def loss(u):
        (mine,), running = statistics(net, x + u)
        return bn_statistics_loss(mine, running, 10.0, weighting)

    assert torch.autograd.gradcheck(loss, (drawn(3, 1, 2, 5, 5).requires_grad_(),))


def test_it_is_zero_with_a_gradient_of_zero_where_statistics_agree():
    mean, var = drawn(4, 5), drawn(5, 5).square()
    ours = Moments(mean.clone().requires_grad_(), var.clone().requires_grad_())
    for weighting in ("released", "normalised"):
        loss = bn_statistics_loss([ours], [Moments(mean, var)], 10.0, weighting)
        assert float(loss.detach()) == 0
        for gradient in torch.autograd.grad(loss, list(ours)):
            assert torch.equal(gradient, torch.zeros(5, dtype=torch.float64))


def test_a_batch_that_has_the_running_statistics_has_no_loss():
    x = drawn(6, 7, 3, 4, 4)
    layer = nn.BatchNorm2d(3).double().eval()
    layer.running_mean.copy_(x.mean((0, 2, 3)))
    layer.running_var.copy_(x.var((0, 2, 3), unbiased=False))
    (mine,), running = statistics(layer, x)
    assert float(bn_statistics_loss(mine, running)) < 1e-14


def test_the_order_of_the_batch_does_not_matter_and_its_members_do():
    net, x = small_net(), drawn(7, 5, 2, 5, 5)
    values = [
        float(bn_statistics_loss(*(lambda found: (found[0][0], found[1]))(statistics(net, batch))))
        for batch in (x, x[[3, 1, 4, 0, 2]], x[:4])
    ]
    assert values[0] == pytest.approx(values[1], rel=1e-12) and abs(values[0] - values[2]) > 1e-3


def test_the_first_weight_changes_the_first_layer_only():
    net, x = small_net(), drawn(8, 4, 2, 5, 5)
    (mine,), running = statistics(net, x)
    first = float(bn_statistics_loss(mine[:1], running[:1], 1.0))
    gained = [float(bn_statistics_loss(mine, running, w)) for w in (3.0, 10.0)]
    assert gained[1] - gained[0] == pytest.approx(7 * first, rel=1e-12)


def test_normalised_it_ignores_the_scale_of_a_layer():
    mean, var, run_mean, run_var = drawn(9, 5), drawn(10, 5).square(), drawn(11, 5), drawn(12, 5).square()
    one = bn_statistics_loss([Moments(mean, var)], [Moments(run_mean, run_var)], weighting="normalised")
    scaled = [Moments(100 * mean, 1e4 * var)], [Moments(100 * run_mean, 1e4 * run_var)]
    assert float(bn_statistics_loss(*scaled, weighting="normalised")) == pytest.approx(float(one), rel=1e-12)


def test_parts_of_a_batch_have_the_statistics_that_they_have_alone():
    net, x = small_net(), drawn(13, 8, 2, 5, 5)
    parts, _ = statistics(net, x, [5, 3])
    for part, alone in zip(parts, (x[:5], x[5:]), strict=True):
        (expected,), _ = statistics(net, alone)
        for a, b in zip(part, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_half_precision_is_reduced_in_float32():
    x = 300 + drawn(14, 64, 3, 8, 8).to(torch.bfloat16)
    layer = nn.BatchNorm2d(3).eval()
    layer.running_mean.fill_(299.0)
    with observed(layer, [64]) as found:
        layer(x)
    mean, var = found[0][1][0]
    assert mean.dtype == var.dtype == torch.float32
    torch.testing.assert_close(mean, x.float().mean((0, 2, 3)))
    torch.testing.assert_close(var, x.float().var((0, 2, 3), unbiased=False), rtol=1e-4, atol=1e-5)


def test_hooks_are_gone_afterwards_even_after_an_error():
    net = small_net()
    with pytest.raises(RuntimeError), observed(net, [3]):
        net(drawn(15, 2, 9, 9, 9))
    assert not any(module._forward_pre_hooks for module in net.modules())


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 40), st.floats(0.0, 0.95))
def test_running_averages_of_the_same_batch_are_that_batch(steps, decay):
    net, x = small_net(), drawn(16, 4, 2, 5, 5)
    (mine,), _ = statistics(net, x)
    average = torch.zeros(2, 8, dtype=torch.float64)
    for step in range(steps):
        seen, average = running_average(mine, average, decay, step)
    for a, b in zip(seen, mine, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_running_averages_are_those_of_means_and_squares():
    batches = [drawn(20 + i, 3, 2, 4, 4) for i in range(6)]
    average, decay, kept = torch.zeros(2, 2, dtype=torch.float64), 0.7, [[], []]
    for step, x in enumerate(batches):
        seen, average = running_average(
            [Moments(x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False))], average, decay, step
        )
        kept[0].append(x.mean((0, 2, 3)))
        kept[1].append(x.square().mean((0, 2, 3)))
    weights = torch.tensor([decay ** (5 - i) for i in range(6)], dtype=torch.float64)
    mean, square = ((weights[:, None] * torch.stack(k)).sum(0) / weights.sum() for k in kept)
    torch.testing.assert_close(seen[0].mean, mean)
    torch.testing.assert_close(seen[0].var, square - mean.square())


def test_without_memory_the_gradient_is_the_batches_own():
    x = drawn(30, 3, 2, 4, 4).requires_grad_()
    own = Moments(x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False))
    target = [Moments(drawn(31, 2), drawn(32, 2).square())]
    seen, _ = running_average([own], torch.zeros(2, 2, dtype=torch.float64), 0.0, 0)
    pair = [
        torch.autograd.grad(bn_statistics_loss([m], target), x, retain_graph=True)[0] for m in (own, seen[0])
    ]
    torch.testing.assert_close(pair[0], pair[1], rtol=1e-9, atol=1e-12)


def test_layers_or_channels_that_differ_are_refused():
    one = Moments(torch.zeros(3), torch.ones(3))
    for ours, theirs in (([], []), ([one], []), ([one], [Moments(torch.zeros(2), torch.ones(2))])):
        with pytest.raises(
            UsageError, match="statistics of . layers against those of .\nGive the same layers"
        ):
            bn_statistics_loss(ours, theirs)
    with pytest.raises(UsageError, match="layer weighting"):
        bn_statistics_loss([one], [one], weighting="mean")


def test_a_batch_norm_without_running_statistics_is_refused():
    with pytest.raises(UsageError, match="keeps no running statistics"):
        running_moments(nn.BatchNorm2d(3, track_running_stats=False))


def test_a_network_lists_its_batch_norms_in_the_order_in_which_they_fire():
    net = build(NetSpec("resnet18", width=2), (3, 8, 8), 3, Rng(0).torch("w")).eval()
    with observed(net, [2]) as found:
        net(torch.zeros(2, 3, 8, 8))
    _, layers, _ = batch_norm_inputs(net, torch.zeros(2, 3, 8, 8))
    assert [layer for layer, _ in found] == layers and len(layers) == 20


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 7), st.integers(1, 5), st.integers(1, 6), st.floats(-50, 50), st.integers(0, 99))
def test_moments_are_torchs_with_torchs_gradient(n, c, side, level, seed):
    x = (drawn(seed, n, c, side, 3) + level).requires_grad_()
    shift, weights = level + drawn(seed + 1, c), drawn(seed + 2, 2, c)
    var, mean = torch.var_mean(x, [0, 2, 3], correction=0)
    pairs = []
    for found in (moments(x, shift), Moments(mean, var)):
        (gradient,) = torch.autograd.grad((weights[0] * found.mean + weights[1] * found.var).sum(), x)
        pairs.append((found.mean, found.var, gradient))
    for mine, theirs in zip(*pairs, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


def test_moments_do_not_depend_on_the_memory_layout():
    x = drawn(40, 4, 5, 6, 7).float()
    plain, last = (moments(v, torch.zeros(5)) for v in (x, x.contiguous(memory_format=torch.channels_last)))
    for a, b in zip(plain, last, strict=True):
        torch.testing.assert_close(a, b)


def test_a_mean_far_from_zero_keeps_its_variance_in_float32():
    x = (1000 + drawn(41, 64, 3, 8, 8)).float()
    found = moments(x, x.mean((0, 2, 3)))
    torch.testing.assert_close(
        found.var, x.double().var((0, 2, 3), unbiased=False).float(), rtol=1e-4, atol=0
    )

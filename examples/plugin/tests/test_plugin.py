"""The loss against numpy and finite differences, the inner loop by hand, and the contract of matchers."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ddengine.data import load
from ddengine.errors import UsageError
from ddengine.nets import NetSpec
from ddengine.ops import dsa
from ddengine.rng import Rng
from ddengine.testing import CLAUSES, check_matcher, image_task
from ddengine.types import Budget, Task
from matchers.parametrised import FormOptions, pulled_back
from synth import Pixels

if importlib.util.find_spec("ddengine_gradient_matching") is None:  # run from its folder, not installed
    sys.path.insert(0, str(Path(__file__).parents[1]))

from ddengine_gradient_matching import (
    EPSILON,
    GRADIENT_MATCHING,
    GradientMatching,
    GradientOptions,
    class_gradient,
    drawn,
    gradient_distance,
    trained,
)

SMALL = NetSpec("convnet", width=4, depth=2)
SHAPES = [(5, 3, 2, 3), (5,), (7, 11), (7,)]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def gradients(seed, dtype=torch.float64):
    draw = generator(seed)
    return [torch.randn(shape, generator=draw, dtype=dtype) for shape in SHAPES]


def small(**options):
    return GradientMatching(GradientOptions(**{"steps": 3, "real_per_class": 5, **options}), SMALL)


def by_hand(real, synthetic):
    """Equation 10 of DC, node by node."""
    total = 0.0
    for g, h in zip(real, synthetic, strict=True):
        if g.ndim == 1:
            continue
        for row, other in zip(g.numpy(), h.numpy(), strict=True):
            a, b = row.ravel(), other.ravel()
            total += 1 - a @ b / (np.sqrt(a @ a) * np.sqrt(b @ b) + EPSILON)
    return total


def test_the_distance_is_the_equation_node_by_node():
    one, two = gradients(1), gradients(2)
    assert gradient_distance(one, two).item() == pytest.approx(by_hand(one, two), rel=1e-12)


def test_the_distance_ignores_scale_and_is_twice_the_nodes_for_opposites():
    one = gradients(1)
    nodes = sum(shape[0] for shape in SHAPES if len(shape) > 1)
    assert gradient_distance(one, [3 * g for g in one]).item() == pytest.approx(0, abs=1e-5)
    assert gradient_distance(one, [-g for g in one]).item() == pytest.approx(2 * nodes, abs=1e-5)
    zeros = [torch.zeros_like(g) for g in one]
    assert gradient_distance(one, zeros).item() == nodes


def test_the_distance_has_the_slope_of_finite_differences():
    one, two = gradients(1), [g.requires_grad_() for g in gradients(2)]
    weights = [g for g in two if g.ndim > 1]
    assert torch.autograd.gradcheck(
        lambda *free: gradient_distance([g for g in one if g.ndim > 1], free), weights
    )


def test_gradients_that_do_not_correspond_are_refused():
    with pytest.raises(UsageError, match="Give those of the same weights"):
        gradient_distance(gradients(1), gradients(2)[:-1])
    with pytest.raises(UsageError, match="Give those of the same weights"):
        gradient_distance(gradients(1), [g.mT if g.ndim > 1 else g for g in gradients(2)])


def linear(seed=0):
    """A softmax regression on images of 3 x 2 x 5, whose gradient is known."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(30, 7)).double()
    draw = generator(seed)
    weights = {
        k: torch.randn(v.shape, generator=draw, dtype=torch.float64) for k, v in net.named_parameters()
    }
    return net, weights, torch.randn((11, 3, 2, 5), generator=draw, dtype=torch.float64)


def test_the_gradient_of_a_class_is_that_of_softmax_regression():
    net, weights, x = linear()
    found = class_gradient(net, weights, x, 2)
    flat = x.flatten(1).numpy()
    logits = flat @ weights["1.weight"].numpy().T + weights["1.bias"].numpy()
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    error = (p - np.eye(7)[[2] * 11]) / 11
    np.testing.assert_allclose(found[0].numpy(), error.T @ flat, rtol=1e-10, atol=1e-14)
    np.testing.assert_allclose(found[1].numpy(), error.sum(0), rtol=1e-10, atol=1e-14)


def test_pixels_get_the_slope_of_the_whole_loss():
    net, weights, x = linear()
    target = class_gradient(net, weights, x, 2)
    row = dsa.sample(generator(), "scale", 1, (2, 5))

    def loss(free):
        ours = class_gradient(net, weights, dsa.apply(free, row), 2, differentiable=True)
        return gradient_distance(target, ours)

    assert torch.autograd.gradcheck(loss, x[:3].clone().requires_grad_(), atol=1e-6)


def test_training_the_network_is_plain_descent_on_the_set():
    net, weights, x = linear()
    labels = torch.arange(11) % 7
    found = trained(net, weights, x, labels, 3, 0.1, "none", Rng(0))
    with torch.no_grad():
        for key, value in net.named_parameters():
            value.copy_(weights[key])
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(3):
        optimiser.zero_grad()
        nn.functional.cross_entropy(net(x), labels).backward()
        optimiser.step()
    for key, value in net.named_parameters():
        torch.testing.assert_close(found[key], value.detach(), rtol=1e-12, atol=1e-14)


def test_a_network_is_replaced_after_its_matches():
    task, matcher, rng = image_task(2), small(steps=4, matches=2, inner=3), Rng(0)
    work, states = matcher.prepare(task, rng), [matcher.init(task, rng)]
    for _ in range(4):
        states.append(matcher.step(states[-1], work, rng)[0])
    net, last = work.extra["net"], "classifier.weight"
    fresh = [drawn(net, rng.fold("network", number)) for number in range(3)]
    for place, number in ((0, 0), (2, 1), (4, 2)):
        assert all(torch.equal(states[place].weights[key], fresh[number][key]) for key in fresh[0])
    for place, number in ((1, 0), (3, 1)):
        assert not torch.equal(states[place].weights[last], fresh[number][last])


def test_the_published_loops_follow_from_the_images_per_class():
    def loops(ipc, **options):
        return small(**options)._loops(Task(load("digits").fit, Budget(ipc)))

    assert [loops(ipc) for ipc in (1, 10, 20, 50)] == [(1, 500), (10, 50), (20, 25), (50, 10)]
    assert loops(10, matches=3) == (3, 166) and loops(10, inner=7) == (10, 7)


@pytest.mark.parametrize("options", [{"lr": 0}, {"steps": -1}, {"start": "nowhere"}, {"augment": "blur"}])
def test_values_out_of_range_are_refused(options):
    with pytest.raises(UsageError, match=str(next(iter(options.values())))):
        GradientOptions(**options)


def test_networks_with_batch_norm_are_refused():
    matcher = GradientMatching(GradientOptions(steps=1), NetSpec("convnet", width=4, norm="batch"))
    with pytest.raises(UsageError, match="no network with batch norm, convnet has it\nGive"):
        matcher.prepare(image_task(), Rng(0))


def test_it_keeps_the_contract(monkeypatch):
    monkeypatch.setitem(
        globals(), "SMALL", NetSpec("convnet", width=2, depth=1)
    )  # its runs are repeated often
    assert check_matcher(small()) == list(CLAUSES)
    assert check_matcher(small(steps=3, inner=1, augment="none", start="noise"), image_task(2)) == list(
        CLAUSES
    )
    grids = small(steps=2, inner=1, augment="none", synth=FormOptions("factored"))
    assert check_matcher(grids, image_task(2)) == list(CLAUSES)
    assert GradientMatching() == GRADIENT_MATCHING


@pytest.mark.parametrize("form", [FormOptions("factored"), FormOptions("compensated", compensators=1)])
def test_the_gradient_of_a_form_is_that_of_its_images_pulled_back(form):
    task, rng = image_task(3), Rng(3)
    matcher = small(synth=form)
    work, synth = matcher.prepare(task, rng), matcher.init(task, rng).synth
    weights, seen = drawn(work.extra["net"], rng), synth.decode()
    found, loss = matcher._gradient(synth, work, weights, rng)
    plain = Pixels(seen.x, seen.y, synth.spec)
    cells, same = matcher._gradient(plain, work, weights, rng)
    assert loss.item() == pytest.approx(same.item(), rel=1e-6) and len(plain.images) == len(seen.y)
    torch.testing.assert_close(found, pulled_back(synth, cells["images"]))


def test_the_loss_falls():
    task, matcher, rng = image_task(), small(steps=12, real_per_class=10, augment="none", lr=0.5), Rng(1)
    work, state = matcher.prepare(task, rng), matcher.init(task, rng)
    losses = []
    for _ in range(12):
        state, metrics = matcher.step(state, work, rng)
        losses.append(float(metrics["loss"]))
    assert np.mean(losses[-3:]) < 0.9 * np.mean(losses[:3])

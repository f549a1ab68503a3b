"""The characteristic function loss against complex sums by hand, its derivatives, invariances and bounds."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import matchers
from ddengine.data import load
from ddengine.errors import UsageError
from ddengine.nets import NetSpec, build
from ddengine.rng import Rng
from ddengine.types import Budget, Task
from matchers import characteristic
from matchers.characteristic import (
    EPSILON,
    CharacteristicOptions,
    Frequencies,
    characteristic_function,
    characteristic_loss,
    discrepancy,
)

WEIGHTS = [(0.5, 0.5), (0.9, 0.1), (0.2, 0.8), (1.0, 0.0), (0.0, 1.0), (2.0, 3.0)]
NET = NetSpec("convnet", width=4, depth=2)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=Rng(seed).torch("test"), dtype=torch.float64)


def by_hand(real, synthetic, t, alpha, beta, epsilon=0.0):
    """The paper's loss with complex numbers, frequency by frequency."""
    total = 0.0
    for frequency in t.numpy():
        r, s = (np.exp(1j * (x.numpy() * frequency).sum(1)).mean() for x in (real, synthetic))
        amplitude = (abs(r) - abs(s)) ** 2
        phase = 2 * (abs(r) * abs(s) - (r * np.conj(s)).real)
        total += math.sqrt(max(alpha * amplitude + beta * phase, 0) + epsilon) - math.sqrt(epsilon)
    return total / len(t)


@pytest.mark.parametrize(("alpha", "beta"), WEIGHTS)
def test_loss_is_the_papers_sum_in_complex_numbers(alpha, beta):
    real, synthetic, t = randn(11, 5), randn(3, 5, seed=1), randn(7, 5, seed=2)
    found = float(characteristic_loss(real, synthetic, t, alpha, beta))
    assert math.isclose(found, by_hand(real, synthetic, t, alpha, beta, EPSILON), rel_tol=1e-10)
    assert abs(found - by_hand(real, synthetic, t, alpha, beta)) < 1.1e-6


def test_at_equal_weights_it_is_the_distance_of_the_complex_means():
    real, synthetic, t = randn(11, 5), randn(3, 5, seed=1), randn(7, 5, seed=2)
    r, s = characteristic_function(real, t), characteristic_function(synthetic, t)
    expected = ((r - s).square().sum(0) / 2).sqrt().mean()
    torch.testing.assert_close(characteristic_loss(real, synthetic, t), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("alpha", "beta"), WEIGHTS)
def test_equal_samples_cost_nothing_and_have_a_finite_gradient(alpha, beta):
    real, t = randn(7, 5), randn(13, 5, seed=1)
    synthetic = real.flip(0).clone().requires_grad_()
    loss = characteristic_loss(real, synthetic, t, alpha, beta)
    loss.backward()
    assert abs(float(loss.detach())) < 1e-9 and bool(synthetic.grad.isfinite().all())
    assert float(characteristic_loss(real, torch.cat([real, real]), t, alpha, beta)) < 1e-9
    assert float(characteristic_loss(real, real, t, alpha, beta)) == 0


def test_a_function_of_length_nought_has_a_finite_gradient():
    t = torch.tensor([[math.pi]], dtype=torch.float64)
    real = torch.tensor([[0.0], [1.0]], dtype=torch.float64)  # exp(0) + exp(j pi) = 0
    synthetic = torch.tensor([[0.3], [0.9]], dtype=torch.float64, requires_grad=True)
    for pair in ((real, synthetic), (synthetic, real), (real, real.clone().requires_grad_())):
        loss = characteristic_loss(*pair, t, 0.9, 0.1)
        (gradient,) = torch.autograd.grad(loss, [x for x in pair if x.requires_grad])
        assert bool(gradient.isfinite().all())
    parts = torch.zeros(2, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(discrepancy(torch.ones(2, 3), parts, 1.0, 0.0).sum(), parts)
    assert bool(gradient.isfinite().all())


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 7), m=st.integers(1, 5), d=st.integers(1, 5), q=st.integers(1, 7),
    seed=st.integers(0, 2**31), weights=st.sampled_from(WEIGHTS),
)  # fmt: skip
def test_loss_ignores_order_and_repetition_and_is_symmetric_and_bounded(n, m, d, q, seed, weights):
    real, synthetic, t = randn(n, d, seed=seed), randn(m, d, seed=seed + 1), 2 * randn(q, d, seed=seed + 2)
    loss = characteristic_loss(real, synthetic, t, *weights)
    shuffle = Rng(seed).torch("order")
    mixed = [x[torch.randperm(len(x), generator=shuffle)] for x in (real, synthetic, t)]
    torch.testing.assert_close(characteristic_loss(*mixed, *weights), loss, rtol=1e-9, atol=1e-9)
    twice = synthetic.repeat(3, 1)
    torch.testing.assert_close(characteristic_loss(real, twice, t, *weights), loss, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(characteristic_loss(synthetic, real, t, *weights), loss, rtol=1e-9, atol=1e-9)
    assert 0 <= float(loss) <= math.sqrt(weights[0] + 4 * weights[1])
    if weights == (0.5, 0.5):
        assert float(loss) <= math.sqrt(2)


def test_at_frequency_nought_everything_is_one():
    real, t = randn(5, 3), torch.zeros(2, 3, dtype=torch.float64)
    assert torch.equal(characteristic_function(real, t), torch.tensor([[1.0, 1], [0, 0]]).double())
    assert float(characteristic_loss(real, randn(7, 3, seed=1), t)) == 0


def test_it_sees_what_means_do_not():
    spread = torch.tensor([[-1.0, 0], [1, 0]], dtype=torch.float64)
    middle = torch.zeros(2, 2, dtype=torch.float64)
    assert torch.equal(spread.mean(0), middle.mean(0))
    assert float(characteristic_loss(spread, middle, randn(31, 2))) > 0.1


@pytest.mark.parametrize(("alpha", "beta"), WEIGHTS)
def test_gradient_of_the_loss_is_exact(alpha, beta):
    real, t = randn(5, 3), randn(7, 3, seed=1)
    x, y = randn(4, 3, seed=2).requires_grad_(), randn(5, 3, seed=3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: characteristic_loss(real, x, t, alpha, beta), x)
    assert torch.autograd.gradcheck(lambda y: characteristic_loss(y, real, t, alpha, beta), y)


@pytest.mark.parametrize(
    ("shapes", "weights"),
    [
        (((5, 3), (4, 2), (7, 3)), (0.5, 0.5)),
        (((5, 3), (4, 3), (7, 2)), (0.5, 0.5)),
        (((0, 3), (4, 3), (7, 3)), (0.5, 0.5)),
        (((5, 3), (4, 3), (0, 3)), (0.5, 0.5)),
        (((5, 3), (4, 3), (7, 3)), (-0.1, 0.5)),
        (((5, 3), (4, 3), (7, 3)), (0.5, math.nan)),
    ],
)
def test_wrong_shapes_and_weights_are_refused(shapes, weights):
    with pytest.raises((UsageError, TypeError)):  # TypeError where annotations are checked
        characteristic_loss(*(torch.zeros(shape) for shape in shapes), *weights)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"alpha": 1.2}, "matcher.alpha=1.2"),
        ({"alpha": math.nan}, "matcher.alpha=nan"),
        ({"frequencies": 0}, "matcher.frequencies=0"),
        ({"scale": -1}, "matcher.scale=-1"),
        ({"momentum": -1}, "matcher.momentum=-1"),
    ],
)
def test_options_out_of_range_are_refused(options, said):
    with pytest.raises(UsageError) as refused:
        CharacteristicOptions(**options)
    assert said in refused.value.cause and "\n" not in refused.value.cause + refused.value.remedy


@pytest.fixture(scope="module")
def task():
    digits = load("digits").fit
    return Task(digits.take(torch.arange(0, len(digits), 7)), Budget(3))


def test_frequencies_are_standard_normal_and_another_draw_is_others():
    drawn, other = (Frequencies(101, 53, torch.device("cpu")) for _ in range(2))
    drawn.draw(Rng(0).fold(1))
    other.draw(Rng(0).fold(2))
    assert abs(float(drawn.t.mean())) < 0.05 and abs(float(drawn.t.std()) - 1) < 0.05
    assert not torch.equal(drawn.t, other.t) and len(drawn.t.unique(dim=0)) == 101
    other.draw(Rng(0).fold(1))
    assert torch.equal(drawn.t, other.t)


def test_the_loss_of_a_step_is_the_sum_over_classes_on_unit_embeddings(task):
    """One network, no augmentation, all real images: against the pure function, class by class."""
    options = {"steps": 1, "real_per_class": 1000, "augment": "none", "frequencies": 13, "chunk": 37}
    matcher = matchers.make("characteristic", NET, **options, alpha=0.7)
    rng = Rng(3)
    state, work = matcher.init(task, rng), matcher.prepare(task, rng)
    _, metrics = matcher.step(state, work, rng)
    t, net = work.extra["statistics"].__self__.t.double(), work.extra["net"].double()
    with torch.no_grad():
        x = [task.images.model_input().double(), state.synth.images.double()]
        unit = [torch.nn.functional.normalize(net.features(part).embedding, dim=1) for part in x]
    labels = task.images.y, state.synth.labels
    parts = [
        characteristic_loss(*(e[y == c] for e, y in zip(unit, labels, strict=True)), t, 0.7, 1 - 0.7)
        for c in range(10)
    ]
    assert math.isclose(float(metrics["loss"]), 300 * float(sum(parts)), rel_tol=1e-4)
    work.close()


def test_every_network_of_a_step_has_frequencies_of_its_own(task, monkeypatch):
    seen = []
    draw = Frequencies.draw
    monkeypatch.setattr(Frequencies, "draw", lambda self, rng: (draw(self, rng), seen.append(self.t.clone())))
    matcher = matchers.make("characteristic", NET, steps=2, real_per_class=5, networks_per_step=2)
    rng = Rng(0)
    state, work = matcher.init(task, rng), matcher.prepare(task, rng)
    seen.clear()
    for _ in range(2):
        state, _ = matcher.step(state, work, rng)
    work.close()
    assert len(seen) == 4 and len(torch.stack(seen).flatten(1).unique(dim=0)) == 4
    assert seen[0].shape == (1024, characteristic._dimensions(task, NET))


def test_the_dimensions_are_those_of_the_embedding(task):
    net = build(NET, (1, 8, 8), 10, Rng(0).torch("w"))
    shape = net.features(torch.zeros(2, 1, 8, 8)).embedding.shape
    assert characteristic._dimensions(task, NET) == shape[1]


def test_descent_lowers_the_loss(task):
    matcher = matchers.make(
        "characteristic", NetSpec("convnet", width=8, depth=2), steps=25, real_per_class=20, start="noise"
    )
    rng, losses = Rng(0), []
    state, work = matcher.init(task, rng), matcher.prepare(task, rng)
    for _ in range(25):
        state, metrics = matcher.step(state, work, rng)
        losses.append(float(metrics["loss"]))
    work.close()
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])

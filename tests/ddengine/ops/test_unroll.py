"""The three gradients of a student's end: against dense Jacobians, differences, SGD, `higher` and limits."""

import itertools
import math
import weakref

import higher
import naive_unroll
import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

from ddengine.errors import UsageError
from ddengine.nets import NetSpec, build
from ddengine.ops import dsa
from ddengine.ops.unroll import (
    GRADIENTS,
    Derivatives,
    Eager,
    Inner,
    Point,
    adjoint_gradient,
    first_order_gradient,
    miss_of,
    unroll,
    unroll_gradient,
)

M, SHAPE, K, T = 5, (3, 8, 11), 7, 3
SMOOTH = (2, 5, 7)
FULL = [torch.arange(M)] * T
MINI = [torch.tensor(i) for i in ([0, 3, 3], [2, 1, 2], [4, 1, 3])]  # with repeated images
GRID = {
    "momentum": [0, 0.9], "weight_decay": [0, 1e-3], "mini": [False, True], "soft": [False, True],
    "points": [1, 2], "augmented": [False, True], "scale": [1, 1.3],
}  # fmt: skip


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def convnet(dtype=torch.float64, width=5):
    """A ConvNet, its loss on flat parameters, and these."""
    net = build(NetSpec("convnet", width=width, depth=2), SHAPE, K, torch.Generator().manual_seed(3)).to(
        dtype
    )
    names, shapes = zip(*[(n, tuple(p.shape)) for n, p in net.named_parameters()], strict=True)

    def loss(theta, x, y):
        params = dict(zip(names, naive_unroll.pieces(theta, shapes), strict=True))
        return F.cross_entropy(functional_call(net, params, (x,)), y)

    return net, loss, torch.cat([p.detach().flatten() for p in net.parameters()])


def labels_of(soft, classes=K, dtype=torch.float64):
    return randn(M, classes, seed=5, dtype=dtype).softmax(1) if soft else torch.tensor([0, 2, 1, 1, 0])


def replayed(size, batches, one_op=False, seed=7):
    """Augmentation from parameters that are drawn once for each step."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [dsa.sample(generator, dsa.STRATEGY, len(i), size, one_op=one_op) for i in batches]
    return lambda x, step: dsa.apply(x, drawn[step])


def targets(start, count, steps=T):
    """A target for the last step, and with `count` 2 one for the second step."""
    end, middle = (start + 0.1 * randn(len(start), seed=s, dtype=start.dtype) for s in (11, 13))
    points = [Point(steps, end, (start - end).square().sum())]
    return points if count == 1 else [Point(2, middle, (start - middle).square().sum(), 0.7), *points]


def gap(found, truth):
    truth = torch.as_tensor(truth, dtype=found.dtype)
    return float(((found - truth).norm() / truth.norm()).detach())


def gaps(found, truth):
    """Relative errors of miss, images, labels (where there are any) and rate."""
    assert (found[2] is None) == (truth[2] is None)
    return [gap(a, b) for a, b in zip(found, truth, strict=True) if a is not None]


def problem(
    momentum=0,
    weight_decay=0,
    mini=False,
    soft=False,
    points=1,
    augmented=False,
    scale=1,
    dtype=torch.float64,
):
    """The arguments of a gradient on a ConvNet."""
    _, loss, theta = convnet(dtype)
    batches = MINI if mini else FULL
    extra = (replayed(SHAPE[1:], batches),) if augmented else ()
    inner = Inner(Eager(loss), batches, momentum, weight_decay, scale, *extra)
    rate = torch.tensor(0.05, dtype=dtype)
    return (
        inner,
        theta,
        randn(M, *SHAPE, dtype=dtype),
        labels_of(soft, dtype=dtype),
        rate,
        targets(theta, points),
    )


def smooth(
    momentum=0, weight_decay=0, mini=False, soft=False, points=1, augmented=False, scale=1, rate=0.1, steps=T
):
    """The arguments of a gradient on a smooth network, and the naive training that they stand for."""
    loss, p = naive_unroll.smooth_loss(2, SMOOTH, 3)
    batches = MINI if mini else [torch.arange(M)] * steps
    extra = (replayed(SMOOTH[1:], batches, one_op=True),) if augmented else ()
    settings = (batches, momentum, weight_decay, scale, *extra)
    start = 0.5 * randn(p, seed=1)
    x, y = randn(M, *SMOOTH, seed=2), labels_of(soft, classes=3)
    arguments = (start, x, y, torch.tensor(rate, dtype=torch.float64), targets(start, points, steps))
    return (Inner(Eager(loss), *settings), *arguments), naive_unroll.Training(loss, *settings)


ALL = {
    "momentum": 0.9, "weight_decay": 1e-3, "mini": True, "soft": True, "points": 2, "augmented": True,
    "scale": 1.3,
}  # fmt: skip
CORNERS = [
    {}, ALL, {"mini": True, "momentum": 0.9}, {"soft": True, "weight_decay": 0.1},
    {"mini": True, "soft": True, "augmented": True},
    {"points": 2, "momentum": 0.5, "weight_decay": 0.1, "scale": 0.3},
]  # fmt: skip


@pytest.mark.parametrize(
    "values", list(itertools.product(*GRID.values())), ids=lambda v: "-".join(map(str, v))
)
def test_the_adjoint_is_the_unroll(values):
    arguments = problem(**dict(zip(GRID, values, strict=True)))
    adjoint, unrolled = adjoint_gradient(*arguments), unroll_gradient(*arguments)
    assert max(gaps(adjoint, unrolled)) < 1e-10
    assert unrolled.images.norm() > 1e-6 and unrolled.rate.abs() > 1e-6


@pytest.mark.parametrize(
    "values", [{}, {"momentum": 0.9, "mini": True, "soft": True, "points": 2, "augmented": True}]
)
def test_the_adjoint_is_the_unroll_in_float32(values):
    arguments = problem(dtype=torch.float32, **values)
    found = adjoint_gradient(*arguments)
    assert found.images.dtype == found.rate.dtype == torch.float32
    assert max(gaps(found, unroll_gradient(*arguments))) < 1e-5


@pytest.mark.parametrize("values", CORNERS, ids=str)
def test_both_exact_gradients_are_those_of_dense_jacobians(values):
    arguments, training = smooth(**values)
    truth = naive_unroll.gradients(training, *arguments[1:])
    for method in (adjoint_gradient, unroll_gradient):
        assert max(gaps(method(*arguments), truth)) < 1e-10


@pytest.mark.parametrize("values", CORNERS, ids=str)
def test_the_first_order_gradient_is_that_of_dense_jacobians_without_hessians(values):
    arguments, training = smooth(**values)
    found = first_order_gradient(*arguments)
    assert max(gaps(found, naive_unroll.gradients(training, *arguments[1:], hessian=False))) < 1e-10
    assert gap(found.images, adjoint_gradient(*arguments).images) > 1e-4


@pytest.mark.parametrize("method", [adjoint_gradient, unroll_gradient])
@pytest.mark.parametrize("values", [CORNERS[0], CORNERS[1], CORNERS[3]], ids=str)
def test_exact_gradients_are_central_differences(method, values):
    arguments, training = smooth(**values)
    _, start, x, y, rate, points = arguments
    found = method(*arguments)

    def end(x=x, y=y, rate=rate):
        return naive_unroll.miss(naive_unroll.train(training, start, x, y, rate)[0], points)

    for seed in (21, 22):
        d = randn(*x.shape, seed=seed)
        expected = naive_unroll.slope(lambda x: end(x=x), x, d, 1e-4)
        assert math.isclose(float((found.images * d).sum()), expected, rel_tol=1e-6)
        if found.labels is not None:
            d = randn(*y.shape, seed=seed)
            expected = naive_unroll.slope(lambda y: end(y=y), y, d, 1e-4)
            assert math.isclose(float((found.labels * d).sum()), expected, rel_tol=1e-6)
    expected = naive_unroll.slope(lambda rate: end(rate=rate), rate, 1.0, 1e-5 * float(rate))
    assert math.isclose(found.rate, expected, rel_tol=1e-6)


@pytest.mark.parametrize(("momentum", "weight_decay"), list(itertools.product([0, 0.9], [0, 1e-3])))
@pytest.mark.parametrize("graph", [False, True])
def test_the_path_is_that_of_torch_sgd(momentum, weight_decay, graph):
    inner, theta, x, y, rate, _ = problem(momentum, weight_decay, mini=True)
    with torch.set_grad_enabled(graph):
        states = unroll(inner, theta, x, y, rate)
    net = convnet()[0]
    optimiser = torch.optim.SGD(
        net.parameters(), lr=float(rate), momentum=momentum, weight_decay=weight_decay
    )
    assert len(states) == T + 1 and torch.equal(states[0], theta)
    for index, state in zip(MINI, states[1:], strict=True):
        optimiser.zero_grad()
        F.cross_entropy(net(x[index]), y[index]).backward()
        optimiser.step()
        assert gap(state, torch.cat([p.detach().flatten() for p in net.parameters()])) < 1e-13


@pytest.mark.parametrize(("momentum", "weight_decay"), [(0, 0), (0.9, 0), (0.9, 1e-3)])
@pytest.mark.parametrize("soft", [False, True])
def test_the_unrolled_gradient_is_that_of_higher(momentum, weight_decay, soft):
    arguments = problem(momentum, weight_decay, mini=True, soft=soft)
    _, _, x, y, rate, points = arguments
    net = convnet()[0]
    optimiser = torch.optim.SGD(net.parameters(), lr=1.0, momentum=momentum, weight_decay=weight_decay)
    x, rate = x.requires_grad_(), rate.requires_grad_()
    y = y.requires_grad_() if soft else y
    with higher.innerloop_ctx(net, optimiser, override={"lr": [rate]}) as (student, descent):
        for index in MINI:
            descent.step(F.cross_entropy(student(x[index]), y[index]))
        end = torch.cat([p.flatten() for p in student.parameters()])
        miss = (end - points[0].target).square().sum() / points[0].distance
        truth = torch.autograd.grad(miss, [x, rate, *([y] if soft else [])])
    found = unroll_gradient(*arguments)
    assert max(gaps(found, (miss.detach(), truth[0], truth[2] if soft else None, truth[1]))) < 1e-12


def test_the_first_order_rate_is_that_of_a_fixed_sum_of_gradients():
    (inner, start, x, y, rate, points), training = smooth(soft=True)
    total = sum(naive_unroll.train(training, start, x, y, rate)[1])
    beta = rate.clone().requires_grad_()
    miss = (start - beta * total - points[0].target).square().sum() / points[0].distance
    found = first_order_gradient(inner, start, x, y, rate, points)
    torch.testing.assert_close(found.rate, torch.autograd.grad(miss, beta)[0], rtol=1e-12, atol=0)


@pytest.mark.parametrize("momentum", [0, 0.9])
def test_the_first_order_gradient_is_exact_for_one_step(momentum):
    _, loss, theta = convnet()
    inner = Inner(Eager(loss), [torch.tensor([0, 3, 3])], momentum, 1e-3)
    arguments = (
        inner,
        theta,
        randn(M, *SHAPE),
        labels_of(True),
        torch.tensor(0.05).double(),
        targets(theta, 1, 1),
    )
    assert max(gaps(first_order_gradient(*arguments), unroll_gradient(*arguments))) < 1e-12


@pytest.mark.parametrize("momentum", [0, 0.9])
def test_the_first_order_gradient_is_exact_for_a_loss_linear_in_the_parameters(momentum):
    def loss(theta, x, y):
        return (theta * (x.flatten(1).tanh() * y.square().sum(1, keepdim=True)).mean(0)).sum()

    start = randn(math.prod(SHAPE))
    inner = Inner(Eager(loss), MINI, momentum, 1e-2, 1.3)
    arguments = (
        inner,
        start,
        randn(M, *SHAPE, seed=1),
        labels_of(True),
        torch.tensor(0.3).double(),
        targets(start, 2),
    )
    truth = unroll_gradient(*arguments)
    assert max(gaps(first_order_gradient(*arguments), truth)) < 1e-12
    assert max(gaps(adjoint_gradient(*arguments), truth)) < 1e-12


def test_the_first_order_gap_falls_linearly_with_the_rate():
    found = []
    for rate in (1e-3, 1e-4, 1e-5):
        arguments, _ = smooth(rate=rate, steps=20)
        found.append(gap(first_order_gradient(*arguments).images, adjoint_gradient(*arguments).images))
    assert found[0] / found[1] == pytest.approx(10, rel=0.15)
    assert found[1] / found[2] == pytest.approx(10, rel=0.02)


def test_the_first_order_gradient_points_elsewhere_on_a_convnet(record_property):
    _, loss, theta = convnet(width=8)
    inner = Inner(Eager(loss), [torch.arange(M)] * 20)
    arguments = (
        inner,
        theta,
        randn(M, *SHAPE),
        labels_of(False),
        torch.tensor(0.05).double(),
        targets(theta, 1, 20),
    )
    first, exact = first_order_gradient(*arguments).images, adjoint_gradient(*arguments).images
    cosine = float(F.cosine_similarity(first.flatten(), exact.flatten(), dim=0))
    record_property("cosine of the first-order gradient to the exact one", cosine)
    assert 0.8 < cosine < 0.95


@pytest.mark.parametrize("name", GRADIENTS)
@pytest.mark.parametrize("momentum", [0, 0.9])
def test_a_target_at_the_students_own_end_gives_zero_and_no_gradient(name, momentum):
    inner, theta, x, y, rate, points = problem(momentum, 1e-3, mini=True, soft=True)
    truth = GRADIENTS[name](inner, theta, x, y, rate, points)
    end = unroll(inner, theta, x, y, rate)[-1].detach()
    found = GRADIENTS[name](inner, theta, x, y, rate, [points[0]._replace(target=end)])
    assert found.miss < 1e-28
    for value, usual in zip(found[1:], truth[1:], strict=True):
        assert value.norm() < 1e-12 * usual.norm()


@pytest.mark.parametrize("name", GRADIENTS)
@pytest.mark.parametrize("momentum", [0, 0.9])
def test_a_rate_of_zero_misses_by_the_whole_distance(name, momentum):
    inner, theta, x, y, _, points = problem(momentum, weight_decay=1e-3, soft=True)
    zero = torch.tensor(0.0, dtype=torch.float64)
    found = GRADIENTS[name](inner, theta, x, y, zero, points)
    assert found.miss == 1 and not found.images.any() and not found.labels.any()
    g = Eager(inner.derivatives.loss).first(theta, x, y).detach() + 1e-3 * theta
    lam = 2 / points[0].distance * (theta - points[0].target)
    gathered = sum(momentum ** (t - j) for t in range(T) for j in range(t + 1))  # of g in b_1 + .. + b_T
    torch.testing.assert_close(found.rate, -gathered * (lam @ g), rtol=1e-12, atol=0)
    both = GRADIENTS[name](inner, theta, x, y, zero, targets(theta, 2))
    torch.testing.assert_close(both.miss, torch.tensor(1.7, dtype=torch.float64), rtol=1e-15, atol=0)


def quadratic(theta, x, y):
    """h/2 |theta - m|^2 with h = 0.7 and m the mean image."""
    return 0.35 * (theta - x.flatten(1).mean(0)).square().sum()


@pytest.mark.parametrize("name", GRADIENTS)
def test_common_shift_and_scale_leave_the_miss(name):
    start, x = randn(math.prod(SHAPE)), randn(M, *SHAPE, seed=1)
    inner, end = Inner(Eager(quadratic), MINI, 0.9), randn(len(start), seed=2)

    def miss(shift, scale):
        a, b, images = (scale * v + shift for v in (start, end, x))
        points = [Point(T, b, (a - b).square().sum())]
        return GRADIENTS[name](inner, a, images, labels_of(False), torch.tensor(0.2).double(), points).miss

    for shift, scale in ((3.7, 1.0), (0.0, -0.01), (-1.3, 17.0)):
        torch.testing.assert_close(miss(shift, scale), miss(0.0, 1.0), rtol=1e-11, atol=0)


def test_the_miss_is_a_weighted_sum_of_relative_squared_distances():
    states = [randn(13, seed=s) for s in range(4)]
    points = [
        Point(2, randn(13, seed=5), torch.tensor(0.3).double(), 0.25),
        Point(3, randn(13, seed=6), torch.tensor(7.0).double()),
    ]
    assert math.isclose(miss_of(states, points), naive_unroll.miss(states, points), rel_tol=1e-14)


@pytest.mark.parametrize("method", [adjoint_gradient, unroll_gradient])
def test_a_quadratic_loss_has_its_closed_form(method):
    h, rate, steps = 0.7, 0.3, 7
    start, x = randn(math.prod(SHAPE)), randn(M, *SHAPE, seed=1)
    target, m = randn(len(start), seed=2), x.flatten(1).mean(0)
    distance = (start - target).square().sum()
    inner = Inner(Eager(quadratic), [torch.arange(M)] * steps)
    beta = torch.tensor(rate, dtype=torch.float64)
    found = method(inner, start, x, labels_of(False), beta, [Point(steps, target, distance)])
    shrink = (1 - rate * h) ** steps
    end = m + shrink * (start - m)
    lam = 2 * (end - target) / distance
    pixels = ((1 - shrink) * lam / M).reshape(SHAPE).expand_as(x)
    slope = -h * steps * (1 - rate * h) ** (steps - 1) * (lam @ (start - m))
    assert max(gaps(found, ((end - target).square().sum() / distance, pixels, None, slope))) < 1e-12


def test_a_wrong_replay_of_the_augmentation_is_another_gradient():
    inner, *rest = problem(augmented=True, soft=True)
    right, calls = inner.augment, itertools.count()
    wrong = replayed(SHAPE[1:], FULL, seed=8)

    def forgetful(x, step):
        return right(x, step) if next(calls) < T else wrong(x, step)

    truth = unroll_gradient(inner, *rest)
    found = adjoint_gradient(Inner(inner.derivatives, inner.batches, augment=forgetful), *rest)
    assert found.miss == truth.miss and gap(found.images, truth.images) > 1e-2


class Ledger:
    """Bytes that autograd holds for backward passes, now and at most."""

    def __init__(self):
        self.now = self.peak = 0

    def pack(self, tensor):
        held = [tensor.nbytes]
        box = Box(tensor)
        weakref.finalize(box, self.release, held[0])
        self.now += held[0]
        self.peak = max(self.peak, self.now)
        return box

    def release(self, nbytes):
        self.now -= nbytes


class Box:
    def __init__(self, tensor):
        self.tensor = tensor


def saved_bytes(method, steps):
    _, loss, theta = convnet()
    inner, ledger = Inner(Eager(loss), [torch.arange(M)] * steps, 0.9), Ledger()
    arguments = (
        theta,
        randn(M, *SHAPE),
        labels_of(True),
        torch.tensor(0.01).double(),
        targets(theta, 1, steps),
    )
    with torch.autograd.graph.saved_tensors_hooks(ledger.pack, lambda box: box.tensor):
        method(inner, *arguments)
    assert ledger.now == 0
    return ledger.peak


def test_saved_bytes_grow_with_the_steps_in_the_unroll_alone():
    steps = (2, 4, 8, 16)
    for method in (adjoint_gradient, first_order_gradient):
        assert len({saved_bytes(method, t) for t in steps}) == 1
    two, four, eight, sixteen = (saved_bytes(unroll_gradient, t) for t in steps)
    assert two > saved_bytes(adjoint_gradient, 2)
    assert eight - four == 2 * (four - two) and sixteen - eight == 4 * (four - two)


def test_inputs_are_left_as_they_were():
    inner, *rest, points = problem(0.9, mini=True, soft=True)
    before = [tensor.clone() for tensor in rest]
    for method in GRADIENTS.values():
        found = method(inner, *rest, points)
        assert not any(value.requires_grad for value in found)
    assert all(torch.equal(a, b) and not a.requires_grad for a, b in zip(rest, before, strict=True))
    assert isinstance(inner.derivatives, Derivatives)


@pytest.mark.parametrize("name", GRADIENTS)
def test_points_that_mean_nothing_are_refused(name):
    inner, theta, x, y, rate, (point,) = problem()
    cases = [
        ([], "no matching point"),
        ([point._replace(step=0)], "a matching point at step 0 of 3"),
        ([point, point._replace(step=T + 1)], "a matching point at step 4 of 3"),
        ([point._replace(distance=torch.tensor(0.0))], "distance from start to target is 0.0"),
        ([point._replace(distance=torch.tensor(math.nan))], "distance from start to target is nan"),
    ]
    for points, message in cases:
        with pytest.raises(UsageError, match=message):
            GRADIENTS[name](inner, theta, x, y, rate, points)


def test_a_student_that_does_not_move_or_runs_backwards_is_refused():
    inner = problem()[0]
    with pytest.raises(UsageError, match="takes no step"):
        Inner(inner.derivatives, [])
    for momentum, weight_decay in ((-0.1, 0), (math.nan, 0), (0, -1e-3)):
        with pytest.raises(UsageError, match="is out of range"):
            Inner(inner.derivatives, FULL, momentum, weight_decay)

"""Compiled derivatives are the eager ones, and what cannot be compiled or is wrong is said and left."""

import inspect
import itertools
import shutil
from functools import partial
from math import prod

import naive_unroll
import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

from ddengine.nets import NetSpec, build, convnet
from ddengine.ops import compiled as module
from ddengine.ops.compiled import Compiled, compiled, compiled_statistics, derivatives
from ddengine.ops.unroll import Derivatives, Eager, Inner, Point, adjoint_gradient, unroll_gradient

M, SHAPE, K = 5, (2, 8, 8), 3
KINDS = list(itertools.product([True, False], [True, False]))
COMPILER = any(shutil.which(name) for name in ("c++", "g++", "clang++"))
needs_compiler = pytest.mark.skipif(not COMPILER, reason="there is no C++ compiler")
NETWORK = build(NetSpec("convnet", width=4, depth=2), SHAPE, K, torch.Generator().manual_seed(1))
NAMES, SHAPES = zip(*[(name, tuple(p.shape)) for name, p in NETWORK.named_parameters()], strict=True)
P = sum(prod(shape) for shape in SHAPES)


def loss(theta, x, y):
    params = dict(zip(NAMES, naive_unroll.pieces(theta, SHAPES), strict=True))
    return F.cross_entropy(functional_call(NETWORK, params, (x,)), y)


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def drawn(soft=True, seed=0, dtype=torch.float32):
    """Parameters, images and labels."""
    start = torch.cat([p.detach().flatten() for p in NETWORK.parameters()]).to(dtype)
    y = randn(M, K, seed=seed + 2, dtype=dtype).softmax(1) if soft else torch.tensor([0, 2, 1, 1, 0])
    return start + 0.05 * randn(P, seed=seed, dtype=dtype), randn(M, *SHAPE, seed=seed + 1, dtype=dtype), y


def gap(found, truth):
    return float((found - truth).norm() / truth.norm())


def gaps(found, truth):
    """Relative errors; both have None in the same places."""
    assert [a is None for a in found] == [b is None for b in truth]
    return [gap(a, b) for a, b in zip(found, truth, strict=True) if a is not None]


@pytest.fixture(scope="module")
def unchecked():
    """The network without its annotation checks, which a compiler cannot see through."""
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in (
            (convnet.ConvNet, "forward"), (convnet.ConvNet, "features"), (convnet, "check_input"),
            (convnet, "_average_pool"),
        ):  # fmt: skip
            patch.setattr(owner, name, inspect.unwrap(getattr(owner, name)))
        yield


@pytest.fixture(scope="module")
def kernels(unchecked):
    """Derivatives of the loss by compiled kernels, for soft labels and with the Hessian product."""
    made, reason = derivatives(loss, True, *drawn())
    assert reason is None and isinstance(made, Compiled) and isinstance(made, Derivatives)
    return made


@needs_compiler
def test_compiled_kernels_give_the_eager_derivatives(kernels):
    arguments, v = drawn(seed=11), randn(P, seed=17)
    with torch.no_grad():
        assert gap(kernels.first(*arguments), Eager(loss).first(*arguments)) < 1e-5
    found = kernels.second(v, *arguments, hessian=True)
    assert not any(tensor.requires_grad for tensor in found)
    assert max(gaps(found, Eager(loss).second(v, *arguments, hessian=True))) < 1e-5


@needs_compiler
@pytest.mark.parametrize("method", [adjoint_gradient, unroll_gradient])
def test_a_gradient_over_three_steps_by_compiled_kernels_is_the_eager_one(kernels, method):
    theta, x, y = drawn(seed=21)
    target = theta + 0.1 * randn(P, seed=29)
    points = [Point(3, target, (theta - target).square().sum())]
    found, truth = (
        method(Inner(made, [torch.arange(M)] * 3, 0.9, 1e-3), theta, x, y, torch.tensor(0.05), points)
        for made in (kernels, Eager(loss))
    )
    assert max(gaps(found, truth)) < 1e-5


@pytest.mark.parametrize(("hessian", "soft"), KINDS)
def test_each_kind_of_product_is_the_eager_one_as_traced_by_the_compiler(
    hessian, soft, unchecked, monkeypatch
):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    arguments, v = drawn(soft, dtype=torch.float64), randn(P, seed=7, dtype=torch.float64)
    made = compiled(loss)
    found, truth = (d.second(v, *arguments, hessian) for d in (made, Eager(loss)))
    assert (found[1] is None, found[3] is None) == (not hessian, not soft)
    assert max(gaps(found, truth)) < 1e-12
    assert gap(made.first(*arguments).detach(), truth[0]) < 1e-12


def test_eager_derivatives_are_given_where_none_are_to_be_compiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", None)
    made, reason = derivatives(loss, False, *drawn())
    assert made == Eager(loss) and reason is None


@pytest.mark.parametrize(
    ("error", "said"),
    [(RuntimeError("no compiler\n  was found"), "no compiler was found"), (KeyError(), "KeyError")],
)
def test_a_loss_that_cannot_be_compiled_falls_back_with_the_reason(error, said, monkeypatch):
    def refuse(function, **options):
        raise error

    monkeypatch.setattr(torch, "compile", refuse)
    made, reason = derivatives(loss, True, *drawn())
    assert made == Eager(loss)
    assert reason == f"not compiled, which is slower: {said}"


def test_a_kernel_that_fails_when_it_is_first_called_falls_back(monkeypatch):
    def fail(*arguments):
        raise RuntimeError("x" * 1000)

    monkeypatch.setattr(torch, "compile", lambda function, **options: fail)
    made, reason = derivatives(loss, True, *drawn())
    assert made == Eager(loss) and reason.startswith("not compiled") and len(reason) < 200


def damaged(part, by):
    """A compiler whose kernels are right but for one result: "first", "g" or a place among the products."""

    def compile(function, **options):
        def kernel(*arguments):
            result = function(*arguments)
            if isinstance(result, torch.Tensor):
                return result * by if part == "first" else result
            products, g = list(result[0]), result[1]
            if isinstance(part, int):
                products[part] = products[part] * by
            return tuple(products), g * by if part == "g" else g

        return kernel

    return compile


@pytest.mark.parametrize("part", ["first", "g", 0, 1, 2])
@pytest.mark.parametrize("by", [1.03, -1.0, float("nan")])
def test_a_wrong_kernel_is_refused(part, by, monkeypatch):
    monkeypatch.setattr(torch, "compile", damaged(part, by))
    made, reason = derivatives(loss, True, *drawn())
    assert made == Eager(loss)
    assert "the compiled derivative is off by " in reason


@pytest.mark.parametrize(("hessian", "soft"), KINDS)
def test_right_kernels_are_taken(hessian, soft, monkeypatch):
    monkeypatch.setattr(torch, "compile", damaged(None, 1.0))
    made, reason = derivatives(loss, True, *drawn(soft), "adjoint" if hessian else "tesla")
    assert isinstance(made, Compiled) and reason is None
    assert module.TOLERANCE < 0.03


@pytest.mark.parametrize("by", [1.0, 1.03])
def test_what_is_tried_for_the_unroll_is_its_second_derivative(by, monkeypatch):
    products = []

    def compile(function, **options):
        def kernel(*arguments):
            if len(arguments) == 4:
                products.append(arguments)
            theta = arguments[0]
            # of the right value, and with a derivative that is off where `by` is not 1
            return function(theta.detach() + by * (theta - theta.detach()), *arguments[1:])

        return kernel

    monkeypatch.setattr(torch, "compile", compile)
    made, reason = derivatives(loss, True, *drawn(), "unroll")
    assert isinstance(made, Compiled) == (by == 1.0) and (reason is None) == (by == 1.0)
    assert not products


FROZEN = build(NetSpec("convnet", width=4, depth=2), SHAPE, K, torch.Generator().manual_seed(1))
FROZEN = FROZEN.requires_grad_(False)


def statistics(net, x):
    """Two rows for each image."""
    found = net.features(x, lambda level, f: f.square().sum(1).flatten(1))
    return [found.taps[0], found.embedding]


def traced(monkeypatch):
    """A compiler that traces, and runs what it traced as it is; the list grows with each of its graphs."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    return graphs


def test_traced_statistics_are_the_same_for_any_number_of_images_and_any_weights(unchecked, monkeypatch):
    graphs = traced(monkeypatch)
    made, reason = compiled_statistics(statistics, FROZEN, randn(4, *SHAPE), "fp32", 4)
    assert reason is None and made is not statistics
    tried = len(graphs)
    for count in (7, 2):
        for parameter in FROZEN.parameters():
            parameter.mul_(1.1)
        x = randn(count, *SHAPE, seed=count).contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            for a, b in zip(made(FROZEN, x), statistics(FROZEN, x), strict=True):
                torch.testing.assert_close(a, b)
        live = [x.clone().requires_grad_() for _ in range(2)]
        totals = [
            sum(s.sin().sum() for s in f(FROZEN, y)) for f, y in zip((made, statistics), live, strict=True)
        ]
        ours, theirs = (torch.autograd.grad(t, y)[0] for t, y in zip(totals, live, strict=True))
        assert gap(ours, theirs) < 1e-4
    assert len(graphs) == tried  # none for pieces of 3 and 2 images, which were not tried


def test_no_more_images_than_told_are_given_to_compiled_statistics_at_once(monkeypatch):
    sizes = []

    def compile(function):
        def kernel(net, x):
            sizes.append(len(x))
            return function(net, x)

        return kernel

    monkeypatch.setattr(torch, "compile", compile)
    made, _ = compiled_statistics(statistics, FROZEN, randn(3, *SHAPE), "fp32", 3)
    sizes.clear()
    x = randn(8, *SHAPE)
    for a, b in zip(made(FROZEN, x), statistics(FROZEN, x), strict=True):
        torch.testing.assert_close(a, b)
    assert sizes == [3, 3, 2]
    together, _ = compiled_statistics(statistics, FROZEN, randn(3, *SHAPE), "fp32", None)
    sizes.clear()
    together(FROZEN, x)
    assert sizes == [8]


def test_statistics_that_cannot_be_compiled_come_back_with_the_reason(monkeypatch):
    def fail(*arguments):
        raise RuntimeError("no compiler\n  was found")

    monkeypatch.setattr(torch, "compile", lambda function: fail)
    made, reason = compiled_statistics(statistics, FROZEN, randn(3, *SHAPE), "fp32")
    assert made is statistics and reason == "not compiled, which is slower: no compiler was found"


@pytest.mark.parametrize("by", [1.03, -1.0, float("nan")])
@pytest.mark.parametrize("part", ["value", "gradient"])
def test_wrong_compiled_statistics_are_refused(part, by, monkeypatch):
    def compile(function):
        def kernel(net, x):
            rows = function(net, x)
            last = (
                rows[-1] * by if part == "value" else rows[-1].detach() + by * (rows[-1] - rows[-1].detach())
            )
            return [rows[0], last]

        return kernel

    monkeypatch.setattr(torch, "compile", compile)
    made, reason = compiled_statistics(statistics, FROZEN, randn(3, *SHAPE), "fp32")
    assert made is statistics and "compiled statistics are off by " in reason

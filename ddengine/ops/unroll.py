"""Training as a function, and three gradients of where it ends: full unroll, exact adjoint, first order.

A student with flat parameters theta [p] takes T steps of SGD on batches of synthetic images and labels:

    b_{t+1} = mu b_t + g_t + omega theta_t,    theta_{t+1} = theta_t - rate b_{t+1},    b_0 = 0

(torch.optim.SGD's convention), g_t the gradient of the loss on batch t. The miss is a sum over matching
points s of weight_s |theta_s - target_s|^2 / distance_s (trajectory matching, Cazenavette et al., CVPR 2022,
is one point at s = T with distance |theta_0 - target|^2). Its gradient by the chain rule, backwards in t:

    Lambda += d miss_{t+1} / d theta_{t+1};   A = Lambda + mu A;   v = -rate A
    (H v, vX, vY) = d <v, g_t> / d (theta, X, Y);   dX += vX;   dY += vY
    d rate -= <A, g_t + omega theta_t>;   Lambda += H v + omega v

(A gathers all later uses of step t's gradient, so that no b_t is kept or read off the path.)
`adjoint_gradient` does just that: exact, with the graph of one step at a time, keeping only theta_0..theta_T.
`unroll_gradient` differentiates through all steps, whose graphs are held together. `first_order_gradient`
(TESLA, Cui et al., ICML 2023) takes H as zero: theta_t then no longer depends on the images.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ddengine.errors import UsageError, require_positive

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # (theta [p], images [b c h w], labels) -> scalar


@runtime_checkable
class Derivatives(Protocol):
    """Gradient of a loss in theta, and the products of a vector with its derivatives."""

    def first(self, theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """g [p], differentiable in all three arguments where they require gradients."""
        ...

    def second(
        self, v: Tensor, theta: Tensor, x: Tensor, y: Tensor, hessian: bool
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """g [p] and d<v, g> / d(theta, x, y): theta's is None without `hessian`, y's for class numbers."""
        ...


@dataclass(frozen=True)
class Eager:
    """Derivatives by autograd as it goes."""

    loss: Loss

    def first(self, theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """See `Derivatives`."""
        if not torch.is_grad_enabled():
            with torch.enable_grad():
                live = theta.detach().requires_grad_()
                return torch.autograd.grad(self.loss(live, x.detach(), y.detach()), live)[0]
        live = theta if theta.requires_grad else theta.detach().requires_grad_()
        return torch.autograd.grad(self.loss(live, x, y), live, create_graph=True)[0]

    def second(
        self, v: Tensor, theta: Tensor, x: Tensor, y: Tensor, hessian: bool
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """See `Derivatives`."""
        soft = y.is_floating_point()
        with torch.enable_grad():
            live, images = theta.detach().requires_grad_(), x.detach().requires_grad_()
            labels = y.detach().requires_grad_() if soft else y
            g = torch.autograd.grad(self.loss(live, images, labels), live, create_graph=True)[0]
            wanted = [*([live] if hessian else []), images, *([labels] if soft else [])]
            found = list(torch.autograd.grad(g @ v, wanted, materialize_grads=True))
        return g.detach(), found.pop(0) if hessian else None, found[0], found[1] if soft else None


@dataclass(frozen=True)
class Inner:
    """How the student trains: `derivatives` of its loss, a batch of indices [b] per step, the numbers of SGD.

    `augment(x, step)` changes the images of a step, the same way whenever it is called. `scale` multiplies
    the loss.
    """

    derivatives: Derivatives
    batches: Sequence[Tensor]
    momentum: float | int = 0.0
    weight_decay: float | int = 0.0
    scale: float | int = 1.0
    augment: Callable[[Tensor, int], Tensor] = lambda x, step: x

    def __post_init__(self) -> None:
        require_positive("inner.momentum", self.momentum, zero=True)
        require_positive("inner.weight_decay", self.weight_decay, zero=True)
        if not len(self.batches):
            raise UsageError("the student takes no step", "Give at least one batch")


class Point(NamedTuple):
    """A matching point: after `step` steps theta should be `target` [p]; the miss is over `distance`."""

    step: int
    target: Tensor
    distance: Tensor
    weight: float | int = 1.0


class Gradients(NamedTuple):
    """The miss, and its gradient for images [m c h w], labels (None for class numbers) and the rate."""

    miss: Float[Tensor, ""]
    images: Float[Tensor, "m c h w"]
    labels: Tensor | None
    rate: Float[Tensor, ""]


Method = Callable[[Inner, Tensor, Tensor, Tensor, Tensor, Sequence[Point]], Gradients]


def unroll(
    inner: Inner,
    start: Float[Tensor, " p"],
    images: Float[Tensor, "m c h w"],
    labels: Int[Tensor, " m"] | Float[Tensor, "m k"],
    rate: Float[Tensor, ""],
) -> list[Float[Tensor, " p"]]:
    """theta_0..theta_T, differentiable in images, soft labels and rate where gradients are enabled."""
    theta, b, states = start, torch.zeros_like(start), [start]
    for step, index in enumerate(inner.batches):
        x = inner.augment(images[index], step)
        g = inner.scale * inner.derivatives.first(theta, x, labels[index])
        b = inner.momentum * b + g + inner.weight_decay * theta
        theta = theta - rate * b
        states.append(theta)
    return states


def miss_of(states: Sequence[Tensor], points: Sequence[Point]) -> Float[Tensor, ""]:
    """The sum over matching points of weight |theta_s - target|^2 / distance."""
    parts = [p.weight * (states[p.step] - p.target).square().sum() / p.distance for p in points]
    return torch.stack(parts).sum()


def check_points(inner: Inner, points: Sequence[Point]) -> None:
    """Refuse points outside 1..T, none at all, and a distance that is not positive (UsageError)."""
    if not points:
        raise UsageError("there is no matching point", "Give one at the student's last step")
    for point in points:
        if not 1 <= point.step <= len(inner.batches):
            raise UsageError(
                f"a matching point at step {point.step} of {len(inner.batches)}",
                f"Give steps from 1 to {len(inner.batches)}",
            )
        if not bool(point.distance > 0):
            raise UsageError(
                f"the distance from start to target is {float(point.distance)}",
                "Give a target that differs from the start",
            )


def unroll_gradient(
    inner: Inner,
    start: Float[Tensor, " p"],
    images: Float[Tensor, "m c h w"],
    labels: Int[Tensor, " m"] | Float[Tensor, "m k"],
    rate: Float[Tensor, ""],
    points: Sequence[Point],
) -> Gradients:
    """The exact gradient through a graph of all T steps: the reference; memory grows with T."""
    live = start.detach().requires_grad_()  # like every later state, so that all steps are one compilation
    return through(lambda *free: unroll(inner, live, *free), inner, images, labels, rate, points)


def through(
    path: Callable[[Tensor, Tensor, Tensor], list[Tensor]],
    inner: Inner,
    images: Tensor,
    labels: Tensor,
    rate: Tensor,
    points: Sequence[Point],
) -> Gradients:
    """Gradients through any differentiable `path(images, labels, rate)` of states."""
    check_points(inner, points)
    soft = labels.is_floating_point()
    with torch.enable_grad():
        x, beta = images.detach().requires_grad_(), rate.detach().requires_grad_()
        y = labels.detach().requires_grad_() if soft else labels
        miss = miss_of(path(x, y, beta), points)
        found = torch.autograd.grad(miss, [x, beta, *([y] if soft else [])], materialize_grads=True)
    return Gradients(miss.detach(), found[0], found[2] if soft else None, found[1])


def adjoint_gradient(
    inner: Inner,
    start: Float[Tensor, " p"],
    images: Float[Tensor, "m c h w"],
    labels: Int[Tensor, " m"] | Float[Tensor, "m k"],
    rate: Float[Tensor, ""],
    points: Sequence[Point],
) -> Gradients:
    """The same exact gradient by the backward recursion: the graph of one step, and the T + 1 states."""
    return _backwards(inner, start, images, labels, rate, points, hessian=True)


def first_order_gradient(
    inner: Inner,
    start: Float[Tensor, " p"],
    images: Float[Tensor, "m c h w"],
    labels: Int[Tensor, " m"] | Float[Tensor, "m k"],
    rate: Float[Tensor, ""],
    points: Sequence[Point],
) -> Gradients:
    """TESLA's approximation: the recursion with every Hessian zero. Exact for one step only.

    Without momentum and weight decay it is d miss / dX_t = -2 rate / D (theta_T - target)^T dg_t/dX_t, the
    published form with the factor 2 that the released code leaves out for images.
    """
    return _backwards(inner, start, images, labels, rate, points, hessian=False)


def _backwards(
    inner: Inner,
    start: Tensor,
    images: Tensor,
    labels: Tensor,
    rate: Tensor,
    points: Sequence[Point],
    hessian: bool,
) -> Gradients:
    check_points(inner, points)
    with torch.no_grad():
        images, rate = images.detach(), rate.detach()
        states = unroll(inner, start.detach(), images, labels.detach(), rate)
        dx, drate = torch.zeros_like(images), torch.zeros_like(rate)
        dy = torch.zeros_like(labels) if labels.is_floating_point() else None
        lam, pull = torch.zeros_like(states[0]), torch.zeros_like(states[0])
        for step in reversed(range(len(inner.batches))):
            for p in points:
                if p.step == step + 1:
                    lam = lam + 2 * p.weight / p.distance * (states[p.step] - p.target)
            theta, index = states[step], inner.batches[step]
            pull = lam + inner.momentum * pull
            v = -rate * pull
            g, hv, vx, vy = _step_products(inner, v, theta, images[index], labels[index], step, hessian)
            drate -= pull @ (g + inner.weight_decay * theta)
            dx.index_add_(0, index, vx)
            if dy is not None and vy is not None:
                dy.index_add_(0, index, vy)
            lam = lam + inner.weight_decay * v if hv is None else lam + hv + inner.weight_decay * v
    return Gradients(miss_of(states, points), dx, dy, drate)


def _step_products(
    inner: Inner, v: Tensor, theta: Tensor, x: Tensor, y: Tensor, step: int, hessian: bool
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """g_t and the products of v with its derivatives, through the augmentation of the step."""
    with torch.enable_grad():
        raw = x.detach().requires_grad_()
        seen = inner.augment(raw, step)
        g, hv, vx, vy = inner.derivatives.second(inner.scale * v, theta, seen.detach(), y, hessian)
        if seen is not raw:
            vx = torch.autograd.grad(seen, raw, vx, materialize_grads=True)[0]
    return inner.scale * g, hv, vx, vy


GRADIENTS: dict[str, Method] = {
    "adjoint": adjoint_gradient,
    "unroll": unroll_gradient,
    "tesla": first_order_gradient,
}

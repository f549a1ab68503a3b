"""The derivatives of a student's loss as compiled kernels: nested `torch.func.grad` inside `torch.compile`;
and statistics of images whose maps are fused away.

`torch.compile` of a loss cannot be differentiated twice; a compiled function that takes the gradient inside
can be, and one that takes both leaves nothing to be done outside. Shapes are static: one compilation for each
network and batch shape. It needs a C++ compiler on the CPU, Triton on a GPU.
"""

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ddengine.ops.unroll import Derivatives, Eager, Loss

TOLERANCE = 1e-2  # of the probe, relative: a flipped ReLU moves it by 0.7 % in float32, a wrong kernel by all


@dataclass(frozen=True)
class Compiled:
    """Derivatives by compiled functions; `products` holds one for each kind of `second` (hessian, soft)."""

    gradient: Callable[..., Tensor]
    products: dict[tuple[bool, bool], Callable[..., Any]]

    def first(self, theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """See `Derivatives`."""
        return self.gradient(theta, x, y)

    def second(
        self, v: Tensor, theta: Tensor, x: Tensor, y: Tensor, hessian: bool
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """See `Derivatives`."""
        soft = y.is_floating_point()
        with torch.no_grad():
            found, g = self.products[hessian, soft](v, theta.detach(), x.detach(), y.detach())
        found = list(found)
        return g, found.pop(0) if hessian else None, found[0], found[1] if soft else None


def compiled(loss: Loss) -> Compiled:
    """`loss` with both derivatives compiled at their first use."""
    kinds = [(hessian, soft) for hessian in (True, False) for soft in (True, False)]
    wanted = {(h, s): ((0,) if h else ()) + ((1, 2) if s else (1,)) for h, s in kinds}
    return Compiled(
        torch.compile(torch.func.grad(loss), dynamic=False),
        {kind: torch.compile(_product(loss, which), dynamic=False) for kind, which in wanted.items()},
    )


def _product(loss: Loss, which: tuple[int, ...]) -> Callable[..., Any]:
    def along(theta: Tensor, x: Tensor, y: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        g = torch.func.grad(loss)(theta, x, y)
        return g @ v, g

    return lambda v, theta, x, y: torch.func.grad(along, argnums=which, has_aux=True)(theta, x, y, v)


def derivatives(
    loss: Loss, compile: bool, theta: Tensor, x: Tensor, y: Tensor, gradient: str = "adjoint"
) -> tuple[Derivatives, str | None]:
    """Compiled derivatives, tried once on (theta, x, y); or eager ones and the reason why they are not.

    What is tried is what `gradient`, a key of GRADIENTS, will use.
    """
    eager = Eager(loss)
    if not compile:
        return eager, None
    try:
        made = compiled(loss)
        with _quiet():
            ours, theirs = (_tried(d, theta, x, y, gradient) for d in (made, eager))
            pairs = zip(ours, theirs, strict=True)
            gaps = [_gap(a, b) for a, b in pairs if a is not None and b is not None]
    except Exception as error:  # whatever a compiler raises
        return eager, f"not compiled, which is slower: {_reason(error)}"
    if wrong := [gap for gap in gaps if not gap <= TOLERANCE]:  # nan is wrong too
        return eager, f"not compiled, which is slower: the compiled derivative is off by {wrong[0]:.1e}"
    return made, None


def compiled_statistics(
    statistics: Callable[..., list[Tensor]],
    net: Any,
    probe: Float[Tensor, "n c h w"],
    precision: str,
    at_once: int | None = None,
) -> tuple[Callable[..., list[Tensor]], str | None]:
    """`statistics(net, x)`, a row an image, compiled; it works on `at_once` images (None: all) at a time.

    The maps between are fused away; weights of `net` may change in place. It is tried once forwards and
    backwards on `probe`; where that fails, `statistics` comes back with the reason.
    """
    kernel = torch.compile(statistics)

    def made(net: Any, x: Tensor) -> list[Tensor]:
        found = [kernel(net, _of_any_number(piece)) for piece in x.split(at_once or len(x))]
        return found[0] if len(found) == 1 else [torch.cat(rows) for rows in zip(*found, strict=True)]

    def tried(function: Callable[..., list[Tensor]]) -> list[Tensor]:
        live = probe.contiguous(memory_format=torch.channels_last).requires_grad_()
        with torch.autocast(probe.device.type, torch.bfloat16, enabled=precision == "bf16"):
            with torch.no_grad():
                rows = function(net, live.detach())
            found = function(net, live)
            sizes = [row.square().sum() for row in rows]  # so that none of them hides another's gradient
            total = torch.stack(
                [v.mean(0).square().sum() / s for v, s in zip(found, sizes, strict=True)]
            ).sum()
        return [*rows, torch.autograd.grad(total, live)[0]]

    try:
        with _quiet(), torch.enable_grad():
            gaps = [_gap(a, b) for a, b in zip(tried(made), tried(statistics), strict=True)]
    except Exception as error:  # whatever a compiler raises
        return statistics, f"not compiled, which is slower: {_reason(error)}"
    allowed = TOLERANCE if precision == "fp32" else 10 * TOLERANCE
    if wrong := [gap for gap in gaps if not gap <= allowed]:  # nan is wrong too
        return statistics, f"not compiled, which is slower: compiled statistics are off by {wrong[0]:.1e}"
    return made, None


def _of_any_number(x: Tensor) -> Tensor:
    torch._dynamo.maybe_mark_dynamic(x, 0)
    return x


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__


def _tried(made: Derivatives, theta: Tensor, x: Tensor, y: Tensor, gradient: str) -> list[Tensor | None]:
    """All that a gradient needs of derivatives, once."""
    if gradient == "unroll":
        with torch.enable_grad():
            live, images = theta.detach().requires_grad_(), x.detach().requires_grad_()
            g = made.first(live, images, y)
            return [g.detach(), *torch.autograd.grad(g @ theta.detach(), [live, images])]
    with torch.no_grad():
        g = made.first(theta, x, y)
    return [g, *made.second(theta, theta, x, y, gradient == "adjoint")]


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside, the compiler's modules keep their warnings, of a missing CUDA for one, to themselves."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _gap(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm().clamp(min=torch.finfo(b.dtype).tiny))

"""The student of trajectory matching: its loss on flat parameters, its batches and augmentation, its targets.

Every switch of AST (alignable student training) has an off value under which nothing of it remains.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from ddengine.errors import UsageError, require, require_positive
from ddengine.ops import dsa
from ddengine.ops.unroll import Gradients, Inner, Loss, Point, through
from ddengine.rng import Rng
from ddengine.types import Task
from expert_buffers.params import ParamSpec
from expert_buffers.segment import Segment

BACKENDS = ("torch", "higher")
MIDDLES = ("off", "equal", "adaptive")


@dataclass(frozen=True)
class InnerOptions:
    """How a student trains on the synthetic set: `steps` (T) of SGD at a learned rate, `rate` at first.

    `batch` images a step, None the whole set. `backend` "higher" runs the unroll in that library instead, a
    second implementation to check ours with.
    """

    steps: int = 20
    rate: float | int = 0.01
    momentum: float | int = 0.0
    weight_decay: float | int = 0.0
    batch: int | None = None
    backend: str = "torch"

    def __post_init__(self) -> None:
        for key in ("steps", "batch"):
            value = getattr(self, key)
            if value is not None:
                require_positive(f"matcher.inner.{key}", value)
            if not isinstance(value, int | None):
                raise UsageError(f"matcher.inner.{key}={value} is not a whole number", "Give a whole number")
        require_positive("matcher.inner.rate", self.rate)
        require_positive("matcher.inner.weight_decay", self.weight_decay, zero=True)
        if not 0 <= self.momentum < 1:
            raise UsageError(
                f"matcher.inner.momentum={self.momentum} is out of range", "Give 0 <= momentum < 1"
            )
        require(self.backend, BACKENDS, "matcher.inner.backend")


def criterion(logits: Float[Tensor, "b k"], labels: Int[Tensor, " b"] | Float[Tensor, "b k"]) -> Tensor:
    """Mean cross-entropy against class numbers, or against the softmax of label logits (DATM, TESLA)."""
    if labels.is_floating_point():
        return -(labels.softmax(1) * logits.log_softmax(1)).sum(1).mean()
    return F.cross_entropy(logits, labels)


def student_loss(net: nn.Module, spec: ParamSpec) -> Loss:
    """The criterion of `net` as a function of flat parameters [p], images and labels; `net` keeps its own."""

    def loss(theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return criterion(functional_call(net, spec.unflatten(theta), (x,)), y)

    return loss


def probe(
    net: nn.Module, spec: ParamSpec, task: Task, batch: int | None, soft: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Parameters, images and labels in the shapes that a student of `task` meets, to try derivatives on."""
    classes = len(task.images.spec.classes)
    count = min(batch or task.ipc * classes, task.ipc * classes)
    x = torch.randn(count, *task.images.spec.shape, generator=Rng(0).torch("probe")).to(task.device)
    y = torch.arange(count, device=task.device) % classes
    labels = F.one_hot(y, classes).to(x) if soft else y
    return spec.flatten(dict(net.named_parameters())), x, labels


def without_running_statistics(net: nn.Module) -> nn.Module:
    """`net` with batch norms that use their batch alone: a forward pass leaves no trace (in place)."""
    for module in net.modules():
        if isinstance(module, _BatchNorm):
            module.track_running_stats = False
            module.running_mean = module.running_var = module.num_batches_tracked = None
    return net


def batches(rng: Rng, images: int, batch: int | None, steps: int) -> list[Int[Tensor, " b"]]:
    """Index sets of the steps: all images each time, or reshuffled passes over the set cut into batches.

    Passes lie end to end, so that all batches are of one size, where MTT ends each pass with a short one; a
    batch across two passes may hold an image twice.
    """
    if batch is None or batch >= images:
        return [torch.arange(images)] * steps
    passes = range(math.ceil(steps * batch / images))
    order = torch.cat([torch.randperm(images, generator=rng.torch(f"pass-{number}")) for number in passes])
    return list(order[: steps * batch].split(batch))


def augmentation(
    rng: Rng, strategy: str, index: Sequence[Tensor], size: tuple[int, int]
) -> Callable[[Tensor, int], Tensor]:
    """DSA of each step, from parameters drawn once: one operator a step, its numbers an image (MTT)."""
    if not dsa.parse(strategy):
        return lambda x, step: x
    drawn = [
        dsa.sample(rng.fold(step).torch("dsa"), strategy, len(batch), size, one_op=True)
        for step, batch in enumerate(index)
    ]
    return lambda x, step: dsa.apply(x, drawn[step])


def balance(epoch: int, middle: int) -> float:
    """AST's factor on the inner loss: log5(s - m + 8) from m on, 1 / log5(m - s + 8) for earlier starts s."""
    return math.log(epoch - middle + 8, 5) if epoch >= middle else 1 / math.log(middle - epoch + 8, 5)


def perturbed(
    theta: Float[Tensor, " p"], spec: ParamSpec, generator: torch.Generator, alpha: float | int
) -> Float[Tensor, " p"]:
    """AST's start: w + alpha d / |d| * w for every convolution weight w, d standard normal of its shape."""
    parts = []
    for part, shape in zip(theta.split(spec.sizes), spec.shapes, strict=True):
        if len(shape) == 4:
            d = torch.randn(part.shape, generator=generator).to(part)
            part = part + alpha * d / d.norm() * part
        parts.append(part)
    return torch.cat(parts)


def matching_points(segment: Segment, start: Float[Tensor, " p"], steps: int, middle: str) -> list[Point]:
    """The last target at the last step and, with `middle`, target i of M at step (steps // M) i (AST).

    Distances are taken from `start`. Middle points weigh 1 ("equal") or i / M ("adaptive"). UsageError where
    the expert did not move.
    """
    count = len(segment.targets)
    chosen = range(1, count + 1) if middle != "off" else (count,)
    points = []
    for i in chosen:
        target = segment.targets[i - 1]
        distance = (start - target).square().sum()
        weight = i / count if middle == "adaptive" and i < count else 1.0
        points.append(Point(steps if i == count else steps // count * i, target, distance, weight))
    return points


def higher_gradient(
    net: nn.Module,
    spec: ParamSpec,
    inner: Inner,
    start: Float[Tensor, " p"],
    images: Float[Tensor, "m c h w"],
    labels: Int[Tensor, " m"] | Float[Tensor, "m k"],
    rate: Float[Tensor, ""],
    points: Sequence[Point],
) -> Gradients:
    """The full unroll in `higher` (Grefenstette et al. 2019): the same numbers from other code."""
    import higher  # imported here: few runs use it

    module = copy.deepcopy(net).to(start)
    with torch.no_grad():
        for name, value in spec.unflatten(start).items():
            module.get_parameter(name).copy_(value)
    module.requires_grad_()
    optimiser = torch.optim.SGD(
        module.parameters(), lr=1.0, momentum=inner.momentum, weight_decay=inner.weight_decay
    )

    def path(x: Tensor, y: Tensor, beta: Tensor) -> list[Tensor]:
        override = {"lr": [beta]}
        with higher.innerloop_ctx(module, optimiser, override=override) as (net, descent):
            for step, index in enumerate(inner.batches):
                seen = inner.augment(x[index], step)
                descent.step(inner.scale * criterion(net(seen), y[index]))
            times = range(len(inner.batches) + 1)
            return [torch.cat([p.reshape(-1) for p in net.parameters(time=t)]) for t in times]

    return through(path, inner, images, labels, rate, points)

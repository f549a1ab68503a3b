"""Recover: what is added to images so that a trained teacher meets in them the statistics it was trained on.

A compensator u, one image that is added to all images x of a group of sheets, follows the gradient of

    L(u) = ce_weight * CE(f(x~), y) + r_bn * R(x~),    x~ = roll(crop(x + u), shift)

for one frozen teacher f in eval mode (INFER, Zhang et al. 2024; the loss is that of SRe2L, Yin et al. 2023).
R compares, at the input of every batch norm, mean and biased variance of the batch with the running ones.
With a part of the images in a step, the statistics are running averages and their gradient is the part's.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from ddengine.errors import UsageError
from ddengine.rng import Rng
from ddengine.types import DataSpec
from matchers.bn_statistics import bn_statistics_loss, observed, running_average, running_moments

BETAS, EPSILON = (0.5, 0.9), 1e-8  # Adam of the released code
RATIO = (3 / 4, 4 / 3)  # sides of a crop, as torchvision's RandomResizedCrop


@dataclass(frozen=True)
class RecoverOptions:
    """What the loss and the descent of recovery depend on (meanings: `CompensatorOptions`)."""

    steps: int
    lr: float
    ce_weight: float
    r_bn: float
    first_weight: float
    weighting: str
    jitter: int
    crop: float
    flip: bool
    batch: int | None


@dataclass(frozen=True, eq=False)
class Session:
    """What all jobs of a recovery share: uint8 bases [b c h w], their classes, the rows of each group, and
    frozen teachers in eval mode; everything on one device.
    """

    bases: UInt8[Tensor, "b c h w"]
    classes: Int[Tensor, " b"]
    rows: tuple[Tensor, ...]
    teachers: tuple[nn.Module, ...]
    spec: DataSpec
    options: RecoverOptions
    rng: Rng
    precision: str


@dataclass(frozen=True)
class Recovering:
    """One job on its way: u [1 c h w], or [b c h w] with one image for each of its group, in model-input
    space; Adam's two moments; running mean and second moment [2 s] of all channels of all batch norms, empty
    while whole groups are seen in a step.
    """

    u: Float[Tensor, "v c h w"]
    first: Float[Tensor, "v c h w"]
    second: Float[Tensor, "v c h w"]
    average: Float[Tensor, "2 s"]


@dataclass(frozen=True)
class Block:
    """One step of the jobs of some groups with one teacher, in one forward pass."""

    step: int
    teacher: int
    groups: tuple[int, ...]
    jobs: tuple[Recovering, ...]


def begin(count: int, spec: DataSpec, channels: int, device: torch.device) -> Recovering:
    """A job at rest: `count` images of zeros (1: shared by a group)."""
    zeros = torch.zeros(count, *spec.shape, device=device)
    return Recovering(zeros, zeros, zeros, torch.zeros(2, channels, device=device))


def channels_of(net: nn.Module, spec: DataSpec, device: torch.device) -> int:
    """Channels of all batch norms that fire in a forward pass (UsageError where there is none)."""
    with observed(net, [1]) as found, torch.no_grad():
        net(torch.zeros(1, *spec.shape, device=device))
    if not found:
        raise UsageError(
            "a teacher without batch norm has no statistics to recover from",
            "Record the experts with network.norm=batch, or networks that have it, such as resnet18",
        )
    return sum(len(running_moments(module).mean) for module, _ in found)


def advance(session: Session, block: Block) -> tuple[tuple[Recovering, ...], tuple[float, float]]:
    """The jobs of a block one step later, and the mean of their cross-entropies and of their R.

    A job whose loss or gradient is not finite stays as it was; the means are then NaN.
    """
    net, o = session.teachers[block.teacher], session.options
    free = [job.u.detach().requires_grad_() for job in block.jobs]
    picks = [_pick(session, block, place) for place in range(len(free))]
    parts = [
        _seen(session, block, place, rows, here, u)
        for place, (u, (rows, here)) in enumerate(zip(free, picks, strict=True))
    ]
    sizes = [len(part) for part in parts]
    place = free[0].device
    with observed(net, sizes) as found:
        x = (torch.cat(parts) if len(parts) > 1 else parts[0]).contiguous(memory_format=torch.channels_last)
        with torch.autocast(place.type, torch.bfloat16, enabled=session.precision == "bf16"):
            logits = net(x)
    running = [running_moments(module) for module, _ in found]
    jobs, entropies, statistics = [], [], []
    for i, (part, (rows, _)) in enumerate(zip(logits.split(sizes), picks, strict=True)):
        entropies.append(F.cross_entropy(part.float(), session.classes[rows]))
        seen = [moments[i] for _, moments in found]
        whole = sizes[i] == len(session.rows[block.groups[i]])
        average = block.jobs[i].average
        if not whole:
            # Half of what is not seen: a longer memory follows the moving images too late and oscillates.
            share = sizes[i] / len(session.rows[block.groups[i]])
            seen, average = running_average(seen, average, (1 - share) / 2, block.step)
        statistics.append(bn_statistics_loss(seen, running, o.first_weight, o.weighting))
        jobs.append(average)
    total = o.ce_weight * torch.stack(entropies).sum() + o.r_bn * torch.stack(statistics).sum()
    gradients = torch.autograd.grad(total, free)
    lr = o.lr * 0.5 * (1 + math.cos(math.pi * block.step / o.steps))
    moved = tuple(
        _adam(job, gradient, average, lr, block.step)
        for job, gradient, average in zip(block.jobs, gradients, jobs, strict=True)
    )
    fine = [
        (o.ce_weight * ce + o.r_bn * bn).isfinite() & _finite(new)
        for ce, bn, new in zip(entropies, statistics, moved, strict=True)
    ]
    kept = tuple(_chosen(ok, new, job) for ok, new, job in zip(fine, moved, block.jobs, strict=True))
    unknown = torch.where(torch.stack(fine).all(), 0.0, torch.nan)
    return kept, (_level(entropies) + float(unknown), _level(statistics) + float(unknown))


def send(block: Block) -> Block:
    """The block with numpy arrays for tensors: between processes each tensor would take a file of its own."""
    arrays = tuple(_mapped(job, lambda tensor: tensor.numpy()) for job in block.jobs)
    return replace(block, jobs=arrays)


def received(jobs: tuple[Recovering, ...]) -> tuple[Recovering, ...]:
    """Jobs with tensors again, whether they came as arrays or not."""
    return tuple(_mapped(job, torch.as_tensor) for job in jobs)


def advance_sent(session: Session, block: Block) -> tuple[tuple[Recovering, ...], tuple[float, float]]:
    """`advance` in another process: arrays come and go."""
    jobs, levels = advance(session, replace(block, jobs=received(block.jobs)))
    return tuple(_mapped(job, lambda tensor: tensor.numpy()) for job in jobs), levels


def _mapped(job: Recovering, change: Callable[[Any], Any]) -> Any:
    """The job with other arrays; without checks, since what is sent holds no tensors."""
    made = object.__new__(Recovering)
    for field in fields(Recovering):
        object.__setattr__(made, field.name, change(getattr(job, field.name)))
    return made


def _pick(session: Session, block: Block, place: int) -> tuple[Tensor, Tensor]:
    """The images of this step: rows of `bases`, and their places among those of the group."""
    rows, batch = session.rows[block.groups[place]], session.options.batch
    if batch is None or batch >= len(rows):
        return rows, torch.arange(len(rows), device=rows.device)
    rng = _stream(session, block, place)
    here = torch.cat([_pass(rng, len(rows), number) for number in _passes(len(rows), batch, block.step)])
    first = block.step * batch % len(rows)
    here = here[first : first + batch].to(rows.device)
    return rows[here], here


def _passes(pool: int, batch: int, step: int) -> range:
    return range(step * batch // pool, ((step + 1) * batch - 1) // pool + 1)


def _pass(rng: Rng, pool: int, number: int) -> Tensor:
    return torch.randperm(pool, generator=rng.torch(f"pass-{number}"))


def _stream(session: Session, block: Block, place: int) -> Rng:
    return session.rng.fold("job", block.teacher, block.groups[place])


def _seen(
    session: Session, block: Block, place: int, rows: Tensor, here: Tensor, u: Tensor
) -> Float[Tensor, "n c h w"]:
    """What the teacher sees: the images with what is added to them, cropped, mirrored and rolled as one."""
    o = session.options
    x = session.spec.normalise(session.bases[rows]) + (u if len(u) == 1 else u[here])
    generator = _stream(session, block, place).torch("views")
    drawn = torch.rand((o.steps, 7), generator=generator)[block.step].tolist()
    return view(x, drawn, o.jitter, o.crop, o.flip)


def view(
    x: Float[Tensor, "n c h w"], drawn: Sequence[float], jitter: int, crop: float | int, flip: bool
) -> Float[Tensor, "n c h w"]:
    """One crop, flip and roll for a whole batch from seven numbers in [0, 1).

    The crop has an area of `crop` (1: none) to 1 of the image and is resized to it, as RandomResizedCrop; the
    roll is by 0..`jitter` pixels down and right. Source: released code of INFER.
    """
    h, w = x.shape[2:]
    if crop < 1:
        area = (crop + (1 - crop) * drawn[0]) * h * w
        ratio = math.exp(math.log(RATIO[0]) + (math.log(RATIO[1]) - math.log(RATIO[0])) * drawn[1])
        rows, columns = (
            min(max(round(s), 1), side)
            for s, side in (((area / ratio) ** 0.5, h), ((area * ratio) ** 0.5, w))
        )
        top, left = int(drawn[2] * (h - rows + 1)), int(drawn[3] * (w - columns + 1))
        part = x[:, :, top : top + rows, left : left + columns]
        x = F.interpolate(part, (h, w), mode="bilinear", align_corners=False)
    if flip and drawn[4] < 0.5:
        x = x.flip(3)
    return x.roll((int(drawn[5] * (jitter + 1)), int(drawn[6] * (jitter + 1))), (2, 3)) if jitter else x


def _adam(job: Recovering, gradient: Tensor, average: Tensor, lr: float, step: int) -> Recovering:
    first = BETAS[0] * job.first + (1 - BETAS[0]) * gradient
    second = BETAS[1] * job.second + (1 - BETAS[1]) * gradient.square()
    size = (second / (1 - BETAS[1] ** (step + 1))).sqrt() + EPSILON
    return Recovering(job.u - lr * first / (1 - BETAS[0] ** (step + 1)) / size, first, second, average)


def _finite(job: Recovering) -> Tensor:
    return torch.stack(
        [value.isfinite().all() for value in (job.u, job.first, job.second, job.average)]
    ).all()


def _chosen(fine: Tensor, new: Recovering, old: Recovering) -> Recovering:
    """The new job where all of it is finite, else the old one; without a look at which it is."""
    names = [field.name for field in fields(Recovering)]
    return Recovering(*(torch.where(fine, getattr(new, name), getattr(old, name)) for name in names))


def _level(values: Sequence[Tensor]) -> float:
    return float(torch.stack(list(values)).detach().mean())

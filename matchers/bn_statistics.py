"""Batch-norm statistics: what a trained network met in training, what it meets in a batch, their distance."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ddengine.errors import UsageError, require

WEIGHTINGS = ("released", "normalised")


class Moments(NamedTuple):
    """Mean and biased variance of each channel of a batch norm's input, or its running ones."""

    mean: Float[Tensor, " c"]
    var: Float[Tensor, " c"]


def bn_statistics_loss(
    batch: Sequence[Moments],
    running: Sequence[Moments],
    first_weight: float | int = 10.0,
    weighting: str = "released",
) -> Float[Tensor, ""]:
    """R = sum_l w_l (|mean_l - running mean_l|_2 + |var_l - running var_l|_2), w = (first_weight, 1, 1, ...).

    Norms are not squared, and have the gradient 0 at 0. Weighting "normalised" divides the first norm of a
    layer by that of its running deviations, the second by that of its running variances, and R by the sum of
    w, so that layers and architectures count alike. Source: released code of INFER and SRe2L. UsageError
    where layers or channels differ.
    """
    require(weighting, WEIGHTINGS, "layer weighting")
    if not batch or [m.mean.shape for m in batch] != [m.mean.shape for m in running]:
        raise UsageError(
            f"statistics of {len(batch)} layers against those of {len(running)}",
            "Give the same layers, at least one, with the same channels",
        )
    weights = [float(first_weight), *[1.0] * (len(batch) - 1)]
    terms = []
    for weight, ours, theirs in zip(weights, batch, running, strict=True):
        mean, var = (torch.linalg.vector_norm(a - b) for a, b in zip(ours, theirs, strict=True))
        if weighting == "normalised":
            mean = mean / _length(theirs.var.sqrt())
            var = var / _length(theirs.var)
        terms.append(weight * (mean + var))
    total = torch.stack(terms).sum()
    return total / sum(weights) if weighting == "normalised" else total


def _length(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x).clamp(min=torch.finfo(x.dtype).tiny)


@contextmanager
def observed(net: nn.Module, sizes: Sequence[int]) -> Iterator[list[tuple[_BatchNorm, list[Moments]]]]:
    """Inside, a forward pass lists each batch norm as it fires with the moments of its input, one for each
    of the parts of `sizes` images that make up the batch. Half precision is reduced in float32.
    """
    found: list[tuple[_BatchNorm, list[Moments]]] = []

    def look(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        assert isinstance(module, _BatchNorm)
        parts = given[0].split(list(sizes)) if len(sizes) > 1 else given
        about = module.running_mean
        shift = given[0].new_zeros(given[0].shape[1]) if about is None else about
        found.append((module, [moments(part, shift) for part in parts]))

    modules = [module for module in net.modules() if isinstance(module, _BatchNorm)]
    handles = [module.register_forward_pre_hook(look) for module in modules]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def moments(x: Float[Tensor, "n c *s"], shift: Float[Tensor, " c"]) -> Moments:
    """Mean and biased variance of each channel, in float32 or wider.

    Sums are taken about `shift`, a guess of the means such as the running ones, in one pass over memory that
    is laid out channels last: torch.var_mean takes many times as long there (measured:
    benchmarks/recover_step.py), and so does its gradient.
    """
    return Moments(*_Moments.apply(x, shift))


class _Moments(torch.autograd.Function):
    """Mean and variance, whose gradient is one multiply and add for each value."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        rows = x.movedim(1, -1).reshape(-1, x.shape[1]).to(dtype)
        moved = rows - shift.to(dtype)
        mean = moved.sum(0) / len(rows)
        var = (moved.square().sum(0) / len(rows) - mean.square()).clamp(min=0)
        mean = mean + shift.to(dtype)
        ctx.save_for_backward(x, mean)
        return mean, var

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        x, mean = ctx.saved_tensors
        by_mean, by_var = gradients
        count = x.numel() // x.shape[1]
        slope = 2 * by_var / count
        level = by_mean / count - slope * mean
        slope, level = (v.reshape(-1, *[1] * (x.ndim - 2)) for v in (slope, level))
        return torch.addcmul(level, x.to(slope.dtype), slope).to(x.dtype), None


def running_moments(module: _BatchNorm) -> Moments:
    """What the batch norm was trained on (UsageError where it keeps no statistics)."""
    if module.running_mean is None or module.running_var is None:
        raise UsageError("a teacher's batch norm keeps no running statistics", "Record it with ddengine")
    return Moments(module.running_mean, module.running_var)


def running_average(
    seen: Sequence[Moments], average: Float[Tensor, "2 s"], decay: float | int, step: int
) -> tuple[list[Moments], Float[Tensor, "2 s"]]:
    """Moments averaged over the steps so far, with the gradient of this step's part; the new averages.

    `average` holds decaying sums of means and second moments, corrected for their start at 0 at step 0. The
    values are those of the average, the gradient is that of the part as though it alone were the batch,
    around the average's mean.
    """
    mean = torch.cat([m.mean for m in seen])
    square = torch.cat([m.var for m in seen]) + mean.square()
    average = decay * average + (1 - decay) * torch.stack([mean, square]).detach()
    centre, second = average / (1 - decay ** (step + 1))
    var = square - 2 * centre * mean
    mean = mean + (centre - mean).detach()
    var = var + ((second - centre.square()).clamp(min=0) - var).detach()
    sizes = [len(m.mean) for m in seen]
    return [Moments(*pair) for pair in zip(mean.split(sizes), var.split(sizes), strict=True)], average

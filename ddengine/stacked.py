"""Several networks of one architecture trained at once: their weights side by side, one kernel for all.

For a GPU, which one small network leaves idle: there the judge trains the networks of a row so. On a CPU let
one process for each core train one after the other: on one core three ConvNets of width 16 on 100 images take
1.09 times as long at once as in turn at 28x28 pixels and 0.84 times at 8x8 (medians of three), whereas a
second core halves the time.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import groupby

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from ddengine.bench import Bench, Job, Record, record_of, run_job, stream_of
from ddengine.composites import Composites
from ddengine.errors import UsageError, require
from ddengine.nets import NETWORKS, build, has_batch_norm
from ddengine.nets.core import NetSpec
from ddengine.ops.batches import resident
from ddengine.parallel import MapJobs, job_pool
from ddengine.rng import Rng
from ddengine.train import (
    PRECISIONS,
    SCHEDULES,
    Recipe,
    _follow,
    _loss,
    _Stream,
    optimiser_for,
    starts_anew,
)
from ddengine.types import Images

Stack = dict[str, Tensor]  # weights by name, each [s ...] of s networks
AT_ONCE = 8  # networks of a row in one stack


@contextmanager
def judging(bench: Bench, workers: int = 1) -> Iterator[MapJobs]:
    """What maps the jobs of `bench` to their records: stacks on a GPU, else worker processes."""
    if workers == 1 and torch.device(bench.device).type == "cuda":
        yield partial(run_stacked, bench)
        return
    with job_pool(run_job, bench, workers) as results:
        yield results


def run_stacked(bench: Bench, jobs: Sequence[Job]) -> Iterator[Record]:
    """The records of `jobs` in order, equal to those of `run_job` but for float rounding.

    Neighbours of one row and network are trained at once, AT_ONCE at most; networks that do not stack,
    teachers that label the batches and looks at the test part on the way leave them one by one.
    """
    for (network, row, _), found in groupby(jobs, lambda job: (job.network, job.row, job.index is None)):
        alike = list(found)
        alone = not stacks(network) or bench.labeler(row) is not None or bench.looks > 0
        for start in range(0, len(alike), 1 if alone else AT_ONCE):
            if alone:
                yield run_job(bench, alike[start])
            else:
                yield from _at_once(bench, alike[start : start + AT_ONCE])


def _at_once(bench: Bench, jobs: Sequence[Job]) -> Iterator[Record]:
    began = time.perf_counter()
    sets = [bench.training_set(job.row, job.index) for job in jobs]
    rngs, lrs = [stream_of(bench, job) for job in jobs], [job.lr for job in jobs]
    recipe = bench.recipe_of(jobs[0].row)
    nets = train_stacked(jobs[0].network, sets, recipe, lrs, rngs, bench.device, bench.precision)
    each = (time.perf_counter() - began) / len(jobs)
    for net, job, rng in zip(nets, jobs, rngs, strict=True):
        began = time.perf_counter()
        record = record_of(net, bench, job, rng)
        yield record | {"seconds": round(each + time.perf_counter() - began, 3)}


def stacks(spec: NetSpec) -> bool:
    """Whether networks of `spec` can be trained at once: ours, without batch norm.

    Batch norm moves its statistics in place, and a user's or torchvision's network may draw while it trains.
    """
    return spec.name in NETWORKS and not has_batch_norm(spec)


def train_stacked(
    spec: NetSpec,
    images: Images | Composites | Sequence[Images | Composites],
    recipe: Recipe,
    lrs: Sequence[float],
    rngs: Sequence[Rng],
    device: torch.device | str,
    precision: str = "fp32",
) -> list[nn.Module]:
    """What `train` makes of (spec, images[i], recipe, lrs[i], rngs[i]), for each i, but for float rounding.

    `images` are one set for all networks or one for each, of one size and one kind of label. Raises
    UsageError for a network that does not stack (see `stacks`), for sets, rates and rngs that are not as many
    or do not go together, and as `train` does.
    """
    require(precision, PRECISIONS, "precision")
    sets = [images] * len(rngs) if isinstance(images, Images | Composites) else list(images)
    _check(spec, sets, lrs, rngs)
    place, shape, classes = torch.device(device), sets[0].spec.shape, len(sets[0].spec.classes)
    nets = [build(spec, shape, classes, rng.torch("weights")).to(place).train() for rng in rngs]
    held = {id(each): resident(each, place) for each in sets}
    streams = [_Stream.of(held[id(each)], recipe, rng) for each, rng in zip(sets, rngs, strict=True)]
    weights = _trained(nets, streams, recipe, lrs, precision)
    for i, net in enumerate(nets):
        net.load_state_dict({name: tensor[i] for name, tensor in weights.items()})
    return nets


def _check(
    spec: NetSpec, sets: Sequence[Images | Composites], lrs: Sequence[float], rngs: Sequence[Rng]
) -> None:
    if not stacks(spec):
        raise UsageError(f"networks '{spec.name}' of {spec} do not stack", "Train them one after the other")
    if not rngs or len({len(sets), len(lrs), len(rngs)}) > 1:
        raise UsageError(
            f"{len(sets)} sets, {len(lrs)} rates and {len(rngs)} rngs", "Give one of each for each network"
        )
    kinds = {(len(each), each.y_kind, each.spec.shape, each.spec.classes) for each in sets}
    if len(kinds) > 1:
        raise UsageError(
            "the sets differ in size, kind of label, shape or classes",
            "Train networks on sets that are alike at once, the others apart",
        )
    if not len(sets[0]):
        raise UsageError("there is no image to train on", "Give sets with at least one image")


def _trained(
    nets: Sequence[nn.Module],
    streams: Sequence[_Stream],
    recipe: Recipe,
    lrs: Sequence[float],
    precision: str,
) -> Stack:
    """The last, or average, weights of all networks."""
    weights, _ = stack_module_state(list(nets))
    average = {name: tensor.detach().clone() for name, tensor in weights.items()} if recipe.ema else {}
    slopes = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    optimiser = _optimiser(weights, slopes, lrs, recipe)
    for step in range(recipe.steps):
        if starts_anew(recipe, step):
            optimiser = _optimiser(weights, slopes, lrs, recipe)
        for group in optimiser.param_groups:
            group["lr"] = group["start"] * SCHEDULES[recipe.schedule](step / recipe.steps)
        batches = [stream.batch(step) for stream in streams]
        logits = _logits(nets[0], weights, torch.stack([x for x, _ in batches]), precision)
        pairs = zip(logits.float(), batches, strict=True)  # vmap would loop over the loss too, more slowly
        losses = [_loss(own, labels, recipe, streams[0].soft) for own, (_, labels) in pairs]
        found = torch.autograd.grad(torch.stack(losses).sum(), list(weights.values()))
        for slope, tensor in zip(slopes.values(), found, strict=True):
            slope.copy_(tensor)
        optimiser.step()
        _follow(average, weights, recipe.ema, step)
    return average or weights


def _logits(net: nn.Module, weights: Stack, x: Tensor, precision: str) -> Tensor:
    """The logits [s n k] of each network on its own batch of `x` [s n c h w]."""

    def forward(own: Stack, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bf16"):
            return functional_call(net, own, (x,))

    return vmap(forward)(weights, x)


def _optimiser(weights: Stack, slopes: Stack, lrs: Sequence[float], recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimiser on views of `weights`, whose gradients are views of `slopes`.

    A group for each rate, since a rate is a number of a group; `start` keeps it.
    """
    by_rate: dict[float, list[Tensor]] = {lr: [] for lr in lrs}
    for name, tensor in weights.items():
        for own, slope, lr in zip(tensor.detach(), slopes[name], lrs, strict=True):
            own.grad = slope
            by_rate[lr].append(own)
    groups = [{"params": params, "start": lr} for lr, params in by_rate.items()]
    return optimiser_for(groups, lrs[0], recipe, next(iter(weights.values())).device)

"""What the pixel matchers share: the start, one gradient over drawn networks in chunks, one momentum step."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from ddengine.errors import UsageError, require, require_positive
from ddengine.nets import build, has_batch_norm, resolve
from ddengine.nets.core import NetSpec, Network, initialise
from ddengine.ops import dsa
from ddengine.rng import Rng
from ddengine.types import Accepts, Metrics, SynthSet, Task, Workspace
from expert_buffers.segment import Window
from expert_buffers.store import ExpertBuffer
from matchers.parametrised import FormOptions, form, per_class
from synth.compensated import Compensated
from synth.pixels import CODECS
from synth.starts import STARTS, start_images

PUBLISHED_EMBEDDING = 2048  # dimensions summed over in the papers, to which their rates and weights belong
SCHEDULES = ("constant", "cosine", "drop")
NETWORKS = ("random", "buffer")
Statistics = Callable[[Network, Tensor], list[Tensor]]
Loss = Callable[[list[Tensor], list[Tensor]], Tensor]


@runtime_checkable
class DescentOptions(Protocol):
    """The options that every pixel matcher has under the same names."""

    @property
    def real_per_class(self) -> int | None: ...
    @property
    def lr(self) -> float: ...
    @property
    def momentum(self) -> float: ...
    @property
    def schedule(self) -> str | None: ...
    @property
    def augment(self) -> str: ...
    @property
    def networks_per_step(self) -> int: ...
    @property
    def chunk(self) -> int: ...
    @property
    def networks(self) -> str: ...
    @property
    def window(self) -> Window: ...
    @property
    def start(self) -> str: ...
    @property
    def codec(self) -> str: ...
    @property
    def synth(self) -> FormOptions: ...


@dataclass(frozen=True)
class PixelState:
    """A synthetic set on its way: steps done, the set, and the velocity of each of its free tensors."""

    step: int
    synth: SynthSet
    velocity: dict[str, Tensor]


def check_options(o: Any) -> None:
    """Refuse values outside their range among the options that the pixel matchers share (UsageError)."""
    for key in ("steps", "real_per_class", "networks_per_step", "chunk", "lr"):
        value = getattr(o, key)
        if value is not None:
            require_positive(f"matcher.{key}", value)
        if key != "lr" and not isinstance(value, int | None):
            raise UsageError(
                f"matcher.{key}={value} is out of range", f"Give a whole number for matcher.{key}"
            )
    require_positive("matcher.momentum", o.momentum, zero=True)
    require(o.start, STARTS, "matcher.start")
    require(o.codec, CODECS, "matcher.codec")
    require(o.networks, NETWORKS, "matcher.networks")
    if o.schedule is not None:
        require(o.schedule, SCHEDULES, "matcher.schedule")
    if o.augment != "auto":
        dsa.parse(o.augment)


def start(task: Task, rng: Rng, o: DescentOptions) -> PixelState:
    """The hard-labelled set that `o.synth` frees, as large as the budget allows, from `o.start`, at rest."""
    count = per_class(task, o.synth, o.codec)
    images = start_images(o.start, task.images, count, rng.fold("start")).to(task.device)
    synth = form(task, images, o.synth, o.codec, rng)
    return PixelState(0, synth, {key: torch.zeros_like(value) for key, value in synth.params().items()})


def accepted(o: DescentOptions) -> Accepts:
    """What a pixel matcher works on: images, and experts where it draws its networks from a buffer."""
    return Accepts(source="images", experts=o.networks == "buffer", batch_norm=True)


def workspace(task: Task, network: NetSpec, o: DescentOptions) -> Workspace:
    """The task with its data resident on the device and one network whose weights each step draws anew."""
    spec, classes = task.images.spec, len(task.images.spec.classes)
    net = build(resolve(network, spec.shape), spec.shape, classes, Rng(0).torch("weights"))
    net = net.to(task.device).to(memory_format=torch.channels_last).requires_grad_(False)  # type: ignore[call-overload]
    extra = {"net": net, "together": has_batch_norm(net)}
    if o.networks == "buffer":
        extra["experts"] = _experts(task, network, o.window)
    return Workspace(task, task.images.to(task.device), extra)


def checked(task: Task, network: NetSpec) -> NetSpec:
    """The resolved network, after the task's buffer was found to fit it (UsageError)."""
    if not isinstance(task.experts, ExpertBuffer):
        raise UsageError(f"experts are a {type(task.experts).__name__}", "Give an ExpertBuffer: experts=DIR")
    resolved = resolve(network, task.images.spec.shape)
    task.experts.check(task.images.spec, resolved)
    return resolved


def _experts(task: Task, network: NetSpec, window: Window) -> list[int]:
    """The experts with this network, all of which must reach into the window (UsageError)."""
    checked(task, network)
    found = task.experts.matching(network)
    shortest = min(task.experts.epochs(i) for i in found)
    if max(window.min, (window.start or 1) - 1, (window.max or 1) - 1) > shortest:
        raise UsageError(
            f"matcher.window reaches beyond the {shortest} epochs of the buffer {task.experts.root}",
            f"Give matcher.window.max={shortest + 1} or less, or continue the buffer",
        )
    return found


def draw_network(work: Workspace, rng: Rng, o: DescentOptions, iteration: int) -> Network:
    """The workspace's network in train mode with fresh weights, or those of an expert within the window."""
    if o.networks == "random":
        return initialise(work.extra["net"], rng.torch("weights")).train()  # type: ignore[return-value]
    generator, experts = rng.torch("expert"), work.extra["experts"]
    number = experts[int(torch.randint(len(experts), (), generator=generator))]
    high = o.window.upper(iteration, work.task.experts.epochs(number) + 1)
    row = int(torch.randint(o.window.min, high, (), generator=generator))
    return work.task.experts.load(work.extra["net"], number, row).train()


def groups(classes: int, per_class: int, chunk: int, together: bool) -> Iterator[Int[Tensor, " g"]]:
    """Consecutive classes in groups of at most `chunk` images (at least one class); all if `together`.

    `per_class` is the larger of the real and the synthetic images of a class.
    """
    yield from torch.arange(classes).split(classes if together else max(1, chunk // per_class))


def members(classes: Int[Tensor, " n"], count: int) -> list[Tensor]:
    """The indices of each of `count` classes in a label vector."""
    return [(classes.cpu() == c).nonzero().squeeze(1) for c in range(count)]


def classes_of(synth: SynthSet) -> Int[Tensor, " n"]:
    """The class of every image of a set, of composites without making them."""
    return synth.composites().classes if isinstance(synth, Compensated) else synth.decode().classes


def listing(picks: list[Tensor], group: Int[Tensor, " g"]) -> tuple[Tensor, Tensor]:
    """The picked indices of the classes in `group`, class after class, and each one's place in `group`."""
    chosen = [picks[c] for c in group.tolist()]
    place = torch.arange(len(chosen)).repeat_interleave(torch.tensor([len(p) for p in chosen]))
    return torch.cat(chosen), place


def group_means(
    pieces: Iterator[tuple[list[Tensor], Int[Tensor, " n"]]], count: int
) -> list[Float[Tensor, "g _"]]:
    """Class means of per-image statistics that arrive in pieces, each with its images' places in the group.

    Every class needs an image: one without has the mean 0.
    """
    sums: list[Tensor] = []
    numbers = torch.zeros(count)
    for values, place in pieces:
        member = F.one_hot(place, count).T
        numbers += member.sum(1)
        added = [member.to(v) @ v for v in values]  # a product, not a scatter: the same bits on every run
        sums = [s + a for s, a in zip(sums, added, strict=True)] if sums else added
    return [s / numbers.clamp(min=1).to(s)[:, None] for s in sums]


def matching_gradient(
    synth: SynthSet,
    work: Workspace,
    net: Network,
    rng: Rng,
    o: DescentOptions,
    statistics: Statistics,
    loss: Loss,
) -> tuple[dict[str, Tensor], Tensor]:
    """Gradient of `loss` between class means of real and synthetic statistics on `net`; the loss.

    Each class has its own DSA parameters, the same for its real and synthetic images (siamese). Groups of
    classes are taken in turn and the real images of a group in pieces of `chunk`; with batch norm all classes
    go together, real and synthetic apart, because the batch is part of the statistics.
    """
    spec, device, together = work.data.spec, work.task.device, work.extra["together"]
    k, per_class = len(spec.classes), o.real_per_class or 1
    strategy = dsa.strategy_for(spec.name) if o.augment == "auto" else o.augment
    params = dsa.sample(rng.torch("augment"), strategy, k, spec.shape[1:])
    real = work.data.draw(rng.torch("real"), range(k), per_class)
    mine = members(classes_of(synth), k)
    free = {key: value.detach().requires_grad_() for key, value in synth.params().items()}
    live = synth.replace(free)
    total = torch.zeros((), device=device)
    gradients = {key: torch.zeros_like(value) for key, value in free.items()}

    def measure(x: Tensor, rows: Tensor) -> list[Tensor]:
        x = dsa.apply(x, params, rows).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=work.task.precision == "bf16"):
            return statistics(net, x)

    largest = max(per_class, *(len(m) for m in mine))
    for group in groups(k, largest, o.chunk, together):
        index, place = listing(real, group)
        pieces = torch.arange(len(index)).split(len(index) if together else o.chunk)
        with torch.no_grad():
            read = ((work.data.model_input(index[i].to(device)), place[i]) for i in pieces)
            target = group_means(((measure(x, group[at]), at) for x, at in read), len(group))
        index, place = listing(mine, group)
        ours = group_means(
            iter([(measure(live.decode(index.to(device)).x, group[place]), place)]), len(group)
        )
        part = loss(target, ours)
        for key, g in zip(free, torch.autograd.grad(part, list(free.values())), strict=True):
            gradients[key] += g
        total = total + part.detach()
    return gradients, total


def step(
    state: PixelState,
    work: Workspace,
    rng: Rng,
    o: DescentOptions,
    steps: int,
    statistics: Statistics,
    loss: Loss,
) -> tuple[PixelState, Metrics]:
    """One momentum step, v <- momentum v + g and x <- x - lr v, on the mean gradient over drawn networks."""
    rng = rng.fold("step", state.step)
    runs = []
    for run in (rng.fold(i) for i in range(o.networks_per_step)):
        net = draw_network(work, run, o, state.step)
        runs.append(matching_gradient(state.synth, work, net, run, o, statistics, loss))
    lr = scheduled(o.lr, o.schedule or "constant", state.step, steps)
    params = state.synth.params()
    velocity, moved = {}, {}
    for key, value in params.items():
        gradient = work.reduce(torch.stack([g[key] for g, _ in runs]).mean(0))
        velocity[key] = o.momentum * state.velocity[key] + gradient
        moved[key] = (value - lr * o.synth.factor(key) * velocity[key]).detach()
    metrics = {"loss": torch.stack([value for _, value in runs]).mean(), "lr": lr}
    return replace(state, step=state.step + 1, synth=state.synth.replace(moved), velocity=velocity), metrics


def width_factor(dimensions: int, follow: bool) -> float:
    """2048 / d, the published embedding (ConvNet-3, width 128, 32 px) over this one; 1 without `follow`."""
    return PUBLISHED_EMBEDDING / dimensions if follow else 1.0


def scheduled(lr: float | int, schedule: str, step: int, steps: int) -> float:
    """The rate at `step` of `steps`: constant, cosine to zero, or a tenth after half ("drop": released)."""
    if schedule == "cosine":
        return lr * 0.5 * (1 + math.cos(math.pi * step / steps))
    return float(lr * 0.1 if schedule == "drop" and step >= steps // 2 else lr)

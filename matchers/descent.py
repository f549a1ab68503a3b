"""What the pixel matchers share: the start, one gradient over drawn networks in chunks, one momentum step."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ddengine.errors import UsageError
from ddengine.nets import build, has_batch_norm, resolve
from ddengine.nets.core import NetSpec, Network
from ddengine.ops import dsa
from ddengine.ops.compiled import compiled_statistics
from ddengine.ops.instance_block import CACHE
from ddengine.rng import Rng
from ddengine.types import Accepts, DataSpec, Metrics, SynthSet, Task, Workspace
from matchers.class_means import classes_of, group_means, groups, listing, members
from matchers.descent_options import DescentOptions, scheduled
from matchers.networks import draw_network, experts_within
from matchers.parametrised import form, per_class
from matchers.target_bank import TargetBank, opened, pair
from synth.factored import Factored
from synth.pixels import Pixels
from synth.starts import start_images

PAYS_FROM = 1000  # steps that pay for compiling, which takes tens of seconds
Statistics = Callable[[Network, Tensor], list[Tensor]]
Loss = Callable[[list[Tensor], list[Tensor]], Tensor]


@dataclass(frozen=True)
class PixelState:
    """A synthetic set on its way: steps done, the set, and the velocity of each of its free tensors.

    `compiled` says how the steps so far were computed, `skipped` how many of them were left out because the
    loss or what it led to was not finite, `in_row` those since the last that counted; on the device, so that
    no step waits to know.
    """

    step: int
    synth: SynthSet
    velocity: dict[str, Tensor]
    compiled: bool | None = None
    skipped: Int[Tensor, ""] = field(default_factory=lambda: torch.zeros((), dtype=torch.int32))
    in_row: Int[Tensor, ""] = field(default_factory=lambda: torch.zeros((), dtype=torch.int32))


def start(task: Task, rng: Rng, o: DescentOptions) -> PixelState:
    """The hard-labelled set that `o.synth` frees, as large as the budget allows, from `o.start`, at rest."""
    count = per_class(task, o.synth, o.codec)
    images = start_images(o.start, task.images, count, rng.fold("start")).to(task.device)
    synth = form(task, images, o.synth, o.codec, rng)
    velocity = {key: torch.zeros_like(value) for key, value in synth.params().items()}
    none = torch.zeros((), dtype=torch.int32, device=task.device)
    return PixelState(0, synth, velocity, skipped=none, in_row=none)


def accepted(o: DescentOptions) -> Accepts:
    """What a pixel matcher works on: images, and experts where it draws its networks from a buffer."""
    return Accepts(source="images", experts=o.networks == "buffer", batch_norm=True, replicas=True)


def workspace(
    task: Task,
    network: NetSpec,
    o: DescentOptions,
    steps: int,
    statistics: Statistics,
    measured: Mapping[str, Any],
) -> Workspace:
    """The task with its data resident on the device and one network whose weights each step draws anew.

    `measured` names what `statistics` depends on beside network and images, as plain JSON values.
    """
    spec, classes = task.images.spec, len(task.images.spec.classes)
    resolved = resolve(network, spec.shape)
    net = build(resolved, spec.shape, classes, Rng(0).torch("weights"))
    net = net.to(task.device).to(memory_format=torch.channels_last).requires_grad_(False)  # type: ignore[call-overload]
    extra: dict[str, Any] = {"net": net, "together": has_batch_norm(net), "statistics": statistics}
    notes: list[str | None] = []
    if _compiles(o, steps, task.device):
        at_once = _at_once(spec, net, o, task.device)
        probe = torch.randn((at_once or 8, *spec.shape), generator=Rng(0).torch("probe")).to(task.device)
        made = compiled_statistics(statistics, net, probe, task.precision, at_once)
        extra["statistics"], said = made
        notes.append(said)
    extra["compiled"] = extra["statistics"] is not statistics
    if o.networks == "buffer":
        extra["experts"] = experts_within(task, network, o.window)
    if o.bank == "on":
        experts = {"digest": task.experts.digest, **asdict(o.window)} if o.networks == "buffer" else None
        facts = {
            **measured, "compiled": extra["compiled"], "experts": experts, "chunk": o.chunk,
            "augment": _strategy(task, o), "real": o.bank_real or o.real_per_class,
        }  # fmt: skip
        extra["bank"], said = opened(task, resolved, net, facts)
        notes.append(said)
    return Workspace(task, task.images.to(task.device), extra, tuple(note for note in notes if note))


def _compiles(o: DescentOptions, steps: int, device: torch.device) -> bool:
    """Whether to compile: as told, or in a run on a GPU that is long enough to gain by it.

    On a CPU it gains a tenth over `ops.instance_block` on real images and nothing on synthetic ones
    (measured, ConvNet-3 of width 128): too little for bits that depend on there being a compiler.
    """
    told = getattr(o, "compile", "off")
    return told == "on" or (told == "auto" and steps >= PAYS_FROM and device.type == "cuda")


def _at_once(spec: DataSpec, net: nn.Module, o: DescentOptions, device: torch.device) -> int | None:
    """Images that are best given to a compiled network at once: None is all that there are, for batch norm.

    A chunk on a GPU; on a CPU as many as leave two times the first map about in cache.
    """
    if has_batch_norm(net):
        return None
    if device.type != "cpu":
        return o.chunk
    width = next((m.out_channels for m in net.modules() if isinstance(m, nn.Conv2d)), 1)
    return max(2, min(o.chunk, 2 * CACHE // (4 * width * spec.shape[1] * spec.shape[2])))


def _strategy(task: Task, o: DescentOptions) -> str:
    return dsa.strategy_for(task.images.spec.name) if o.augment == "auto" else o.augment


def measure(work: Workspace, net: Network, x: Tensor, params: dsa.DsaParams, rows: Tensor) -> list[Tensor]:
    """The statistics of augmented images: image i under the row `rows[i]` of `params`."""
    x = dsa.apply(x, params, rows).contiguous(memory_format=torch.channels_last)
    with torch.autocast(work.task.device.type, torch.bfloat16, enabled=work.task.precision == "bf16"):
        return work.extra["statistics"](net, x)


@torch.no_grad()
def real_targets(
    work: Workspace, net: Network, rng: Rng, params: dsa.DsaParams, o: DescentOptions, per_class: int
) -> list[Float[Tensor, "k _"]]:
    """Class means of the statistics of up to `per_class` real images a class, drawn from `rng`.

    Groups of classes are taken in turn and the images of a group in pieces of `chunk`; with batch norm all
    go together, because the batch is part of the statistics.
    """
    k, together = len(work.data.spec.classes), work.extra["together"]
    picks = work.task.images.draw(rng.torch("real"), range(k), per_class)  # whose labels need no device
    means = []
    for group in groups(k, per_class, o.chunk, together):
        index, place = listing(picks, group)
        pieces = torch.arange(len(index)).split(len(index) if together else o.chunk)
        read = ((work.data.model_input(index[i].to(work.task.device)), place[i]) for i in pieces)
        means.append(
            group_means(((measure(work, net, x, params, group[at]), at) for x, at in read), len(group))
        )
    return [torch.cat(parts) for parts in zip(*means, strict=True)]


def matching_gradient(
    synth: SynthSet,
    work: Workspace,
    net: Network,
    params: dsa.DsaParams,
    targets: list[Tensor],
    o: DescentOptions,
    loss: Loss,
) -> tuple[dict[str, Tensor], Tensor]:
    """Gradient of `loss` between `targets` and class means of synthetic statistics on `net`; the loss.

    Groups of classes of at most `chunk` images are taken in turn; with batch norm all classes go together.
    """
    k = len(work.data.spec.classes)
    mine = _members(work, synth, k)
    free = {key: value.detach().requires_grad_() for key, value in synth.params().items()}
    gradients = {key: torch.zeros_like(value) for key, value in free.items()}
    total = torch.zeros((), device=work.task.device)
    largest = max(len(m) for m in mine)
    for group in groups(k, largest, o.chunk, work.extra["together"]):
        index, place = listing(mine, group)
        index = index.to(work.task.device)
        x = free["images"][index].detach().requires_grad_() if isinstance(synth, Pixels) else None
        seen = synth.replace(free).decode(index).x if x is None else x
        ours = group_means(iter([(measure(work, net, seen, params, group[place]), place)]), len(group))
        first, last = int(group[0]), int(group[-1]) + 1
        part = loss([t[first:last] for t in targets], ours)
        if x is not None:  # not through the whole set, which would be written once a group
            gradients["images"][index] = torch.autograd.grad(part, x)[0]
        else:
            for key, g in zip(free, torch.autograd.grad(part, list(free.values())), strict=True):
                gradients[key] += g
        total = total + part.detach()
    return gradients, total


def _members(work: Workspace, synth: SynthSet, count: int) -> list[Tensor]:
    """`members` of a set's classes, looked up again only where its labels are other tensors than before."""
    own = "labels" if isinstance(synth, Pixels | Factored) else "classes"
    labels = getattr(synth, own, None)
    known, found = work.extra.get("members", (None, []))
    if labels is None or known is not labels:
        found = members(classes_of(synth), count)
        work.extra["members"] = (labels, found)
    return found


def _found(
    state: PixelState, work: Workspace, rng: Rng, o: DescentOptions, number: int, loss: Loss
) -> tuple[dict[str, Tensor], Tensor]:
    """Gradient and loss of one network; `rng` is its replica's, `number` counts the networks of a run."""
    spec, iteration = work.data.spec, state.step
    here = rng.fold("step", *divmod(number, o.networks_per_step))
    if o.bank == "on":
        place, first = pair(number, o.bank_reuse)
        here = rng.fold("bank", place)
        iteration = first // o.networks_per_step if o.networks == "buffer" else 0
    net = draw_network(work, here, o, iteration)
    if "on_draw" in work.extra:  # what the statistics draw beside the network
        work.extra["on_draw"](here)
    # siamese: a row of parameters for the real and the synthetic images of a class
    strategy = _strategy(work.task, o)
    params = dsa.sample(here.torch("augment"), strategy, len(spec.classes), spec.shape[1:])

    def made() -> list[Tensor]:
        count = (o.bank_real if o.bank == "on" else None) or o.real_per_class or 1
        return real_targets(work, net, here, params, o, count)

    bank: TargetBank | None = work.extra.get("bank")
    targets = bank.targets(here, iteration, work.task.device, made) if bank is not None else made()
    return matching_gradient(state.synth, work, net, params, targets, o, loss)


def step(
    state: PixelState, work: Workspace, rng: Rng, o: DescentOptions, steps: int, loss: Loss
) -> tuple[PixelState, Metrics]:
    """One momentum step, v <- momentum v + g and x <- x - lr v, on the mean gradient over drawn networks.

    Where the loss or a moved value is not finite nothing moves, and the step counts as skipped.
    """
    state = _as_before(state, work.extra["compiled"])
    first, parts = state.step * o.networks_per_step, []
    for stream in work.task.streams(rng):
        runs = [_found(state, work, stream, o, first + i, loss) for i in range(o.networks_per_step)]
        parts.append(_mean([{**gradients, "loss": value} for gradients, value in runs]))
    del runs
    found = work.reduce(parts)
    parts.clear()
    lr = scheduled(o.lr, o.schedule or "constant", state.step, steps)
    values, velocity, moved = state.synth.params(), {}, {}
    for key, value in values.items():
        velocity[key] = o.momentum * state.velocity[key] + found.pop(key)
        moved[key] = (value - lr * o.synth.relative_rate(key) * velocity[key]).detach()
    fine = torch.stack(
        [t.isfinite().all() for t in (found["loss"], *velocity.values(), *moved.values())]
    ).all()
    skipped = state.skipped + (~fine).to(state.skipped.dtype)
    in_row = torch.where(fine, 0, state.in_row + 1).to(state.in_row.dtype)
    for new, old in ((moved, values), (velocity, state.velocity)):
        for key in new:
            new[key] = torch.where(fine, new[key], old[key].detach())
    state = replace(
        state, step=state.step + 1, synth=state.synth.replace(moved), velocity=velocity, skipped=skipped,
        in_row=in_row,
    )  # fmt: skip
    return state, {"loss": found["loss"], "lr": lr, "skipped": skipped, "in_row": in_row}


def _mean(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of each tensor over networks; of one network without a copy, as all tensors of a set count."""
    if len(parts) == 1:
        return parts[0]
    return {key: torch.stack([part[key] for part in parts]).mean(0) for key in parts[0]}


def _as_before(state: PixelState, compiled: bool) -> PixelState:
    """The state, refused where its steps so far were computed in the other way (UsageError)."""
    if state.compiled not in (None, compiled):
        was, now = ("compiled", "not compiled") if state.compiled else ("not compiled", "compiled")
        raise UsageError(
            f"the steps so far were {was}, the next would be {now}: the set would be another one",
            "Go on where there is the same compiler, or start again in another out=DIR",
        )
    return replace(state, compiled=compiled)

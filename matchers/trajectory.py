"""Trajectory matching (MTT, Cazenavette et al., CVPR 2022), its soft labels (DATM) and its stabilisers (AST).

A student that starts at an expert's parameters theta*_t and trains T steps on the synthetic set should arrive
where the expert was M epochs later:

    L = |theta_T - theta*_{t+M}|^2 / |theta*_t - theta*_{t+M}|^2

Pixels, label logits and the student's rate follow its gradient, which is exact (`ddengine.ops.unroll`). The
rate is exp(a), so that it stays positive; a steps by lr_rate / rate_0^2, to first order the published step,
and by no more than 1 at a time, so that one wild gradient cannot end a run.
Published, CIFAR-10, ConvNet-3 of width 128, 1 / 10 / 50 images per class: 46.2 / 65.4 / 71.6 % (MTT),
46.9 / 66.8 / 76.1 % (DATM), best iteration on test; ours are in docs/log.md, chosen on validation.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from ddengine.errors import DDError, UsageError
from ddengine.nets import build, resolve
from ddengine.nets.core import NetSpec
from ddengine.ops import dsa
from ddengine.ops.compiled import Compiled, derivatives
from ddengine.ops.unroll import GRADIENTS, Gradients, Inner, Method, unroll
from ddengine.rng import Rng
from ddengine.types import Accepts, Metrics, SynthSet, Task, Workspace
from expert_buffers.params import ParamSpec
from expert_buffers.segment import Plan, Prefetch, Segment
from matchers import parametrised, student, teachers
from matchers.descent_options import scheduled
from matchers.networks import checked
from matchers.parametrised import Beside
from matchers.student import InnerOptions
from matchers.trajectory_options import (
    RATE_BYTES,
    TrajectoryOptions,
    compiles,
    estimate,
    has_compiler,
    is_long,
    require_ipc,
)

__all__ = ["InnerOptions", "TrajectoryMatching", "TrajectoryOptions", "trajectory_loss", "unroll"]

NORMS = 32  # gradient norms remembered for clipping
PATIENCE = 100  # skipped steps in a row that end a run


def trajectory_loss(
    start: Float[Tensor, " p"], student: Float[Tensor, " p"], target: Float[Tensor, " p"]
) -> Float[Tensor, ""]:
    """|student - target|^2 / |start - target|^2: 1 where the student did not move, 0 where it arrived.

    Source: MTT, eq. 2. UsageError when start and target are equal or shapes differ.
    """
    if not start.shape == student.shape == target.shape:
        shapes = [tuple(v.shape) for v in (start, student, target)]
        raise UsageError(f"parameter vectors of shapes {shapes}", "Give three of one network")
    distance = (start - target).square().sum()
    if not bool(distance > 0):
        raise UsageError("start and target are equal", "Give a target that differs from the start")
    return (student - target).square().sum() / distance


@dataclass(frozen=True)
class TrajectoryState:
    """A synthetic set on its way, the logarithm of the student's rate, and what its descent remembers.

    `velocity` and `norms` (the last gradient norms, 0: none yet) have an entry for each free tensor and for
    "rate"; `average` is empty without `ema`. `skipped` counts steps left out, `in_row` those since the last
    that counted; `compiled` says how the steps so far were computed.
    """

    step: int
    synth: SynthSet
    log_rate: Float[Tensor, ""]
    velocity: dict[str, Tensor]
    norms: dict[str, Tensor]
    average: dict[str, Tensor]
    skipped: int = 0
    in_row: int = 0
    compiled: bool | None = None


@dataclass(frozen=True)
class Readers:
    """Reads ahead the segments of each replica that this process computes."""

    each: tuple[Prefetch, ...]

    def get(self, iteration: int) -> list[Segment]:
        """The segment of each replica at an iteration."""
        return [reader.get(iteration) for reader in self.each]

    def close(self) -> None:
        """Stop reading."""
        for reader in self.each:
            reader.close()


@dataclass(frozen=True)
class TrajectoryMatching:
    """Matching of expert trajectories (see the head of this file)."""

    options: TrajectoryOptions = TrajectoryOptions()
    network: NetSpec = NetSpec()

    accepts: ClassVar[Accepts] = Accepts(
        source="images", experts=True, batch_norm=True, bf16=False, replicas=True
    )

    def steps(self, task: Task) -> int:
        """Outer iterations: the option."""
        return self.options.steps

    def prepare(self, task: Task, rng: Rng) -> Workspace:
        """The student's network and derivatives, and segments that are read ahead."""
        o, spec = self.options, task.images.spec
        network, plan = self._plan(task, rng)
        plans = [replace(plan, rng=stream.fold("segments")) for stream in task.streams(rng)]
        fresh = build(network, spec.shape, len(spec.classes), Rng(0).torch("weights"))
        net = student.without_running_statistics(fresh.to(task.device).requires_grad_(False))
        layout = ParamSpec.of(net)
        count = parametrised.count(task, o.synth, o.codec, self._beside(task))
        probe = student.probe(net, layout, task, min(o.inner.batch or count, count), o.labels != "hard")
        loss = student.student_loss(net, layout)
        made, *notes = derivatives(loss, compiles(o, task.device), *probe, o.gradient)
        method: Method = GRADIENTS[o.gradient]
        if o.inner.backend == "higher":
            method = partial(student.higher_gradient, net, layout)
        extra = {
            "plan": plan, "layout": layout, "net": net, "derivatives": made, "method": method,
            "readers": Readers(tuple(Prefetch(task.experts, plan, task.device) for plan in plans)),
        }  # fmt: skip
        if o.labels == "target":
            fresh = build(network, spec.shape, len(spec.classes), Rng(0).torch("weights"))
            extra["teacher"] = fresh.to(task.device).requires_grad_(False).eval()
        if o.compile == "auto" and is_long(o) and not has_compiler(task.device):
            notes.append("not compiled, which is slower: there is no C++ compiler")
        if is_long(o):
            notes.append(estimate(o, made, probe))
        return Workspace(task, task.images, extra, tuple(note for note in notes if note))

    def _plan(self, task: Task, rng: Rng) -> tuple[NetSpec, Plan]:
        """The resolved network and the segments, after the buffer was found to fit both (UsageError)."""
        o, network = self.options, checked(task, self.network)
        return network, Plan.of(
            task.experts, rng.fold("segments"), o.window, o.expert_epochs, o.order, network
        )

    def _beside(self, task: Task) -> Beside:
        """The student's rate, and a row of float16 for each soft label."""
        soft = self.options.labels != "hard"
        return Beside(RATE_BYTES, 2 * len(task.images.spec.classes) if soft else 0)

    def init(self, task: Task, rng: Rng) -> TrajectoryState:
        """Images at the chosen start, their labels, the student's rate, all at rest."""
        o = self.options
        require_ipc(task, o)
        network, _ = self._plan(task, rng)
        beside = self._beside(task)
        count = parametrised.per_class(task, o.synth, o.codec, beside)
        images = teachers.start(task, network, o.start, count, rng.fold("start")).to(task.device)
        synth = parametrised.form(task, images, o.synth, o.codec, rng, beside)
        if o.labels in ("soft", "learned"):
            shown = synth.decode()
            logits = teachers.soft_labels(task.experts, network, shown.x, shown.classes)
            synth = parametrised.with_labels(synth, logits)
        log_rate = torch.tensor(math.log(o.inner.rate), dtype=torch.float32, device=task.device)
        moving = {**synth.params(), "rate": log_rate}
        if o.labels == "soft":
            del moving["labels"]
        velocity = {key: torch.zeros_like(value) for key, value in moving.items()}
        norms = {key: torch.zeros(NORMS, device=task.device) for key in moving}
        average = dict(synth.params()) if o.ema else {}
        return TrajectoryState(0, synth, log_rate, velocity, norms, average)

    def step(self, state: TrajectoryState, work: Workspace, rng: Rng) -> tuple[TrajectoryState, Metrics]:
        """One descent on the mean gradient of the replicas, each with its own segment and student; none where
        their mean loss is not finite or above `skip_above`.
        """
        o = self.options
        state = _as_before(state, isinstance(work.extra["derivatives"], Compiled))
        segments: list[Segment] = work.extra["readers"].get(state.step)
        streams = work.task.streams(rng.fold("step", state.step))
        found = work.reduce([self._found(state, work, *pair) for pair in zip(segments, streams, strict=True)])
        miss, moving = found["miss"], {key: found[key] for key in state.velocity}
        sizes = {key: value.norm() for key, value in moving.items()}
        finite = bool(torch.stack([miss, *sizes.values()]).isfinite().all())
        sizes_said = {f"gradient_{key}": value for key, value in sizes.items()}
        metrics: Metrics = {
            **({"loss": miss, **sizes_said} if finite else {}),
            "rate": state.log_rate.exp(),
            **({"epoch": segments[0].epoch, "expert": segments[0].expert} if work.task.replicas == 1 else {}),
            "distance": found["distance"],
        }
        if not finite or (o.skip_above is not None and bool(miss > o.skip_above)):
            state = replace(state, step=state.step + 1, skipped=state.skipped + 1, in_row=state.in_row + 1)
            if state.in_row >= PATIENCE:
                raise DDError(
                    f"{PATIENCE} steps in a row were skipped, the last with loss {float(miss):.3g}",
                    "Lower matcher.inner.rate or matcher.lr, or raise matcher.skip_above",
                )
        else:
            state = self._moved(state, moving, sizes, work.task)
        return state, metrics | {"skipped": state.skipped}

    def _found(
        self, state: TrajectoryState, work: Workspace, segment: Segment, rng: Rng
    ) -> dict[str, Tensor]:
        """The gradient of one segment for all that moves, its loss as "miss", and how far the expert went."""
        with float32(work.task.device):
            found = self.gradients(state, work, segment, rng)
        by_name = parametrised.pulled_back(state.synth, found.images)
        by_name["rate"] = found.rate * state.log_rate.exp()
        if found.labels is not None:
            by_name["labels"] = found.labels
        distance = (segment.start - segment.targets[-1]).square().sum()
        return {**{key: by_name[key] for key in state.velocity}, "miss": found.miss, "distance": distance}

    def gradients(self, state: TrajectoryState, work: Workspace, segment: Segment, rng: Rng) -> Gradients:
        """The loss of one segment and its gradient for images, labels and rate; `rng` is the step's."""
        o, spec = self.options, work.data.spec
        theta, layout = segment.start, work.extra["layout"]
        if o.perturb:
            theta = student.perturbed(theta, layout, rng.torch("perturb"), o.perturb)
        images = state.synth.decode()
        labels = images.y
        if o.labels == "target":
            work.task.experts.load(work.extra["teacher"], segment.expert, segment.epoch + o.expert_epochs)
            labels = teachers.logits_of(work.extra["teacher"], images.x)
        index = student.batches(rng.fold("batches"), len(images), o.inner.batch, o.inner.steps)
        strategy = dsa.strategy_for(spec.name) if o.augment == "auto" else o.augment
        plan: Plan = work.extra["plan"]
        middle = min(o.window.max or plan.limit, plan.limit) // 2
        inner = Inner(
            work.extra["derivatives"],
            [i.to(images.x.device) for i in index],
            o.inner.momentum,
            o.inner.weight_decay,
            student.balance(segment.epoch, middle) if o.balance else 1.0,
            student.augmentation(rng.fold("augment"), strategy, index, spec.shape[1:]),
        )
        points = student.matching_points(segment, theta, o.inner.steps, o.middle)
        return work.extra["method"](inner, theta, images.x, labels, state.log_rate.exp(), points)

    def _moved(
        self, state: TrajectoryState, gradients: dict[str, Tensor], sizes: dict[str, Tensor], task: Task
    ) -> TrajectoryState:
        """The state after one momentum step of everything that moves."""
        o = self.options
        pixels = scheduled(o.lr, o.schedule, state.step, o.steps)
        lr = {key: pixels * o.synth.relative_rate(key) for key in gradients}
        lr["labels"] = scheduled(o.lr_labels, o.schedule, state.step, o.steps)
        lr["rate"] = o.lr_rate / o.inner.rate**2
        momentum = {key: o.labels_momentum if key == "labels" else o.momentum for key in gradients}
        values = {**state.synth.params(), "rate": state.log_rate}
        norms, velocity, moved = {}, {}, {}
        for key, gradient in gradients.items():
            factor = clip_factor(sizes[key], state.norms[key], o.clip)
            norms[key] = torch.cat([state.norms[key][1:], sizes[key][None]])
            velocity[key] = momentum[key] * state.velocity[key] + factor * gradient
            change = lr[key] * velocity[key]
            moved[key] = (values[key] - (change.clamp(-1, 1) if key == "rate" else change)).detach()
        log_rate = moved.pop("rate")
        synth = state.synth.replace(moved)
        average = {k: o.ema * v + (1 - o.ema) * synth.params()[k] for k, v in state.average.items()}
        return replace(
            state, step=state.step + 1, synth=synth, log_rate=log_rate, velocity=velocity, norms=norms,
            average=average, in_row=0,
        )  # fmt: skip

    def finish(self, state: TrajectoryState, work: Workspace, rng: Rng) -> SynthSet:
        """The set, or its running average, with the student's rate; "target" labels are assigned again."""
        synth = state.synth.replace(state.average)
        images = synth.decode()
        labels, y_kind = images.y, images.y_kind
        if self.options.labels == "target":
            plan: Plan = work.extra["plan"]
            row = plan.window.upper(self.options.steps, plan.limit) - 1 + self.options.expert_epochs
            network = resolve(self.network, images.spec.shape)
            labels, y_kind = teachers.assigned_labels(work.task.experts, network, images.x, row), "prob"
        rate = float(state.log_rate.exp())
        return parametrised.finished(synth, rate, labels, y_kind)


def clip_factor(size: Float[Tensor, ""], before: Float[Tensor, " n"], clip: float | int) -> Tensor:
    """What brings a gradient of norm `size` down to `clip` times the median of the norms `before` it.

    1 where it is below, without a bound (`clip` 0), and while fewer than a quarter of `before` are known.
    """
    known = before[before > 0]
    if not clip or len(known) < len(before) // 4:
        return torch.ones_like(size)
    return (clip * known.median() / size).clamp(max=1.0)


@contextmanager
def float32(device: torch.device) -> Iterator[None]:
    """Inside, convolutions on a GPU are in float32, not TF32: the miss is a difference of weights."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = before and device.type != "cuda"
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def _as_before(state: TrajectoryState, compiled: bool) -> TrajectoryState:
    """The state, which knows from its first step on how it is computed; UsageError where that changed."""
    if state.compiled not in (None, compiled):
        was, now = ("compiled", "not compiled") if state.compiled else ("not compiled", "compiled")
        raise UsageError(
            f"the steps so far were {was}, here they are {now}: the result would have other bits",
            "Go on where there is the same compiler, or start again in another out=DIR",
        )
    return replace(state, compiled=compiled)

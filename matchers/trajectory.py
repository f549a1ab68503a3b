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
import shutil
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from ddengine.errors import DDError, UsageError, require, require_positive
from ddengine.nets import build, resolve
from ddengine.nets.core import NetSpec
from ddengine.ops import dsa
from ddengine.ops.compiled import derivatives
from ddengine.ops.unroll import GRADIENTS, Gradients, Inner, Method, unroll
from ddengine.rng import Rng
from ddengine.types import Accepts, Metrics, SynthSet, Task, Workspace
from expert_buffers.params import ParamSpec
from expert_buffers.segment import ORDERS, Plan, Prefetch, Segment, Window
from matchers import descent, student, teachers
from matchers.descent import scheduled
from matchers.student import InnerOptions
from synth import Pixels
from synth.pixels import CODECS
from synth.starts import STARTS

__all__ = ["InnerOptions", "TrajectoryMatching", "TrajectoryOptions", "trajectory_loss", "unroll"]

LABELS = ("hard", "soft", "learned", "target")
SWITCH = ("auto", "on", "off")
PAYS_FROM = 20_000  # student steps in all: compiling costs a minute of CPU and halves the time of a step
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
class TrajectoryOptions:
    """Options of the `trajectory` matcher. Defaults are MTT's; what DATM, AST, FTD and TESLA add is off.

    `lr`, `lr_labels`, `lr_rate` are the rates of pixels, label logits and the student's rate, each with its
    momentum. `labels`: class numbers, logits of the experts (fixed: "soft", free: "learned"), or TESLA's
    "target", assigned anew from each segment's target. `skip_above` leaves a step out whose loss is larger;
    `clip` bounds gradient norms by so many times their running median (0: no bound). `middle`, `balance`,
    `perturb` are AST's terms, `ema` is FTD's average of the set.
    """

    steps: int = 5000
    gradient: str = "adjoint"
    lr: float | int = 100.0
    momentum: float | int = 0.5
    schedule: str = "constant"
    lr_rate: float | int = 1e-5
    labels: str = "hard"
    lr_labels: float | int = 2.0
    labels_momentum: float | int = 0.9
    start: str = "real"
    augment: str = "auto"
    expert_epochs: int = 2
    order: str = "uniform"
    window: Window = Window()
    inner: InnerOptions = InnerOptions()
    skip_above: float | int | None = None
    clip: float | int = 10.0
    middle: str = "off"
    balance: bool = False
    perturb: float | int = 0.0
    ema: float | int = 0.0
    compile: str = "auto"
    codec: str = "uint8"

    def __post_init__(self) -> None:
        for key in (
            "steps",
            "expert_epochs",
            "lr",
            "lr_labels",
            *(["skip_above"] if self.skip_above is not None else []),
        ):
            require_positive(f"matcher.{key}", getattr(self, key))
        for key in ("steps", "expert_epochs"):
            if not isinstance(getattr(self, key), int):
                raise UsageError(
                    f"matcher.{key}={getattr(self, key)} is not a whole number", "Give a whole number"
                )
        for key in ("lr_rate", "clip", "perturb", "momentum", "labels_momentum"):
            require_positive(f"matcher.{key}", getattr(self, key), zero=True)
        for key in ("momentum", "labels_momentum", "ema"):
            if not 0 <= getattr(self, key) < 1:
                raise UsageError(f"matcher.{key}={getattr(self, key)} is out of range", "Give 0 <= value < 1")
        allowed = {
            "gradient": GRADIENTS, "labels": LABELS, "start": (*STARTS, *teachers.EXPERT_STARTS),
            "schedule": descent.SCHEDULES, "order": ORDERS, "middle": student.MIDDLES, "compile": SWITCH,
            "codec": CODECS,
        }  # fmt: skip
        for key, values in allowed.items():
            require(getattr(self, key), values, f"matcher.{key}")
        if self.inner.backend == "higher" and self.gradient != "unroll":
            raise UsageError(
                f"matcher.inner.backend=higher with matcher.gradient={self.gradient}",
                "Give matcher.gradient=unroll: higher keeps the graph of all steps",
            )
        if self.middle != "off" and self.inner.steps < self.expert_epochs:
            raise UsageError(
                f"matcher.middle={self.middle} with {self.inner.steps} steps for {self.expert_epochs} epochs",
                f"Give matcher.inner.steps of at least {self.expert_epochs}",
            )
        if self.augment != "auto":
            dsa.parse(self.augment)


@dataclass(frozen=True)
class TrajectoryState:
    """A synthetic set on its way, the logarithm of the student's rate, and what its descent remembers.

    `velocity` and `norms` (the last gradient norms, 0: none yet) have an entry for each free tensor and for
    "rate"; `average` is empty without `ema`. `skipped` counts steps left out, `in_row` those since the last
    that counted.
    """

    step: int
    synth: SynthSet
    log_rate: Float[Tensor, ""]
    velocity: dict[str, Tensor]
    norms: dict[str, Tensor]
    average: dict[str, Tensor]
    skipped: int = 0
    in_row: int = 0


@dataclass(frozen=True)
class TrajectoryMatching:
    """Matching of expert trajectories (see the head of this file)."""

    options: TrajectoryOptions = TrajectoryOptions()
    network: NetSpec = NetSpec()

    accepts: ClassVar[Accepts] = Accepts(source="images", experts=True, batch_norm=True)

    def steps(self, task: Task) -> int:
        """Outer iterations: the option."""
        return self.options.steps

    def prepare(self, task: Task, rng: Rng) -> Workspace:
        """The student's network and derivatives, and segments that are read ahead."""
        o, spec = self.options, task.source.spec
        network = descent.checked(task, self.network)
        plan = Plan.of(task.experts, rng.fold("segments"), o.window, o.expert_epochs, o.order, network)
        fresh = build(network, spec.shape, len(spec.classes), Rng(0).torch("weights"))
        net = student.without_running_statistics(fresh.to(task.device).requires_grad_(False))
        layout = ParamSpec.of(net)
        probe = student.probe(net, layout, task, o.inner.batch, o.labels != "hard")
        loss = student.student_loss(net, layout)
        made, reason = derivatives(loss, _compiles(o, task.device), *probe, o.gradient == "adjoint")
        method: Method = GRADIENTS[o.gradient]
        if o.inner.backend == "higher":
            method = partial(student.higher_gradient, net, layout)
        extra = {
            "plan": plan, "prefetch": Prefetch(task.experts, plan, task.device), "layout": layout, "net": net,
            "derivatives": made, "method": method,
        }  # fmt: skip
        if o.labels == "target":
            fresh = build(network, spec.shape, len(spec.classes), Rng(0).torch("weights"))
            extra["teacher"] = fresh.to(task.device).requires_grad_(False).eval()
        return Workspace(task, task.source, extra, () if reason is None else (reason,))

    def init(self, task: Task, rng: Rng) -> TrajectoryState:
        """Images at the chosen start, their labels, the student's rate, all at rest."""
        o, spec = self.options, task.source.spec
        _require_ipc(task, o)
        network = descent.checked(task, self.network)
        images = teachers.start(task, network, o.start, rng.fold("start")).to(task.device)
        y = torch.arange(len(spec.classes), device=task.device).repeat_interleave(task.ipc)
        synth = Pixels(images, y, spec, codec=o.codec)
        if o.labels in ("soft", "learned"):
            logits = teachers.soft_labels(task.experts, network, images, y)
            synth = Pixels(images, logits, spec, y_kind="logit", codec=o.codec)
        log_rate = torch.tensor(math.log(o.inner.rate), dtype=torch.float32, device=task.device)
        moving = {**synth.params(), "rate": log_rate}
        if o.labels == "soft":
            del moving["labels"]
        velocity = {key: torch.zeros_like(value) for key, value in moving.items()}
        norms = {key: torch.zeros(NORMS, device=task.device) for key in moving}
        average = dict(synth.params()) if o.ema else {}
        return TrajectoryState(0, synth, log_rate, velocity, norms, average)

    def step(self, state: TrajectoryState, work: Workspace, rng: Rng) -> tuple[TrajectoryState, Metrics]:
        """One segment, one student, one descent; none where the loss is not finite or above `skip_above`."""
        o = self.options
        segment: Segment = work.extra["prefetch"].get(state.step)
        found = self.gradients(state, work, segment, rng.fold("step", state.step))
        by_name = {"images": found.images, "rate": found.rate * state.log_rate.exp()}
        if found.labels is not None:
            by_name["labels"] = found.labels
        moving = {key: work.reduce(by_name[key]) for key in state.velocity}
        sizes = {key: value.norm() for key, value in moving.items()}
        finite = bool(torch.stack([found.miss, *sizes.values()]).isfinite().all())
        sizes_said = {f"gradient_{key}": value for key, value in sizes.items()}
        metrics: Metrics = {
            **({"loss": found.miss, **sizes_said} if finite else {}),
            "rate": state.log_rate.exp(), "epoch": segment.epoch, "expert": segment.expert,
            "distance": (segment.start - segment.targets[-1]).square().sum(),
        }  # fmt: skip
        if not finite or (o.skip_above is not None and bool(found.miss > o.skip_above)):
            state = replace(state, step=state.step + 1, skipped=state.skipped + 1, in_row=state.in_row + 1)
            if state.in_row >= PATIENCE:
                raise DDError(
                    f"{PATIENCE} steps in a row were skipped, the last with loss {float(found.miss):.3g}",
                    "Lower matcher.inner.rate or matcher.lr, or raise matcher.skip_above",
                )
        else:
            state = self._moved(state, moving, sizes, work.task)
        return state, metrics | {"skipped": state.skipped}

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
        middle = plan.window.upper(state.step, plan.limit) // 2
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
        lr = {
            "images": scheduled(o.lr, o.schedule, state.step, o.steps),
            "labels": scheduled(o.lr_labels, o.schedule, state.step, o.steps),
            "rate": o.lr_rate / o.inner.rate**2,
        }
        momentum = {"images": o.momentum, "labels": o.labels_momentum, "rate": o.momentum}
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
        return TrajectoryState(
            state.step + 1, synth, log_rate, velocity, norms, average, state.skipped, in_row=0
        )

    def finish(self, state: TrajectoryState, work: Workspace, rng: Rng) -> SynthSet:
        """The set, or its running average, with the student's rate; "target" labels are assigned again."""
        images = state.synth.replace(state.average).decode()
        labels, y_kind = images.y, images.y_kind
        if self.options.labels == "target":
            plan: Plan = work.extra["plan"]
            row = plan.window.upper(self.options.steps, plan.limit) - 1 + self.options.expert_epochs
            network = resolve(self.network, images.spec.shape)
            labels, y_kind = teachers.assigned_labels(work.task.experts, network, images.x, row), "prob"
        rate = float(state.log_rate.exp())
        return Pixels(images.x, labels, images.spec, y_kind, self.options.codec, student_lr=rate)


def clip_factor(size: Float[Tensor, ""], before: Float[Tensor, " n"], clip: float | int) -> Tensor:
    """What brings a gradient of norm `size` down to `clip` times the median of the norms `before` it.

    1 where it is below, without a bound (`clip` 0), and while fewer than a quarter of `before` are known.
    """
    known = before[before > 0]
    if not clip or len(known) < len(before) // 4:
        return torch.ones_like(size)
    return (clip * known.median() / size).clamp(max=1.0)


def _require_ipc(task: Task, o: TrajectoryOptions) -> None:
    """Refuse a budget in bytes, which counts one class number an image, for labels that are stored soft."""
    if task.budget.nbytes is not None and o.labels != "hard":
        raise UsageError(
            f"budget.nbytes={task.budget.nbytes} with matcher.labels={o.labels}: bytes are for hard labels",
            "Give ipc=N, or matcher.labels=hard",
        )


def _compiles(o: TrajectoryOptions, device: torch.device) -> bool:
    """Whether to compile: as told, or where there is a compiler and the run is long enough to gain by it."""
    if o.compile != "auto" or o.inner.backend == "higher":
        return o.compile == "on" and o.inner.backend != "higher"
    compiler = device.type == "cuda" or any(shutil.which(name) for name in ("c++", "g++", "clang++"))
    return compiler and o.gradient == "adjoint" and o.steps * o.inner.steps >= PAYS_FROM

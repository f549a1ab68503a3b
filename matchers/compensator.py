"""Inter-class feature compensators (INFER, Zhang et al. 2024, arXiv 2408.06927): squeeze, recover, relabel.

Squeeze is a buffer of experts with batch norm, the teachers. Recover adds to sheets of real images, one of
each class, one compensator for each teacher: an image that all classes of a group of sheets share
(`matchers.recovery`). Relabel gives every composite the mean of the teachers' logits. K sheets of C images
and G groups of M compensators make K C (M + 1) training images, stored in factors (`synth.Compensated`).
Published, ResNet-18, CIFAR-10 32.0 / 60.4 %, CIFAR-100 45.2 / 62.8 % at 10 / 50 images per class, best epoch
on test; ours, beside real images with the same labels, are in docs/log.md, chosen on validation.

The rivals of the family come through the same door (`recover`): real images alone ("none"), compensators of
noise with the optimised ones' deviations ("noise"), one recovered image for each base ("images": SRe2L, Yin
et al., NeurIPS 2023, from real starts), crops that teachers know best ("crops": RDED, Sun et al., CVPR 2024).
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ddengine.composites import in_pixels
from ddengine.errors import UsageError
from ddengine.nets import has_batch_norm
from ddengine.nets.core import NetSpec
from ddengine.ops import kd
from ddengine.ops.dsa import DIGITS
from ddengine.parallel import Pool, one_thread
from ddengine.rng import Rng
from ddengine.types import Accepts, Metrics, SynthSet, Task, Workspace, class_order, no_budget
from expert_buffers.store import ExpertBuffer
from matchers.bn_statistics import bn_statistics_loss
from matchers.compensator_options import KD, SMALL, CompensatorOptions
from matchers.recovery import (
    Block,
    Recovering,
    RecoverOptions,
    Session,
    advance,
    advance_sent,
    begin,
    channels_of,
    received,
    send,
)
from matchers.sheets import Sheets, confident_sheets, group_sizes, real_sheets
from matchers.teachers import teacher
from synth.budget import SheetPlan, nominal_bytes, plan
from synth.compensated import Compensated
from synth.labels import label_row_bytes
from synth.teachers import flat_teacher

__all__ = ["CompensatorMatching", "CompensatorOptions", "bn_statistics_loss"]

WORTH = 100_000  # images through teachers, about two minutes, from which on processes are worth their start


@dataclass(frozen=True)
class CompensatorState:
    """Recovery on its way: a job for each teacher and group, teacher by teacher; none without steps.

    `skipped` counts steps in which a job stayed as it was for want of a finite gradient, `in_row` those since
    the last without.
    """

    step: int
    jobs: tuple[Recovering, ...]
    skipped: int = 0
    in_row: int = 0


@dataclass(frozen=True)
class CompensatorMatching:
    """Compensators of trained teachers and their family (see the head of this file)."""

    options: CompensatorOptions = CompensatorOptions()
    network: NetSpec = NetSpec()

    accepts: ClassVar[Accepts] = Accepts(source="images", experts=True, batch_norm=True, plans=True)

    def steps(self, task: Task) -> int:
        """Descent steps of every job: the option, none where nothing is optimised."""
        return 0 if self.options.recover in ("none", "crops") else self.options.steps

    def prepare(self, task: Task, rng: Rng) -> Workspace:
        """Sheets, teachers on the device, and the processes that share the jobs."""
        made, nets = self._plan(task), self._teachers(task)
        sheets = self._sheets(task, made, nets, rng)
        session = self._session(task, sheets, nets, rng)
        seen = sum(min(len(rows), self.options.class_batch or len(rows)) for rows in session.rows)
        worth = seen * len(nets) * self.steps(task) >= WORTH and task.device.type == "cpu"
        workers = task.workers if worth else 1
        pool = Pool(advance_sent if workers > 1 else advance, session, workers)
        extra = {"sheets": sheets, "nets": nets, "session": session, "pool": pool, "workers": workers}
        work = Workspace(task, task.images, extra, (self._note(task, made, len(nets)),))
        if self.steps(task) * len(session.rows) >= 100:
            work.notes += (self._estimate(task, session, workers),)
        return work

    def init(self, task: Task, rng: Rng) -> CompensatorState:
        """Zeros for every job."""
        if not self.steps(task):
            return CompensatorState(0, ())
        sizes = group_sizes(self._plan(task), len(task.images.spec.classes))
        return self._at_rest(task, sizes, self._teachers(task))

    def _at_rest(self, task: Task, sizes: Sequence[int], nets: Sequence[nn.Module]) -> CompensatorState:
        o, spec, jobs = self.options, task.images.spec, []
        for number, group in self._jobs(len(sizes), len(nets)):
            small = o.class_batch is not None and o.class_batch < sizes[group]
            channels = channels_of(nets[number], spec, task.device) if small else 0
            count = sizes[group] if o.recover == "images" else 1
            jobs.append(begin(count, spec, channels, task.device))
        return CompensatorState(0, tuple(jobs))

    def step(self, state: CompensatorState, work: Workspace, rng: Rng) -> tuple[CompensatorState, Metrics]:
        """Every job one step further, in blocks of groups that share a teacher."""
        session: Session = work.extra["session"]
        blocks = self._blocks(session, state)
        moved: list[Recovering] = []
        entropies, statistics = [], []
        sent = [send(block) for block in blocks] if work.extra["workers"] > 1 else blocks
        for block, (jobs, (entropy, statistic)) in zip(blocks, work.extra["pool"].map(sent), strict=True):
            moved.extend(received(jobs))
            entropies.extend([entropy] * len(block.groups))
            statistics.extend([statistic] * len(block.groups))
        metrics = {"ce": _mean(entropies), "bn": _mean(statistics)}
        o = self.options
        metrics["loss"] = o.ce_weight * metrics["ce"] + o.r_bn * metrics["bn"]
        bad = not math.isfinite(metrics["loss"])
        skipped, in_row = state.skipped + bad, (state.in_row + 1) * bad
        metrics |= {"skipped": skipped, "in_row": in_row}
        return CompensatorState(state.step + 1, tuple(moved), skipped, in_row), metrics

    def finish(self, state: CompensatorState, work: Workspace, rng: Rng) -> SynthSet:
        """The factors as they will be stored, and the labels of what these decode to."""
        task, o, sheets = work.task, self.options, work.extra["sheets"]
        synth = Compensated(
            sheets.pixels, sheets.classes, self._compensators(state, task, sheets, rng), sheets.group,
            task.images.spec, codec=o.codec, label_codec=o.label_codec,
        )  # fmt: skip
        if o.recover == "images":
            synth = replace(synth, bases=self._recovered(state, task, sheets))
        if o.labels == "hard":
            return synth
        numbers = self._label_numbers(task)
        if o.labels == "dynamic":
            return replace(synth, teachers=tuple(_stored(task.experts, i) for i in numbers))
        nets = [_loaded(task, i) for i in numbers]
        return replace(synth, labels=kd.soft_labels(nets, synth.quantised().composites(), task.device))

    def evaluation(self, task: Task) -> dict[str, Any]:
        """What the manifest tells a judge: the kind of labels and how to train on them."""
        o, spec = self.options, task.images.spec
        train = {**KD, "temperature": float(o.temperature)}
        train["augment"] = "crop" if spec.name in DIGITS else "crop_flip"
        found: dict[str, Any] = {"labels": o.labels, "train": train, "class_order": class_order(spec.classes)}
        if o.labels != "hard":
            found["labelled_by"] = {"experts": self._label_numbers(task), "digest": task.experts.digest}
        if o.labels == "dynamic":
            found["teachers"] = [task.experts.network(i).to_dict() for i in self._label_numbers(task)]
        return found

    def _numbers(self, task: Task, chosen: tuple[int, ...] | None) -> list[int]:
        """The experts that teach, after the buffer was found to fit (UsageError)."""
        if not isinstance(task.experts, ExpertBuffer):
            raise UsageError(
                f"experts are a {type(task.experts).__name__}", "Give an ExpertBuffer: experts=DIR"
            )
        task.experts.check(task.images.spec)
        for number in chosen or ():
            if not 0 <= number < len(task.experts):
                raise UsageError(
                    f"there is no expert {number} in a buffer of {len(task.experts)}",
                    f"Give numbers of 0..{len(task.experts) - 1}",
                )
        return list(range(len(task.experts)) if chosen is None else chosen)

    def _label_numbers(self, task: Task) -> list[int]:
        return self._numbers(task, self.options.label_teachers)

    def _teachers(self, task: Task) -> tuple[nn.Module, ...]:
        """The frozen teachers of recovery, on the device; UsageError for one without batch norm."""
        nets = []
        for number in self._numbers(task, self.options.teachers):
            net = _loaded(task, number)
            if self.steps(task) and not has_batch_norm(net):
                raise UsageError(
                    f"expert {number}, a {task.experts.network(number).name}, has no batch norm",
                    "Record the experts with network.norm=batch, or networks that have it, such as resnet18",
                )
            nets.append(net)
        return tuple(nets)

    def _plan(self, task: Task) -> SheetPlan:
        """How many sheets and groups the budget holds (UsageError where it holds none)."""
        o, spec = self.options, task.images.spec
        if task.budget is None:
            raise no_budget()
        shared = o.recover in ("compensator", "noise")
        row = label_row_bytes(len(spec.classes), o.label_codec) if o.labels == "static" else 0
        fixed = 0
        if o.labels == "dynamic" and o.count_teachers:
            fixed = sum(_stored_bytes(task.experts, number) for number in self._label_numbers(task))
        compensators = len(self._numbers(task, o.teachers)) if shared else 0
        remedy = (
            "Give a larger ipc or budget.nbytes, matcher.groups=1, fewer teachers, or matcher.labels=hard"
        )
        if fixed:
            remedy = f"Give matcher.count_teachers=false: the teachers alone have {fixed:,} bytes"
        each = spec.shape[0] * spec.shape[1] * spec.shape[2]
        size = each + 2 * spec.shape[0] if o.codec == "int8" else 2 * each
        return plan(
            nominal_bytes(task.budget, spec), spec, compensators, o.groups if shared else None, row, fixed,
            compensator_bytes=size, fraction=o.fraction, limit=min(task.images.counts), remedy=remedy,
        )  # fmt: skip

    def _sheets(self, task: Task, made: SheetPlan, nets: Sequence[nn.Module], rng: Rng) -> Sheets:
        if self.options.recover != "crops":
            return real_sheets(task, made, self.options.start, rng)
        parts = self.options.parts or (1 if min(task.images.spec.shape[1:]) <= SMALL else 2)
        return confident_sheets(task, made, nets, parts, rng)

    def _session(self, task: Task, sheets: Sheets, nets: tuple[nn.Module, ...], rng: Rng) -> Session:
        o, spec = self.options, task.images.spec
        jitter = max(1, round(min(spec.shape[1:]) / 8)) if o.jitter is None else o.jitter
        options = RecoverOptions(
            o.steps, float(o.lr), float(o.ce_weight), float(o.r_bn), float(o.first_weight), o.weighting,
            jitter, float(o.crop), o.flip, o.class_batch,
        )  # fmt: skip
        groups = range(int(sheets.group.max()) + 1)
        rows = tuple((sheets.group == g).nonzero().squeeze(1).to(task.device) for g in groups)
        where = task.device
        return Session(
            sheets.pixels.to(where), sheets.classes.to(where), rows, nets, spec, options,
            rng.fold("recover"), task.precision,
        )  # fmt: skip

    def _jobs(self, groups: int, teachers: int) -> list[tuple[int, int]]:
        """(teacher, group) of each job, teacher by teacher; recovered images have one teacher a group."""
        every = [(t, g) for t in range(teachers) for g in range(groups)]
        if self.options.recover != "images":
            return every
        return [(t, g) for t, g in every if g % teachers == t]

    def _blocks(self, session: Session, state: CompensatorState) -> list[Block]:
        """The jobs in blocks of one teacher and at most `chunk` images, in the order of the state."""
        blocks: list[Block] = []
        images = 0
        for (number, group), job in zip(
            self._jobs(len(session.rows), len(session.teachers)), state.jobs, strict=True
        ):
            size = min(len(session.rows[group]), self.options.class_batch or len(session.rows[group]))
            fits = blocks and blocks[-1].teacher == number and images + size <= self.options.chunk
            images = images + size if fits else size
            if fits:
                last = blocks[-1]
                blocks[-1] = replace(last, groups=(*last.groups, group), jobs=(*last.jobs, job))
            else:
                blocks.append(Block(state.step, number, (group,), (job,)))
        return blocks

    def _compensators(
        self, state: CompensatorState, task: Task, sheets: Sheets, rng: Rng
    ) -> Float[Tensor, "g m c h w"]:
        """The shared images in units of pixels: as recovered, or noise with their deviations."""
        o, groups, shape = self.options, int(sheets.group.max()) + 1, task.images.spec.shape
        if o.recover not in ("compensator", "noise"):
            return torch.zeros(groups, 0, *shape)
        u = in_pixels(torch.cat([job.u for job in state.jobs]).cpu(), task.images.spec)
        if o.recover == "noise":
            drawn = torch.randn(u.shape, generator=rng.torch("noise"))
            u = drawn * (_deviation(u) / _deviation(drawn))
        return u.reshape(-1, groups, *shape).transpose(0, 1).contiguous()

    def _recovered(self, state: CompensatorState, task: Task, sheets: Sheets) -> Tensor:
        """Bases that were recovered one by one, as pixels again."""
        spec, pixels = task.images.spec, sheets.pixels.clone()
        groups, teachers = int(sheets.group.max()) + 1, len(self._numbers(task, self.options.teachers))
        for (_, group), job in zip(self._jobs(groups, teachers), state.jobs, strict=True):
            rows = (sheets.group == group).nonzero().squeeze(1)
            moved = pixels[rows].float() / 255 + in_pixels(job.u.cpu(), spec)
            pixels[rows] = (moved.clamp(0, 1) * 255).round().to(torch.uint8)
        return pixels

    def _note(self, task: Task, made: SheetPlan, teachers: int) -> str:
        o, classes = self.options, len(task.images.spec.classes)
        rest = f" and {made.last} of {classes} classes of one more" if made.last else ""
        shared = f", {made.groups} x {teachers} compensators" if o.recover in ("compensator", "noise") else ""
        return (
            f"{made.sheets} sheets of {classes} images{rest}{shared}: {made.nbytes:,} bytes of "
            f"{nominal_bytes(task.budget, task.images.spec):,}"  # type: ignore[arg-type]
        )

    def _estimate(self, task: Task, session: Session, workers: int) -> str:
        """What recovery will take, from one step of one block."""
        state = self._at_rest(task, [len(rows) for rows in session.rows], session.teachers)
        blocks = self._blocks(session, state)
        began = time.perf_counter()
        with one_thread():
            advance(session, blocks[0])
        minutes = (
            (time.perf_counter() - began) * len(blocks) * self.steps(task) / 60 / min(workers, len(blocks))
        )
        return f"{len(blocks)} blocks of jobs, {self.steps(task)} steps: about {minutes:.0f} min"


def _deviation(u: Tensor) -> Tensor:
    """Root mean square of each channel."""
    return u.square().mean((2, 3), keepdim=True).sqrt()


def _loaded(task: Task, number: int) -> nn.Module:
    return teacher(task.experts, number, None, task.device).requires_grad_(False)


def _stored(buffer: ExpertBuffer, number: int) -> tuple[Tensor, Tensor]:
    """Parameters and batch-norm means and variances of an expert's last checkpoint, flat."""
    return flat_teacher(buffer.build(number, buffer.epochs(number)))


def _stored_bytes(buffer: ExpertBuffer, number: int) -> int:
    """Bytes of what `_stored` gives in a set, without reading it: float16 parameters, float32 statistics."""
    named = zip(buffer.stat_spec(number).names, buffer.stat_spec(number).sizes, strict=True)
    kept = sum(size for name, size in named if not name.endswith("num_batches_tracked"))
    return 2 * sum(buffer.spec(number).sizes) + 4 * kept


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)

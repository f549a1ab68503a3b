"""One network of an evaluation: what all jobs share, and the job of training one network and scoring it.

This is all that a worker process of the judge loads.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from ddengine.composites import Composites
from ddengine.errors import DDError
from ddengine.nets.core import NetSpec
from ddengine.ops import kd
from ddengine.rng import Rng
from ddengine.robust import (
    calibration_error,
    corruption_accuracy,
    per_class_accuracy,
    pgd_accuracy,
    probabilities,
)
from ddengine.sealed import Sealed
from ddengine.train import Labeler, Probe, Recipe, accuracy, train
from ddengine.types import Images

Record = dict[str, Any]
Log = Callable[[Record], None]
Progress = Callable[[int, int], None]
Key = tuple[str, int | None]  # a row and the number of a network, None for the trials
SUBJECT, SAME_LABELS = "distilled", "random_same_labels"
DRAWN_ANEW = ("random", "random_bytes", SAME_LABELS)  # rows with a fresh selection for each network
HARD, PLAIN, RANDOM_PLAIN, CONVERGED = "distilled_hard", "distilled_plain", "random_plain", "full_converged"
VARIANTS = {
    HARD: SUBJECT,
    PLAIN: SUBJECT,
    RANDOM_PLAIN: "random",
    CONVERGED: "full",
}  # rows on others' images
PASSES = 50  # over all the data, after which a network is taken to have converged
PGD = "pgd"


@dataclass(frozen=True)
class Bench:
    """What every job of one evaluation shares. `picks` holds indices into `fit` by row and network number.

    `labels` says how the set's labels come: "hard", "static" (stored) or "dynamic", asked of the `teachers`
    at every step. `soft` has the teachers' logits of the picks of rows that are labelled so. `robust` names
    corruptions, and "pgd", under which finished networks are scored too. `looks` > 0 scores the best of so
    many looks at the test part while a network trains, as some publications do; 0 the last step.
    """

    distilled: Images | Composites
    fit: Images
    validation: Images
    test: Sealed
    picks: Mapping[Key, Tensor]
    recipe: Recipe
    seed: int
    device: str
    precision: str
    labels: str = "hard"
    teachers: tuple[nn.Module, ...] = ()
    soft: Mapping[Key, Tensor] = field(default_factory=dict)
    robust: tuple[str, ...] = ()
    severity: int = 3
    looks: int = 0

    def training_set(self, row: str, index: int | None) -> Images | Composites:
        """The images that network `index` of `row` is trained on; None is the trials' own draw."""
        if row in VARIANTS:
            images = self.training_set(VARIANTS[row], index)
            return replace(images, y=images.classes, y_kind="class") if row == HARD else images
        if row in (SUBJECT, "full"):
            return self.distilled if row == SUBJECT else self.fit
        key = row, index if row in DRAWN_ANEW else None
        chosen = self.fit.take(self.picks[key])
        return replace(chosen, y=self.soft[key], y_kind="logit") if key in self.soft else chosen

    def recipe_of(self, row: str) -> Recipe:
        """How networks of `row` are trained: as all are, but for what the row is there to show."""
        if row in (PLAIN, RANDOM_PLAIN):
            return replace(self.recipe, augment="none", mix="none")
        if row == CONVERGED:
            batch = min(self.recipe.batch_size, len(self.fit))
            enough = PASSES * math.ceil(len(self.fit) / batch)
            return replace(self.recipe, steps=max(self.recipe.steps, enough))
        return self.recipe

    def labeler(self, row: str) -> Labeler | None:
        """What labels the batches of `row`: the teachers' mean logits; None where its images have labels."""
        if self.labels != "dynamic" or row not in (SUBJECT, PLAIN, SAME_LABELS):
            return None
        return partial(kd.mean_logits, kd.placed(self.teachers, self.device))


@dataclass(frozen=True)
class Job:
    """One network to train: a trial for the rate (`index` None, scored on validation) or a final network."""

    network: NetSpec
    label: str
    row: str
    lr: float
    index: int | None = None


def run_job(bench: Bench, job: Job) -> Record:
    """Train one network and score it; its streams depend on (seed, network, index), not on the row."""
    began = time.perf_counter()
    rng, recipe, looked = stream_of(bench, job), bench.recipe_of(job.row), list[float]()
    net = train(
        job.network,
        bench.training_set(job.row, job.index),
        recipe,
        job.lr,
        rng,
        bench.device,
        bench.precision,
        bench.labeler(job.row),
        None if job.index is None else _looking(bench, recipe, looked),
    )
    record = record_of(net, bench, job, rng)
    if job.index is not None:
        record["test"] = max([record["test"], *looked])
    return record | {"seconds": round(time.perf_counter() - began, 3)}


def stream_of(bench: Bench, job: Job) -> Rng:
    """The stream of a job's weights, batches and augmentation: equal for all rows."""
    return Rng(bench.seed).fold("judge", job.network.name, "trial" if job.index is None else job.index)


def record_of(net: nn.Module, bench: Bench, job: Job, rng: Rng) -> Record:
    """What the trained network of `job` is worth, on validation for a trial and on test for a final one."""
    record = {"row": job.row, "network": job.label, "lr": job.lr, "steps": bench.recipe_of(job.row).steps}
    if job.index is None:
        return record | {"kind": "trial", "validation": accuracy(net, bench.validation)}
    return record | {"kind": "final", "index": job.index, **scored_on_test(net, bench, rng)}


def _looking(bench: Bench, recipe: Recipe, looked: list[float]) -> Probe | None:
    """What notes test accuracy `bench.looks` times on the way, the last step apart."""
    if not bench.looks:
        return None
    every = max(1, recipe.steps // bench.looks)

    def look(net: nn.Module, steps: int) -> None:
        if steps % every == 0 and steps < recipe.steps:
            looked.append(accuracy(net, bench.test.images))

    return look


def scored_on_test(net: nn.Module, bench: Bench, rng: Rng) -> Record:
    """What a finished network, whose rate is chosen, is worth on the test part.

    Accuracy, calibration error, the accuracy of each class, and what the bench's `robust` asks for.
    """
    images = bench.test.images
    p, classes = probabilities(net, images), images.classes.cpu()
    found: Record = {
        "test": (p.argmax(1) == classes).double().mean().item(),
        "ece": calibration_error(p, classes),
        "per_class": per_class_accuracy(p, classes, len(images.spec.classes)),
    }
    if bench.robust:
        names = [name for name in bench.robust if name != PGD]
        found["robust"] = corruption_accuracy(net, images, names, bench.severity, rng.fold("robust"))
        if PGD in bench.robust:
            found["robust"][PGD] = pgd_accuracy(net, images, rng.fold("robust"))
    return found


def tensors_of(images: Images | Composites) -> dict[str, Tensor]:
    """The tensors that a set of images is made of, by field."""
    return {name: value for name, value in vars(images).items() if isinstance(value, Tensor)}


def share(bench: Bench) -> None:
    """Put the tensors that workers read into shared memory (DDError where there is too little of it)."""
    parts = (bench.distilled, bench.fit, bench.validation)
    held = [tensor for part in parts for tensor in tensors_of(part).values()] + bench.test.tensors()
    try:
        for tensor in [*held, *bench.picks.values(), *bench.soft.values()]:
            tensor.share_memory_()
        for teacher in bench.teachers:
            teacher.share_memory()
    except RuntimeError as error:
        raise DDError(f"no shared memory for the data: {error}", "Repeat with workers=1") from error


def reporter(log: Log | None, on_progress: Progress | None, total: int) -> Callable[[Record], Record]:
    """What tells `log` of each record and `on_progress` how many of `total` there were; gives the record."""
    done = 0

    def report(record: Record) -> Record:
        nonlocal done
        done += 1
        if log is not None:
            log(record)
        if on_progress is not None:
            on_progress(done, total)
        return record

    return report

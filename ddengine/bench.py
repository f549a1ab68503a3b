"""One network of an evaluation: what all jobs share, and the job of training one network and scoring it.

This is all that a worker process of the judge loads.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from ddengine.composites import Composites
from ddengine.errors import DDError
from ddengine.nets.core import NetSpec
from ddengine.ops import kd
from ddengine.rng import Rng
from ddengine.train import Labeler, Recipe, accuracy, train
from ddengine.types import Images

Record = dict[str, Any]
Key = tuple[str, int | None]  # a row and the number of a network, None for the trials
SUBJECT, SAME_LABELS = "distilled", "random_same_labels"
DRAWN_ANEW = ("random", "random_bytes", SAME_LABELS)  # rows with a fresh selection for each network


@dataclass(frozen=True)
class Bench:
    """What every job of one evaluation shares. `picks` holds indices into `fit` by row and network number.

    `labels` says how the set's labels come: "hard", "static" (stored) or "dynamic", asked of the `teachers`
    at every step. `soft` has the teachers' logits of the picks of rows that are labelled so.
    """

    distilled: Images | Composites
    fit: Images
    validation: Images
    test: Images
    picks: Mapping[Key, Tensor]
    recipe: Recipe
    seed: int
    device: str
    precision: str
    labels: str = "hard"
    teachers: tuple[nn.Module, ...] = ()
    soft: Mapping[Key, Tensor] = field(default_factory=dict)

    def training_set(self, row: str, index: int | None) -> Images | Composites:
        """The images that network `index` of `row` is trained on; None is the trials' own draw."""
        if row in (SUBJECT, "full"):
            return self.distilled if row == SUBJECT else self.fit
        key = row, index if row in DRAWN_ANEW else None
        chosen = self.fit.take(self.picks[key])
        return replace(chosen, y=self.soft[key], y_kind="logit") if key in self.soft else chosen

    def labeler(self, row: str) -> Labeler | None:
        """What labels the batches of `row`: the teachers' mean logits; None where its images have labels."""
        if self.labels != "dynamic" or row not in (SUBJECT, SAME_LABELS):
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
    rng = Rng(bench.seed).fold("judge", job.network.name, "trial" if job.index is None else job.index)
    images = bench.training_set(job.row, job.index)
    labeler = bench.labeler(job.row)
    net = train(job.network, images, bench.recipe, job.lr, rng, bench.device, bench.precision, labeler)
    record = {"row": job.row, "network": job.label, "lr": job.lr, "steps": bench.recipe.steps}
    if job.index is None:
        score = {"kind": "trial", "validation": accuracy(net, bench.validation)}
    else:
        score = {"kind": "final", "index": job.index, "test": score_on_test(net, bench)}
    return record | score | {"seconds": round(time.perf_counter() - began, 3)}


def score_on_test(net: nn.Module, bench: Bench) -> float:
    """Test accuracy of a finished network whose rate is chosen: the only place that reads the test part."""
    return accuracy(net, bench.test)


def tensors_of(images: Images | Composites) -> dict[str, Tensor]:
    """The tensors that a set of images is made of, by field."""
    return {name: value for name, value in vars(images).items() if isinstance(value, Tensor)}


def share(bench: Bench) -> None:
    """Put the tensors that workers read into shared memory (DDError where there is too little of it)."""
    parts = (bench.distilled, bench.fit, bench.validation, bench.test)
    held = [tensor for part in parts for tensor in tensors_of(part).values()]
    try:
        for tensor in [*held, *bench.picks.values(), *bench.soft.values()]:
            tensor.share_memory_()
        for teacher in bench.teachers:
            teacher.share_memory()
    except RuntimeError as error:
        raise DDError(f"no shared memory for the data: {error}", "Repeat with workers=1") from error

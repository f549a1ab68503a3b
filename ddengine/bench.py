"""One network of an evaluation: what all jobs share, and the job of training one network and scoring it.

This is all that a worker process of the judge loads.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ddengine.errors import DDError
from ddengine.nets.core import NetSpec
from ddengine.rng import Rng
from ddengine.train import Recipe, accuracy, train
from ddengine.types import Images

Record = dict[str, Any]
SUBJECT = "distilled"
DRAWN_ANEW = ("random", "random_bytes")  # rows with a fresh selection for each network


@dataclass(frozen=True)
class Bench:
    """What every job of one evaluation shares. `picks` holds indices into `fit` by row and network number."""

    distilled: Images
    fit: Images
    validation: Images
    test: Images
    picks: Mapping[tuple[str, int | None], Tensor]
    recipe: Recipe
    seed: int
    device: str
    precision: str

    def training_set(self, row: str, index: int | None) -> Images:
        """The images that network `index` of `row` is trained on; None is the trials' own draw."""
        if row in (SUBJECT, "full"):
            return self.distilled if row == SUBJECT else self.fit
        return self.fit.take(self.picks[row, index if row in DRAWN_ANEW else None])


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
    net = train(job.network, images, bench.recipe, job.lr, rng, bench.device, bench.precision)
    record = {"row": job.row, "network": job.label, "lr": job.lr, "steps": bench.recipe.steps}
    if job.index is None:
        score = {"kind": "trial", "validation": accuracy(net, bench.validation)}
    else:
        score = {"kind": "final", "index": job.index, "test": score_on_test(net, bench)}
    return record | score | {"seconds": round(time.perf_counter() - began, 3)}


def score_on_test(net: nn.Module, bench: Bench) -> float:
    """Test accuracy of a finished network whose rate is chosen: the only place that reads the test part."""
    return accuracy(net, bench.test)


def share(bench: Bench) -> None:
    """Put the tensors that workers read into shared memory (DDError where there is too little of it)."""
    parts = (bench.distilled, bench.fit, bench.validation, bench.test)
    try:
        for tensor in [t for part in parts for t in (part.x, part.y)] + list(bench.picks.values()):
            tensor.share_memory_()
    except RuntimeError as error:
        raise DDError(f"no shared memory for the data: {error}", "Repeat with workers=1") from error

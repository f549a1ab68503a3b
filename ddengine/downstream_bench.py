"""One network of a downstream task: the images and classes that it sees, and the job of training it.

This is all that a worker process of these tasks loads.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ddengine.bench import Record, tensors_of
from ddengine.composites import Composites
from ddengine.errors import DDError, UsageError
from ddengine.nets.core import NetSpec
from ddengine.parallel import job_pool
from ddengine.rng import Rng
from ddengine.train import Recipe, accuracy, train
from ddengine.types import Images

Key = tuple[Any, ...]
Note = Callable[[Record], Record]


@dataclass(frozen=True, eq=False)
class View:
    """Images as one network sees them: those at `index`, and of them those of `classes`; None is all.

    `classes` are then all the classes there are, numbered in the order given. Views share their images.
    """

    images: Images | Composites
    index: Tensor | None = None
    classes: tuple[int, ...] | None = None

    def get(self) -> Images | Composites:
        """The images of the view."""
        found = self.images if self.index is None else self.images.take(self.index)
        return found if self.classes is None else only(found, self.classes)

    @property
    def counts(self) -> list[int]:
        """Images in each class of the images that are looked at, in their label order."""
        held = self.images.classes.cpu()
        held = held if self.index is None else held[self.index]
        found = torch.bincount(held, minlength=len(self.images.spec.classes)).tolist()
        return [n if self.classes is None or c in self.classes else 0 for c, n in enumerate(found)]


def only(images: Images | Composites, classes: Sequence[int]) -> Images:
    """The images whose class is one of `classes`, numbered 0.. in that order, in a spec of these alone.

    Of soft labels the columns of the other classes are left out: logits need no more, and probabilities are
    divided by what is left of them. Raises UsageError where nothing is left.
    """
    spec, order = images.spec, torch.tensor(list(classes), dtype=torch.long)
    number = torch.full((len(spec.classes),), -1)
    number[order] = torch.arange(len(order))
    kept = images.take((number[images.classes.cpu().long()] >= 0).nonzero().squeeze(1))
    y = number[kept.y.cpu().long()] if kept.y_kind == "class" else kept.y[:, order]
    if kept.y_kind == "prob":
        left = y.sum(1, keepdim=True)
        if not bool((left > 0).all()):
            raise UsageError(
                f"a soft label gives nothing to the {len(order)} classes of its stage",
                "Give probabilities whose largest is positive",
            )
        y = y / left
    return replace(kept, y=y, spec=replace(spec, classes=tuple(spec.classes[c] for c in classes)))


@dataclass(frozen=True)
class Job:
    """One network: trained on one view, scored on another; `path` names its streams.

    `about` goes into its record.
    """

    network: NetSpec
    trained: Key
    scored: Key
    lr: float
    path: tuple[str | int, ...]
    about: Record


@dataclass(frozen=True, eq=False)
class Shared:
    """What the jobs of one round share: views by key, the name of the `part` scored, and how to train.

    A round that chooses holds no view of the test part.
    """

    trained: Mapping[Key, View]
    scored: Mapping[Key, View]
    part: str
    recipe: Recipe
    seed: int
    device: str
    precision: str


def run_job(shared: Shared, job: Job) -> Record:
    """Train one network and score it: the record of the job with its score under the name of the part."""
    began = time.perf_counter()
    rng, images = Rng(shared.seed).fold(*job.path), shared.trained[job.trained].get()
    net = train(job.network, images, shared.recipe, job.lr, rng, shared.device, shared.precision)
    scored = shared.scored[job.scored].get()
    assert isinstance(scored, Images)
    score = {"lr": job.lr, "steps": shared.recipe.steps, shared.part: accuracy(net, scored)}
    return job.about | score | {"seconds": round(time.perf_counter() - began, 3)}


def run_jobs(shared: Shared, jobs: Sequence[Job], workers: int, note: Note) -> list[Record]:
    """The records of `jobs` in order, whatever the number of `workers`; `note` sees each as it is ready."""
    if workers > 1:
        _share([*shared.trained.values(), *shared.scored.values()])
    with job_pool(run_job, shared, workers) as results:
        return [note(record) for record in results(jobs)]


def _share(views: Sequence[View]) -> None:
    """Put the tensors of the views into shared memory (DDError where there is too little of it)."""
    held = [tensor for view in views for tensor in tensors_of(view.images).values()]
    try:
        for tensor in [*held, *(view.index for view in views if view.index is not None)]:
            tensor.share_memory_()
    except RuntimeError as error:
        raise DDError(f"no shared memory for the data: {error}", "Repeat with workers=1") from error


def best(trials: Sequence[Mapping[str, Any]]) -> float:
    """The rate of the trial with the best validation accuracy; the first of equals."""
    return max(trials, key=lambda record: record["validation"])["lr"]

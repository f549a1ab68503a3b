"""Class-incremental learning with a memory (GDumb, Prabhu et al., ECCV 2020), as DM and DataDAM use it.

The classes come in groups, in a drawn order. After each group a fresh network is trained on the memory of all
classes seen so far and scored on the test images of these classes alone. Validation chooses one rate for each
row: the first of the best at the last stage of the first order, where all classes are seen; it is the row's
rate at every stage. Every network of every row gets as many optimiser steps.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch

from ddengine.bench import Log, Progress, Record, reporter
from ddengine.composites import Composites
from ddengine.continual_table import ContinualRow, ContinualTable, Group
from ddengine.data import Dataset
from ddengine.downstream import (
    ROWS,
    check_rows,
    check_set,
    check_task,
    cost,
    in_space,
    one_space,
    real_picks,
    same_ipc,
)
from ddengine.downstream_bench import Job, Key, Note, Shared, View, best, only, run_jobs
from ddengine.errors import UsageError
from ddengine.nets import resolve
from ddengine.nets.core import NetSpec
from ddengine.parallel import one_thread
from ddengine.rng import Rng
from ddengine.train import Recipe
from ddengine.types import DataSpec, Images

Memory = Callable[[Sequence[Group], int], Images | View]  # (groups so far, order) -> their classes' images


def class_groups(classes: int, steps: int, seed: int, order: int) -> tuple[Group, ...]:
    """The classes in a drawn order, in `steps` groups as equal as can be, larger ones first.

    Raises UsageError unless 2 <= steps <= classes.
    """
    if not 2 <= steps <= classes:
        raise UsageError(f"steps={steps} for {classes} classes", f"Give a number of steps in 2..{classes}")
    generator = Rng(seed).fold("order", order).torch("classes")
    drawn = torch.randperm(classes, generator=generator)
    return tuple(tuple(group.tolist()) for group in drawn.tensor_split(steps))


def set_memory(images: Images | Composites) -> Memory:
    """The memory that holds of a given set the images of the classes seen so far.

    Soft labels keep the columns of these classes. A set that was made with all classes at once knows more of
    the later ones than a memory could have; `staged_memory` does not.
    """
    return lambda groups, order: View(images, classes=tuple(chain(*groups)))


def staged_memory(fit: Images, distil: Callable[[Images], Images]) -> Memory:
    """The memory to which each group's own set is added: what `distil` makes of its fit images alone.

    `distil` gets images whose classes are those of the group, 0.. in their order, and gives images of the
    same; it is called once for each group. Logits become probabilities, with 0 for all other classes.
    """
    made: dict[Group, Images] = {}

    def memory(groups: Sequence[Group], order: int) -> Images:
        for group in groups:
            if group not in made:
                ordered = tuple(sorted(group))
                made[group] = _renumbered(distil(only(fit, ordered)), ordered, fit.spec.classes)
        found = [made[group] for group in groups]
        x, y = (torch.cat([getattr(part, name) for part in found]) for name in ("x", "y"))
        return replace(found[0], x=x, y=y)

    return memory


def _renumbered(images: Images, group: Group, classes: tuple[str, ...]) -> Images:
    """The images of a group with its classes' own numbers, or with a probability for each of `classes`."""
    spec, order = replace(images.spec, classes=classes), torch.tensor(group)
    if images.y_kind == "class":
        return replace(images, y=order[images.y.cpu().long()], spec=spec)
    shares = images.y.float().softmax(1) if images.y_kind == "logit" else images.y.float()
    every = torch.zeros(len(images), len(classes)).index_copy(1, order, shares.cpu())
    return replace(images, y=every, spec=spec, y_kind="prob")


def continual(
    dataset: Dataset,
    memories: Mapping[str, Memory],
    *,
    network: NetSpec,
    recipe: Recipe,
    steps: int = 5,
    orders: int = 3,
    networks: int = 1,
    rows: Sequence[str] = ROWS,
    ipc: int | None = None,
    nbytes: Mapping[str, Mapping[str, int]] | None = None,
    seed: int = 0,
    workers: int = 1,
    device: str = "cpu",
    precision: str = "fp32",
    log: Log | None = None,
    on_progress: Progress | None = None,
) -> ContinualTable:
    """Train `networks` fresh networks on each memory after each of `steps` groups, in `orders` class orders.

    A memory gets the groups so far and the number of the order, and gives images of exactly their classes
    with the dataset's numbers. Beside them stand `rows` of real images, `ipc` a class (None: as many as the
    first memory has at last), random ones drawn anew for each order, "full" all fit images. `nbytes` is what
    memories cost; those not in it count a byte for each value of an image. The result is a function of the
    data, memories and settings, not of `workers`. Raises UsageError; DDError when a worker process dies.
    """
    check_rows(tuple(memories), rows)
    check_task(dataset, [network], orders=orders, networks=networks, workers=workers)
    classes = len(dataset.spec.classes)
    groups = tuple(class_groups(classes, steps, seed, order) for order in range(orders))
    with one_thread():
        shared = Shared({}, {}, "", recipe, seed, device, precision)
        plan = _plan(dataset, memories, groups, rows, ipc, shared)
    names, last = (*memories, *rows), (0, steps - 1)
    tried = recipe.lrs if len(recipe.lrs) > 1 else ()
    keys = [(row, order, stage) for row in names for order in range(orders) for stage in range(steps)]
    note = reporter(log, on_progress, len(names) * len(tried) + len(keys) * networks)
    trials = [_job(network, (row, *last), lr, None) for row in names for lr in tried]
    found = plan.run(trials, "validation", workers, note)
    rates = {row: best(_of(found, row)) if tried else recipe.lrs[0] for row in names}
    finals = [_job(network, key, rates[key[0]], index) for key in keys for index in range(networks)]
    found += plan.run(finals, "test", workers, note)
    costs = {row: plan.cost((row, *last)) for row in names} | dict(nbytes or {})
    table = tuple(_row(plan, row, rates[row], _of(found, row), costs[row]) for row in names)
    shown = resolve(network, dataset.spec.shape)
    return ContinualTable(dataset.spec.name, groups, networks, shown, table, recipe, seed)


@dataclass(frozen=True, eq=False)
class _Plan:
    """All that the rounds of one table share: the data in one space, and a view for (row, order, stage)."""

    data: Dataset
    views: Mapping[Key, View]
    groups: tuple[tuple[Group, ...], ...]
    shared: Shared

    def run(self, jobs: Sequence[Job], part: str, workers: int, note: Note) -> list[Record]:
        """The records of `jobs` scored on `part`, the only one that their workers see."""
        if not jobs:
            return []
        images = getattr(self.data, part)
        scored = {job.scored: View(images, classes=_seen(self.groups, *job.scored)) for job in jobs}
        trained = {job.trained: self.views[job.trained] for job in jobs}
        return run_jobs(replace(self.shared, trained=trained, scored=scored, part=part), jobs, workers, note)

    def cost(self, key: Key) -> dict[str, int]:
        """Bytes of a view."""
        return cost(self.views[key].images, sum(self.views[key].counts))


def _plan(
    dataset: Dataset,
    memories: Mapping[str, Memory],
    groups: tuple[tuple[Group, ...], ...],
    rows: Sequence[str],
    ipc: int | None,
    shared: Shared,
) -> _Plan:
    views: dict[Key, View] = {}
    for name, memory in memories.items():
        views |= dict(_remembered(name, memory, groups, dataset.spec))
    specs = [(key[0], view.images.spec) for key, view in views.items()]
    data, stages = in_space(dataset, one_space(specs, dataset.spec)), range(len(groups[0]))
    sizes = [sum(views[name, 0, stages[-1]].counts) for name in memories]
    ipc = same_ipc(ipc, sizes, len(dataset.spec.classes), rows)
    picks = real_picks(data.fit, rows, ipc, len(groups), Rng(shared.seed).fold("continual", "pick"))
    for (row, order), index in picks:
        for stage in stages:
            views[row, order, stage] = View(data.fit, index, _seen(groups, order, stage))
    return _Plan(data, views, groups, shared)


def _remembered(
    name: str, memory: Memory, groups: tuple[tuple[Group, ...], ...], spec: DataSpec
) -> Iterator[tuple[Key, View]]:
    """The views of a memory, checked: images of every class seen so far and of no other."""
    for order, mine in enumerate(groups):
        for stage in range(len(mine)):
            seen = _seen(groups, order, stage)
            found = memory(mine[: stage + 1], order)
            view = replace(found, classes=seen) if isinstance(found, View) else View(found)
            check_set(name, view.images, spec)
            held = {c for c, n in enumerate(view.counts) if n}
            if held != set(seen):
                wrong = min(held.symmetric_difference(seen))
                what = "holds images of unseen" if wrong in held else "has no image of"
                raise UsageError(
                    f"memory '{name}' {what} class '{spec.classes[wrong]}' at stage {stage + 1}",
                    "Give images of exactly the classes of the groups so far",
                )
            yield (name, order, stage), replace(view, classes=seen)


def _seen(groups: Sequence[Sequence[Group]], order: int, stage: int) -> Group:
    return tuple(chain(*groups[order][: stage + 1]))


def _job(network: NetSpec, key: tuple[str, int, int], lr: float, index: int | None) -> Job:
    """A trial (`index` None) or a final network; its streams do not depend on the row."""
    row, order, stage = key
    kind = "trial" if index is None else "final"
    path = ("continual", network.name, order, stage, kind if index is None else index)
    about = {"task": "continual", "row": row, "kind": kind, "order": order, "stage": stage}
    return Job(network, key, (order, stage), lr, path, about | ({} if index is None else {"index": index}))


def _of(records: Sequence[Record], row: str) -> list[Record]:
    return [record for record in records if record["row"] == row]


def _row(
    plan: _Plan, name: str, lr: float, records: Sequence[Record], nbytes: Mapping[str, int]
) -> ContinualRow:
    scores: dict[tuple[int, int], list[float]] = {}  # of the networks, by stage and order
    for record in records:
        if record["kind"] == "final":
            scores.setdefault((record["stage"], record["order"]), []).append(record["test"])
    stages, orders = range(len(plan.groups[0])), range(len(plan.groups))
    trials = [record for record in records if record["kind"] == "trial"]
    return ContinualRow(
        name=name,
        values=tuple(tuple(tuple(scores[stage, order]) for order in orders) for stage in stages),
        counts=tuple(sum(plan.views[name, 0, stage].counts) for stage in stages),
        lr=lr,
        trials=tuple({"lr": record["lr"], "validation": record["validation"]} for record in trials),
        nbytes=nbytes,
        train_seconds=round(sum(record["seconds"] for record in records), 3),
    )

"""The judge: protocol `standard-v1` retrains fresh networks on a distilled set and on its rivals.

Every row gets the same recipe, steps, trials, weights, batches and augmentation; validation chooses the rate
and the test part is scored once for each trained network. Where a set has its labels from teachers, so has
one of its rivals. The judge knows nothing of how a set was made.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ddengine.bench import SAME_LABELS, SUBJECT, Bench, Job, Record, run_job, share, tensors_of
from ddengine.composites import Composites
from ddengine.data import Dataset
from ddengine.errors import UsageError, require, require_positive
from ddengine.nets import build, family, resolve
from ddengine.nets.core import NetSpec
from ddengine.parallel import job_pool, one_thread
from ddengine.rivals import (
    KNOWN,
    Judged,
    draw,
    label_cost,
    label_mode,
    label_picks,
    real_bytes,
    usual_rows,
)
from ddengine.rng import Rng
from ddengine.tables import Row, Table, cost_of, label_networks
from ddengine.train import Recipe, recipe_of
from ddengine.types import Images

Log = Callable[[Record], None]
Progress = Callable[[int, int], None]


def evaluate(
    distilled: Judged,
    dataset: Dataset,
    *,
    networks: Sequence[NetSpec],
    seeds: int = 5,
    seed: int = 0,
    rows: Sequence[str] | None = None,
    recipe: Recipe | None = None,
    teachers: Sequence[nn.Module] = (),
    workers: int = 1,
    device: str = "cpu",
    precision: str = "fp32",
    log: Log | None = None,
    on_progress: Progress | None = None,
) -> Table:
    """Judge `distilled` beside `rows` by `standard-v1` with `seeds` fresh networks of each kind.

    The result is a function of the set, the data, `networks`, `seeds`, `seed`, `rows`, `recipe` (None: what
    the set's manifest asks for) and `teachers` (networks in eval mode), not of `workers`. `log` gets one
    record for each trained network (trials too), `on_progress` the networks done and their number. Raises
    UsageError for an empty validation or test part, a set of other classes or shape, an unknown row, labels
    without their teachers; ArtefactError for a manifest that asks for the impossible; DDError when a worker
    process dies.
    """
    recipe = recipe or recipe_of(distilled.manifest, dataset.fit.spec.name)
    labels = label_mode(distilled.manifest)
    rows = usual_rows(labels, bool(teachers)) if rows is None else rows
    _check(dataset, networks, rows, seeds, seed)
    _check_teachers(dataset.fit, rows, labels, teachers)
    with one_thread():
        bench = _bench(
            distilled,
            dataset,
            rows,
            seeds,
            seed,
            device=device,
            precision=precision,
            recipe=recipe,
            labels=labels,
            teachers=tuple(teachers),
        )
    if workers > 1:
        share(bench)
    names, shown = (SUBJECT, *rows), label_networks(networks)
    pairs = [(net, label, row) for net, label in zip(networks, shown, strict=True) for row in names]
    rates = {row: trial_rates(recipe, learned_rate(distilled) if row == SUBJECT else None) for row in names}
    total = sum(len(rates[row]) + seeds for _, _, row in pairs)
    report = _reporter(log, on_progress, total)
    trials = [Job(net, label, row, lr) for net, label, row in pairs for lr in rates[row]]
    with job_pool(run_job, bench, workers) as results:
        tried = [report(record) for record in results(trials)]
        chosen = {(label, row): choose(tried, label, row) for _, label, row in pairs}
        finals = [Job(*pair, chosen[pair[1:]], i) for pair in pairs for i in range(seeds)]
        scored = [report(record) for record in results(finals)]
    table = [_row(bench, distilled, net, label, row, tried + scored) for net, label, row in pairs]
    matches = _source_matches(bench.distilled, dataset.fit)
    return Table(dataset.fit.spec.name, tuple(table), recipe, seed, cost_of(distilled.manifest), matches)


def choose(tried: Sequence[Record], label: str, row: str) -> float:
    """The rate with the best validation accuracy of this network and row; the first of equals."""
    mine = [record for record in tried if (record["network"], record["row"]) == (label, row)]
    return max(mine, key=lambda record: record["validation"])["lr"]


def learned_rate(distilled: Judged) -> float | None:
    """The learning rate for students that was learned with the set; None where there is none."""
    rate = distilled.tensors.get("student_lr")
    return None if rate is None else float(rate)


def trial_rates(recipe: Recipe, learned: float | None = None) -> tuple[float, ...]:
    """The rates to try: the recipe's; a rate `learned` with the set takes the place of the nearest."""
    if learned is None or learned in recipe.lrs:
        return recipe.lrs
    nearest = min(recipe.lrs, key=lambda lr: max(lr / learned, learned / lr))
    return tuple(learned if lr == nearest else lr for lr in recipe.lrs)


def _check(dataset: Dataset, networks: Sequence[NetSpec], rows: Sequence[str], seeds: int, seed: int) -> None:
    for name, part in (("fit", dataset.fit), ("validation", dataset.validation), ("test", dataset.test)):
        if not len(part):
            raise UsageError(
                f"the {name} part of '{dataset.fit.spec.name}' is empty", "Give a dataset with more images"
            )
    for row in rows:
        require(row, KNOWN, "row")
    require_positive("seeds", seeds)
    resolved = [resolve(net, dataset.fit.spec.shape) for net in networks]
    for net in resolved:  # a network that does not fit is refused before any is trained
        build(net, dataset.fit.spec.shape, len(dataset.fit.spec.classes), Rng(seed).torch("check"))
    if not resolved or len(set(resolved)) < len(resolved) or len(set(rows)) < len(rows):
        raise UsageError("networks or rows are empty or repeat one another", "Give each network and row once")


def _check_teachers(fit: Images, rows: Sequence[str], labels: str, teachers: Sequence[nn.Module]) -> None:
    if not teachers and (labels == "dynamic" or SAME_LABELS in rows):
        what = f"row '{SAME_LABELS}'" if SAME_LABELS in rows else "a set with dynamic labels"
        raise UsageError(f"{what} needs teachers and there are none", "Give experts=DIR, a buffer of them")
    if SAME_LABELS in rows and labels == "hard":
        raise UsageError(f"row '{SAME_LABELS}' of a set with hard labels", "Give row random_bytes, the same")
    for number, teacher in enumerate(teachers):
        if any(module.training for module in teacher.modules()):
            raise UsageError(f"teacher {number} is in train mode", "Call eval() on the teachers")
        with torch.no_grad():
            found = teacher(fit.model_input(slice(0, 1)).to(next(teacher.parameters()).device)).shape[1]
        if found != len(fit.spec.classes):
            raise UsageError(
                f"teacher {number} has {found} classes, '{fit.spec.name}' {len(fit.spec.classes)}",
                "Give teachers that were trained on this dataset",
            )


def _bench(
    distilled: Judged, dataset: Dataset, rows: Sequence[str], seeds: int, seed: int, **settings: Any
) -> Bench:
    """All that jobs share; the whole evaluation takes place in the set's own model-input space."""
    images, spec = _subject(distilled), dataset.fit.spec
    if (images.spec.shape, images.spec.classes) != (spec.shape, spec.classes):
        raise UsageError(
            f"the set holds {images.spec.shape} images of {len(images.spec.classes)} classes, "
            f"'{spec.name}' {spec.shape} of {len(spec.classes)}, or their classes differ",
            "Evaluate the set on the dataset that it was distilled from",
        )
    fit, validation, test = (
        replace(part, spec=images.spec) for part in (dataset.fit, dataset.validation, dataset.test)
    )
    labels, teachers, device = settings["labels"], settings["teachers"], settings["device"]
    rng = Rng(seed).fold("judge", "pick")
    picks = dict(draw(distilled, fit, rows, labels, len(images), seeds, rng))
    soft = label_picks(fit, picks, teachers, device, distilled) if labels == "static" else {}
    return Bench(images, fit, validation, test, picks, seed=seed, soft=soft, **settings)


def _subject(distilled: Judged) -> Images | Composites:
    """What the set's networks are trained on: its composites where it has some, else its decoded images."""
    compose = getattr(distilled, "composites", lambda: None)
    found = compose()
    found = distilled.decode() if found is None else found
    return replace(found, **{name: tensor.detach().cpu() for name, tensor in tensors_of(found).items()})


def _reporter(log: Log | None, on_progress: Progress | None, total: int) -> Callable[[Record], Record]:
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


def _row(
    bench: Bench, distilled: Judged, net: NetSpec, label: str, row: str, records: Sequence[Record]
) -> Row:
    mine = [record for record in records if (record["network"], record["row"]) == (label, row)]
    trials = [record for record in mine if record["kind"] == "trial"]
    finals = [record for record in mine if record["kind"] == "final"]
    count = len(bench.training_set(row, None))
    cost = label_cost(row, bench.labels, distilled, len(bench.fit.spec.classes))
    spec = resolve(net, bench.fit.spec.shape)
    return Row(
        name=row,
        network=label,
        values=tuple(record["test"] for record in finals),
        steps=bench.recipe.steps,
        nbytes=dict(distilled.nbytes) if row == SUBJECT else real_bytes(bench.fit, count, *cost),
        lr=finals[0]["lr"],
        trials=tuple({"lr": record["lr"], "validation": record["validation"]} for record in trials),
        train_seconds=round(sum(record["seconds"] for record in mine), 3),
        count=count,
        ipc=_ipc(distilled, row, count / len(bench.fit.spec.classes)),
        network_spec=spec.to_dict(),
        seen_by_matcher=seen_by(distilled.manifest, spec),
    )


def _ipc(distilled: Judged, row: str, each: float) -> float:
    """Images of a class: of the set what its manifest says, since composites cost less than images."""
    said = (distilled.manifest.get("budget") or {}).get("ipc")
    return float(said) if row == SUBJECT and type(said) is int else round(each, 2)


def seen_by(manifest: Mapping[str, Any], spec: NetSpec) -> bool | None:
    """Whether the set was distilled with this family of networks; None where the manifest does not say."""
    used = (manifest.get("recipe") or {}).get("network")
    if not isinstance(used, Mapping) or not isinstance(used.get("name"), str):
        return None
    return family(used["name"]) == family(spec.name)


def _source_matches(images: Images | Composites, fit: Images) -> bool | None:
    mine, theirs = images.spec.fingerprint, fit.spec.fingerprint
    return mine == theirs if mine and theirs else None

"""The judge: fresh networks are trained on a distilled set and on its rivals, by one protocol.

Every row gets the same recipe, steps, trials, weights, batches and augmentation; validation chooses the rate
and the test part, sealed until then, is scored once for each trained network. Where a set has its labels from
teachers, so has one of its rivals. The judge knows nothing of how a set was made.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ddengine.bench import (
    HARD,
    PGD,
    SAME_LABELS,
    SUBJECT,
    VARIANTS,
    Bench,
    Job,
    Log,
    Progress,
    Record,
    reporter,
    share,
)
from ddengine.composites import Composites
from ddengine.data import Dataset
from ddengine.errors import UsageError, require, require_positive
from ddengine.keeping import Keeping
from ddengine.kept import Kept
from ddengine.nets import build, family, resolve
from ddengine.nets.core import NetSpec
from ddengine.parallel import one_thread
from ddengine.protocols import BEST_ON_TEST, STANDARD, Protocol
from ddengine.rivals import (
    KNOWN,
    Judged,
    draw,
    label_cost,
    label_mode,
    label_picks,
    real_bytes,
    training_images,
    usual_rows,
)
from ddengine.rng import Rng
from ddengine.robust import CORRUPTIONS, SEVERITIES
from ddengine.scores import table_scores
from ddengine.sealed import Sealed
from ddengine.stacked import judging
from ddengine.tables import Row, Table, cost_of, label_networks, measures_of, sizes_of
from ddengine.train import Recipe
from ddengine.types import Images


def evaluate(
    distilled: Judged,
    dataset: Dataset,
    *,
    networks: Sequence[NetSpec],
    protocol: Protocol = STANDARD,
    seeds: int | None = None,
    seed: int = 0,
    rows: Sequence[str] | None = None,
    recipe: Recipe | None = None,
    robust: Sequence[str] = (),
    severity: int = 3,
    kept: Kept | None = None,
    teachers: Sequence[nn.Module] = (),
    workers: int = 1,
    device: str = "cpu",
    precision: str = "fp32",
    log: Log | None = None,
    on_progress: Progress | None = None,
) -> Table:
    """Judge `distilled` beside `rows` by `protocol` with `seeds` fresh networks of each kind.

    The result is a function of the set, the data and all arguments but `workers` and `kept`, where rows that
    depend on data and recipe alone are looked up and left. On a GPU one worker trains the networks of a row
    at once. `recipe` None is what the protocol makes of the
    set's manifest, `seeds` None the protocol's; `robust` names corruptions (`ddengine.robust.CORRUPTIONS`),
    and "pgd", under which finished networks are scored too, at `severity` 1 to 5; `teachers` are networks in
    eval mode. `log` gets one record for each trained network (trials too), `on_progress` the networks done
    and their number. Raises UsageError for an empty validation or test part, a set of other classes or shape,
    an unknown row, labels without their teachers; ArtefactError for a manifest that asks for the impossible;
    DDError when a worker process dies.
    """
    labels, seeds = label_mode(distilled.manifest), protocol.seeds if seeds is None else seeds
    subject = training_images(distilled)
    recipe = recipe or protocol.recipe_for(
        distilled.manifest, dataset.fit.spec.name, len(subject), labels == "dynamic"
    )
    augmented = (recipe.augment, recipe.mix) != ("none", "none")
    rows = usual_rows(labels, bool(teachers), augmented) if rows is None else rows
    _check(dataset, networks, rows, seeds, seed)
    _check_robust(robust, severity)
    _check_teachers(dataset.fit, rows, labels, teachers)
    settings: dict[str, Any] = {"device": device, "precision": precision, "recipe": recipe, "labels": labels}
    settings |= {"robust": tuple(robust), "severity": severity, "teachers": tuple(teachers)}
    settings["looks"] = protocol.looks if protocol.select == BEST_ON_TEST else 0
    with one_thread():
        bench = _bench(distilled, subject, dataset, rows, seeds, seed, **settings)
    if workers > 1:
        share(bench)
    names, shown = (SUBJECT, *rows), label_networks(networks)
    pairs = [(net, label, row) for net, label in zip(networks, shown, strict=True) for row in names]
    rates = {row: _rates(protocol, recipe, distilled, row) for row in names}
    searched = protocol.rates == "validation"
    trials = [Job(net, label, row, lr) for net, label, row in pairs for lr in rates[row] if searched]
    report = reporter(log, on_progress, len(trials) + len(pairs) * seeds)
    keeping = Keeping(bench, kept)
    with judging(bench, workers) as results:
        tried = [report(record) for record in keeping.run(results, trials)]
        chosen = {
            (label, row): choose(tried, label, row) if searched else rates[row][0] for _, label, row in pairs
        }
        bench.test.unseal()
        finals = [Job(*pair, chosen[pair[1:]], i) for pair in pairs for i in range(seeds)]
        scored = [report(record) for record in keeping.run(results, finals)]
    table = tuple(_row(bench, distilled, net, label, row, tried + scored) for net, label, row in pairs)
    parts, untested = sizes_of(dataset.spec.classes, dataset.fit, dataset.validation, dataset.test)
    return Table(
        dataset.fit.spec.name,
        table,
        recipe,
        seed,
        cost_of(distilled.manifest),
        _source_matches(bench.distilled, dataset.fit),
        scores=table_scores(table, labels != "hard"),
        protocol=protocol.name,
        protocol_spec=protocol.to_dict(),
        fingerprint=dataset.fit.spec.fingerprint,
        parts=parts,
        untested=untested,
    )


def _rates(protocol: Protocol, recipe: Recipe, distilled: Judged, row: str) -> tuple[float, ...]:
    """The rates of a row: those to try, or the one that the protocol fixes."""
    learned = learned_rate(distilled) if VARIANTS.get(row, row) == SUBJECT else None
    if protocol.rates == "learned":  # every row, as the publication's own rivals, takes the set's rate
        rate = learned_rate(distilled)
        return (recipe.lrs[0] if rate is None else rate,)
    return trial_rates(recipe, learned) if protocol.rates == "validation" else recipe.lrs


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


def _check_robust(robust: Sequence[str], severity: int) -> None:
    for name in robust:
        require(name, (*CORRUPTIONS, PGD), "robust")
    if robust:
        require(severity, SEVERITIES, "severity")


def _check_teachers(fit: Images, rows: Sequence[str], labels: str, teachers: Sequence[nn.Module]) -> None:
    if not teachers and (labels == "dynamic" or SAME_LABELS in rows):
        what = f"row '{SAME_LABELS}'" if SAME_LABELS in rows else "a set with dynamic labels"
        raise UsageError(f"{what} needs teachers and there are none", "Give experts=DIR, a buffer of them")
    if HARD in rows and labels == "hard":
        raise UsageError(f"row '{HARD}' of a set with hard labels", "Leave it out, distilled is the same")
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
    distilled: Judged,
    images: Images | Composites,
    dataset: Dataset,
    rows: Sequence[str],
    seeds: int,
    seed: int,
    **settings: Any,
) -> Bench:
    """All that jobs share; the whole evaluation takes place in the set's own model-input space."""
    spec = dataset.fit.spec
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
    return Bench(images, fit, validation, Sealed(test), picks, seed=seed, soft=soft, **settings)


def _row(
    bench: Bench, distilled: Judged, net: NetSpec, label: str, row: str, records: Sequence[Record]
) -> Row:
    mine = [record for record in records if (record["network"], record["row"]) == (label, row)]
    trials = [record for record in mine if record["kind"] == "trial"]
    finals = [record for record in mine if record["kind"] == "final"]
    count = len(bench.training_set(row, None))
    cost = label_cost(row, bench.labels, distilled, len(bench.fit.spec.classes))
    spec, own = resolve(net, bench.fit.spec.shape), VARIANTS.get(row, row) == SUBJECT
    return Row(
        name=row,
        network=label,
        values=tuple(record["test"] for record in finals),
        steps=finals[0]["steps"],
        nbytes=dict(distilled.nbytes) if own else real_bytes(bench.fit, count, *cost),
        lr=finals[0]["lr"],
        trials=tuple({"lr": record["lr"], "validation": record["validation"]} for record in trials),
        train_seconds=round(sum(record["seconds"] for record in mine), 3),
        count=count,
        ipc=_ipc(distilled, own, count / len(bench.fit.spec.classes)),
        network_spec=spec.to_dict(),
        seen_by_matcher=seen_by(distilled.manifest, spec),
        measures=measures_of(finals),
    )


def _ipc(distilled: Judged, own: bool, each: float) -> float:
    """Images of a class: of the set what its manifest says, since composites cost less than images."""
    said = (distilled.manifest.get("budget") or {}).get("ipc")
    return float(said) if own and type(said) is int else round(each, 2)


def seen_by(manifest: Mapping[str, Any], spec: NetSpec) -> bool | None:
    """Whether the set was distilled with this family of networks; None where the manifest does not say."""
    used = (manifest.get("recipe") or {}).get("network")
    if not isinstance(used, Mapping) or not isinstance(used.get("name"), str):
        return None
    return family(used["name"]) == family(spec.name)


def _source_matches(images: Images | Composites, fit: Images) -> bool | None:
    mine, theirs = images.spec.fingerprint, fit.spec.fingerprint
    return mine == theirs if mine and theirs else None

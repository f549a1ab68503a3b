"""The judge: protocol `standard-v1` retrains fresh networks on a distilled set and on its rivals.

Every row gets the same recipe, steps, trials, weights, batches and augmentation; validation chooses the rate
and the test part is scored once for each trained network. The judge knows nothing of how a set was made.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from ddengine.bench import DRAWN_ANEW, SUBJECT, Bench, Job, Record, run_job, share
from ddengine.data import Dataset
from ddengine.errors import UsageError, require, require_positive
from ddengine.nets import build, family, resolve
from ddengine.nets.core import NetSpec
from ddengine.ops.dsa import strategy_for
from ddengine.parallel import job_pool, one_thread
from ddengine.rng import Rng
from ddengine.tables import Row, Table, cost_of, label_networks
from ddengine.train import Recipe
from ddengine.types import Images, label_bytes
from synth.starts import SELECTIONS, random_total

ROWS = ("random", "random_bytes", "herding", "kmeans", "full")

Log = Callable[[Record], None]
Progress = Callable[[int, int], None]


@runtime_checkable
class Judged(Protocol):
    """All that the judge sees of a distilled set: what is stored, what its manifest says, and its images."""

    @property
    def tensors(self) -> Mapping[str, Tensor]: ...

    @property
    def manifest(self) -> Mapping[str, Any]: ...

    @property
    def nbytes(self) -> Mapping[str, int]: ...

    def decode(self) -> Images: ...


def evaluate(
    distilled: Judged,
    dataset: Dataset,
    *,
    networks: Sequence[NetSpec],
    seeds: int = 5,
    seed: int = 0,
    rows: Sequence[str] = ROWS,
    recipe: Recipe | None = None,
    workers: int = 1,
    device: str = "cpu",
    precision: str = "fp32",
    log: Log | None = None,
    on_progress: Progress | None = None,
) -> Table:
    """Judge `distilled` beside `rows` by `standard-v1` with `seeds` fresh networks of each kind.

    The result is a function of the set, the data, `networks`, `seeds`, `seed`, `rows` and `recipe` (None: the
    default with the dataset's augmentation), not of `workers`. `log` gets one record for each trained network
    (trials too), `on_progress` the networks done and their number. Raises UsageError for an empty validation
    or test part, a set of other classes or shape, an unknown row; DDError when a worker process dies.
    """
    recipe = recipe or Recipe(augment=strategy_for(dataset.fit.spec.name))
    _check(dataset, networks, rows, seeds, seed)
    with one_thread():
        bench = _bench(distilled, dataset, rows, seeds, recipe, seed, device, precision)
    if workers > 1:
        share(bench)
    names, labels = (SUBJECT, *rows), label_networks(networks)
    pairs = [(net, label, row) for net, label in zip(networks, labels, strict=True) for row in names]
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


def count_for_bytes(nbytes: int, fit: Images) -> int:
    """Real uint8 images that fit in `nbytes` at c*h*w bytes and one label each: at least 1, at most all."""
    c, h, w = fit.spec.shape
    return min(max(nbytes // (c * h * w + label_bytes(len(fit.spec.classes))), 1), len(fit))


def _check(dataset: Dataset, networks: Sequence[NetSpec], rows: Sequence[str], seeds: int, seed: int) -> None:
    for name, part in (("fit", dataset.fit), ("validation", dataset.validation), ("test", dataset.test)):
        if not len(part):
            raise UsageError(
                f"the {name} part of '{dataset.fit.spec.name}' is empty", "Give a dataset with more images"
            )
    for row in rows:
        require(row, (*SELECTIONS, "random_bytes", "full"), "row")
    require_positive("seeds", seeds)
    resolved = [resolve(net, dataset.fit.spec.shape) for net in networks]
    for net in resolved:  # a network that does not fit is refused before any is trained
        build(net, dataset.fit.spec.shape, len(dataset.fit.spec.classes), Rng(seed).torch("check"))
    if not resolved or len(set(resolved)) < len(resolved) or len(set(rows)) < len(rows):
        raise UsageError("networks or rows are empty or repeat one another", "Give each network and row once")


def _bench(
    distilled: Judged,
    dataset: Dataset,
    rows: Sequence[str],
    seeds: int,
    recipe: Recipe,
    seed: int,
    device: str,
    precision: str,
) -> Bench:
    """All that jobs share; the whole evaluation takes place in the set's own model-input space."""
    images, spec = distilled.decode(), dataset.fit.spec
    images = replace(images, x=images.x.detach().cpu(), y=images.y.detach().cpu())
    if (images.spec.shape, images.spec.classes) != (spec.shape, spec.classes):
        raise UsageError(
            f"the set holds {images.spec.shape} images of {len(images.spec.classes)} classes, "
            f"'{spec.name}' {spec.shape} of {len(spec.classes)}, or their classes differ",
            "Evaluate the set on the dataset that it was distilled from",
        )
    fit, validation, test = (
        replace(part, spec=images.spec) for part in (dataset.fit, dataset.validation, dataset.test)
    )
    count = count_for_bytes(distilled.nbytes["total"], fit)
    ipc = max(1, round(int(distilled.manifest.get("count", len(images))) / len(spec.classes)))
    picks = dict(_picks(fit, rows, ipc, count, seeds, Rng(seed).fold("judge", "pick")))
    return Bench(images, fit, validation, test, picks, recipe, seed, device, precision)


def _picks(
    fit: Images, rows: Sequence[str], ipc: int, count: int, seeds: int, rng: Rng
) -> Iterator[tuple[tuple[str, int | None], Tensor]]:
    for row in rows:
        for index in (None, *range(seeds)) if row in DRAWN_ANEW else (None,):
            here = rng.fold(row, "trial" if index is None else index)
            if row == "random_bytes":
                yield (row, index), random_total(fit, count, here)
            elif row != "full":
                yield (row, index), SELECTIONS[row](fit, ipc, here)


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
    spec = resolve(net, bench.fit.spec.shape)
    return Row(
        name=row,
        network=label,
        values=tuple(record["test"] for record in finals),
        steps=bench.recipe.steps,
        nbytes=dict(distilled.nbytes) if row == SUBJECT else real_bytes(bench.fit, count),
        lr=finals[0]["lr"],
        trials=tuple({"lr": record["lr"], "validation": record["validation"]} for record in trials),
        train_seconds=round(sum(record["seconds"] for record in mine), 3),
        count=count,
        ipc=round(count / len(bench.fit.spec.classes), 2),
        network_spec=spec.to_dict(),
        seen_by_matcher=seen_by(distilled.manifest, spec),
    )


def real_bytes(fit: Images, count: int) -> dict[str, int]:
    """Bytes by part of `count` real images stored as uint8 with one label each."""
    c, h, w = fit.spec.shape
    images, labels = count * c * h * w, count * label_bytes(len(fit.spec.classes))
    return {"images": images, "labels": labels, "extras": 0, "total": images + labels}


def seen_by(manifest: Mapping[str, Any], spec: NetSpec) -> bool | None:
    """Whether the set was distilled with this family of networks; None where the manifest does not say."""
    used = (manifest.get("recipe") or {}).get("network")
    if not isinstance(used, Mapping) or not isinstance(used.get("name"), str):
        return None
    return family(used["name"]) == family(spec.name)


def _source_matches(images: Images, fit: Images) -> bool | None:
    mine, theirs = images.spec.fingerprint, fit.spec.fingerprint
    return mine == theirs if mine and theirs else None

"""Architecture search by proxy (as in DC, DSA, DM, DataDAM): rank networks by what a small set makes of them.

Every architecture is trained on every set for as many steps and scored on the validation part; where the
recipe has several rates, each is tried for each architecture and the best mean counts. The search never sees
the test part. The reference is all the data under a longer recipe, its rates chosen on validation too, each
finished network scored on the test part once.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from statistics import fmean

from ddengine.bench import Log, Progress, Record, reporter
from ddengine.composites import Composites
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
from ddengine.downstream_bench import Job, Key, Shared, View, run_jobs
from ddengine.errors import UsageError
from ddengine.nas_table import NasTable, Scored
from ddengine.nets import resolve
from ddengine.nets.core import NetSpec
from ddengine.parallel import one_thread
from ddengine.rng import Rng
from ddengine.tables import label_networks
from ddengine.train import Recipe
from ddengine.types import Images

REFERENCE = "reference"


def convnet_space(
    widths: Sequence[int] = (8, 16, 32),
    depths: Sequence[int] = (1, 2, 3),
    norms: Sequence[str] = ("none", "instance", "batch", "layer"),
) -> list[NetSpec]:
    """ConvNets of every width, depth and norm, widths outermost."""
    return [NetSpec("convnet", *choice) for choice in product(widths, depths, norms)]


@dataclass(frozen=True)
class Setting:
    """What a search and its reference share: architectures, `seeds` fresh networks of each, how they run."""

    space: tuple[NetSpec, ...]
    seeds: int = 1
    seed: int = 0
    workers: int = 1
    device: str = "cpu"
    precision: str = "fp32"
    log: Log | None = None
    on_progress: Progress | None = None


def nas(
    dataset: Dataset,
    sets: Mapping[str, Images | Composites],
    *,
    space: Sequence[NetSpec],
    recipe: Recipe,
    reference_recipe: Recipe,
    rows: Sequence[str] = ROWS,
    ipc: int | None = None,
    nbytes: Mapping[str, Mapping[str, int]] | None = None,
    seeds: int = 1,
    seed: int = 0,
    workers: int = 1,
    device: str = "cpu",
    precision: str = "fp32",
    log: Log | None = None,
    on_progress: Progress | None = None,
) -> NasTable:
    """Rank `space` by each of `sets` and of `rows` under `recipe`, beside all the data under another.

    `rows` are real images, `ipc` a class (None: as many as the first set has), random ones drawn anew for
    each of `seeds`; "full" is all the data for as many steps: a search stopped early. `nbytes` is what sets
    cost; those not in it count a byte for each value of an image. The result is a function of the data, sets
    and settings, not of `workers`. Raises UsageError; DDError when a worker process dies.
    """
    setting = Setting(tuple(space), seeds, seed, workers, device, precision, log)
    first = (len(sets) + len(rows)) * len(space) * len(recipe.lrs) * seeds
    total = first + len(space) * (len(_tried(reference_recipe)) + seeds)
    spec = one_space([(name, images.spec) for name, images in sets.items()], dataset.spec)
    within = [replace(setting, on_progress=_part(on_progress, done, total)) for done in (0, first)]
    found = search(dataset, sets, recipe, within[0], rows=rows, ipc=ipc, nbytes=nbytes)
    truth = reference(in_space(dataset, spec), reference_recipe, within[1])
    return compared(dataset, setting, found, truth, recipe, reference_recipe)


def _part(on_progress: Progress | None, before: int, total: int) -> Progress | None:
    return None if on_progress is None else lambda done, _: on_progress(before + done, total)


def compared(
    dataset: Dataset,
    setting: Setting,
    found: Sequence[Scored],
    truth: Scored,
    recipe: Recipe,
    reference_recipe: Recipe,
) -> NasTable:
    """The table of what `search` and `reference` found for one setting."""
    space = tuple(resolve(network, dataset.spec.shape) for network in setting.space)
    names = tuple(label_networks(setting.space))
    return NasTable(
        dataset.spec.name, names, space, truth, tuple(found), recipe, reference_recipe, setting.seed
    )


def search(
    dataset: Dataset,
    sets: Mapping[str, Images | Composites],
    recipe: Recipe,
    setting: Setting,
    *,
    rows: Sequence[str] = ROWS,
    ipc: int | None = None,
    nbytes: Mapping[str, Mapping[str, int]] | None = None,
) -> tuple[Scored, ...]:
    """Validation scores of the space on each of `sets` and of `rows`, as `nas` has them.

    A row's scores do not depend on which others there are.
    """
    check_rows(tuple(sets), rows)
    _check(dataset, setting)
    for name, images in sets.items():
        check_set(name, images, dataset.spec)
        if not len(images):
            raise UsageError(f"set '{name}' is empty", "Give a set with at least one image")
    data = in_space(dataset, one_space([(name, held.spec) for name, held in sets.items()], dataset.spec))
    ipc = same_ipc(ipc, [len(images) for images in sets.values()], len(data.spec.classes), rows)
    with one_thread():
        picks = real_picks(data.fit, rows, ipc, setting.seeds, Rng(setting.seed).fold("nas", "pick"))
        views: dict[Key, View] = {key: View(data.fit, index) for key, index in picks}
    views |= {(name, i): View(images) for name, images in sets.items() for i in range(setting.seeds)}
    names = (*sets, *rows)
    jobs = [
        _job(setting, (name, i), arch, lr, ("nas", i), {"kind": "search", "index": i})
        for name in names
        for arch in range(len(setting.space))
        for lr in recipe.lrs
        for i in range(setting.seeds)
    ]
    run = Shared(views, {(): View(data.validation)}, "validation", recipe, *_where(setting))
    records = run_jobs(run, jobs, setting.workers, reporter(setting.log, setting.on_progress, len(jobs)))
    costs = {name: cost(views[name, 0].images, sum(views[name, 0].counts)) for name in names}
    costs |= {name: dict(known) for name, known in (nbytes or {}).items() if name in costs}
    return tuple(_scored(run, name, records, views[name, 0], costs[name]) for name in names)


def reference(dataset: Dataset, recipe: Recipe, setting: Setting) -> Scored:
    """Test scores of the space trained on the whole fit part; several rates are tried on validation."""
    _check(dataset, setting)
    archs, tried, path = range(len(setting.space)), _tried(recipe), ("nas", REFERENCE)
    note = reporter(setting.log, setting.on_progress, len(archs) * (len(tried) + setting.seeds))
    everything = View(dataset.fit)
    run = Shared({(REFERENCE,): everything}, {}, "", recipe, *_where(setting))
    trials = [
        _job(setting, (REFERENCE,), arch, lr, (*path, "trial"), {"kind": "trial"})
        for arch in archs
        for lr in tried
    ]
    choosing = replace(run, scored={(): View(dataset.validation)}, part="validation")
    records = run_jobs(choosing, trials, setting.workers, note) if trials else []
    rates = [_best(records, arch, "validation")[0] if tried else recipe.lrs[0] for arch in archs]
    finals = [
        _job(setting, (REFERENCE,), arch, rates[arch], (*path, i), {"kind": "final", "index": i})
        for arch in archs
        for i in range(setting.seeds)
    ]
    scoring = replace(run, scored={(): View(dataset.test)}, part="test")
    scored = run_jobs(scoring, finals, setting.workers, note)
    found = _scored(scoring, REFERENCE, scored, everything, cost(dataset.fit, len(dataset.fit)))
    return replace(found, seconds=_seconds(records + scored))


def _tried(recipe: Recipe) -> tuple[float, ...]:
    return recipe.lrs if len(recipe.lrs) > 1 else ()


def _where(setting: Setting) -> tuple[int, str, str]:
    return setting.seed, setting.device, setting.precision


def _check(dataset: Dataset, setting: Setting) -> None:
    check_task(dataset, setting.space, seeds=setting.seeds, workers=setting.workers)
    resolved = [resolve(network, dataset.spec.shape) for network in setting.space]
    if len(resolved) < 2 or len(set(resolved)) < len(resolved):
        raise UsageError(
            f"a space of {len(resolved)} architectures, {len(set(resolved))} of them different",
            "Give at least two, each once",
        )


def _job(
    setting: Setting, trained: Key, arch: int, lr: float, path: tuple[str | int, ...], about: Record
) -> Job:
    """One network; its streams depend on the index alone, so that architectures are compared in pairs."""
    network = setting.space[arch]
    head = {"task": "nas", "row": trained[0], "architecture": arch, "network": network.to_dict()}
    return Job(network, trained, (), lr, path, head | about)


def _best(records: Sequence[Record], arch: int, part: str) -> tuple[float, tuple[float, ...]]:
    """The rate with the best mean score of an architecture, the first of equals, and its scores."""
    scores: dict[float, list[float]] = {}
    for record in records:
        if record["architecture"] == arch:
            scores.setdefault(record["lr"], []).append(record[part])
    lr = max(scores, key=lambda rate: fmean(scores[rate]))
    return lr, tuple(scores[lr])


def _scored(
    run: Shared, name: str, records: Sequence[Record], view: View, nbytes: Mapping[str, int]
) -> Scored:
    mine = [record for record in records if record["row"] == name]
    found = [_best(mine, arch, run.part) for arch in sorted({record["architecture"] for record in mine})]
    return Scored(
        name=name,
        values=tuple(values for _, values in found),
        lrs=tuple(lr for lr, _ in found),
        steps=run.recipe.steps,
        count=sum(view.counts),
        nbytes=nbytes,
        seconds=_seconds(mine),
    )


def _seconds(records: Iterable[Record]) -> float:
    return round(sum(record["seconds"] for record in records), 3)

"""Memory and time of an evaluation before it runs: every kind of job timed over a few of its steps."""

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ddengine import loop
from ddengine.artefacts import artefact, holds_graphs, run_of
from ddengine.bench import VARIANTS, Bench, Job, record_of, stream_of
from ddengine.config import EvaluateConfig
from ddengine.data import Dataset
from ddengine.errors import UsageError
from ddengine.evaluating import find_protocol, recipe_given, teachers_of
from ddengine.forecast import Forecast, disk_room, memory_room
from ddengine.given import Watch, device_of, load_named, precision_of
from ddengine.judge import learned_rate, trial_rates
from ddengine.nets import build, count_parameters
from ddengine.nets.core import NetSpec
from ddengine.ops.memory import resident_memory
from ddengine.parallel import one_thread, start_method, workers_of
from ddengine.protocols import BEST_ON_TEST, Protocol
from ddengine.rivals import draw, label_mode, label_picks, training_images, usual_rows
from ddengine.rng import Rng
from ddengine.sealed import Sealed
from ddengine.stacked import AT_ONCE, stacks, train_stacked
from ddengine.subject import check_same, chosen
from ddengine.train import Recipe, train
from synth import DistilledSet

SECONDS = 20.0  # that all timed steps may take together
FIRST, MOST = 2, 64  # steps of the shorter and of the longest timed training
SCORED = 250  # images that a network is timed on
SPAWNED = 6.0  # seconds until a worker process that starts anew has imported all it needs: measured
TRIAL, FINAL, CLASS = 150, 350, 22  # bytes of a trained network's line, and of each class in a final one's


@dataclass(frozen=True)
class JobCost:
    """Seconds of training one network: before its steps, and of each; of scoring one image, twice over."""

    start: float
    step: float
    validation: float
    test: float


def estimate_evaluate(path: Path, config: EvaluateConfig, watch: Watch = Watch()) -> Forecast:
    """What `ddengine evaluate PATH` would take with this configuration, nothing being kept from before.

    Raises UsageError as the command does, and for a set of graphs.
    """
    began = time.perf_counter()
    distilled = DistilledSet.load(artefact(path))
    if holds_graphs(distilled):
        raise UsageError("an evaluation of graphs is not estimated", "Run it: networks of graphs are small")
    dataset: Dataset = load_named(config.dataset, watch)
    check_same(distilled, dataset, watch)
    rules, networks = find_protocol(config.protocol), chosen(config, distilled)
    bench, rows = _bench(distilled, dataset, config, rules, watch)
    start, before = time.perf_counter() - began, resident_memory()
    seeds = rules.seeds if config.seeds is None else config.seeds
    work, jobs, finals, steps = 0.0, 0, 0, 0
    with one_thread() if torch.device(bench.device).type == "cpu" else nullcontext():
        for network in networks:
            costs = _costs(bench, network, rows, seeds, SECONDS / len(networks))
            for row in rows:
                trials, own = _trials(rules, bench.recipe, distilled, row), bench.recipe_of(row).steps
                seconds = costs[row]
                each = seconds.start + own * seconds.step
                tests = 1 + bench.looks
                work += (trials + seeds) * each + trials * len(dataset.validation) * seconds.validation
                work += seeds * tests * len(dataset.test) * seconds.test
                jobs, finals, steps = jobs + trials + seeds, finals + seeds, steps + (trials + seeds) * own
    place = torch.device(bench.device)
    workers = min(workers_of(config.workers, place.type), jobs)
    slow = SPAWNED if workers > 1 and start_method() == "spawn" else 0.0
    peak = loop.peak_memory(place)
    folder = Path(config.out).expanduser() if config.out else run_of(path) or Path()
    written = bool(config.out or run_of(path))
    lines = jobs * TRIAL + finals * (FINAL - TRIAL + CLASS * len(dataset.spec.classes))
    return Forecast(
        "evaluate",
        f"{distilled.spec.name}, {jobs} networks on {workers} {'workers' if workers > 1 else 'worker'}",
        start + slow + work / workers,
        peak if workers == 1 else before + workers * peak,
        2 * lines * written,  # the log, and the table that repeats it
        memory_room(place),
        disk_room(folder),
        {"start": start + slow, f"{jobs} networks": work / workers},
        {
            "images": len(dataset.fit), "networks": jobs, "optimiser steps": steps,
            "parameters": _parameters(networks, dataset),
        },
    )  # fmt: skip


def _bench(
    distilled: DistilledSet, dataset: Dataset, config: EvaluateConfig, rules: Protocol, watch: Watch
) -> tuple[Bench, tuple[str, ...]]:
    """What the jobs would share, with one draw for the networks and one for the trials; all rows.

    Validation images stand in for the test part, which stays unread.
    """
    where, labels = device_of(config.device), label_mode(distilled.manifest)
    subject, teachers = training_images(distilled), teachers_of(config.experts, distilled, watch)
    recipe = recipe_given(config.recipe, distilled.manifest, dataset.spec.name, rules) or rules.recipe_for(
        distilled.manifest, dataset.spec.name, len(subject), labels == "dynamic"
    )
    augmented = (recipe.augment, recipe.mix) != ("none", "none")
    rows = usual_rows(labels, bool(teachers), augmented) if config.rows is None else tuple(config.rows)
    fit, validation = (replace(part, spec=subject.spec) for part in (dataset.fit, dataset.validation))
    rng = Rng(config.seed).fold("judge", "pick")
    picks = dict(draw(distilled, fit, rows, labels, len(subject), 1, rng))
    soft = label_picks(fit, picks, teachers, str(where), distilled) if labels == "static" else {}
    few = validation.take(torch.arange(len(validation))[:SCORED])
    test = Sealed(few)
    test.unseal()
    looks = rules.looks if rules.select == BEST_ON_TEST else 0
    bench = Bench(
        subject, fit, few, test, picks, recipe, config.seed, str(where),
        precision_of(config.precision, where), labels, tuple(teachers), soft,
        tuple(config.robust), config.severity, looks,
    )  # fmt: skip
    return bench, ("distilled", *rows)


def _trials(rules: Protocol, recipe: Recipe, distilled: DistilledSet, row: str) -> int:
    """Networks that are trained to choose a rate for `row`."""
    if rules.rates != "validation":
        return 0
    learned = learned_rate(distilled) if VARIANTS.get(row, row) == "distilled" else None
    return len(trial_rates(recipe, learned))


def _costs(
    bench: Bench, network: NetSpec, rows: Sequence[str], seeds: int, limit: float
) -> dict[str, JobCost]:
    """The cost of a job of each row; rows whose batches and labels are alike share one measurement."""
    kinds: dict[Any, list[str]] = {}
    for row in rows:
        recipe, images = bench.recipe_of(row), bench.training_set(row, 0)
        batch = min(recipe.batch_size, len(images))
        labeled = bench.labeler(row) is not None
        kinds.setdefault((batch, images.y_kind, recipe.augment, labeled), []).append(row)
    found: dict[str, JobCost] = {}
    for alike in kinds.values():
        cost = _cost(bench, network, alike[0], seeds, limit / len(kinds))
        found |= dict.fromkeys(alike, cost)
    return found


def _cost(bench: Bench, network: NetSpec, row: str, seeds: int, limit: float) -> JobCost:
    _trained(bench, network, row, seeds, 1)  # warms up
    short, _ = _trained(bench, network, row, seeds, FIRST)
    longer = min(bench.recipe_of(row).steps, MOST, FIRST + int(limit * FIRST / max(short, 1e-9)))
    if longer > FIRST:
        seconds, net = _trained(bench, network, row, seeds, longer)
        step = max(0.0, seconds - short) / (longer - FIRST)
    else:
        seconds, net = _trained(bench, network, row, seeds, FIRST)
        step = seconds / FIRST
    job = Job(network, network.name, row, bench.recipe.lrs[0])
    scored = []
    for index in (None, 0):
        began = time.perf_counter()
        record_of(net, bench, replace(job, index=index), Rng(bench.seed))
        scored.append((time.perf_counter() - began) / len(bench.validation))
    return JobCost(max(0.0, short - FIRST * step), step, scored[0], scored[1])


def _trained(
    bench: Bench, network: NetSpec, row: str, seeds: int, steps: int
) -> tuple[float, torch.nn.Module]:
    """Seconds for each network of a row that the judge trains for `steps` steps; and one of them."""
    recipe, images = replace(bench.recipe_of(row), steps=steps), bench.training_set(row, 0)
    job, labeler = Job(network, network.name, row, recipe.lrs[0], 0), bench.labeler(row)
    rng, place = stream_of(bench, job), torch.device(bench.device)
    together = place.type == "cuda" and stacks(network) and labeler is None and not bench.looks
    count = min(seeds, AT_ONCE) if together else 1
    began = time.perf_counter()
    if together:
        rates, rngs = [job.lr] * count, [rng.fold(i) for i in range(count)]
        net = train_stacked(network, images, recipe, rates, rngs, place, bench.precision)[0]
    else:
        net = train(network, images, recipe, job.lr, rng, place, bench.precision, labeler)
    if place.type == "cuda":
        torch.cuda.synchronize(place)
    return (time.perf_counter() - began) / count, net


def _parameters(networks: Sequence[NetSpec], dataset: Dataset) -> int:
    """Parameters of the largest network."""
    shape, classes = dataset.spec.shape, len(dataset.spec.classes)
    return max(count_parameters(build(net, shape, classes, Rng(0).torch("weights"))) for net in networks)

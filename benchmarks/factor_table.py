"""Every matcher of images with plain ones (factor 1) and grids of four (factor 2): equal bytes, one recipe.

    python benchmarks/factor_table.py --root DIR --runs RUNS --workers 2
    ddengine buffer dataset=fashion_mnist dataset.root=DIR network.width=16 count=4 max_start_epoch=5 \\
      expert_epochs=2 workers=2 out=BUFFER
    python benchmarks/factor_table.py --root DIR --runs RUNS --experts BUFFER --matchers trajectory
    pip install examples/plugin
    python benchmarks/factor_table.py --root DIR --runs RUNS --matchers gradient
    ddengine buffer dataset=fashion_mnist dataset.root=DIR network.width=16 network.norm=batch count=2 \
      epochs=3 recipe=squeeze out=TEACHERS
    python benchmarks/factor_table.py --root DIR --runs RUNS --experts TEACHERS --matchers compensator

Sets of one size in bytes: at factor 2 as many stored images stand for four times the training images. Each is
a run in RUNS, which goes on where it was cut off, and one line of --out, which is kept; lines of others lie
beside it. The rows "start" are what the matchers start from, not distilled: real images at factor 1, four
down-scaled real images in each stored one at factor 2. Matchers that choose real images, and compensators,
which are a form of their own, have no factor. The first set is judged beside random real images (as
many, and as many bytes), k-means and all the data. The table comes last, on stdout.
"""

import argparse
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import matchers
from ddengine import data, files, judge, loop
from ddengine.nets import NetSpec
from ddengine.rng import Rng
from ddengine.tables import Row, cost_of, spread
from ddengine.train import Recipe
from ddengine.types import Budget, Task
from expert_buffers import ExpertBuffer
from synth import DistilledSet

HERE = Path(__file__).parent / "results"
DESCENT = ("attention", "distribution", "characteristic")
FORMLESS = ("herding", "kcenter", "compensator")  # their sets are never grids
BESIDE = ("random", "random_bytes", "kmeans", "full")
TRAJECTORY = {"lr": 300.0, "schedule": "cosine", "window": {"max": 3}, "inner": {"steps": 40, "rate": 0.03}}
GRADIENT = {"lr": 0.5, "inner": 10}  # published .1 and, at 10 images per class, 50: for 1,000 steps
HEAD = ("set", "factor", "trained on", "bytes", "accuracy", "interval", "rate", "distilled in")


def main() -> None:
    o = arguments()
    made = settings(o)
    dataset = data.load(o.dataset, root=o.root)
    buffer = ExpertBuffer(o.experts) if o.experts else None
    task = Task(dataset.fit, Budget(o.ipc), buffer, origin={"name": o.dataset})
    for name, factor in [(name, factor) for name in o.matchers for factor in o.factors]:
        if name in FORMLESS and factor > 1:
            continue
        if any((line["set"], line["factor"]) == (name, factor) for line in lines(o.out, made)):
            continue
        distilled, seconds = distil(task, name, factor, o)
        known = {line["set"] for line in lines(o.out, made)}
        for row in judged(distilled, dataset, o, [row for row in BESIDE if row not in known]):
            own = row.name == "distilled"
            who = {"set": name, "factor": factor} if own else {"set": row.name, "factor": None}
            cost = {"seconds": seconds, **cost_of(distilled.manifest)} if own else {}
            files.append_json_line(o.out, {**who, **record(row), "cost": cost, **made})
            print(json.dumps({**who, "values": row.values}), flush=True)
    print(table(lines(o.out, made)))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", default="fashion_mnist")
    parser.add_argument("--root")
    parser.add_argument("--runs", type=Path, required=True, help="folder of the distillation runs")
    parser.add_argument("--experts", help="an expert buffer, for trajectory matching")
    parser.add_argument("--matchers", nargs="+", default=["start", *DESCENT, *FORMLESS[:2]])
    parser.add_argument("--factors", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--ipc", type=int, default=10)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--steps", type=int, default=500, help="of every matcher")
    parser.add_argument("--real", type=int, default=64, help="real images of a class in a step")
    parser.add_argument("--lr", type=float, default=2.0, help="of the pixels, but in trajectory matching")
    parser.add_argument("--train-steps", type=int, default=300, help="of every judged network")
    parser.add_argument("--lrs", type=float, nargs="+", default=[0.003, 0.01, 0.03])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=HERE / "factor_table.jsonl")
    return parser.parse_args()


def settings(o: argparse.Namespace) -> dict[str, Any]:
    """What makes lines comparable, beside the matcher and the factor."""
    keys = ("dataset", "ipc", "width", "steps", "real", "lr", "train_steps", "lrs", "seeds")
    return {key: getattr(o, key) for key in keys}


def lines(out: Path, made: dict[str, Any]) -> list[dict[str, Any]]:
    """The lines of these settings that are there."""
    return [line for line in files.read_json_lines(out) if made.items() <= line.items()]


def options(name: str, o: argparse.Namespace) -> dict[str, Any]:
    """Equal steps and real images for the matchers that draw them, the trajectory's own for the other."""
    descent = {"real_per_class": o.real, "lr": o.lr, "schedule": "cosine"}
    own = {
        "trajectory": TRAJECTORY, "gradient": {"real_per_class": o.real, **GRADIENT}, "compensator": {},
    }  # fmt: skip
    return {**own.get(name, descent), "steps": o.steps}


def distil(task: Task, name: str, factor: int, o: argparse.Namespace) -> tuple[DistilledSet, float]:
    """The set of a matcher at a factor, and the seconds that it took; "start" is where they start."""
    form = {"name": "factored", "factor": factor} if factor > 1 else {}
    network = NetSpec("convnet", width=o.width)
    if name == "start":
        state = matchers.make("distribution", network, synth=form).init(task, Rng(0))
        return DistilledSet.make(state.synth, recipe={}, provenance={"budget": {"ipc": o.ipc}}), 0.0
    if name in FORMLESS:
        matcher = matchers.make(name, network, **(options(name, o) if name == "compensator" else {}))
    else:
        matcher = matchers.make(name, network, **options(name, o), synth=form)
    shown = f"{o.dataset}_{name}_f{factor}_ipc{o.ipc}_w{o.width}_{o.steps}_{o.real}_{o.lr:g}"
    result = loop.distill(task, matcher, out=o.runs / shown, progress=every_minute(shown))
    return result.distilled, result.seconds


def every_minute(shown: str) -> loop.Progress:
    """Tells how far a run is, once a minute."""
    last = time.monotonic()

    def told(step: int, steps: int, values: Any) -> None:
        nonlocal last
        if time.monotonic() - last > 60:
            last = time.monotonic()
            print(f"{shown}: step {step} of {steps}", flush=True)

    return told


def judged(
    distilled: DistilledSet, dataset: data.Dataset, o: argparse.Namespace, rows: list[str]
) -> Iterator[Row]:
    """The set and `rows` beside it under the one recipe: equal steps, the rate chosen on validation."""
    recipe = Recipe(steps=o.train_steps, lrs=tuple(o.lrs))
    networks = [NetSpec("convnet", width=o.width)]
    yield from judge.evaluate(
        distilled, dataset, networks=networks, seeds=o.seeds, rows=rows, recipe=recipe, workers=o.workers
    ).rows


def record(row: Row) -> dict[str, Any]:
    """A judged row as it is kept."""
    mean, std, interval = spread(row.values)
    return {
        "mean": mean, "std": std, "ci95": interval, "values": row.values, "count": row.count, "rate": row.lr,
        "bytes": dict(row.nbytes), "train_seconds": row.train_seconds, "torch": torch.__version__,
    }  # fmt: skip


def table(found: list[dict[str, Any]]) -> str:
    """All rows in Markdown."""
    rows = [_cells(HEAD), "|---" * len(HEAD) + "|"]
    for line in found:
        low, high = line["ci95"] or (line["mean"], line["mean"])
        score = f"{100 * line['mean']:.1f} ± {100 * (line['std'] or 0):.1f}"
        seconds = line["cost"].get("seconds")
        cost = f"{seconds:.0f} s" if seconds else ""
        size = (line["count"], f"{line['bytes']['total']:,}")
        interval = f"{100 * low:.1f} to {100 * high:.1f}"
        rows.append(
            _cells((line["set"], line["factor"] or "", *size, score, interval, f"{line['rate']:g}", cost))
        )
    return "\n".join(rows)


def _cells(values: tuple[Any, ...]) -> str:
    return "| " + " | ".join(map(str, values)) + " |"


if __name__ == "__main__":
    main()

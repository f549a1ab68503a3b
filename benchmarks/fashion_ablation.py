"""What moves attention matching away from random real images on Fashion-MNIST at 10 images per class.

    python benchmarks/fashion_ablation.py --root ../shared/data

Each row changes the one before it or the best one; all are distilled for the same number of steps and judged
by three fresh ConvNet-3 of width 32 on the *validation* part. Rows already in the result file are kept.
"""

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import matchers
from ddengine import data, files, loop
from ddengine.data import Dataset
from ddengine.nets.core import NetSpec
from ddengine.parallel import job_pool
from ddengine.rng import Rng
from ddengine.train import Recipe, accuracy, train
from ddengine.types import Budget, Images, Task

HERE = Path(__file__).parent / "results"
NETWORK, NETWORKS, IPC = NetSpec("convnet", width=32), 3, 10
RATE = {"lr": 4.0, "schedule": "cosine"}
BEST = {**RATE, "start": "kmeans"}
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "start: random": ("random", {}),
    "start: herding": ("herding", {}),
    "start: k-means": ("kmeans", {}),
    "paper settings (rate 1, constant)": ("attention", {"lr": 1.0, "follow_width": False}),
    "rate 4, cosine": ("attention", {**RATE, "follow_width": False}),
    "rate 4, cosine, weight follows width": ("attention", RATE),
    "the same from k-means": ("attention", BEST),
    "... without attention (= DM)": ("attention", {**BEST, "sam_weight": 0.0}),
    "... without augmentation": ("attention", {**BEST, "augment": "none"}),
    "... rate 10": ("attention", {**BEST, "lr": 10.0}),
    "... 2 networks a step, half the steps": ("attention", {**BEST, "networks_per_step": 2}),
}


@dataclass(frozen=True)
class Shared:
    """What every row needs."""

    dataset: Dataset
    steps: int
    recipe: Recipe


def run(shared: Shared, name: str) -> dict[str, Any]:
    """Distil one row and score it on validation."""
    kind, options = ROWS[name]
    if kind == "attention":
        steps = shared.steps // options.get("networks_per_step", 1)
        options = {"real_per_class": 64, **options, "steps": steps}
    task = Task(shared.dataset.fit, Budget(ipc=IPC))
    began = time.monotonic()
    made = loop.distill(task, matchers.make(kind, NETWORK, **options)).distilled.decode()
    seconds = time.monotonic() - began
    values = [score(shared, made, i) for i in range(NETWORKS)]
    mean = sum(values) / len(values)
    return {"row": name, "options": options, "validation": values, "mean": mean, "seconds": round(seconds)}


def score(shared: Shared, made: Images, index: int) -> float:
    """Validation accuracy of fresh network `index`."""
    net = train(NETWORK, made, shared.recipe, shared.recipe.lrs[0], Rng(0).fold("ablation", index))
    return accuracy(net, shared.dataset.validation)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", required=True)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=HERE / "fashion_ablation.jsonl")
    given = parser.parse_args()
    done = {record["row"] for record in files.read_json_lines(given.out)}
    todo = [name for name in ROWS if name not in done]
    dataset = data.load("fashion_mnist", root=given.root)
    shared = Shared(dataset, given.steps, Recipe(steps=200, lrs=(0.01,)))
    with job_pool(run, shared, given.workers) as results:
        for record in results(todo):
            files.append_json_line(given.out, {**record, "steps": given.steps, "torch": torch.__version__})
            print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()

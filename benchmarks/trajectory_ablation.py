"""What each part of trajectory matching does on Fashion-MNIST at one image per class, under one budget.

    ddengine buffer dataset=fashion_mnist dataset.root=DIR network.width=16 count=4 max_start_epoch=5 \\
      expert_epochs=2 workers=2 out=BUFFER
    python benchmarks/trajectory_ablation.py --root DIR --experts BUFFER

Every row is distilled by the same number of steps from the same experts and judged by three fresh networks of
the matcher's kind on the *validation* part, at the best of three rates there (a learned one among them). Rows
already in the result file are kept.
"""

import argparse
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import matchers
from ddengine import data, files, judge, loop
from ddengine.data import Dataset
from ddengine.parallel import job_pool
from ddengine.rng import Rng
from ddengine.train import Recipe, accuracy, train
from ddengine.types import Budget, Images, Task
from expert_buffers import ExpertBuffer

HERE = Path(__file__).parent / "results"
NETWORKS = 3
INNER = {"steps": 40, "rate": 0.02}
BASE: dict[str, Any] = {"lr": 300.0, "window": {"max": 3}}
DATM = {"labels": "learned", "start": "correct"}
AST = {"middle": "equal", "balance": True, "perturb": 1.0, "start": "representative"}
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "start: random": ("random", {}),
    "start: k-means": ("kmeans", {}),
    "MTT (adjoint)": ("trajectory", {}),
    "MTT with TESLA's gradient": ("trajectory", {"gradient": "tesla"}),
    "MTT from images that experts get right": ("trajectory", {"start": "correct"}),
    "MTT from representative images": ("trajectory", {"start": "representative"}),
    "MTT from k-means": ("trajectory", {"start": "kmeans"}),
    "+ fixed soft labels (experts')": ("trajectory", {**DATM, "labels": "soft"}),
    "+ learned soft labels (DATM)": ("trajectory", DATM),
    "+ learned soft labels, TESLA's gradient": ("trajectory", {**DATM, "gradient": "tesla"}),
    "+ assigned soft labels (TESLA)": ("trajectory", {"labels": "target"}),
    "+ AST terms": ("trajectory", AST),
    "+ AST terms with momentum .9": ("trajectory", {**AST, "inner": {"momentum": 0.9, "rate": 0.002}}),
    "+ AST terms and learned soft labels": ("trajectory", {**AST, "labels": "learned"}),
    "+ average of the set (FTD)": ("trajectory", {"ema": 0.99}),
    "without augmentation": ("trajectory", {"augment": "none"}),
}


@dataclass(frozen=True)
class Shared:
    """What every row needs."""

    dataset: Dataset
    experts: str
    ipc: int
    steps: int
    recipe: Recipe


def run(shared: Shared, name: str) -> dict[str, Any]:
    """Distil one row and score it on validation."""
    kind, options = ROWS[name]
    buffer = ExpertBuffer(shared.experts)
    if kind == "trajectory":
        inner = {**INNER, **options.get("inner", {})}
        options = {**BASE, **options, "inner": inner, "steps": shared.steps, "compile": "on"}
    task = Task(shared.dataset.fit, Budget(ipc=shared.ipc), buffer)
    began = time.monotonic()
    losses: list[float] = []
    result = loop.distill(
        task,
        matchers.make(kind, buffer.network(0), **options),
        progress=lambda step, steps, values: losses.append(values["loss"]) if "loss" in values else None,
    )
    seconds = time.monotonic() - began
    learned = judge.learned_rate(result.distilled)
    rates = judge.trial_rates(shared.recipe, learned)
    trials = {lr: scores(shared, result.distilled.decode(), buffer, lr) for lr in rates}
    best = max(trials, key=lambda lr: sum(trials[lr]))
    mean = sum(trials[best]) / NETWORKS
    tail = losses[-10:] if kind == "trajectory" else []
    return {
        "row": name, "options": options, "validation": trials[best], "mean": mean, "lr": best,
        "learned_rate": learned, "seconds": round(seconds), "loss": sum(tail) / len(tail) if tail else None,
    }  # fmt: skip


def scores(shared: Shared, made: Images, buffer: ExpertBuffer, lr: float) -> list[float]:
    """Validation accuracies of fresh networks."""
    recipe = replace(shared.recipe, lrs=(lr,))
    nets = (train(buffer.network(0), made, recipe, lr, Rng(0).fold("ablation", i)) for i in range(NETWORKS))
    return [accuracy(net, shared.dataset.validation) for net in nets]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", required=True)
    parser.add_argument("--experts", required=True)
    parser.add_argument("--ipc", type=int, default=1)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--train-steps", type=int, default=300)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rows", nargs="*", default=list(ROWS))
    parser.add_argument("--out", type=Path, default=HERE / "trajectory_ablation.jsonl")
    given = parser.parse_args()
    made = {"steps": given.steps, "ipc": given.ipc, "experts": ExpertBuffer(given.experts).digest[:12]}
    records = files.read_json_lines(given.out)
    done = {record["row"] for record in records if made.items() <= record.items()}
    todo = [name for name in given.rows if name not in done]
    dataset = data.load("fashion_mnist", root=given.root)
    recipe = Recipe(steps=given.train_steps, lrs=(0.003, 0.01, 0.03))
    shared = Shared(dataset, given.experts, given.ipc, given.steps, recipe)
    with job_pool(run, shared, given.workers) as results:
        for record in results(todo):
            files.append_json_line(given.out, {**record, **made, "torch": torch.__version__})
            print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()

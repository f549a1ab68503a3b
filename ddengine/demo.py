"""`ddengine demo`: distil the embedded digits at one image per class and judge the result, offline."""

import os
from pathlib import Path

import matchers
from ddengine import data, files, loop, report
from ddengine.config import DemoConfig
from ddengine.errors import require_positive
from ddengine.evaluating import evaluate
from ddengine.given import Watch
from ddengine.nets.core import NetSpec
from ddengine.ops.dsa import strategy_for
from ddengine.parallel import one_thread
from ddengine.tables import Table
from ddengine.train import Recipe
from ddengine.types import Budget, Task

NETWORK = NetSpec("convnet", width=32, depth=2)
OPTIONS = {"steps": 300, "lr": 0.5, "schedule": "cosine", "real_per_class": 64}
RECIPE = Recipe(steps=200, lrs=(0.01, 0.03), batch_size=128, augment=strategy_for("digits"))


def run_demo(config: DemoConfig, watch: Watch) -> Table:
    """Distil, judge, and write `report.md` beside the set and its picture into `config.out`."""
    require_positive("seeds", config.seeds)
    folder, dataset = Path(config.out), data.load("digits")
    task = Task(dataset.fit, Budget(ipc=1), origin={"name": "digits"})
    with one_thread():  # images of 8x8 pixels are too small to share out
        made = loop.distill(
            task,
            matchers.make("attention", NETWORK, **OPTIONS),
            seed=config.seed,
            out=folder,
            progress=watch.bar("distilling digits"),
            notice=watch.notice,
        )
    table = evaluate(
        made.distilled,
        dataset=dataset,
        seeds=config.seeds,
        seed=config.seed,
        recipe=RECIPE,
        workers=os.cpu_count() or 1,
        device="cpu",
        watch=watch,
        out=folder,
    )
    files.write_bytes(folder / "report.md", page(table, made).encode())
    watch.notice(f"wrote {folder / 'report.md'} and {folder / 'distilled' / 'preview.png'}")
    return table


def page(table: Table, made: loop.Result) -> str:
    """The demo's report: the table, the picture, and how it was made."""
    return "\n".join(
        [
            "# Digits at one image per class",
            "",
            f"Attention matching, {made.steps} steps, {made.seconds:.0f} s. Every row was trained "
            f"by the same recipe with the same {table.recipe.to_dict()['steps']} optimiser steps; "
            "rates were chosen on validation images.",
            "",
            report.table_markdown(table.to_json()),
            "![the distilled images, one row a class](distilled/preview.png)",
            "",
        ]
    )

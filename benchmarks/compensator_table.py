"""Compensators beside their controls: equal bytes, equal optimiser steps, one recipe for every row.

    python benchmarks/compensator_table.py --dataset npz --root FILE --out DIR [--teachers DIR] [--ipc 10 20]

Teachers (ConvNet-3, ResNet-18, VGG-11 and AlexNet with batch norm, narrow) are recorded into OUT/teachers
where none are given. Every set is a run in OUT and every judged set a few lines of OUT/rows.jsonl, so that a
table that was cut off goes on; what changes the sets needs another OUT. The table comes last, on stdout.

Rows: real images with class numbers (random: as many images, random_bytes: as many bytes); real images with
the same static labels; composites with noise of the compensators' deviations; compensators with one group a
sheet and with one group; recovered images (SRe2L); crops (RDED); dynamic labels with and without
compensators; attention matching of plain pixels and of bases and compensators; all the data.
"""

import argparse
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import matchers
from ddengine import data, files, judge, loop
from ddengine.nets import NetSpec
from ddengine.tables import spread
from ddengine.train import Recipe
from ddengine.types import Budget, Task
from expert_buffers import ExpertBuffer, record
from matchers.compensator_options import KD
from synth import DistilledSet

TEACHERS = (("convnet", 32), ("resnet18", 8), ("vgg11", 16), ("alexnet", 16))


def main() -> None:
    o = arguments()
    root = Path(o.out)
    files.make_folder(root)
    dataset = data.load(o.dataset, root=o.root)
    buffer = ExpertBuffer(o.teachers) if o.teachers else squeezed(dataset, root, o)
    began = time.perf_counter()
    for ipc in o.ipc:
        task = Task(dataset.fit, Budget(ipc), buffer, workers=o.workers)
        for name, matcher in algorithms(o, task):
            if o.sets and name not in o.sets:
                continue
            result = loop.distill(task, matcher, out=root / f"ipc{ipc}_{name}", notice=print)
            if not judged(root, ipc, name):
                judge_set(root, ipc, name, result, dataset, o)
    print(table(root, o, time.perf_counter() - began))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", default="npz")
    parser.add_argument("--root")
    parser.add_argument("--out", required=True)
    parser.add_argument("--teachers", help="an expert buffer; recorded where not given")
    parser.add_argument("--epochs", type=int, default=5, help="of the teachers")
    parser.add_argument("--ipc", type=int, nargs="+", default=[10, 20])
    parser.add_argument("--recover", type=int, default=100, help="steps of recovery")
    parser.add_argument("--class-batch", type=int, default=100, help="images of a group in a step")
    parser.add_argument("--match", type=int, default=100, help="steps of attention matching")
    parser.add_argument("--sets", nargs="+", help="only these, by the names in OUT")
    parser.add_argument("--steps", type=int, default=400, help="of every judged network")
    parser.add_argument("--width", type=int, default=16, help="of the judged ConvNet")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--lrs", type=float, nargs="+", default=[2e-3])
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    return parser.parse_args()


def squeezed(dataset: data.Dataset, root: Path, o: argparse.Namespace) -> ExpertBuffer:
    """The teachers, recorded by short recipes."""
    nets = [NetSpec(name, width=width, norm="batch") for name, width in TEACHERS]
    options: dict[str, Any] = {"count": len(nets), "epochs": o.epochs, "recipe": "squeeze"}
    return record(dataset.fit, nets, root / "teachers", **options, workers=o.workers, notice=print)


def algorithms(o: argparse.Namespace, task: Task) -> Iterator[tuple[str, Any]]:
    """The sets of one budget, by name."""
    classes = len(task.images.spec.classes)
    student = NetSpec("convnet", width=o.width, norm="batch")
    shared = {"steps": o.recover, "class_batch": o.class_batch}
    for name, options in {
        "real_static": {"recover": "none"},
        "compensator": {},
        "noise": {"recover": "noise"},
        "compensator_one_group": {"groups": 1, "class_batch": max(classes, 30)},
        "compensator_normalised": {"groups": 1, "class_batch": max(classes, 30), "weighting": "normalised"},
        "recovered_images": {"recover": "images", "first_weight": 1.0},
        "crops": {"recover": "crops"},
        "dynamic": {
            "groups": 1,
            "class_batch": max(classes, 30),
            "labels": "dynamic",
            "count_teachers": False,
        },
    }.items():
        still = options.get("recover") in ("none", "crops")  # nothing to take in parts
        common = {"steps": o.recover} if still else shared
        yield name, matchers.make("compensator", student, **{**common, **options})
    matching = {"steps": o.match, "real_per_class": 32, "lr": 2.0, "schedule": "cosine"}
    yield "attention", matchers.make("attention", student, **matching)
    form = {"name": "compensated", "compensators": 2, "groups": 1}
    yield "attention_compensated", matchers.make("attention", student, **matching, synth=form)


def judged(root: Path, ipc: int, name: str) -> bool:
    return any(
        line["ipc"] == ipc and line["set"] == name for line in files.read_json_lines(root / "rows.jsonl")
    )


def judge_set(
    root: Path, ipc: int, name: str, result: loop.Result, dataset: data.Dataset, o: argparse.Namespace
) -> None:
    """Judge one set, the first of a budget beside the rows that depend on data alone."""
    values = {**KD, "steps": o.steps, "temperature": 30.0, "augment": "crop_flip", "lrs": tuple(o.lrs)}
    known = {line["row"] for line in files.read_json_lines(root / "rows.jsonl")}
    full = () if "full" in known else ("full",)
    beside = {"real_static": ("random", "random_bytes", *full), "dynamic": ("random_same_labels",)}
    distilled = DistilledSet.load(result.folder / "distilled")
    found = judge.evaluate(
        distilled,
        dataset,
        networks=[NetSpec("convnet", width=o.width, norm="batch")],
        seeds=o.seeds,
        rows=beside.get(name, ()),
        recipe=Recipe(**values),
        workers=o.workers,
        teachers=distilled.teachers(),
    )
    for row in found.rows:
        own = name if row.name == "distilled" else row.name
        said = {"ipc": ipc, "set": name, "row": own, "values": row.values, "bytes": dict(row.nbytes)}
        rest = {
            "count": row.count,
            "lr": row.lr,
            "steps": row.steps,
            "trials": [t["validation"] for t in row.trials],
        }
        cost = {"train_seconds": row.train_seconds}
        if row.name == "distilled":
            cost["distill_seconds"] = result.distilled.manifest["provenance"]["seconds"]
        files.append_json_line(root / "rows.jsonl", {**said, **rest, **cost})
        print(f"ipc {ipc} {own}: {spread(row.values)[0]:.4f}", flush=True)


def table(root: Path, o: argparse.Namespace, seconds: float) -> str:
    """All rows in Markdown, with what they were made on."""
    made_on = f"{platform.processor() or platform.machine()}, torch {torch.__version__}"
    recipe = (
        f"ConvNet-3 width {o.width} with batch norm, {o.steps} steps of 64, {o.seeds} networks, rates {o.lrs}"
    )
    head = (
        "IPC",
        "row",
        "trained on",
        "bytes",
        "images + labels + extras",
        "accuracy",
        "interval",
        "rate",
        "made",
    )
    lines = [
        f"{o.dataset}, {recipe}; recovery {o.recover} steps; {made_on}",
        "",
        _cells(head),
        "|---" * len(head) + "|",
    ]
    for line in files.read_json_lines(root / "rows.jsonl"):
        mean, std, interval = spread(line["values"])
        low, high = interval or (mean, mean)
        parts = " + ".join(f"{line['bytes'][part]:,}" for part in ("images", "labels", "extras"))
        seconds_made = f"{line['distill_seconds']:.0f} s" if "distill_seconds" in line else ""
        score = (f"{100 * mean:.1f} ± {100 * (std or 0):.1f}", f"{100 * low:.1f} to {100 * high:.1f}")
        size = (f"{line['count']:,}", f"{line['bytes']['total']:,}", parts)
        lines.append(_cells((line["ipc"], line["row"], *size, *score, f"{line['lr']:g}", seconds_made)))
    return "\n".join([*lines, "", f"this call: {seconds / 60:.0f} min"])


def _cells(values: tuple[Any, ...]) -> str:
    return "| " + " | ".join(map(str, values)) + " |"


if __name__ == "__main__":
    main()

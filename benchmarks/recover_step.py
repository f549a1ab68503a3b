"""Recovering one compensator: CPU time beside a plain version in the same run, and whether both come as far.

    python benchmarks/recover_step.py [--root FILE] [--classes 100] [--class-batch 33] [--repeat 3]

The plain version is written from the formulas the way released scripts do it: all classes of a sheet in every
step, float32, each batch norm's input copied and permuted, one sheet and one teacher after the other. Ours
takes class sub-batches with running statistics and channels-last memory. Both make the same number of Adam
steps from the same sheet with the same rolls; the loss is then measured on the whole sheet, at rest, along
the way. FILE is an npz of 32-pixel images; without it they are noise, and the losses mean nothing.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddengine import data
from ddengine.nets import NetSpec
from ddengine.rng import Rng
from ddengine.types import DataSpec, Images
from expert_buffers import record
from matchers.recovery import Block, Recovering, RecoverOptions, Session, advance, begin, channels_of

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "reference"))
from naive_recovery import recover_one

RESULTS = Path(os.environ.get("RESULTS", Path(__file__).parent / "results"))
NETWORKS = (
    NetSpec("convnet", width=32, norm="batch"),
    NetSpec("resnet18", width=8),
    NetSpec("vgg11", width=16, norm="batch"),
)
MARKS = 6  # points of the loss curve


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", help="npz with x_train, y_train, x_test, y_test")
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--class-batch", type=int, default=33)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--epochs", type=int, default=3, help="of the teachers")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--save", action="store_true")
    o = parser.parse_args()
    torch.set_num_threads(1)
    images = data.load("npz", root=o.root).fit if o.root else noise(o.classes)
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {"count": len(NETWORKS), "epochs": o.epochs, "recipe": "squeeze"}
        buffer = record(images, NETWORKS, Path(folder) / "teachers", **options)
        nets = tuple(buffer.build(i, o.epochs).eval().requires_grad_(False) for i in range(len(buffer)))
    found = [compare(session(images, net, o), o) for net in nets]
    report = {
        "classes": o.classes, "class_batch": o.class_batch, "steps": o.steps, "threads": 1,
        "torch": torch.__version__, "machine": platform.processor() or platform.machine(),
        "data": "photographs" if o.root else "noise",
        "teachers": [
            {"network": net.name, "width": net.width, **one} for net, one in zip(NETWORKS, found, strict=True)
        ],
    }  # fmt: skip
    text = json.dumps(report, indent=1)
    print(text)
    if o.save:
        (RESULTS / "recover_step.json").write_text(text + "\n")


def noise(classes: int) -> Images:
    x = torch.randint(0, 256, (classes * 20, 3, 32, 32), generator=Rng(0).torch("x"), dtype=torch.uint8)
    spec = DataSpec("noise", (3, 32, 32), tuple(f"{c:03d}" for c in range(classes)), (0.5,) * 3, (0.25,) * 3)
    return Images(x, torch.arange(classes).repeat_interleave(20), spec)


def session(images: Images, net: nn.Module, o: argparse.Namespace) -> Session:
    """One sheet, one teacher."""
    starts = torch.tensor([0, *images.counts]).cumsum(0)[: o.classes]
    options = RecoverOptions(o.steps, 0.25, 1.0, 1.0, 10.0, "released", 4, 1.0, False, o.class_batch)
    rows = (torch.arange(o.classes),)
    return Session(images.x[starts], images.y[starts], rows, (net,), images.spec, options, Rng(0), "fp32")


def compare(made: Session, o: argparse.Namespace) -> dict[str, Any]:
    """CPU seconds of both, in turn, and their losses on the whole sheet along the way."""
    generator = made.rng.fold("job", 0, 0).torch("views")
    drawn = torch.rand((o.steps, 7), generator=generator).tolist()
    shifts = [tuple(int(v * 5) for v in row[5:]) for row in drawn]
    images = made.spec.normalise(made.bases)
    seconds: dict[str, list[float]] = {"plain": [], "ours": []}
    marks = [o.steps * i // MARKS for i in range(1, MARKS + 1)]
    for _ in range(o.repeat):
        began = time.process_time()
        recover_one(made.teachers[0], images, made.classes, shifts, o.steps)
        seconds["plain"].append(time.process_time() - began)
        began = time.process_time()
        run(made, o.steps)
        seconds["ours"].append(time.process_time() - began)
    whole = replace(made, options=replace(made.options, batch=None))
    curves = {"ours": [level(whole, run(made, mark)) for mark in marks]}
    curves["plain"] = [level(whole, run(whole, mark)) for mark in marks]
    ratios = [a / b for a, b in zip(seconds["plain"], seconds["ours"], strict=True)]
    return {
        "seconds": {key: round(statistics.median(value), 2) for key, value in seconds.items()},
        "ratio": round(statistics.median(ratios), 2),
        "ratios": [round(r, 2) for r in ratios],
        "start": round(level(whole, torch.zeros_like(images[:1])), 3),
        "loss": {key: [round(v, 3) for v in curve] for key, curve in curves.items()},
    }


def run(made: Session, steps: int) -> Tensor:
    """The compensator after so many of the steps."""
    channels = channels_of(made.teachers[0], made.spec, torch.device("cpu")) if made.options.batch else 0
    jobs: tuple[Recovering, ...] = (begin(1, made.spec, channels, torch.device("cpu")),)
    for step in range(steps):
        jobs, _ = advance(made, Block(step, 0, (0,), jobs))
    return jobs[0].u


def level(whole: Session, u: Tensor) -> float:
    """The loss of the whole sheet, without a roll."""
    still = replace(whole, options=replace(whole.options, jitter=0))
    job = replace(begin(1, whole.spec, 0, torch.device("cpu")), u=u)
    return sum(advance(still, Block(0, 0, (0,), (job,)))[1])


if __name__ == "__main__":
    main()

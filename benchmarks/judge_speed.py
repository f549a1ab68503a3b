"""Networks judged per minute by `ddengine.judge.evaluate`, beside a plain version of the same evaluation.

    python benchmarks/judge_speed.py --dataset digits fashion_mnist --root DIR [--steps 300] [--networks 5]

The plain version does what the papers' evaluation scripts do, one network after the other on torch's default
number of threads: DataLoaders without workers over TensorDatasets, the set shuffled anew in each pass, one
operator of differentiable augmentation for a batch with numbers for each image, SGD with momentum under a
cosine, the test part in batches of 256. Ours is the judge with one process for each core; their start is
included, which takes seconds whatever the number of networks. Both train the same architecture, as many
networks, for as many steps at the same rate, on the same random real images at 10 a class, and score the
whole test part; both have the data loaded before.

Every run has a process of its own and makes a few steps to warm up before the clock starts; the two take
turns. Reported are the median and the quartiles of seconds, and the accuracies, whose intervals must overlap.
"""

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from ddengine.data import Dataset, load
from ddengine.files import write_json
from ddengine.judge import evaluate
from ddengine.nets import NetSpec, build
from ddengine.ops import dsa
from ddengine.protocols import Protocol
from ddengine.rng import Rng
from ddengine.tables import spread
from synth import DistilledSet, Pixels
from synth.starts import random

RESULTS = Path(os.environ.get("RESULTS", Path(__file__).parent / "results"))
NETWORKS = {"digits": NetSpec("convnet", width=32, depth=2)}  # others: ConvNet of width 32, its own depth
IPC, RATE, MOMENTUM, DECAY, BATCH = 10, 0.01, 0.9, 5e-4, 256
WARM_STEPS = 3
KINDS = ("plain", "judge")


def subject(dataset: Dataset) -> DistilledSet:
    """Random real images, packed as a distilled set."""
    chosen = dataset.fit.take(random(dataset.fit, IPC, Rng(0).fold("judge-speed")))
    pixels = Pixels(chosen.model_input(), chosen.y, dataset.fit.spec, "class")
    provenance = {"seconds": 0.0, "steps": 0, "peak_memory_bytes": 0}
    return DistilledSet.make(pixels, recipe={}, provenance=provenance)


def judge(
    dataset: Dataset, given: DistilledSet, net: NetSpec, steps: int, networks: int, device: str = "cpu"
) -> list[float]:
    """Test accuracies of `networks` by the judge."""
    recipe = {
        "steps": steps,
        "lrs": (RATE,),
        "momentum": MOMENTUM,
        "weight_decay": DECAY,
        "batch_size": BATCH,
        "augment": dsa.strategy_for(dataset.fit.spec.name),
    }
    protocol = Protocol("one rate", 1, "this benchmark", recipe, rates="fixed")
    workers = min(os.cpu_count() or 1, networks) if device == "cpu" else 1
    table = evaluate(
        given,
        dataset,
        networks=[net],
        protocol=protocol,
        seeds=networks,
        rows=(),
        workers=workers,
        device=device,
    )
    return list(table.rows[0].values)


def plain(
    dataset: Dataset, given: DistilledSet, net: NetSpec, steps: int, networks: int, device: str = "cpu"
) -> list[float]:
    """Test accuracies of `networks` by the plain version."""
    images, test = given.decode(), dataset.test
    train_set = TensorDataset(images.x, images.y)
    test_set = TensorDataset(test.model_input(), test.y)
    return [plain_network(train_set, test_set, dataset, net, steps, Rng(i), device) for i in range(networks)]


def plain_network(
    train_set: TensorDataset,
    test_set: TensorDataset,
    dataset: Dataset,
    net: NetSpec,
    steps: int,
    rng: Rng,
    device: str,
) -> float:
    """Test accuracy of one network after `steps` steps."""
    spec = dataset.fit.spec
    model = build(net, spec.shape, len(spec.classes), rng.torch("weights")).to(device).train()
    optimiser = torch.optim.SGD(model.parameters(), RATE, MOMENTUM, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    batches = DataLoader(train_set, BATCH, shuffle=True, generator=rng.torch("shuffle"))
    numbers, names = rng.torch("augment"), dsa.strategy_for(spec.name).split("_")
    done = 0
    while done < steps:
        for x, y in batches:
            op = names[int(torch.randint(len(names), (), generator=numbers))]
            loss = F.cross_entropy(model(AUGMENT[op](x, numbers).to(device)), y.to(device))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            done += 1
            if done == steps:
                break
    return plain_accuracy(model.eval(), DataLoader(test_set, 256))


@torch.no_grad()
def plain_accuracy(model: torch.nn.Module, batches: DataLoader) -> float:
    """The fraction of images that are classified correctly."""
    right, total, place = 0, 0, next(model.parameters()).device
    for x, y in batches:
        right += (model(x.to(place)).argmax(1).cpu() == y).sum().item()
        total += len(y)
    return right / total


def _drawn(x: Tensor, g: torch.Generator) -> Tensor:
    return torch.rand(len(x), 1, 1, 1, generator=g)


def _color(x: Tensor, g: torch.Generator) -> Tensor:
    x = x + _drawn(x, g) - 0.5
    grey = x.mean(1, keepdim=True)
    x = (x - grey) * (2 * _drawn(x, g)) + grey
    level = x.mean((1, 2, 3), keepdim=True)
    return (x - level) * (_drawn(x, g) + 0.5) + level


def _crop(x: Tensor, g: torch.Generator) -> Tensor:
    n, _, h, w = x.shape
    pad = int(h * dsa.CROP + 0.5)
    down, right = torch.randint(2 * pad + 1, (2, n, 1, 1), generator=g)
    image, row, column = torch.meshgrid(torch.arange(n), torch.arange(h), torch.arange(w), indexing="ij")
    padded = F.pad(x, [pad] * 4).permute(0, 2, 3, 1)
    return padded[image, row + down, column + right].permute(0, 3, 1, 2).contiguous()


def _cutout(x: Tensor, g: torch.Generator) -> Tensor:
    n, _, h, w = x.shape
    size = int(h * dsa.CUTOUT + 0.5)
    top, left = torch.randint(h + 1 - size % 2, (2, n, 1, 1), generator=g)
    image, row, column = torch.meshgrid(
        torch.arange(n), torch.arange(size), torch.arange(size), indexing="ij"
    )
    mask = torch.ones(n, h, w)
    row, column = (row + top - size // 2).clamp(0, h - 1), (column + left - size // 2).clamp(0, w - 1)
    mask[image, row, column] = 0
    return x * mask[:, None]


def _flip(x: Tensor, g: torch.Generator) -> Tensor:
    return torch.where(_drawn(x, g) < 0.5, x.flip(3), x)


def _warp(x: Tensor, theta: list[list[Tensor]]) -> Tensor:
    grid = F.affine_grid(
        torch.stack([torch.stack(row, 1) for row in theta], 1), list(x.shape), align_corners=False
    )
    return F.grid_sample(x, grid, align_corners=False)


def _scale(x: Tensor, g: torch.Generator) -> Tensor:
    low, high = 1 / dsa.SCALE, dsa.SCALE
    sx, sy = torch.rand(2, len(x), generator=g) * (high - low) + low
    zero = torch.zeros(len(x))
    return _warp(x, [[sx, zero, zero], [zero, sy, zero]])


def _rotate(x: Tensor, g: torch.Generator) -> Tensor:
    angle = (torch.rand(len(x), generator=g) - 0.5) * 2 * math.radians(dsa.DEGREES)
    zero = torch.zeros(len(x))
    return _warp(x, [[angle.cos(), -angle.sin(), zero], [angle.sin(), angle.cos(), zero]])


AUGMENT: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "color": _color, "crop": _crop, "cutout": _cutout, "flip": _flip, "scale": _scale, "rotate": _rotate,
}  # fmt: skip


def case(kind: str, name: str, given: argparse.Namespace) -> dict[str, Any]:
    """Seconds and accuracies of one evaluation in this process."""
    dataset = load(name, root=given.root)
    made, net = subject(dataset), NETWORKS.get(name, NetSpec("convnet", width=32))
    work = {"plain": plain, "judge": judge}[kind]
    work(dataset, made, net, WARM_STEPS, 1)
    began = time.perf_counter()
    values = work(dataset, made, net, given.steps, given.networks)
    return {"kind": kind, "seconds": time.perf_counter() - began, "values": values}


def measured(name: str, given: argparse.Namespace) -> dict[str, Any]:
    """Both versions in turns, `given.repeat` times, each in a process of its own."""
    found: list[dict[str, Any]] = []
    words = [sys.executable, __file__, "--steps", str(given.steps), "--networks", str(given.networks)]
    words += ["--root", str(given.root)] if given.root else []
    for _ in range(given.repeat):
        for kind in KINDS:
            run = subprocess.run(
                [*words, "--case", kind, name], check=True, stdout=subprocess.PIPE, text=True
            )
            found.append(json.loads(run.stdout))
            print(name, kind, f"{found[-1]['seconds']:.1f} s", file=sys.stderr, flush=True)
    rows = [summary(kind, [f for f in found if f["kind"] == kind], given.networks) for kind in KINDS]
    theirs, ours = (row["networks_per_minute"] for row in rows)
    return {"dataset": name, "ratio": ours / theirs, "intervals_overlap": overlap(*rows), "rows": rows}


def summary(kind: str, runs: list[dict[str, Any]], networks: int) -> dict[str, Any]:
    """One version's row: seconds over its runs, networks per minute at their median, accuracies."""
    seconds = [run["seconds"] for run in runs]
    q1, median, q3 = (float(q) for q in np.quantile(seconds, (0.25, 0.5, 0.75)))
    mean, std, ci95 = spread(runs[0]["values"])
    return {
        "kind": kind,
        "seconds": {"median": median, "iqr": [q1, q3], "all": seconds},
        "networks_per_minute": 60 * networks / statistics.median(seconds),
        "accuracy": {"mean": mean, "std": std, "ci95": ci95 and list(ci95), "values": runs[0]["values"]},
    }


def overlap(a: dict[str, Any], b: dict[str, Any]) -> bool | None:
    """Whether the 95 % intervals of two rows' accuracies overlap; None where one network gives none."""
    first, second = a["accuracy"]["ci95"], b["accuracy"]["ci95"]
    if first is None or second is None:
        return None
    return bool(first[0] <= second[1] and second[0] <= first[1])


def table(found: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = [
        "| dataset | version | s, median (quartiles) | networks/min | accuracy, % |",
        "|---|---|---|---|---|",
    ]
    for each in found:
        for row in each["rows"]:
            q1, q3 = row["seconds"]["iqr"]
            accuracy, std = row["accuracy"]["mean"], row["accuracy"]["std"] or 0.0
            lines.append(
                f"| {each['dataset']} | {row['kind']} | {row['seconds']['median']:.1f} ({q1:.1f}-{q3:.1f}) "
                f"| {row['networks_per_minute']:.2f} | {100 * accuracy:.2f} ± {100 * std:.2f} |"
            )
        lines.append(
            f"| {each['dataset']} | ratio | | {each['ratio']:.2f} | overlap: {each['intervals_overlap']} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", nargs="+", default=["digits"])
    parser.add_argument("--root", type=Path)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--networks", type=int, default=5)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--note", default="", help="said in the result, such as what else the machine does")
    parser.add_argument("--out", type=Path, default=RESULTS / "judge_speed.json")
    parser.add_argument("--case", nargs=2, metavar=("KIND", "DATASET"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.case:
        kind, name = given.case
        print(json.dumps(case(kind, name, given)))
        return
    setting = {key: getattr(given, key) for key in ("steps", "networks", "repeat", "note")}
    setting |= {
        "ipc": IPC,
        "lr": RATE,
        "batch": BATCH,
        "judge_workers": min(os.cpu_count() or 1, given.networks),
    }
    machine = {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "plain_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }
    found = [measured(name, given) for name in given.dataset]
    write_json(given.out, {"setting": setting, **machine, "cases": found})
    print(table(found))


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor()


if __name__ == "__main__":
    main()

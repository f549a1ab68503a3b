"""Ten thousand distillation steps and two hundred evaluations in one process: nothing grows, nothing slows.

    python tests/faults/long_run.py [--steps 10000] [--evaluations 200]

Fifty times over each part it takes the resident memory, the live tensors, the open file handles and the
registered hooks, and the rate: units of work in the CPU time of a fixed calculation that is timed beside
them, so that other programs on the machine do not matter. The last fifth is compared with the second: memory
at most 2 % and 8 MiB above it, no more tensors, handles and hooks, a median rate of at least 0.9 of it. The
result goes to benchmarks/results/faults_long_run.json.
"""

import argparse
import gc
import json
import platform
import resource
import sys
import tempfile
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from torch import Tensor, nn

import matchers
from ddengine.data import load
from ddengine.judge import evaluate
from ddengine.loop import Schedule, distill
from ddengine.nets.core import NetSpec
from ddengine.parallel import one_thread
from ddengine.train import Recipe
from ddengine.types import Budget, Task
from synth import DistilledSet

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "faults_long_run.json"
SAMPLES = 50  # a fifth of them is what is compared
GROWTH, ROOM = 1.02, 8 << 20  # of resident memory
SLOWEST = 0.9  # of the rate
NET = NetSpec("convnet", width=2, depth=1)
JUDGED = NetSpec("mlp", width=3)
RECIPE = Recipe(steps=2, lrs=(0.01,), batch_size=10, augment="none")
COUNTED = ("tensors", "handles", "hooks")


@dataclass
class Watch:
    """Samples over a part of `total` units of work; call it with the number of those that are done."""

    total: int
    samples: list[dict[str, float]] = field(default_factory=list)
    fixed: float = field(default_factory=lambda: calculation())
    began: tuple[float, float] = field(default_factory=lambda: (time.monotonic(), time.process_time()))

    def __call__(self, done: int) -> None:
        seconds, cpu = time.monotonic() - self.began[0], time.process_time() - self.began[1]
        units = done - (self.samples[-1]["done"] if self.samples else 0)
        before, self.fixed = self.fixed, calculation()
        rates = {"per_second": units / seconds, "rate": units / cpu * (before + self.fixed) / 2}
        self.samples.append({"done": done, **rates, **resources()})
        self.began = (time.monotonic(), time.process_time())


def calculation() -> float:
    """CPU seconds of a fixed calculation of small tensors, forwards and backwards."""
    x = torch.linspace(-1, 1, 64 * 64).reshape(1, 1, 64, 64).requires_grad_()
    weight, began = torch.linspace(-1, 1, 36).reshape(4, 1, 3, 3), time.process_time()
    for _ in range(300):
        torch.autograd.grad(torch.conv2d(x, weight).relu().square().mean(), x)
    return time.process_time() - began


def resources() -> dict[str, int]:
    """What this process holds: resident bytes, live tensors, open file handles, registered hooks."""
    gc.collect()
    found = gc.get_objects()
    modules = [thing for thing in found if issubclass(type(thing), nn.Module)]
    tensors = [thing for thing in found if issubclass(type(thing), Tensor)]
    hooks = sum(len(kept) for module in modules for name, kept in vars(module).items() if _of_hooks(name))
    hooks += sum(len(kept) for name, kept in vars(nn.modules.module).items() if _of_global_hooks(name, kept))
    hooks += sum(len(thing._backward_hooks or ()) for thing in tensors if thing.is_leaf)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "resident": pages * resource.getpagesize(),
        "tensors": len(tensors),
        "handles": len(list(Path("/proc/self/fd").iterdir())),
        "hooks": hooks,
    }


def _of_hooks(name: str) -> bool:
    return name.endswith("_hooks")


def _of_global_hooks(name: str, kept: object) -> bool:
    return name.startswith("_global_") and name.endswith("_hooks") and hasattr(kept, "__len__")


def steps(count: int, folder: Path, samples: int = SAMPLES) -> list[dict[str, float]]:
    """`count` steps of attention matching on digits, one image per class, saved ten times."""
    matcher, watch = matchers.make("attention", NET, steps=count, real_per_class=2), Watch(count)
    schedule = Schedule(checkpoint_steps=max(1, count // 10), log_steps=max(1, count // samples))
    task = Task(load("digits").fit, Budget(1))
    with one_thread():
        distill(task, matcher, out=folder, schedule=schedule, progress=lambda done, *_: watch(done))
    return watch.samples


def evaluations(count: int, folder: Path) -> list[dict[str, float]]:
    """`count` evaluations of the set in `folder`, each of one tiny network of its own seed."""
    dataset, distilled, watch = load("digits"), DistilledSet.load(folder), Watch(count)
    for number in range(1, count + 1):
        table = evaluate(distilled, dataset, networks=[JUDGED], seeds=1, seed=number, rows=[], recipe=RECIPE)
        assert [row.name for row in table.rows] == ["distilled"]
        if number % max(1, count // SAMPLES) == 0:
            watch(number)
    return watch.samples


def fifths(samples: list[dict[str, float]]) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """The second fifth of the samples and the last; the first is of caches that fill."""
    size = max(1, len(samples) // 5)
    return samples[size : 2 * size], samples[-size:]


def grown(samples: list[dict[str, float]]) -> list[str]:
    """What has grown from the second fifth of the samples to the last, in words."""
    early, late = fifths(samples)
    most = {key: (max(s[key] for s in early), max(s[key] for s in late)) for key in ("resident", *COUNTED)}
    problems = [
        f"{key}: {was:.0f}, then {now:.0f}"
        for key, (was, now) in most.items()
        if key in COUNTED and now > was
    ]
    was, now = most["resident"]
    return problems + [f"memory: {was:.0f} bytes, then {now:.0f}"] * (now > GROWTH * was + ROOM)


def slowed(samples: list[dict[str, float]]) -> list[str]:
    """How much slower the last fifth of the samples is than the second, in words, where that is too much."""
    was, now = (median(s["rate"] for s in part) for part in fifths(samples))
    return [f"rate: {was:.4g} units, then {now:.4g}"] * (now < SLOWEST * was)


def told(samples: list[dict[str, float]]) -> dict[str, Any]:
    """A part's samples by tenths, and what is wrong with them."""
    size = max(1, len(samples) // 10)
    tenths = [samples[start : start + size] for start in range(0, len(samples), size)]
    row = lambda part: {
        "done": int(part[-1]["done"]),
        **{key: round(median(s[key] for s in part), 2) for key in ("per_second", "rate")},
        "resident_mib": round(max(s["resident"] for s in part) / (1 << 20), 1),
        **{key: int(max(s[key] for s in part)) for key in COUNTED},
    }
    return {"tenths": [row(part) for part in tenths], "problems": grown(samples) + slowed(samples)}


def main(arguments: list[str] | None = None) -> int:
    """Do both parts, print and write what came of them; the exit code is 1 where something grew or slowed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--evaluations", type=int, default=200)
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        parts = {"steps": told(steps(given.steps, Path(folder) / "run"))}
        parts["evaluations"] = told(evaluations(given.evaluations, Path(folder) / "run" / "distilled"))
    result = {
        "command": f"python tests/faults/long_run.py --steps {given.steps} --evaluations {given.evaluations}",
        "date": time.strftime("%Y-%m-%d"),
        "versions": {name: version(name) for name in ("torch", "numpy", "safetensors")},
        "python": platform.python_version(),
        "seconds": round(time.monotonic() - began, 1),
        **parts,
    }  # fmt: skip
    given.results.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    return int(any(part["problems"] for part in parts.values()))


if __name__ == "__main__":
    sys.exit(main())

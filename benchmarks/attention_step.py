"""One attention-matching step: steps/s beside a plain per-class version, and peak memory as classes grow.

    python benchmarks/attention_step.py [--width 32] [--repeat 5]

The plain version is written from the formulas the way the papers' scripts do it: all real images of a class
at once, one forward a class, every ReLU map kept, a new network object a step. Both see the same data and the
same number of images. Each case has a process, and so a peak memory, of its own; the two take turns.
"""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import matchers
from ddengine.nets import build
from ddengine.nets.core import NetSpec
from ddengine.ops import dsa
from ddengine.rng import Rng
from ddengine.types import Budget, DataSpec, Images, Task

RESULTS = Path(__file__).parent / "results"
REAL, IPC, SIDE = 128, 10, 32


def task(classes: int) -> Task:
    """Noise in the shape of CIFAR: speed and memory do not depend on what the pixels show."""
    count = classes * (REAL + 8)
    x = torch.randint(0, 256, (count, 3, SIDE, SIDE), generator=Rng(0).torch("x"), dtype=torch.uint8)
    names = tuple(f"{c:03d}" for c in range(classes))
    spec = DataSpec("noise", (3, SIDE, SIDE), names, (0.5,) * 3, (0.25,) * 3)
    return Task(Images(x, torch.arange(classes).repeat_interleave(REAL + 8), spec), Budget(ipc=IPC))


def engine(work: Task, width: int) -> Callable[[], None]:
    """A call that makes one step of the engine's matcher."""
    network = NetSpec("convnet", width=width)
    matcher = matchers.make("attention", network, steps=10**6, real_per_class=REAL)
    rng = Rng(0)
    space = matcher.prepare(work, rng)
    state = [matcher.init(work, rng)]

    def step() -> None:
        state[0] = matcher.step(state[0], space, rng)[0]

    return step


def plain(work: Task, width: int) -> Callable[[], None]:
    """A call that makes one step the way the papers' scripts do."""
    spec, rng = work.source.spec, Rng(0)
    syn = torch.randn((len(spec.classes) * IPC, *spec.shape), generator=rng.torch("syn")).requires_grad_()
    optimiser, count = torch.optim.SGD([syn], lr=1.0, momentum=0.5), [0]

    def attention(f: Tensor) -> Tensor:
        return F.normalize(f.abs().pow(4).sum(1).flatten(1), dim=1)

    def step() -> None:
        count[0] += 1
        here = rng.fold(count[0])
        net = build(NetSpec("convnet", width=width), spec.shape, len(spec.classes), here.torch("net"))
        net.requires_grad_(False)
        total = torch.zeros(())
        for c in range(len(spec.classes)):
            params = dsa.sample(here.fold(c).torch("dsa"), dsa.STRATEGY, 1, (SIDE, SIDE))
            picks = (work.source.y == c).nonzero().squeeze(1)
            picks = picks[torch.randperm(len(picks), generator=here.fold(c).torch("real"))[:REAL]]
            real = dsa.apply(work.source.model_input(picks), params)
            fake = dsa.apply(syn[c * IPC : (c + 1) * IPC], params)
            a, b = (net.features(x, lambda level, f: f.clone()) for x in (real, fake))
            for f, g in zip(a.taps[:-1], b.taps[:-1], strict=True):
                total = total + 100 * (attention(f).detach().mean(0) - attention(g).mean(0)).square().sum()
            total = total + (a.embedding.detach().mean(0) - b.embedding.mean(0)).square().sum()
        optimiser.zero_grad()
        total.backward()
        optimiser.step()

    return step


def case(kind: str, classes: int, width: int, repeat: int) -> dict[str, object]:
    """Seconds of `repeat` steps after one to warm up, and the peak resident bytes that the steps added."""
    work = task(classes)
    step = {"engine": engine, "plain": plain}[kind](work, width)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    step()
    seconds = []
    for _ in range(repeat):
        began = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "kind": kind,
        "classes": classes,
        "seconds": seconds,
        "step_bytes": peak - before,
        "peak_bytes": peak,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--case", nargs=2, metavar=("KIND", "CLASSES"))
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.case:
        print(json.dumps(case(given.case[0], int(given.case[1]), given.width, given.repeat)))
        return
    found = []
    for classes in (10, 100):
        for kind in ("engine", "plain", "engine", "plain"):
            words = [sys.executable, __file__, "--case", kind, str(classes), "--width", str(given.width)]
            words += ["--repeat", str(given.repeat if classes == 10 else 1), "--threads", str(given.threads)]
            found.append(json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout))
            print(json.dumps(found[-1]), flush=True)
    rows = []
    for classes in (10, 100):
        for kind in ("engine", "plain"):
            mine = [f for f in found if (f["kind"], f["classes"]) == (kind, classes)]
            seconds = [s for f in mine for s in f["seconds"]]
            spread = {"min": min(seconds), "median": statistics.median(seconds), "max": max(seconds)}
            memory = max(f["step_bytes"] for f in mine)
            rows.append({"kind": kind, "classes": classes, "seconds": spread, "step_bytes": memory})
    setting = {
        "width": given.width,
        "threads": given.threads,
        "real_per_class": REAL,
        "ipc": IPC,
        "chunk": 128,
    }
    machine = {"torch": torch.__version__, "machine": platform.machine(), "python": platform.python_version()}
    out = {"setting": setting, **machine, "date": time.strftime("%Y-%m-%d"), "rows": rows}
    (RESULTS / "attention_step.json").write_text(json.dumps(out, indent=1) + "\n")
    for row in rows:
        print(
            f"{row['kind']:7} {row['classes']:4} classes  {row['seconds']['median']:7.3f} s/step  "
            f"{row['step_bytes'] / 2**20:7.0f} MiB for the step"
        )


if __name__ == "__main__":
    main()

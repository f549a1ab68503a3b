"""What a GPU makes of each hot path beside a plain version on the same device: rate, memory, utilisation.

    python benchmarks/gpu.py [--data DIR]                          # under 8 minutes on one H200-class device
    python benchmarks/gpu.py --device cpu --width 8 --least 1     # that it runs, where there is no GPU

Attention matching without and with the bank, in float32 and bf16, and plain (a new hooked network and a class
at a time); one outer step of trajectory matching by each gradient; an epoch of an expert beside a loop over a
DataLoader; networks judged a minute beside the plain judge. Noise in the shape of CIFAR but for the last,
which takes digits, or Fashion-MNIST in DIR. Each row is timed for `--least` seconds after a warm-up, the
device synchronised, in quarters whose median counts; memory is the most that PyTorch allocated, utilisation
what nvidia-smi says, where there is one. Writes benchmarks/results/gpu_NAME.json after each row.
"""

import argparse
import json
import platform
import re
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import attention_step
import judge_speed
import torch
import torch.nn.functional as F
import trajectory_gradients
from torch.utils.data import DataLoader, TensorDataset

from ddengine.data import load
from ddengine.nets import NetSpec, build
from ddengine.ops.compiled import derivatives
from ddengine.ops.unroll import GRADIENTS, Inner, Point
from ddengine.rng import Rng
from expert_buffers import record

RESULTS = Path(__file__).parent / "results"
Step = Callable[[int], object]
QUARTERS = 4


def attention_rows(given: argparse.Namespace) -> Iterator[tuple[str, Step]]:
    """A step of attention matching: 10 classes, 128 real and 10 synthetic images a class."""
    for precision in ("fp32", "bf16"):
        for kind in ("engine", "bank", "plain") if precision == "fp32" else ("engine", "bank"):
            work = attention_step.task(10, given.device, precision)
            made = attention_step.version(kind, work, attention_step.Plan(given.width))
            block = attention_step.BLOCK if kind == "bank" else 1  # steps of a pair lie a block apart
            reuse = attention_step.REUSE if kind == "bank" else 1

            def step(i: int, made: Any = made, block: int = block, reuse: int = reuse) -> object:
                before, place = divmod(i, reuse * block)
                return made.step(before * reuse * block + place // reuse + place % reuse * block)

            yield f"attention {kind} {precision}", step


def trajectory_rows(given: argparse.Namespace) -> Iterator[tuple[str, Step]]:
    """An outer step of 20 student steps on ten images, by each gradient, eager and compiled."""
    count, steps = trajectory_gradients.IMAGES, 20
    for compiled in (False, True) if given.device == "cuda" else (False,):
        for method in trajectory_gradients.METHODS:
            loss, theta = trajectory_gradients.student(given.width, given.device)
            x = torch.randn((count, *trajectory_gradients.SHAPE), generator=Rng(0).torch("images")).to(theta)
            y = torch.arange(count, device=given.device) % trajectory_gradients.CLASSES
            made, reason = derivatives(loss, compiled, theta, x, y, method)
            if reason is not None:
                print(f"{method} is not compiled: {reason}")
            target = theta + 0.01
            inner = Inner(made, [torch.arange(count, device=given.device)] * steps)
            point = Point(steps, target, (theta - target).square().sum())
            rate = torch.tensor(trajectory_gradients.RATE, device=given.device)
            call = partial(GRADIENTS[method], inner, theta, x, y, rate, [point])
            yield f"trajectory {method}{' compiled' if compiled else ''}", lambda i, call=call: call()


def expert_rows(given: argparse.Namespace) -> Iterator[tuple[str, Step]]:
    """One epoch of one expert on 5,440 images, its recording included, and the same by a plain loop."""
    source = attention_step.task(40).images
    net = NetSpec("convnet", width=given.width)

    def ours(i: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            record(
                source, net, Path(folder) / "e", count=1, epochs=1, max_start_epoch=0, expert_epochs=1,
                seed=i, device=given.device,
            )  # fmt: skip

    data = TensorDataset(source.model_input(), source.y)

    def plain(i: int) -> None:
        model = build(net, source.spec.shape, 40, Rng(i).torch("weights")).to(given.device)
        optimiser = torch.optim.SGD(model.parameters(), 0.01)
        for x, y in DataLoader(data, 256, shuffle=True, generator=Rng(i).torch("shuffle")):
            loss = F.cross_entropy(model(x.to(given.device)), y.to(given.device))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()

    yield "expert epoch engine", ours
    yield "expert epoch plain", plain


def judge_rows(given: argparse.Namespace) -> Iterator[tuple[str, Step]]:
    """Five networks of 300 steps, scored on all of the test part; a step is the five."""
    dataset = load("fashion_mnist", root=given.data) if given.data else load("digits")
    made = judge_speed.subject(dataset)
    net = NetSpec("convnet", width=given.width, depth=3 if given.data else 2)
    for kind in ("judge", "plain"):
        work = {"judge": judge_speed.judge, "plain": judge_speed.plain}[kind]
        steps = 300 if given.device == "cuda" else 3
        yield (
            f"judge {kind}",
            lambda i, work=work, steps=steps: work(dataset, made, net, steps, 5, given.device),
        )


GROUPS = {
    "attention": attention_rows, "trajectory": trajectory_rows, "expert": expert_rows, "judge": judge_rows,
}  # fmt: skip


def timed(step: Step, device: str, least: float) -> dict[str, Any]:
    """Steps a second over `least` seconds after a warm-up step, peak memory and mean utilisation."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    step(0)
    wait()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    rates, used, number = [], [], 1
    for _ in range(QUARTERS):
        began, done = time.perf_counter(), 0
        while done == 0 or time.perf_counter() - began < least / QUARTERS:
            step(number)
            number, done = number + 1, done + 1
            wait()
        rates.append(done / (time.perf_counter() - began))
        used.append(utilisation(device))
    q1, middle, q3 = statistics.quantiles(rates, n=4)
    known = [value for value in used if value is not None]
    return {
        "steps_per_second": {"median": middle, "iqr": [q1, q3]},
        "peak_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None,
        "utilisation": statistics.mean(known) if known else None,
        "steps": number - 1,
    }


def utilisation(device: str) -> float | None:
    """Per cent of the last sample period in which the GPU worked, where nvidia-smi tells it."""
    if device != "cuda" or shutil.which("nvidia-smi") is None:
        return None
    words = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    found = re.search(r"\d+", done.stdout)
    return float(found[0]) if found else None


def main() -> None:
    """Take the rows in order, print each, and keep them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--data")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--least", type=float, default=10.0)
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    name = torch.cuda.get_device_name() if given.device == "cuda" else platform.machine()
    out = given.out or RESULTS / f"gpu_{re.sub(r'[^A-Za-z0-9]+', '_', name).lower()}.json"
    rows: list[dict[str, Any]] = []
    for group in given.groups:
        for label, step in GROUPS[group](given):
            rows.append({"name": label, **timed(step, given.device, given.least)})
            print(f"{label:28} {rows[-1]['steps_per_second']['median']:10.3f} steps/s", flush=True)
            versions = {"python": platform.python_version(), "torch": torch.__version__}
            facts = {"device": name, "width": given.width, "date": time.strftime("%Y-%m-%d"), **versions}
            out.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

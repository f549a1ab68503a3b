"""One outer step of trajectory matching: peak memory and time of its three gradients as the steps grow.

    python benchmarks/trajectory_gradients.py [--widths 32 128] [--steps 10 20 40 80] [--repeat 3]
    python benchmarks/trajectory_gradients.py --compiled --widths 32 --steps 20

ConvNet-3, ten images in the shape of CIFAR (noise: cost does not depend on what the pixels show), one thread.
Each case has a process of its own; time is that of its CPU. Two memories are taken: growth of the largest
resident size over a warm baseline (the same with T = 1 done, what it freed given back), and the most bytes
that autograd saved for backward passes. `--compiled` adds compiled cases to the eager ones. A row that the
result file has is not run again.
"""

import argparse
import ctypes
import gc
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from ddengine.files import write_json
from ddengine.nets import NetSpec, build
from ddengine.ops.compiled import derivatives
from ddengine.ops.unroll import GRADIENTS, Gradients, Inner, Loss, Point
from ddengine.rng import Rng
from expert_buffers import ParamSpec

RESULTS = Path(os.environ.get("RESULTS", Path(__file__).parent / "results"))
SHAPE, CLASSES, IMAGES, RATE = (3, 32, 32), 10, 10, 0.01
METHODS = ("adjoint", "unroll", "tesla")
COMPILED = ("adjoint", "unroll")
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def student(width: int, device: str = "cpu") -> tuple[Loss, Tensor]:
    """Cross-entropy of a ConvNet-3 on flat parameters, and its initial ones."""
    net = build(NetSpec("convnet", width=width), SHAPE, CLASSES, Rng(0).torch("weights")).requires_grad_(
        False
    )
    layout = ParamSpec.of(net.to(device))

    def loss(theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(net, layout.unflatten(theta), (x,)), y)

    return loss, layout.flatten(dict(net.named_parameters())).clone()


def outer_step(method: str, steps: int, width: int, compiled: bool) -> tuple[Callable[[], Gradients], float]:
    """A call that makes one outer step, and the seconds of its warm-up, compiling included."""
    loss, theta = student(width)
    x = torch.randn((IMAGES, *SHAPE), generator=Rng(0).torch("images"))
    y = torch.arange(IMAGES) % CLASSES
    target = theta + 0.01 * torch.randn(theta.shape, generator=Rng(0).torch("target"))
    distance, rate = (theta - target).square().sum(), torch.tensor(RATE)
    began = time.perf_counter()
    made, reason = derivatives(loss, compiled, theta, x, y, method)
    if reason is not None:
        sys.exit(reason)

    def step(steps: int = steps) -> Gradients:
        inner = Inner(made, [torch.arange(IMAGES)] * steps)
        return GRADIENTS[method](inner, theta, x, y, rate, [Point(steps, target, distance)])

    step(1)
    return step, time.perf_counter() - began


class Box:
    """A saved tensor whose end can be watched."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def saved_bytes(step: Callable[[], Gradients]) -> int:
    """The most bytes that autograd saved at once; a storage that is saved several times counts once."""
    users: dict[int, list[int]] = {}  # by address: [times saved, bytes]
    now = peak = 0

    def pack(tensor: Tensor) -> Box:
        nonlocal now, peak
        storage, box = tensor.untyped_storage(), Box(tensor)
        entry = users.setdefault(storage.data_ptr(), [0, storage.nbytes()])
        now += 0 if entry[0] else entry[1]
        entry[0] += 1
        peak = max(peak, now)
        weakref.finalize(box, release, storage.data_ptr())
        return box

    def release(address: int) -> None:
        nonlocal now
        entry = users[address]
        entry[0] -= 1
        if not entry[0]:
            now -= users.pop(address)[1]

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box.tensor):
        step()
    return peak


def forget_peak() -> None:
    """Give freed memory back and start the largest resident size anew, where the system lets us (Linux)."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    if CLEAR.exists():
        CLEAR.write_text("5")


def resident_peak() -> int:
    """The largest resident size of this process, in bytes, since `forget_peak` where that works."""
    found = re.search(r"VmHWM:\s+(\d+)", STATUS.read_text()) if STATUS.exists() else None
    if found:
        return 1024 * int(found[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def case(method: str, steps: int, width: int, compiled: bool, repeat: int) -> dict[str, Any]:
    """Bytes that one outer step added, and CPU seconds of `repeat` more."""
    step, warm_up = outer_step(method, steps, width, compiled)
    forget_peak()
    before = resident_peak()
    step()
    grown = resident_peak() - before
    seconds = []
    for _ in range(repeat):
        began = time.process_time()
        step()
        seconds.append(time.process_time() - began)
    parameters = len(student(width)[1])
    return {
        "width": width,
        "method": method,
        "steps": steps,
        "compiled": compiled,
        "parameters": parameters,
        "cpu_seconds": {"min": min(seconds), "median": statistics.median(seconds), "max": max(seconds)},
        "repeat": repeat,
        "warm_up_seconds": warm_up,
        "resident_growth_bytes": grown,
        "saved_tensor_bytes": None if compiled else saved_bytes(step),
        "path_bytes": 4 * steps * parameters,
    }


def machine(threads: int) -> dict[str, Any]:
    """What the numbers depend on besides the code."""
    return {
        "machine": platform.machine(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def processor() -> str:
    """The processor's name where the system tells it."""
    told = Path("/proc/cpuinfo")
    lines = told.read_text().splitlines() if told.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    """What tells one case from another."""
    return tuple(row[name] for name in ("width", "method", "steps", "compiled", "repeat"))


def cases(given: argparse.Namespace) -> list[dict[str, Any]]:
    """What to run, in the order of the table."""
    kinds = [(method, False) for method in METHODS]
    kinds += [(method, True) for method in COMPILED] if given.compiled else []
    return [
        {"width": width, "method": method, "steps": steps, "compiled": compiled, "repeat": given.repeat}
        for width in given.widths
        for method, compiled in kinds
        for steps in given.steps
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown; times are min/median/max."""
    lines = [
        "| width | gradient | T | resident growth, MB | saved tensors, MB | path 4TP, MB | CPU-s a step |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        name = row["method"] + (", compiled" if row["compiled"] else "")
        saved = "" if row["saved_tensor_bytes"] is None else f"{row['saved_tensor_bytes'] / 1e6:.1f}"
        spread = "/".join(f"{row['cpu_seconds'][part]:.3f}" for part in ("min", "median", "max"))
        grown, path = (row[part] / 1e6 for part in ("resident_growth_bytes", "path_bytes"))
        lines.append(
            f"| {row['width']} | {name} | {row['steps']} | {grown:.1f} | {saved} | {path:.1f} | {spread} |"
        )
    return "\n".join(lines)


def run(wanted: dict[str, Any], threads: int) -> dict[str, Any]:
    """The row of a case, from a fresh process."""
    words = [sys.executable, __file__, "--case", json.dumps(wanted), "--threads", str(threads)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        sys.exit(f"{wanted} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 20, 40, 80])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compiled", action="store_true", help="add the compiled adjoint and unroll")
    parser.add_argument("--out", type=Path, default=RESULTS / "trajectory_gradients.json")
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.case:
        print(json.dumps(case(**given.case)))
        return
    old = json.loads(given.out.read_text())["rows"] if given.out.exists() else []
    rows = {key(row): row for row in old}
    setting = {"network": "convnet depth 3", "images": IMAGES, "shape": SHAPE, "rate": RATE}
    for wanted in cases(given):
        if key(wanted) not in rows:
            print(f"running {wanted}", file=sys.stderr, flush=True)
            rows[key(wanted)] = {**run(wanted, given.threads), **machine(given.threads)}
            write_json(given.out, {"setting": setting, "rows": list(rows.values())})
    print(table([rows[key(wanted)] for wanted in cases(given)]))


if __name__ == "__main__":
    main()

"""Four experts on two cores: two processes beside one after another on one thread and on two; seconds.

`python benchmarks/expert_recording.py [--root DIR] [--repeat 3]`: Fashion-MNIST in DIR, else digits. Each
recording is a process of its own, without its imports in the seconds; the three ways take turns. Wall clock:
cores that do other work make the figures worthless. Writes benchmarks/results/expert_recording.json.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import torch

from ddengine import parallel
from ddengine.data import load
from ddengine.nets import NetSpec
from expert_buffers import record

RESULTS = Path(os.environ.get("RESULTS", Path(__file__).parent / "results"))
RESULT = RESULTS / "expert_recording.json"
EXPERTS, EPOCHS, IMAGES = 4, 2, 4_000
WAYS = {"one thread": (1, 1), "two threads": (1, 2), "two processes": (2, 1)}  # workers, threads of each


def one(way: str, root: str | None, width: int) -> dict[str, float]:
    """Seconds of one recording, and the sum of what it recorded."""
    workers, threads = WAYS[way]
    if threads > 1:  # a worker that is this process otherwise computes on one
        parallel.one_thread = nullcontext
    torch.set_num_threads(threads)
    source = load("fashion_mnist", root=root).fit if root else load("digits").fit
    source = source.take(torch.arange(0, len(source), max(1, len(source) // IMAGES)))
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        buffer = record(
            source, NetSpec("convnet", width=width), Path(folder) / "experts", count=EXPERTS, epochs=EPOCHS,
            max_start_epoch=0, expert_epochs=1, workers=workers,
        )  # fmt: skip
        seconds = time.perf_counter() - began
        total = sum(float(buffer[i].params[-1].double().sum()) for i in range(EXPERTS))
    return {"seconds": seconds, "sum": total, "images": EXPERTS * EPOCHS * len(source)}


def asked(way: str, given: argparse.Namespace) -> dict[str, float]:
    """`one` in a new process."""
    words = [sys.executable, __file__, "--way", way, "--width", str(given.width)]
    words += ["--root", given.root] if given.root else []
    env = {**os.environ, "OMP_NUM_THREADS": str(WAYS[way][1])}
    done = subprocess.run(words, capture_output=True, text=True, check=True, env=env)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Take turns, then write and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--way", choices=WAYS)
    given = parser.parse_args()
    if given.way:
        print(json.dumps(one(given.way, given.root, given.width)))
        return
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(given.repeat):
        for way, found in runs.items():
            found.append(asked(way, given))
            print(f"{way}: {found[-1]['seconds']:.1f} s", file=sys.stderr)
    seconds = {way: [run["seconds"] for run in found] for way, found in runs.items()}
    middle = {way: statistics.median(values) for way, values in seconds.items()}
    result = {
        "what": f"{EXPERTS} experts x {EPOCHS} epochs, ConvNet-3 of width {given.width}",
        "dataset": "fashion_mnist" if given.root else "digits",
        "images": runs["one thread"][0]["images"],
        "seconds": seconds,
        "median": middle,
        "ratio to one thread": middle["one thread"] / middle["two processes"],
        "ratio to two threads": middle["two threads"] / middle["two processes"],
        "same weights as one thread": runs["one thread"][0]["sum"] == runs["two processes"][0]["sum"],
        "cores": os.cpu_count(),
        "machine": platform.processor() or platform.machine(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({key: result[key] for key in ("median", "ratio to one thread", "ratio to two threads")}))


if __name__ == "__main__":
    main()

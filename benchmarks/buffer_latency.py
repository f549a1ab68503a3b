"""An expert buffer against a pickled list of lists of the same trajectories: size, error, latency of a read.

    python benchmarks/buffer_latency.py [--buffer DIR] [--repeat 30]

Without a buffer it measures synthetic ones: random walks as long as the weights of a ConvNet-3 (width 128 on
CIFAR-10: 320,010 parameters) over 22 checkpoints, three experts. The pickle has the layout of MTT's released
code: torch.save of a list (experts) of lists (checkpoints) of lists (tensors); one file holds all experts.

Errors are of what a matcher uses, target - start over `--epochs` epochs, against float32. Latencies are of a
random segment (start and targets): ours after the file's one check against its SHA-256, which is timed apart.
The file cache is warm for both.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddengine.files import write_json
from ddengine.nets import NetSpec
from ddengine.rng import Rng
from ddengine.types import DataSpec
from expert_buffers import ExpertBuffer
from expert_buffers.store import ENCODINGS, Recording, commit, header, open_for_writing, save_expert

RESULTS = Path(os.environ.get("RESULTS", Path(__file__).parent / "results"))
SPEC = DataSpec("noise", (3, 32, 32), tuple("0123456789"), (0.5,) * 3, (0.25,) * 3, fingerprint="0" * 64)
STRIDE = (
    0.015  # of a walk's step to the weights' norm: |target - start| / |theta| of a real expert, two epochs
)

Rows = tuple[Tensor, Tensor]  # parameters [t p] and statistics [t s]


def walk(rng: Rng, size: int, checkpoints: int) -> Rows:
    """A trajectory: a start like initial weights, then steps of normal numbers; no statistics."""
    start = 0.03 * torch.randn(size, generator=rng.torch("start"))
    steps = torch.randn((checkpoints - 1, size), generator=rng.torch("steps"))
    length = STRIDE / 2**0.5 * start.norm()
    moved = (length * steps / steps.norm(dim=1, keepdim=True)).cumsum(0)
    return torch.cat([start[None], start + moved]), torch.empty(checkpoints, 0)


def record(root: Path, trajectories: list[Rows], head: dict[str, Any]) -> ExpertBuffer:
    """A buffer with these trajectories."""
    manifest = open_for_writing(root, head)
    (architecture,) = head["architectures"]
    for number, (params, stats) in enumerate(trajectories):
        recording = Recording.begin(head["encoding"], params[0], stats[0], None, None)
        for row, numbers in zip(params[1:], stats[1:], strict=True):
            recording = recording.append(row, numbers, None, None, {"params": row})
        entry = save_expert(root, number, architecture, recording)
        manifest = commit(root, manifest, number, entry, {})
    return ExpertBuffer(root)


def pickled(path: Path, buffer: ExpertBuffer, trajectories: list[Rows]) -> None:
    """The same trajectories as MTT's released code saves them."""
    experts = []
    for number, (params, _) in enumerate(trajectories):
        layout = buffer.spec(number)
        experts.append([[part.clone() for part in layout.unflatten(row).values()] for row in params])
    torch.save(experts, path)


def read_pickled(path: Path, expert: int, epoch: int, length: int, mapped: bool) -> Tensor:
    """A segment as MTT's released code reads it, or with the file memory-mapped instead, flattened."""
    rows = torch.load(path, weights_only=True, mmap=mapped)[expert][epoch : epoch + length + 1]
    return torch.stack([torch.cat([part.reshape(-1) for part in row]) for row in rows])


def segments(buffer: ExpertBuffer, length: int, count: int) -> list[tuple[int, int]]:
    """Random (expert, start epoch)."""
    generator, found = Rng(0).torch("segments"), []
    for _ in range(count):
        expert = int(torch.randint(len(buffer), (), generator=generator))
        last = buffer.epochs(expert) - length
        found.append((expert, int(torch.randint(last + 1, (), generator=generator))))
    return found


def latencies(read: Callable[[int, int], Tensor], chosen: list[tuple[int, int]]) -> dict[str, float]:
    """Seconds of a read over the chosen segments."""
    seconds = []
    for expert, epoch in chosen:
        began = time.perf_counter()
        read(expert, epoch)
        seconds.append(time.perf_counter() - began)
    return {"min": min(seconds), "median": statistics.median(seconds), "max": max(seconds)}


def first_reads(root: Path) -> list[float]:
    """Seconds until a checkpoint of each expert is there in a buffer just opened: SHA-256 and read."""
    buffer, seconds = ExpertBuffer(root), []
    for expert in range(len(buffer)):
        began = time.perf_counter()
        buffer.rows(expert, [0])
        seconds.append(time.perf_counter() - began)
    return seconds


def error(buffer: ExpertBuffer, trajectories: list[Rows], length: int) -> dict[str, float]:
    """Relative errors of target - start over all segments of `length` epochs."""
    found = []
    for expert, (params, _) in enumerate(trajectories):
        ours = buffer.rows(expert, range(len(params)))[0]
        truth = params[length:] - params[:-length]
        wrong = (ours[length:] - ours[:-length]) - truth
        found += (wrong.norm(dim=1) / truth.norm(dim=1)).tolist()
    return {"median": statistics.median(found), "max": max(found)}


def measure(
    trajectories: list[Rows], heads: dict[str, dict[str, Any]], length: int, repeat: int, folder: Path
) -> list[dict[str, Any]]:
    """Rows for the pickle, read whole and mapped, and for each encoding of ours."""
    buffers = {name: record(folder / name, trajectories, head) for name, head in heads.items()}
    one, path = next(iter(buffers.values())), folder / "replay_buffer_0.pt"
    pickled(path, one, trajectories)
    chosen = segments(one, length, repeat)
    rows = []
    for name, mapped in (("pickle", False), ("pickle, mapped", True)):
        seconds = latencies(partial(read_pickled, path, length=length, mapped=mapped), chosen)
        rows.append({"format": name, "bytes": path.stat().st_size, "segment_seconds": seconds})
    return rows + [ours(name, buffer, trajectories, length, chosen) for name, buffer in buffers.items()]


def ours(
    name: str, buffer: ExpertBuffer, trajectories: list[Rows], length: int, chosen: list[tuple[int, int]]
) -> dict[str, Any]:
    """The row of one of our encodings."""
    first = first_reads(buffer.root)
    for expert in range(len(buffer)):
        buffer.rows(expert, [0])
    return {
        "format": name,
        "bytes": sum(file.stat().st_size for file in buffer.root.iterdir()),
        "segment_seconds": latencies(lambda i, t: buffer.rows(i, range(t, t + length + 1))[0], chosen),
        "first_read_seconds": {"median": statistics.median(first), "max": max(first)},
        "relative_error": error(buffer, trajectories, length),
    }


def synthetic(given: argparse.Namespace) -> tuple[list[Rows], dict[str, dict[str, Any]]]:
    """Random walks in the weights of a ConvNet, and the head of a buffer for each encoding."""
    network = NetSpec("convnet", width=given.width)
    heads = {name: header(SPEC, [network], {"name": "walk"}, 0, name, {}) for name in ENCODINGS}
    (architecture,) = heads["fp32"]["architectures"].values()
    size = sum(torch.Size(shape).numel() for _, shape in architecture["parameters"])
    return [walk(Rng(0).fold(i), size, given.checkpoints) for i in range(given.experts)], heads


def stored(root: Path) -> tuple[list[Rows], dict[str, dict[str, Any]]]:
    """The trajectories of a buffer with one network, and its head with each encoding."""
    buffer = ExpertBuffer(root)
    if len({buffer.network(i) for i in range(len(buffer))}) != 1:
        sys.exit(f"{root} has no expert or several networks; give a buffer with one")
    if buffer.manifest["encoding"] != "fp32":
        print("the buffer is not fp32: its decoded rows count as the truth", file=sys.stderr)
    keys = ("dataset", "networks", "architectures", "recipe", "seed", "origin", "format", "version")
    head = {key: buffer.manifest[key] for key in keys}
    trajectories = [buffer.rows(i, range(buffer.epochs(i) + 1)) for i in range(len(buffer))]
    return trajectories, {name: {**head, "encoding": name} for name in ENCODINGS}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown, with ratios to the pickle."""
    base, lines = rows[0], [
        "| format | MB | of pickle | ms a segment | times faster | first read, ms | error, median (max) |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in rows:
        seconds = row["segment_seconds"]["median"]
        faster = base["segment_seconds"]["median"] / seconds
        first = f"{1e3 * row['first_read_seconds']['median']:.1f}" if "first_read_seconds" in row else ""
        wrong = row.get("relative_error")
        wrong = f"{wrong['median']:.1e} ({wrong['max']:.1e})" if wrong else ""
        lines.append(
            f"| {row['format']} | {row['bytes'] / 1e6:.2f} | {row['bytes'] / base['bytes']:.3f} "
            f"| {1e3 * seconds:.2f} | {faster:.1f} | {first} | {wrong} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--buffer", type=Path)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--checkpoints", type=int, default=22)
    parser.add_argument("--experts", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS / "buffer_latency.json")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    trajectories, heads = stored(given.buffer) if given.buffer else synthetic(given)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(trajectories, heads, given.epochs, given.repeat, Path(folder))
    setting = {
        "source": given.buffer.name if given.buffer else "random walks",
        "parameters": trajectories[0][0].shape[1],
        "checkpoints": [len(params) for params, _ in trajectories],
        "epochs": given.epochs,
        "repeat": given.repeat,
        "threads": given.threads,
    }
    machine = {
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }
    write_json(given.out, {"setting": setting, **machine, "rows": rows})
    print(json.dumps(setting))
    print(table(rows))


if __name__ == "__main__":
    main()

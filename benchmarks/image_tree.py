"""A tree of 1,000 classes and 100,000 small files: start-up cold and warm, images a second, peak memory.

`python benchmarks/image_tree.py FOLDER` writes the tree below FOLDER (100 files of 32x32 pixels a class, JPEG
and PNG in turn), measures each number in a process of its own, writes benchmarks/results/image_tree.json and
removes the tree. Cold means that there is no index yet; the files are in the page cache, as just written.
"""

import argparse
import io
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

EACH, SIDE, CHUNK = 100, 32, 256
PER_CLASS, STEPS = 16, 5
RESULTS = Path(os.environ.get("RESULTS", Path(__file__).parent / "results"))
RESULT = RESULTS / "image_tree.json"


def write_tree(root: Path, classes: int) -> float:
    """Write the files; seconds. Each image is smooth noise of its own, so that JPEG has its usual size."""
    import numpy as np
    from PIL import Image

    began = time.perf_counter()
    for label in range(classes):
        folder = root / f"class_{label:04d}"
        folder.mkdir(parents=True)
        coarse = np.random.default_rng(label).integers(0, 256, (EACH, 8, 8, 3), dtype=np.uint8)
        for number, pixels in enumerate(coarse.repeat(SIDE // 8, 1).repeat(SIDE // 8, 2)):
            data, kind = io.BytesIO(), ("JPEG", "PNG")[number % 2]
            Image.fromarray(pixels).save(data, kind, **({"compress_level": 1} if number % 2 else {}))
            (folder / f"{number:03d}.{kind.lower()}").write_bytes(data.getvalue())
    return time.perf_counter() - began


def part_of(tree: Path, root: Path, classes: int) -> Path:
    """A folder of links to the first `classes` classes of the tree."""
    root.mkdir()
    for folder in sorted(tree.iterdir())[:classes]:
        (root / folder.name).symlink_to(folder)
    return root


def peak() -> float:
    """Peak resident MiB of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measured(root: Path, memory: str, work: str) -> dict[str, Any]:
    """One measurement, in this process: seconds to load and, by `work`, draws or steps of attention."""
    import torch

    from ddengine.data.registry import load
    from ddengine.rng import Rng

    torch.set_num_threads(1)
    before, began, spent = peak(), time.perf_counter(), time.process_time()
    dataset = load("image_folder", root=root, size=SIDE, memory=memory)
    found: dict[str, Any] = {"load_seconds": time.perf_counter() - began, "images": len(dataset.fit)}
    found["load_cpu_seconds"] = time.process_time() - spent
    if work == "draws":
        rates, classes, spent = [], range(len(dataset.fit.spec.classes)), time.process_time()
        for step in range(STEPS):
            began = time.perf_counter()
            drawn = torch.cat(dataset.fit.draw(Rng(step).torch("draw"), classes, PER_CLASS))
            for piece in drawn.split(CHUNK):
                dataset.fit.model_input(piece)
            rates.append(len(drawn) / (time.perf_counter() - began))
        found["images_per_second"] = statistics.median(rates[1:])
        found["images_per_cpu_second"] = STEPS * len(drawn) / (time.process_time() - spent)
    if work == "attention":
        found |= attention_steps(dataset.fit)
    return {**found, "peak_mib": peak(), "before_mib": before}


def attention_steps(fit: Any) -> dict[str, float]:
    """Steps of attention matching at equal chunk, one image a class."""
    import torch

    import matchers
    from ddengine.nets.core import NetSpec
    from ddengine.rng import Rng
    from ddengine.types import Budget, Task

    task, rng = Task(fit, Budget(ipc=1)), Rng(0)
    matcher = matchers.make("attention", NetSpec("convnet", 16), steps=3, real_per_class=8, chunk=CHUNK)
    work, state, seconds = matcher.prepare(task, rng), matcher.init(task, rng), []
    for _ in range(3):
        began = time.perf_counter()
        state, metrics = matcher.step(state, work, rng)
        assert torch.isfinite(torch.as_tensor(metrics["loss"]))
        seconds.append(time.perf_counter() - began)
    work.close()
    return {"step_seconds": min(seconds)}


def apart(root: Path, memory: str, work: str, cache: Path) -> dict[str, Any]:
    """`measured` in a process of its own."""
    words = [sys.executable, __file__, "--one", str(root), memory, work]
    environment = {**os.environ, "DDENGINE_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def run(folder: Path, classes: int) -> dict[str, Any]:
    """All measurements; the tree is removed at the end."""
    top, cache = folder / "tree", folder / "cache"
    try:
        written = write_tree(top, classes)
        rows = []
        for count in [n for n in (10, 100, 1000) if n <= classes]:
            root = part_of(top, folder / f"part_{count}", count)
            cold = apart(root, "disk", "none", cache)
            warm = [apart(root, "disk", "none", cache) for _ in range(3)]
            row = {
                "classes": count, "files": count * EACH, "cold_seconds": cold["load_seconds"],
                "cold_cpu_seconds": cold["load_cpu_seconds"], "cold_peak_mib": cold["peak_mib"],
                "warm_seconds": statistics.median(one["load_seconds"] for one in warm),
                "warm_cpu_seconds": statistics.median(one["load_cpu_seconds"] for one in warm),
            }  # fmt: skip
            for memory, work in (("disk", "draws"), ("disk", "attention"), ("ram", "draws")):
                row |= named(f"{memory}_{work}", apart(root, memory, work, cache))
            rows.append(row)
            print(json.dumps(row), file=sys.stderr, flush=True)
        return {"written_seconds": written, "rows": rows}
    finally:
        shutil.rmtree(folder)


def named(prefix: str, found: dict[str, Any]) -> dict[str, Any]:
    """A measurement under names of its own."""
    keys = ("load_seconds", "images_per_second", "images_per_cpu_second", "step_seconds", "peak_mib")
    return {f"{prefix}_{key}": found[key] for key in keys if key in found}


def main() -> None:
    """Run all or, with --one, one measurement."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("rest", nargs="*")
    parser.add_argument("--one", action="store_true")
    parser.add_argument("--classes", type=int, default=1000)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measured(given.folder, *given.rest)))
        return
    given.folder.mkdir(parents=True)
    began_with = os.getloadavg()[0]  # beside other work the wall clock says little, the CPU seconds more
    found = run(given.folder, given.classes)
    setting = {
        "size": SIDE, "files_per_class": EACH, "chunk": CHUNK, "drawn_per_class": PER_CLASS,
        "cores": len(os.sched_getaffinity(0)), "machine": platform.machine(), "threads": 1,
        "load_at_start": began_with, "load_at_end": os.getloadavg()[0],
        "command": f"python benchmarks/image_tree.py FOLDER --classes {given.classes}",
    }  # fmt: skip
    RESULT.write_text(json.dumps({**setting, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()

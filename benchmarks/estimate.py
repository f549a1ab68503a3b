"""What `ddengine estimate` says beside what the command then takes: seconds, peak memory, bytes on disk.

`python benchmarks/estimate.py OUT [--root DIR]` does each of attention, buffer, trajectory and evaluate on
digits and, where DIR holds Fashion-MNIST, at a second setting. Estimate and command run one after the other,
each in a process of its own; seconds are without the imports. Beside other work the wall clock of one says
little of the other's: `cpu_seconds` compares what the processor was given, by the share that the estimate had
of it. Writes benchmarks/results/estimate.json.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

RESULTS = Path(os.environ.get("RESULTS", Path(__file__).parent / "results"))
RESULT = RESULTS / "estimate.json"
SMALL = ["network=convnet", "network.width=16"]
CASES: dict[str, dict[str, list[str]]] = {
    "digits": {
        "attention": ["distill", "dataset=digits", "matcher=attention", "ipc=1", "matcher.steps=200", *SMALL],
        "buffer": ["buffer", "dataset=digits", "count=3", "epochs=6", "workers=1", *SMALL],
        "trajectory": [
            "distill", "dataset=digits", "matcher=trajectory", "ipc=1", "matcher.steps=30",
            "matcher.inner.steps=10", "experts={out}/buffer", "matcher.window.max=4", *SMALL,
        ],
        "evaluate": ["evaluate", "{out}/attention", "seeds=2", "recipe.steps=200", "workers=1", "kept=none"],
    },
    "fashion_mnist": {
        "attention": [
            "distill", "dataset=fashion_mnist", "dataset.root={root}", "matcher=attention", "ipc=10",
            "matcher.steps=40", "network=convnet", "network.width=32",
        ],
        "buffer": [
            "buffer", "dataset=fashion_mnist", "dataset.root={root}", "count=1", "epochs=1", "workers=1",
            "max_start_epoch=0", "expert_epochs=1", *SMALL,
        ],
        "evaluate": [
            "evaluate", "{out}/attention", "seeds=1", "rows=[random]", "recipe.steps=100", "workers=1",
            "kept=none",
        ],
    },
}  # fmt: skip


def one(words: list[str]) -> dict[str, float]:
    """Run a command in this process: its exit code, seconds after the imports, peak bytes."""
    from ddengine import compose, estimating, estimating_evaluation, evaluating, judge, recipes  # noqa: F401
    from ddengine.cli import main

    began, spent = time.perf_counter(), time.process_time()
    code = main(words)
    seconds = time.perf_counter() - began
    return {
        "code": code,
        "seconds": seconds,
        "cpu_seconds": time.process_time() - spent,
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def apart(words: list[str], cache: Path) -> tuple[dict[str, float], str]:
    """`one` in a process of its own, and what the command printed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DDENGINE_CACHE": str(cache)}
    line = [sys.executable, __file__, "--one", *words]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
    printed = done.stdout.splitlines()
    if done.returncode or not printed or json.loads(printed[-1])["code"]:
        raise SystemExit(f"{' '.join(words)}: {done.stderr[-2000:]}")
    return json.loads(printed[-1]), "\n".join(printed[:-1])


def size(folder: Path) -> int:
    """Bytes of the files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def compared(words: list[str], out: Path, cache: Path) -> dict[str, Any]:
    """Estimate and command: the numbers of both, and estimated over measured."""
    spent, said = apart(["estimate", *words, "--json"], cache)
    expected = json.loads(said)
    before = size(out) if out.exists() else 0
    given = [] if words[0] == "evaluate" else [f"out={out}"]
    took, _ = apart([*words, *given, "--json"], cache)
    measured = {
        "seconds": took["seconds"], "cpu_seconds": took["cpu_seconds"], "memory": took["memory"],
        "disk": size(out) - before,
    }  # fmt: skip
    found = {
        "seconds": expected["seconds"],
        "cpu_seconds": expected["seconds"] * spent["cpu_seconds"] / spent["seconds"],
        "memory": expected["memory_bytes"],
        "disk": expected["disk_bytes"],
    }
    ratio = {key: round(found[key] / max(measured[key], 1), 3) for key in found}
    return {"estimated": found, "measured": measured, "ratio": ratio, "estimate_took": spent["seconds"]}


def run(out: Path, root: Path | None) -> dict[str, Any]:
    """All cases that there is data for."""
    found: dict[str, Any] = {}
    for dataset, cases in CASES.items():
        if dataset != "digits" and root is None:
            continue
        place = out / dataset
        for name, words in cases.items():
            filled = [word.format(out=place, root=root) for word in words]
            target = place / ("attention" if name == "evaluate" else name)
            found[f"{dataset} {name}"] = compared(filled, target, out / "cache")
            print(json.dumps({f"{dataset} {name}": found[f"{dataset} {name}"]}), file=sys.stderr, flush=True)
    return found


def main() -> None:
    """Run all cases, or with --one a single command."""
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(one(sys.argv[2:])))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--root", type=Path)
    given = parser.parse_args()
    setting = {
        "cores": len(os.sched_getaffinity(0)), "load": os.getloadavg()[0], "threads": 1,
        "command": "python benchmarks/estimate.py OUT --root DIR",
    }  # fmt: skip
    found = {**setting, "cases": run(given.out, given.root)}
    RESULT.write_text(json.dumps({**found, "load_after": os.getloadavg()[0]}, indent=1) + "\n")


if __name__ == "__main__":
    main()

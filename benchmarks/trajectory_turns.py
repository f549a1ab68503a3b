"""CPU time of the adjoint beside the unroll, eager and compiled, taking turns in one process.

    python benchmarks/trajectory_turns.py [--widths 32] [--steps 10 20 40] [--rounds 7] [--compiled]

Turns in one process see the same neighbours and the same allocator, which processes one after another do not.
Ten images in the shape of CIFAR, one thread; the first round is not counted.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from trajectory_gradients import RESULTS, machine, outer_step

from ddengine.files import write_json


def turns(width: int, steps: int, rounds: int, compiled: bool) -> dict[str, Any]:
    """CPU seconds of an outer step by version, and each version's ratio to the eager unroll."""
    versions = [(method, False) for method in ("unroll", "adjoint")]
    versions += [(method, True) for method in ("unroll", "adjoint")] if compiled else []
    calls = {
        method + (", compiled" if fast else ""): outer_step(method, steps, width, fast)[0]
        for method, fast in versions
    }
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(rounds + 1):
        for name, call in calls.items():
            began = time.process_time()
            call()
            if round_:
                seconds[name].append(time.process_time() - began)
    spread = {
        name: {"min": min(found), "median": statistics.median(found), "max": max(found)}
        for name, found in seconds.items()
    }
    reference = spread["unroll"]["median"]
    ratios = {name: found["median"] / reference for name, found in spread.items()}
    return {"width": width, "steps": steps, "rounds": rounds, "cpu_seconds": spread, "ratio": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--widths", type=int, nargs="+", default=[32])
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 20, 40])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS / "trajectory_turns.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for width in given.widths:
        for steps in given.steps:
            rows.append({**turns(width, steps, given.rounds, given.compiled), **machine(1)})
            print(json.dumps(rows[-1]), flush=True)
            write_json(given.out, {"rows": rows})


if __name__ == "__main__":
    main()

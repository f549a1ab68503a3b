"""A disk that is full, over its quota, read-only or forbidden, from each point of writing on; then room.

    python tests/faults/full.py [--cases buffer,attention] [--points first|N] [--real]

For each command of `fault_cases.CASES` and each error of `fault_points.REFUSED`: one line says which path and
how many bytes are lacking, what is there is whole, a full disk holds no temporary name, and once there is
room the same command ends with the bits of an uninterrupted run. `--real` fills a small tmpfs instead, which
takes the right to mount one. Counts go to benchmarks/results/faults_full.json after each command.
"""

import argparse
import json
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
from fault_cases import CASES, ROOT, World, half_made, left_over
from fault_points import REFUSED, Fault, Outcome, run
from kill import check, preload

RESULTS = ROOT / "benchmarks" / "results" / "faults_full.json"
ROOMS = (0, 4, 8, 16, 32, 64)  # KiB that are left on a small disk
DISK = 8 << 20


@dataclass
class Count:
    """What one command met and what it came to; `problems` is empty where all is well."""

    refused: dict[str, int] = field(default_factory=dict)
    went_on: int = 0
    identical: int = 0
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0


def places(points: list[str], name: str, which: str) -> list[int]:
    """Where an error begins: the first time of each named point for a full disk, of each phase for others."""
    known: dict[str, int] = {}
    for place, point in enumerate(points):
        phase = point.partition(" ")[0]
        if phase in REFUSED[name]:
            known.setdefault(point if name == "ENOSPC" else phase, place)
    found = sorted(known.values())
    return found[:: max(1, -(-len(found) // int(which)))] if which.isdigit() else found


def wrong(outcome: Outcome, folder: Path, sized: bool) -> str:
    """What is wrong with how a command met a disk that refused it; "" where nothing is."""
    lines = outcome.err.strip().splitlines()
    causes = [line for line in lines if line.startswith("error: ")]
    if outcome.code != 2 or len(causes) != 1 or not lines[-1].startswith("  fix: "):
        return f"ended with {outcome.code}: {outcome.err.strip()[-300:]}"
    names = {path.name for path in folder.rglob("*")} | {
        "out=",
        "run",
        "experts",
        "teachers",
        "judged",
        "rows",
    }
    if not any(name in causes[0] for name in names):
        return f"names no path: {causes[0]}"
    if sized and not re.search(r"\([0-9]+ bytes\)", causes[0]):
        return f"names no bytes: {causes[0]}"
    return ""


def refused(world: World, name: str, error: str, which: str, count: Count) -> None:
    """Let `error` begin at each place of a command's writing."""
    straight, _ = world.run(name)
    for place in places(straight.points, error, which):
        point, folder = straight.points[place], world.fresh("refused")
        outcome = run(world.words(name), folder, Fault(place, error))
        met(outcome, folder, f"{error} at {point}", error in ("ENOSPC", "EDQUOT"), count)
        count.refused[error] = count.refused.get(error, 0) + 1
        check(world, name, folder, f"{error} at {point}", count)


def met(outcome: Outcome, folder: Path, what: str, full: bool, count: Count) -> None:
    """Judge how a command met a refusal, and what it left."""
    if outcome.code == 0:  # it could not take away what nobody needs, and said no more of it
        count.went_on += 1
    elif problem := wrong(outcome, folder, full and "mkdir" not in what):
        count.problems.append(f"{what}: {problem}")
    left = left_over(folder) if full else []
    count.problems += [f"{what}: left {left}"] * bool(left)
    count.problems += [f"{what}: {found}" for found in half_made(folder)]


def small_disk(world: World, name: str, count: Count) -> None:
    """Fill a small tmpfs but for a few KiB, run the command, make room, and run it again."""
    folder = world.fresh("disk")
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(folder)], check=True)
    try:
        for room in ROOMS:
            inside = folder / name
            inside.mkdir()
            free = shutil.disk_usage(folder).free - (room << 10)
            (folder / "ballast").write_bytes(b"\0" * free)
            outcome = run(world.words(name), inside)
            met(outcome, inside, f"{room} KiB left", False, count)
            count.problems += [f"{room} KiB left: left {left}" for left in left_over(inside)]
            count.refused["tmpfs"] = count.refused.get("tmpfs", 0) + (outcome.code != 0)
            (folder / "ballast").unlink()
            check(world, name, inside, f"{room} KiB left", count)
            shutil.rmtree(inside)
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def main(arguments: list[str] | None = None) -> int:
    """Do what the command line asks for; the exit code is 1 where something was lost or left."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--points", default="first")
    parser.add_argument("--real", action="store_true")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--again", action="store_true")
    given = parser.parse_args(arguments)
    preload()
    found = {"command": "python tests/faults/full.py", "cases": {}}
    if given.results.exists() and not given.again:
        found = json.loads(given.results.read_text())
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder))
        for name in given.cases.split(","):
            key, settings = f"{name} on tmpfs" if given.real else name, {"points": given.points}
            before = found["cases"].get(key, {})
            if before.get("settings") == settings and not before["problems"]:
                continue
            count, began = Count(), time.monotonic()
            if given.real:
                small_disk(world, name, count)
            else:
                for error in REFUSED:
                    refused(world, name, error, given.points, count)
            count.seconds = round(time.monotonic() - began, 1)
            found["cases"][key] = {"settings": settings, **asdict(count)}
            found |= {"date": time.strftime("%Y-%m-%d"), "torch": torch.__version__,
                      "python": platform.python_version(), "system": platform.system()}  # fmt: skip
            given.results.write_text(json.dumps(found, indent=1) + "\n")
            print(f"{key}: {count.refused} refusals, {count.identical} ends identical, "
                  f"{len(count.problems)} problems, {count.seconds:.0f} s", flush=True)  # fmt: skip
            for problem in count.problems:
                print(f"  {problem}", flush=True)
    return int(any(case["problems"] for case in found["cases"].values()))


if __name__ == "__main__":
    sys.exit(main())

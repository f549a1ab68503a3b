"""SIGKILL at random moments and at every named point of writing; then the same command again, to its end.

    python tests/faults/kill.py [--cases buffer,attention] [--kills 20] [--points first|all|N]

For each command of `fault_cases.CASES`: what a killed run leaves must be refused or whole, and what the same
command ends with must be, bit for bit, what an uninterrupted run makes (but for times, memory, host and what
is sealed over them), with no temporary name and no lock left. After each command its counts go to
benchmarks/results/faults_kill.json; what stands there with as many kills is not done again but by `--again`.
"""

import argparse
import json
import platform
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
from fault_cases import CASES, ROOT, World, contents, half_made, left_over
from fault_points import Fault, run

from ddengine.rng import Rng

RESULTS = ROOT / "benchmarks" / "results" / "faults_kill.json"
RERUNS = 3  # of a command that was killed, until it must have ended


@dataclass
class Count:
    """What was done to one command and what it came to; `problems` is empty where all is well."""

    random_kills: int = 0
    ended_before: int = 0
    points: dict[str, int] = field(default_factory=dict)
    identical: int = 0
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0


def preload() -> None:
    """Import what commands need, once, before the forks."""
    import hydra  # noqa: F401
    import sklearn.datasets  # noqa: F401

    import ddengine.actions
    import ddengine.artefacts
    import ddengine.compose
    import ddengine.console
    import ddengine.evaluating
    import ddengine.recipes  # noqa: F401


def check(world: World, name: str, folder: Path, what: str, count: Count) -> None:
    """Run the command to its end and compare with the uninterrupted run."""
    _, expected = world.run(name)
    for _ in range(RERUNS):
        outcome = run(world.words(name), folder)
        if outcome.code == 0:
            break
        count.problems.append(f"{what}: rerun ended with {outcome.code}: {outcome.err.strip()[-300:]}")
    found, left = contents(folder), left_over(folder)
    differing = sorted(k for k in found.keys() | expected.keys() if found.get(k) != expected.get(k))
    if left:
        count.problems.append(f"{what}: left {left}")
    elif differing:
        count.problems.append(f"{what}: differs in {differing}")
    else:
        count.identical += 1


def at_random(world: World, name: str, kills: int, count: Count) -> None:
    """`kills` SIGKILLs at moments drawn over the length of a run, on one folder until it is finished."""
    straight, _ = world.run(name)
    moments, folder, open_runs = Rng(0).fold("faults", name).torch("moments"), world.fresh("killed"), 0
    while count.random_kills < kills:
        seconds = straight.seconds * float(torch.rand((), generator=moments))
        outcome = run(world.words(name), folder, kill_after=seconds)
        count.random_kills += 1
        count.problems += [f"random kill {count.random_kills}: {found}" for found in half_made(folder)]
        open_runs += 1
        if outcome.code >= 0:
            count.ended_before += 1
        if outcome.code >= 0 or count.random_kills == kills or open_runs == 5:
            check(world, name, folder, f"{open_runs} random kills", count)
            folder, open_runs = world.fresh("killed"), 0


def at_points(world: World, name: str, which: str, count: Count) -> None:
    """A SIGKILL at each named point: at its first time, at `all` times, or at N of the points, spread out."""
    straight, _ = world.run(name)
    first = {point: place for place, point in reversed(list(enumerate(straight.points)))}
    places = list(range(len(straight.points))) if which == "all" else sorted(first.values())
    if which.isdigit():
        places = places[:: max(1, -(-len(places) // int(which)))]
    for place in places:
        point, folder = straight.points[place], world.fresh("killed")
        outcome = run(world.words(name), folder, Fault(place))
        assert outcome.code == -9, f"{name} was not killed at {point}: {outcome.code} {outcome.err}"
        count.problems += [f"{point}: {found}" for found in half_made(folder)]
        check(world, name, folder, point, count)
        phase = point.partition(" ")[0]
        count.points[phase] = count.points.get(phase, 0) + 1


def measured(world: World, name: str, kills: int, which: str) -> Count:
    """All kills of one command."""
    count, began = Count(), time.monotonic()
    at_random(world, name, kills, count)
    at_points(world, name, which, count)
    count.seconds = round(time.monotonic() - began, 1)
    return count


def main(arguments: list[str] | None = None) -> int:
    """Do what the command line asks for; the exit code is 1 where a command lost or kept too much."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--points", default="first")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--again", action="store_true")
    given = parser.parse_args(arguments)
    preload()
    settings = {"random_kills": given.kills, "points": given.points}
    found = {"command": "python tests/faults/kill.py", "cases": {}}
    if given.results.exists() and not given.again:
        found = json.loads(given.results.read_text())
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder))
        for name in given.cases.split(","):
            before = found["cases"].get(name, {})
            if before.get("settings") == settings and not before["problems"]:
                continue
            count = measured(world, name, given.kills, given.points)
            found["cases"][name] = {"settings": settings, **asdict(count)}
            found |= {"date": time.strftime("%Y-%m-%d"), "torch": torch.__version__,
                      "python": platform.python_version(), "system": platform.system()}  # fmt: skip
            given.results.write_text(json.dumps(found, indent=1) + "\n")
            kills = count.random_kills + sum(count.points.values())
            print(f"{name}: {kills} kills, {count.identical} ends identical, {len(count.problems)} problems, "
                  f"{count.seconds:.0f} s", flush=True)  # fmt: skip
            for problem in count.problems:
                print(f"  {problem}", flush=True)
    return int(any(case["problems"] for case in found["cases"].values()))


if __name__ == "__main__":
    sys.exit(main())

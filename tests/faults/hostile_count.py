"""Counts of the hostile artefacts of tests/faults/test_hostile.py, by group, as its tests meet them.

    python tests/faults/hostile_count.py

The result goes to benchmarks/results/faults_hostile.json; the exit code is 1 where a test failed.
"""

import json
import platform
import subprocess
import sys
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from xml.etree import ElementTree

sys.path.insert(0, str(Path(__file__).parent))

from test_hostile import CASES, GROUPS

TESTS = Path(__file__).parent / "test_hostile.py"
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "faults_hostile.json"
BAD = ("failure", "error", "skipped")


def outcomes() -> dict[str, bool]:
    """Run the tests in a process of their own; for each case that was met, whether its test failed."""
    with TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        words = ["-q", "-n0", "-p", "no:cacheprovider", "--junitxml", str(report), str(TESTS)]
        subprocess.run([sys.executable, "-m", "pytest", *words], check=False)
        tests = list(ElementTree.parse(report).iter("testcase"))
    names = {name.encode("unicode_escape").decode(): name for name in CASES}  # as pytest spells them
    met = {test.get("name", "").partition("[")[2][:-1]: test for test in tests}
    return {
        names[said]: any(test.find(bad) is not None for bad in BAD)
        for said, test in met.items()
        if said in names
    }


def by_group(failed: dict[str, bool]) -> dict[str, dict[str, int]]:
    """Cases of each group: how many were met, how many of them have to be refused, and how many failed."""
    counts = {}
    for group in GROUPS:
        cases = {name: case for name, case in group() if name in failed}
        counts[group.__name__] = {
            "cases": len(cases),
            "to_be_refused": sum(not case.shown for case in cases.values()),
            "failed": sum(failed[name] for name in cases),
        }
    return counts


def main() -> int:
    """Run the tests, print and write the counts."""
    began = time.monotonic()
    failed = outcomes()
    groups, total = by_group(failed), Counter[str]()
    for group in groups.values():
        total.update(group)
    wrong = [name for name in CASES if failed.get(name, True)]
    result = {
        "command": "python tests/faults/hostile_count.py",
        "date": time.strftime("%Y-%m-%d"),
        "versions": {name: version(name) for name in ("torch", "numpy", "safetensors")},
        "python": platform.python_version(),
        "seconds": round(time.monotonic() - began, 1),
        "total": dict(total),
        "groups": groups,
        "failures": wrong,
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())

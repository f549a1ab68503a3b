"""Coverage-guided fuzzing of every reader of foreign or stored bytes, by atheris; the corpus is fuzz_corpus/.

    pip install atheris
    python tests/faults/fuzz.py                           # a minute of each reader
    python tests/faults/fuzz.py --seconds 600 npz torch   # ten minutes of two of them
    python tests/faults/fuzz.py --seeds                   # write the seeds of the corpus anew

Each reader runs in a process of its own under a limit of memory. It may take bytes, or refuse them with its
own error; any other exception, a file made by code from the bytes, or memory beyond the limit is a finding,
and ends the script with exit code 1. The bytes of a finding are left in the folder that --findings names.
After each reader its counts go to benchmarks/results/faults_fuzz.json, and the smallest inputs that reached
new code to the corpus; a reader that stands there with as many seconds is not done again but by `--again`.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

HERE = Path(__file__).parent
CORPUS = HERE / "fuzz_corpus"
RESULTS = HERE.parents[1] / "benchmarks" / "results" / "faults_fuzz.json"
KEPT, KEPT_BYTES = 60, 48 << 10  # inputs of a reader that a run adds to its corpus at most, and their bytes
MEMORY = 3000  # MiB that a reader's process may take, most of them for torch itself
LONGEST = 1 << 14  # bytes of an input
INSTRUMENTED = ["ddengine", "synth", "expert_buffers", "zipfile", "pickletools"]


@dataclass(frozen=True)
class Reader:
    """What reads the bytes of a file called `name`, and the error by which it refuses them."""

    name: str
    read: Callable[[Path], object]
    refusal: type[Exception]
    seeds: Callable[[Path], list[bytes]]


def readers() -> dict[str, Reader]:
    """The readers by name; imports what they need."""
    from fuzz_readers import READERS

    return READERS


def fuzz(name: str, seconds: int, findings: Path) -> None:
    """Fuzz one reader in this process, which ends with it, below the folder for temporary files."""
    import atheris

    with atheris.instrument_imports(include=INSTRUMENTED):
        reader = readers()[name]
    root = Path(tempfile.gettempdir())
    new, folder = root / "new", root / "read"
    words = [sys.argv[0], f"-max_total_time={seconds}", f"-rss_limit_mb={MEMORY}", f"-max_len={LONGEST}"]
    words += ["-timeout=20", "-print_final_stats=1", f"-artifact_prefix={findings}/{name}-"]
    atheris.Setup([*words, str(new), str(CORPUS / name)], lambda data: tried(reader, data, folder))
    atheris.Fuzz()


def tried(reader: Reader, data: bytes, folder: Path) -> bool:
    """Whether a reader refuses `data`; any exception but its own refusal leaves this function."""
    refused = False
    path = folder / reader.name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    try:
        reader.read(path)
    except reader.refusal as error:
        refused, cause = True, str(error).splitlines()[0]
        if not cause.isprintable():
            raise AssertionError(f"unprintable: {cause!a}") from error
    made = {found.name for found in path.parent.iterdir()} - {reader.name.rpartition("/")[2]}
    if made:
        raise AssertionError(f"it made {made}")
    return refused


def run(name: str, seconds: int, findings: Path) -> dict[str, object]:
    """Fuzz one reader in a process of its own: executions, covered edges, and what was found."""
    words = ["--one", name, "--seconds", str(seconds), "--findings", str(findings)]
    with tempfile.TemporaryDirectory(prefix="fuzz-") as root:
        (Path(root) / "new").mkdir()
        done = subprocess.run(
            [sys.executable, __file__, *words],
            env={**os.environ, "TMPDIR": root},
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        kept = keep(name, Path(root) / "new")
    count, covered, found = said(done.stderr)
    if done.returncode and not found:
        found = done.stderr.splitlines()[-3:]
    told = {"seconds": seconds, "executions": count, "edges": covered, "inputs_kept": kept}
    return {**told, "found": found[:3] if done.returncode else []}


def said(err: str) -> tuple[int, int, list[str]]:
    """Executions, covered edges and errors in what libFuzzer wrote."""
    lines = err.splitlines()
    count = next((line.rpartition(" ")[2] for line in lines if "number_of_executed_units" in line), "0")
    words = [line.split() for line in lines]
    covered = [b for line in words for a, b in pairwise(line) if a == "cov:"]
    found = [line for line in lines if "Uncaught" in line or "ERROR:" in line or "Error:" in line]
    return int(count), int(covered[-1]) if covered else 0, found


def keep(name: str, new: Path) -> int:
    """Add the smallest inputs that reached new code to the corpus of a reader; how many."""
    room, kept = KEPT_BYTES, 0
    for path in sorted(new.iterdir(), key=lambda path: (path.stat().st_size, path.name))[:KEPT]:
        room -= path.stat().st_size
        if room >= 0 and not (CORPUS / name / path.name).exists():
            (CORPUS / name / path.name).write_bytes(path.read_bytes())
            kept += 1
    return kept


def write_seeds() -> None:
    """Write the seeds of every reader into the corpus."""
    for name, reader in readers().items():
        (CORPUS / name).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            for number, data in enumerate(reader.seeds(Path(folder))):
                (CORPUS / name / f"seed_{number}").write_bytes(data)


def main() -> int:
    """Fuzz the readers that are named, all if none is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("readers", nargs="*")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--findings", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--seeds", action="store_true")
    parser.add_argument("--one")
    given = parser.parse_args()
    given.findings.mkdir(parents=True, exist_ok=True)
    if given.one:
        fuzz(given.one, given.seconds, given.findings.resolve())
    if given.seeds:
        write_seeds()
        return 0
    return fuzz_all(given)


def fuzz_all(given: argparse.Namespace) -> int:
    """Fuzz the readers one after the other and write the counts after each."""
    found = {"command": f"python tests/faults/fuzz.py --seconds {given.seconds}", "readers": {}}
    if given.results.exists() and not given.again:
        found = json.loads(given.results.read_text())
    for name in given.readers or sorted(path.name for path in CORPUS.iterdir()):
        before = found["readers"].get(name, {"seconds": 0, "found": []})
        if before["seconds"] >= given.seconds and not before["found"]:
            continue
        found["readers"][name] = run(name, given.seconds, given.findings)
        versions = {name: version(name) for name in ("atheris", "torch", "numpy", "safetensors")}
        found |= {"date": time.strftime("%Y-%m-%d"), "python": platform.python_version()}
        found["versions"] = versions
        given.results.write_text(json.dumps(found, indent=1) + "\n")
        print(json.dumps({name: found["readers"][name]}), flush=True)
    return int(any(reader["found"] for reader in found["readers"].values()))


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    sys.exit(main())

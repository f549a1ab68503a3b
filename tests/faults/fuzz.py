"""Coverage-guided fuzzing of every reader of foreign or stored bytes, by atheris; the corpus is fuzz_corpus/.

    pip install atheris
    python tests/faults/fuzz.py                           # a minute of each reader
    python tests/faults/fuzz.py --seconds 600 npz torch   # ten minutes of two of them
    python tests/faults/fuzz.py --seeds                   # write the seeds of the corpus anew

Each reader runs in a process of its own under a limit of memory. It may take bytes, or refuse them with its
own error; any other exception, a file made by code from the bytes, or memory beyond the limit is a finding,
and ends the script with exit code 1. The bytes of a finding are left in the folder that --findings names.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
CORPUS = HERE / "fuzz_corpus"
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
    """Fuzz one reader in this process, which ends with it."""
    import atheris

    with atheris.instrument_imports(include=INSTRUMENTED):
        reader = readers()[name]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        own = stack.enter_context(tempfile.TemporaryDirectory())
        words = [sys.argv[0], f"-max_total_time={seconds}", f"-rss_limit_mb={MEMORY}", f"-max_len={LONGEST}"]
        words += ["-timeout=20", "-print_final_stats=1", f"-artifact_prefix={findings}/{name}-"]
        atheris.Setup([*words, own, str(CORPUS / name)], lambda data: tried(reader, data, folder))
        atheris.Fuzz()


def tried(reader: Reader, data: bytes, folder: Path) -> None:
    """Let a reader read `data`; any exception but its own refusal leaves this function."""
    path = folder / reader.name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    try:
        reader.read(path)
    except reader.refusal as error:
        cause = str(error).splitlines()[0]
        if not cause.isprintable():
            raise AssertionError(f"unprintable: {cause!a}") from error
    made = {found.name for found in path.parent.iterdir()} - {reader.name.rpartition("/")[2]}
    if made:
        raise AssertionError(f"it made {made}")


def run(name: str, seconds: int, findings: Path) -> dict[str, object]:
    """Fuzz one reader in a process of its own: executions, covered edges, and what was found."""
    command = [
        sys.executable,
        __file__,
        "--one",
        name,
        "--seconds",
        str(seconds),
        "--findings",
        str(findings),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = done.stderr.splitlines()
    count = next((line.rpartition(" ")[2] for line in lines if "number_of_executed_units" in line), "0")
    covered = [
        word for line in lines for a, word in zip(line.split(), line.split()[1:], strict=False) if a == "cov:"
    ]
    found = [line for line in lines if "Uncaught" in line or "ERROR:" in line or "Error:" in line]
    said = found[:3] if done.returncode else []
    return {"executions": int(count), "edges": int(covered[-1]) if covered else 0, "found": said}


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
    parser.add_argument("--seeds", action="store_true")
    parser.add_argument("--one")
    given = parser.parse_args()
    given.findings.mkdir(parents=True, exist_ok=True)
    if given.one:
        fuzz(given.one, given.seconds, given.findings)
    if given.seeds:
        write_seeds()
        return 0
    began, results = time.monotonic(), {}
    for name in given.readers or sorted(path.name for path in CORPUS.iterdir()):
        results[name] = run(name, given.seconds, given.findings)
        print(json.dumps({name: results[name]}), flush=True)
    print(f"{len(results)} readers, {time.monotonic() - began:.0f} s", file=sys.stderr)
    return 1 if any(found["found"] for found in results.values()) else 0


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    sys.exit(main())

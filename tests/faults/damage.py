"""Flips single bits of every kind of artefact, cuts it short, and lets it claim a gigabyte.

    python tests/faults/damage.py --flips 3000 --cuts 700 --out benchmarks/results/faults_damage.json

Every damaged artefact must be refused with exit code 3 and the name of its file; a reading that prints what
it printed before was not changed by the damage ("harmless"), a kept row that is not believed is trained again
("disbelieved"). Anything else is a failure, which the script lists; it then ends with exit code 1.
"""

import argparse
import json
import platform
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

from claims import CLAIMS, excess, measured
from kinds import KINDS, Kind, Said

from ddengine.errors import EXIT_ARTEFACT, EXIT_DONE
from ddengine.rng import Rng

Found = tuple[str, str]  # an outcome, and what was done where it is a failure


@dataclass(frozen=True)
class Whole:
    """An artefact as it was made: its folder, its files' bytes, and what reading it prints."""

    kind: Kind
    folder: Path
    data: dict[Path, bytes]
    said: Said


def make(name: str, folder: Path) -> Whole:
    """An artefact of the kind `name` below `folder`."""
    kind, place = KINDS[name], folder / name.replace(" ", "_").replace(",", "")
    kind.make(place)
    data = {path: path.read_bytes() for pattern in kind.files for path in sorted(place.glob(pattern))}
    said = kind.read(place)
    assert said.code == EXIT_DONE and data, f"{name}: {said.cause}"
    return Whole(kind, place, data, said)


def flips(whole: Whole, count: int, rng: Rng) -> Iterator[Found]:
    """What comes of flipping `count` bits of each file, one at a time."""
    for path, data in whole.data.items():
        places = torch.randint(8 * len(data), (count,), generator=rng.torch(path.name)).tolist()
        for place in places:
            flipped = bytearray(data)
            flipped[place // 8] ^= 1 << place % 8
            yield outcome(whole, path, bytes(flipped), f"bit {place} of {path.name}")


def cuts(whole: Whole, count: int, rng: Rng) -> Iterator[Found]:
    """What comes of cutting each file to `count` lengths, the empty file and one byte less among them."""
    for path, data in whole.data.items():
        drawn = torch.randint(len(data), (count - 2,), generator=rng.torch(path.name)).tolist()
        for length in (0, len(data) - 1, *drawn):
            yield outcome(whole, path, data[:length], f"{path.name} cut to {length} bytes")


def outcome(whole: Whole, path: Path, data: bytes, what: str) -> Found:
    """How a reader meets the artefact with other bytes in `path`, which is whole again afterwards."""
    path.write_bytes(data)
    try:
        said = whole.kind.read(whole.folder)
    except BaseException as error:
        return "crashed", f"{what}: {type(error).__name__}: {error}"
    finally:
        path.write_bytes(whole.data[path])
    return judged(whole, path, said, what)


def judged(whole: Whole, path: Path, said: Said, what: str) -> Found:
    """The name of an outcome."""
    if said.code == EXIT_ARTEFACT:
        named = path.name in said.cause or str(path.parent) in said.cause
        return ("refused", "") if named and said.lines == 2 else ("unnamed", f"{what}: {said.cause}")
    if said.code != EXIT_DONE:
        return "failed", f"{what}: exit {said.code}, {said.cause}"
    if said.out == whole.kind.disbelieved:
        return "disbelieved", ""
    same = whole.kind.told and said.out == whole.said.out
    return ("harmless", "") if same else ("unnoticed", what)


GOOD = ("refused", "harmless", "disbelieved")


def tally(found: Iterator[Found]) -> dict[str, object]:
    """Outcomes counted, and the first failures in words."""
    counts: Counter[str] = Counter()
    failures = []
    for name, what in found:
        counts[name] += 1
        failures += [f"{name}: {what}"] if name not in GOOD else []
    return {**counts, **({"failures": failures[:20]} if failures else {})}


def damaged(names: list[str], flipped: int, cut: int) -> dict[str, Any]:
    """Outcomes by kind, for about `flipped` flips and `cut` cuts over all files of these kinds."""
    with tempfile.TemporaryDirectory() as folder:
        wholes = {name: make(name, Path(folder)) for name in names}
        files = sum(len(whole.data) for whole in wholes.values())
        each, short = -(-flipped // files), max(2, -(-cut // files))
        found = {}
        for name, whole in wholes.items():
            rng = Rng(0).fold("damage", name)
            flip, short_ = flips(whole, each, rng.fold("flip")), cuts(whole, short, rng.fold("cut"))
            found[name] = {"files": len(whole.data), "flips": tally(flip), "cuts": tally(short_)}
        return found


def failures(found: dict[str, Any]) -> list[str]:
    """All that no reader may do, in words."""
    tallies = ((kind, parts[part]) for kind, parts in found.items() for part in ("flips", "cuts"))
    return [f"{kind}: {text}" for kind, part in tallies for text in part.get("failures", [])]


def totals(found: dict[str, Any], part: str) -> dict[str, int]:
    """Outcomes of flips or of cuts over all kinds."""
    counts: Counter[str] = Counter()
    for parts in found.values():
        counts.update({k: v for k, v in parts[part].items() if k != "failures"})
    return dict(counts)


def main() -> int:
    """Damage everything, measure the claims, print and write what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--flips", type=int, default=3000)
    parser.add_argument("--cuts", type=int, default=700)
    parser.add_argument("--kinds", nargs="*", default=list(KINDS))
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    began = time.monotonic()
    found = damaged(given.kinds, given.flips, given.cuts)
    claims = {name: measured(claim) for name, claim in CLAIMS.items()}
    large = [text for name, claim in claims.items() for text in excess(name, claim)]
    result = {
        "command": f"python tests/faults/damage.py --flips {given.flips} --cuts {given.cuts}",
        "date": time.strftime("%Y-%m-%d"),
        "versions": {name: version(name) for name in ("torch", "numpy", "safetensors")},
        "python": platform.python_version(),
        "seconds": round(time.monotonic() - began, 1),
        "flips": totals(found, "flips"),
        "cuts": totals(found, "cuts"),
        "kinds": found,
        "claims_of_a_gigabyte": claims,
        "failures": failures(found) + large,
    }  # fmt: skip
    text = json.dumps(result, indent=1)
    if given.out:
        given.out.write_text(text + "\n")
    print(text)
    return 1 if result["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())

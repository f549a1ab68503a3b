"""The licences of all that ddengine stands on, as Markdown, read from the metadata of what is installed.

    python tests/faults/licences.py > docs/licences.md

Run it where all extras are installed.
"""

import re
import sys
import tomllib
from collections.abc import Iterable, Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
OWN = "ddengine"
SHORT = 60  # characters of a licence field that is a name and not its text
HEAD = """\
# Licences

What ddengine needs, and what that needs in turn, with the licence that each states in its own metadata.
ddengine itself is under the [MIT licence](../LICENSE). None of these packages is part of its wheel: pip
installs them from their own sources, under their own terms. Packages called nvidia-* and cuda-* come with the
CUDA builds of PyTorch for Linux, under NVIDIA's terms; its CPU builds do without them.

Written by `python tests/faults/licences.py > docs/licences.md`; versions are those that the tests ran with.

Known vulnerabilities of the installed versions are found, over the network, by

    pip install pip-audit && pip-audit --skip-editable
"""


def main() -> None:
    """Print the page."""
    print(HEAD)
    print(*table("Needed", names(PROJECT["dependencies"])), sep="\n")
    for extra, lines in PROJECT["optional-dependencies"].items():
        print(*table(f"Extra `{extra}`", names(lines)), sep="\n")
    declared = {name for lines in declarations().values() for name in names(lines)}
    print(*table("What these need in turn", sorted(closure(declared) - declared)), end="", sep="\n")


def declarations() -> dict[str, list[str]]:
    """The requirement lines of the project and of its extras."""
    return {"": PROJECT["dependencies"], **PROJECT["optional-dependencies"]}


def names(lines: Iterable[str]) -> list[str]:
    """The packages that requirement lines name, but for the project itself."""
    found = (canonical(Requirement(line).name) for line in lines)
    return [name for name in found if name != OWN]


def canonical(name: str) -> str:
    """A package's name as indices spell it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def closure(roots: Iterable[str]) -> set[str]:
    """Installed packages that `roots` need, themselves among them."""
    found: set[tuple[str, str]] = set()
    left = [(name, "") for name in roots]
    while left:
        name, extra = left.pop()
        if (name, extra) not in found and _installed(name) is not None:
            found.add((name, extra))
            left += _needs(name, extra)
    return {name for name, _ in found}


def _installed(name: str) -> Distribution | None:
    try:
        return distribution(name)
    except PackageNotFoundError:
        return None


def _needs(name: str, extra: str) -> Iterator[tuple[str, str]]:
    """What a package, or an extra of it, needs, each with the extras that are asked for."""
    made = _installed(name)
    for line in (made.requires or []) if made is not None else []:
        needed = Requirement(line)
        if needed.marker is None or needed.marker.evaluate({"extra": extra}):
            yield from ((canonical(needed.name), wanted) for wanted in ("", *needed.extras))


def table(title: str, packages: Iterable[str]) -> Iterator[str]:
    """A section with a row for each package; SystemExit for one that is not installed."""
    yield from (f"## {title}", "", "| package | version | licence |", "|:--|:--|:--|")
    for name in packages:
        made = _installed(name)
        if made is None:
            sys.exit(f"{name} is not installed: install all extras first")
        yield f"| {name} | {made.version} | {licence(made)} |"
    yield ""


def licence(made: Distribution) -> str:
    """What a package states: its expression, else its short licence field, else its classifiers."""
    said = made.metadata
    if expression := said.get("License-Expression"):
        return expression
    stated = " ".join((said.get("License") or "").split())
    if stated and len(stated) <= SHORT and stated.lower() != "unknown":
        return stated
    classified = [
        line.split(" :: ")[-1] for line in said.get_all("Classifier", []) if line.startswith("License")
    ]
    return ", ".join(dict.fromkeys(classified)) or "see its own files"


if __name__ == "__main__":
    main()

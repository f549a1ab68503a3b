"""What ddengine stands on: every dependency is bounded, used, declared once, and its licence is listed."""

import ast
import re
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

TREE = Path(__file__).parents[1]
PACKAGES = ("ddengine", "synth", "matchers", "expert_buffers")
WHOLE = tomllib.loads((TREE / "pyproject.toml").read_text())
PROJECT = WHOLE["project"]
GROUPS = {
    "build": WHOLE["build-system"]["requires"],
    "core": PROJECT["dependencies"],
    **PROJECT["optional-dependencies"],
}
REQUIREMENTS = [
    (group, Requirement(line)) for group, lines in GROUPS.items() for line in lines if "ddengine" not in line
]
LAZY = {
    "torch-geometric",
    "tensorboard",
    "submitit",
    "mlflow-skinny",
    "wandb",
}  # of the extras that packages import only where they are asked for
DISTRIBUTIONS = {
    "yaml": "pyyaml",
    "PIL": "pillow",
    "sklearn": "scikit-learn",
    "hydra": "hydra-core",
    "mlflow": "mlflow-skinny",
}


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def bounds(requirement, operators):
    return [Version(s.version) for s in requirement.specifier if s.operator in operators]


@pytest.mark.parametrize(("group", "requirement"), REQUIREMENTS, ids=str)
def test_every_dependency_has_one_lower_and_one_upper_bound(group, requirement):
    lower, upper = bounds(requirement, (">=", "==")), bounds(requirement, ("<",))
    assert len(lower) == len(upper) == 1
    assert lower[0] < upper[0]
    assert upper[0].release[1:] in ((), (0,)) or upper[0].major == lower[0].major


@pytest.mark.parametrize(("group", "requirement"), REQUIREMENTS, ids=str)
def test_the_upper_bound_is_next_to_the_major_version_that_the_tests_run_with(group, requirement):
    try:
        found = Version(version(requirement.name))
    except PackageNotFoundError:
        pytest.skip(f"{requirement.name}, of the extra {group}, is not installed")
    (upper,) = bounds(requirement, ("<",))
    assert found in requirement.specifier
    assert upper.major <= found.major + 1


def imports(package):
    """Top-level names that the modules of a package import, at any depth in them."""
    for path in (TREE / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                yield from (alias.name.partition(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                yield (node.module or "").partition(".")[0]


def imported():
    """Distributions that our packages import, by name."""
    found = {name for package in PACKAGES for name in imports(package)}
    outside = found - set(sys.stdlib_module_names) - set(PACKAGES)
    known = packages_distributions()
    return {DISTRIBUTIONS.get(name, canonical(known.get(name, [name])[0])) for name in outside}


def test_every_import_of_a_package_is_a_declared_dependency():
    core = {canonical(requirement.name) for group, requirement in REQUIREMENTS if group == "core"}
    assert imported() - LAZY - core == set()


def test_every_core_dependency_is_imported_somewhere():
    core = {canonical(requirement.name) for group, requirement in REQUIREMENTS if group == "core"}
    assert core - imported() == set()


def test_nothing_is_declared_twice_in_one_group():
    named = [(group, canonical(requirement.name)) for group, requirement in REQUIREMENTS]
    assert len(set(named)) == len(named)


def listed():
    rows = re.findall(r"^\| ([a-z0-9-]+) \| (\S+) \| (.+) \|$", (TREE / "docs/licences.md").read_text(), re.M)
    return {name: (number, licence) for name, number, licence in rows}


@pytest.mark.parametrize(
    "requirement", [r for group, r in REQUIREMENTS if group != "build"], ids=lambda r: r.name
)
def test_the_licence_of_every_dependency_is_listed_for_a_version_within_its_bounds(requirement):
    number, licence = listed()[canonical(requirement.name)]
    assert Version(number) in requirement.specifier
    assert licence != "see its own files"


def test_no_listed_licence_is_unknown_or_forbids_use():
    rows = {
        name: licence for name, (_, licence) in listed().items() if not name.startswith(("nvidia-", "cuda-"))
    }
    assert len(rows) > 40
    forbidding = [
        n for n, text in rows.items() if re.search(r"AGPL|Affero|non-?commercial|UNKNOWN", text, re.I)
    ]
    assert forbidding == []

"""The house rules: linters, types, import contracts, and what README and project must agree on."""

import importlib.metadata
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import ddengine

TREE = Path(__file__).parents[1]
PACKAGES = ("ddengine", "synth", "matchers", "expert_buffers")
PROJECT = tomllib.loads((TREE / "pyproject.toml").read_text())
CONTRACTS = [contract["name"] for contract in PROJECT["tool"]["importlinter"]["contracts"]]
LINT = "import sys; from importlinter.cli import lint_imports_command; sys.exit(lint_imports_command())"


def tool(*words, cwd=TREE):
    """Output and exit code of a Python tool."""
    done = subprocess.run(
        [sys.executable, *words], cwd=cwd, capture_output=True, text=True, timeout=600, check=False
    )
    return done.returncode, done.stdout + done.stderr


def test_ruff_finds_nothing():
    code, said = tool("-m", "ruff", "check", "--no-cache", ".")
    assert code == 0, said


def test_every_file_is_formatted():
    code, said = tool("-m", "ruff", "format", "--check", "--no-cache", ".")
    assert code == 0, said


def test_types_check(tmp_path):
    code, said = tool("-m", "mypy", "--cache-dir", str(tmp_path))
    assert code == 0, said


def test_imports_go_downwards_only():
    code, said = tool("-c", LINT, "--no-cache")
    assert code == 0, said
    assert all(f"{name} KEPT" in said for name in CONTRACTS)


BREACHES = [
    ("ddengine/judge.py", "import expert_buffers"),
    ("ddengine/train.py", "import matchers"),
    ("ddengine/judge.py", "import ddengine.loop"),
    ("ddengine/loop.py", "import ddengine.train"),
    ("ddengine/loop.py", "import matchers"),
    ("matchers/attention.py", "import ddengine.loop"),
    ("matchers/subset.py", "import ddengine.bench"),
    ("matchers/subset.py", "import ddengine.recipes"),
    ("ddengine/bench.py", "import synth"),
    ("synth/pixels.py", "import expert_buffers"),
    ("expert_buffers/params.py", "import matchers"),
    ("ddengine/data/npz.py", "import synth"),
    ("ddengine/types.py", "import ddengine.nets"),
    ("ddengine/recipes.py", "import ddengine.cli"),
]


@pytest.fixture(scope="module")
def lint_breach(tmp_path_factory):
    """Lints a copy of the packages in which one module has one more import."""
    tree = tmp_path_factory.mktemp("tree")
    for name in PACKAGES:
        shutil.copytree(TREE / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(TREE / "pyproject.toml", tree)

    def lint(path, line):
        file = tree / path
        before = file.read_text()
        file.write_text(f"{before}\n{line}\n")
        try:
            return tool("-c", LINT, "--no-cache", cwd=tree)
        finally:
            file.write_text(before)

    return lint


@pytest.mark.parametrize(("path", "line"), BREACHES, ids=lambda value: value.removeprefix("import "))
def test_a_breach_of_the_layers_is_found(path, line, lint_breach):
    code, said = lint_breach(path, line)
    assert code == 1, said
    assert "BROKEN" in said
    assert path.removesuffix(".py").replace("/", ".") in said


def test_what_the_layers_allow_is_allowed(lint_breach):
    for path, line in (
        ("ddengine/data/npz.py", "import ddengine.ops.dsa"),
        ("matchers/subset.py", "import synth"),
    ):
        code, said = lint_breach(path, line)
        assert code == 0, said


def test_every_module_has_its_layer():
    text = " ".join(PROJECT["tool"]["importlinter"]["contracts"][0]["layers"])
    placed = set(re.findall(r"[\w.]+", text))
    modules = {
        f"ddengine.{path.stem}" for path in (TREE / "ddengine").glob("*") if path.suffix in ("", ".py")
    }
    modules -= {"ddengine.__init__", "ddengine.__pycache__", "ddengine.conf"}
    assert modules | set(PACKAGES) - {"ddengine"} == placed


def test_readme_shows_the_two_commands_and_names_every_core_dependency():
    readme = (TREE / "README.md").read_text()
    assert "pip install . && ddengine demo" in readme.splitlines()
    assert 'pip install ".[test]" && pytest' in readme.splitlines()
    for requirement in PROJECT["project"]["dependencies"]:
        name = re.match(r"[\w-]+", requirement)[0]
        assert re.search(rf"\b{name}\b", readme, re.IGNORECASE), name


def test_there_is_one_version():
    assert PROJECT["project"]["version"] == ddengine.__version__
    try:
        installed = importlib.metadata.version("ddengine")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("ddengine runs from its tree, it is not installed")
    assert installed == ddengine.__version__


def test_continuous_integration_runs_the_documented_test_command():
    assert 'pip install -q ".[test]" && pytest' in (TREE / ".ci" / "run").read_text()

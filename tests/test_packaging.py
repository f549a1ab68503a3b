"""The wheel: what is in it, and that it runs from folders where other modules have our names."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

TREE = Path(__file__).parents[1]
PACKAGES = ("ddengine", "synth", "matchers", "expert_buffers")
PROJECT = tomllib.loads((TREE / "pyproject.toml").read_text())
DECOY = "raise SystemExit('a decoy was imported')\n"


def setuptools_version() -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in version("setuptools").split(".")[:1])
    except PackageNotFoundError:
        return (0,)


def pip(*words, **settings):
    command = [sys.executable, "-m", "pip", *words, "-q", "--no-input", "--disable-pip-version-check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, **settings)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel, built without a network from a copy of the tree."""
    if setuptools_version() < (77,):
        pytest.skip('building the wheel needs setuptools 77 or newer: pip install "setuptools>=77"')
    tree, made = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for name in (*PACKAGES, "configs", "tests"):
        shutil.copytree(TREE / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(TREE / name, tree / name)
    pip("wheel", str(tree), "--no-deps", "--no-build-isolation", "--no-index", "-w", str(made))
    (path,) = made.iterdir()
    return path


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory):
    """A folder that the wheel is installed into, with modules of our names beside our packages."""
    folder = tmp_path_factory.mktemp("install") / "site"
    pip("install", "--no-deps", "--no-index", "--no-compile", "--target", str(folder), str(wheel))
    for name in ("synth", "matchers", "expert_buffers"):
        (folder / f"{name}.py").write_text(DECOY)
    return folder


@pytest.fixture
def decoys(tmp_path):
    """A working folder that holds modules of our names."""
    folder = tmp_path / "work"
    folder.mkdir()
    for name in ("synth", "matchers"):
        (folder / f"{name}.py").write_text(DECOY)
    return folder


def run(command, cwd, *path):
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "DDENGINE_DEBUG")}
    env |= {"PYTHONPATH": os.pathsep.join(map(str, path)), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        list(map(str, command)), cwd=cwd, env=env, capture_output=True, text=True, timeout=120
    )


def members(wheel):
    return [name for name in zipfile.ZipFile(wheel).namelist() if not name.endswith("/")]


def test_wheel_holds_the_modules_of_the_tree_and_the_configurations_and_nothing_else(wheel):
    found = {name for name in members(wheel) if ".dist-info/" not in name}
    modules = {path.relative_to(TREE).as_posix() for p in PACKAGES for path in (TREE / p).rglob("*.py")}
    rows = {f"ddengine/conf/row/{path.name}" for path in (TREE / "configs" / "row").glob("*.yaml")}
    folder = TREE / "configs"
    protocols = {f"ddengine/conf/{p.relative_to(folder)}" for p in (folder / "protocols").rglob("*.yaml")}
    assert rows and protocols
    assert found == modules | rows | protocols | {"ddengine/py.typed"}


def test_wheel_has_no_tests_and_four_packages_at_its_top(wheel):
    tops = {name.split("/")[0] for name in members(wheel)}
    (info,) = {top for top in tops if top.endswith(".dist-info")}
    assert tops == {*PACKAGES, info}


def test_packages_of_the_tree_are_listed_in_the_project():
    folders = {path.parent.relative_to(TREE) for p in PACKAGES for path in (TREE / p).rglob("__init__.py")}
    listed = set(PROJECT["tool"]["setuptools"]["packages"])
    assert listed == {".".join(folder.parts) for folder in folders} | {"ddengine.conf"}


def test_metadata_names_extras_licence_python_and_the_command(wheel):
    archive = zipfile.ZipFile(wheel)
    (name,) = [m for m in members(wheel) if m.endswith(".dist-info/METADATA")]
    metadata = Parser().parsestr(archive.read(name).decode())
    assert metadata["Name"] == "ddengine"
    assert metadata["Version"] == PROJECT["project"]["version"]
    assert metadata["License-Expression"] == "MIT"
    assert metadata["Requires-Python"] == ">=3.11"
    assert set(metadata.get_all("Provides-Extra")) == set(PROJECT["project"]["optional-dependencies"])
    core = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    needed = {re.match(r"[\w-]+", line)[0] for line in core}
    assert {"torch", "torchvision", "kornia", "higher", "numpy", "scipy", "hydra-core"} <= needed
    assert {"safetensors", "rich", "scikit-learn", "matplotlib"} <= needed
    entries = archive.read(name.replace("METADATA", "entry_points.txt")).decode()
    assert "ddengine = ddengine.cli:main" in entries
    assert any(m.endswith("LICENSE") for m in members(wheel))


def test_installed_wheel_runs_from_an_unrelated_folder(site, tmp_path):
    code = "import ddengine, sys; from ddengine.cli import main; print(ddengine.__file__); sys.exit(main())"
    done = run([sys.executable, "-c", code, "list", "configs"], tmp_path, site)
    assert (done.returncode, done.stderr) == (0, "")
    where, *rows = done.stdout.splitlines()
    assert where == str(site / "ddengine" / "__init__.py")
    shipped = sorted(path.stem for path in (TREE / "configs" / "row").glob("*.yaml"))
    assert [row.split()[0] for row in rows] == shipped


def test_console_script_is_safe_from_modules_of_our_names(site, decoys):
    """Decoys in the current folder, in front on PYTHONPATH, and beside our packages, all at once."""
    words = ["dataset=digits", "ipc=1", "matcher=herding", "out=run", "--json"]
    done = run([sys.executable, site / "bin" / "ddengine", "distill", *words], decoys, decoys, site)
    assert done.returncode == 0, done.stderr
    assert '"kind": "subset"' in done.stdout
    assert "decoy" not in done.stdout + done.stderr
    assert (decoys / "run" / "distilled" / "manifest.json").is_file()


def test_console_script_lists_in_a_folder_of_decoys(site, decoys):
    done = run([site / "bin" / "ddengine", "list", "matchers"], decoys, site)
    assert (done.returncode, done.stderr) == (0, "")
    assert "attention" in done.stdout


@pytest.mark.parametrize("command", [["list", "matchers"], ["inspect", "run"]])
def test_module_call_names_the_decoy_in_one_line_and_exits_2(site, decoys, command):
    done = run([sys.executable, "-m", "ddengine", *command], decoys, site)
    assert (done.returncode, done.stdout) == (2, "")
    cause, remedy = done.stderr.splitlines()
    assert cause.startswith("error: ")
    assert str(decoys / "synth.py") in cause
    assert remedy.startswith("  fix: ")


def test_module_call_works_beside_folders_that_are_no_packages(site, tmp_path):
    (tmp_path / "matchers").mkdir()
    (tmp_path / "synth").mkdir()
    done = run([sys.executable, "-m", "ddengine", "list", "matchers"], tmp_path, site)
    assert (done.returncode, done.stderr) == (0, "")

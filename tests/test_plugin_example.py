"""The example plug-in as a distribution of its own: installed from its folder, listed, examined, and run."""

import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from ddengine import cli, data
from synth import DistilledSet, verify

TREE = Path(__file__).parents[1]
NAME = "ddengine-gradient-matching"


def setuptools_version():
    try:
        return int(version("setuptools").split(".")[0])
    except PackageNotFoundError:
        return 0


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The plug-in, installed without a network; what builds it is in the extra `test`."""
    if setuptools_version() < 77:
        pytest.skip('building the plug-in needs setuptools 77 or newer: pip install "setuptools>=77"')
    tree, made = tmp_path_factory.mktemp("tree") / "plugin", tmp_path_factory.mktemp("site")
    ignored = shutil.ignore_patterns("build", "*.egg-info", "__pycache__")
    shutil.copytree(TREE / "examples" / "plugin", tree, ignore=ignored)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "-q"]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(made), str(tree)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return made


@pytest.fixture
def installed(site, monkeypatch):
    monkeypatch.syspath_prepend(site)
    yield
    sys.modules.pop("ddengine_gradient_matching", None)


def test_the_distribution_is_one_module(site):
    found = {path.name for path in site.iterdir() if path.name != "__pycache__"}
    assert found == {"ddengine_gradient_matching.py", "ddengine_gradient_matching-0.1.0.dist-info"}


def test_it_appears_in_the_list_with_its_origin(site):
    code = "import sys; from ddengine.cli import main; sys.exit(main(['list', 'matchers', '--json']))"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(TREE)])}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=120, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    (found,) = (item for item in json.loads(done.stdout)["items"] if item["name"] == "gradient")
    assert found["origin"] == f"{NAME} 0.1.0"
    assert found["description"].startswith("gradient matching (DC, DSA)")


def test_doctor_finds_it_sound(installed, capsys):
    assert cli.main(["doctor"], pinned=False) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "plug-in" in line]
    place = "ddengine_gradient_matching:GRADIENT_MATCHING"
    assert lines == [f"ok   plug-in matcher gradient: {NAME} 0.1.0, {place}"]


def test_it_distils_from_the_command_line_and_resumes(installed, capsys, tmp_path):
    words = ["dataset=digits", "ipc=1", "matcher=gradient", "matcher.steps=3", "matcher.real_per_class=5"]
    words += ["network.width=4", "network.depth=2", "workers=1", f"out={tmp_path / 'run'}"]
    assert cli.main(["distill", *words], pinned=False) == 0
    assert "made by  ddengine_gradient_matching.GradientMatching, steps 3" in capsys.readouterr().out
    assert cli.main(["distill", *words, "--json"], pinned=False) == 0
    assert json.loads(capsys.readouterr().out)["resumed_from"] == 3
    folder = tmp_path / "run" / "distilled"
    assert verify(folder)
    made = DistilledSet.load(folder)
    start = data.load("digits").fit
    assert made.decode().x.shape == (10, 1, 8, 8) and made.spec.fingerprint == start.spec.fingerprint


def test_help_tells_its_options(installed, capsys):
    assert cli.main(["distill", "matcher=gradient", "--help"], pinned=False) == 0
    said = capsys.readouterr().out
    assert "  matcher.network_lr=0.01\n" in said and "  matcher.matches=null\n" in said


def test_an_unknown_option_of_it_is_one_line(installed, capsys, tmp_path):
    words = ["dataset=digits", "ipc=1", "matcher=gradient", "matcher.stesp=3", f"out={tmp_path / 'run'}"]
    assert cli.main(["distill", *words], pinned=False) == 2
    cause, remedy = capsys.readouterr().err.splitlines()
    assert "stesp" in cause and "matcher.steps" in remedy

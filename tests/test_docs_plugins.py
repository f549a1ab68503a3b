"""The page on plug-ins: its files make one distribution, and its commands and checks run on that."""

import json
import re
import shlex
import sys
import tomllib
from pathlib import Path

import plugged
import pytest

from ddengine import cli, data
from ddengine.testing import CLAUSES

PAGE = Path(__file__).parents[1] / "docs" / "plugins.md"
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
FILES = {found[1]: text for _, text in BLOCKS if (found := re.match(r"# (\w+\.\w+)\n", text))}
COMMANDS = [line for kind, text in BLOCKS if not kind for line in text.splitlines()]


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """The distribution of the page, as pip would install it."""
    project = tomllib.loads(FILES["pyproject.toml"])
    about = project["project"]
    entries = {group.removeprefix("ddengine."): values for group, values in about["entry-points"].items()}
    plugged.install(tmp_path, about["name"], entries, version=about["version"], summary=about["description"])
    modules = project["tool"]["setuptools"]["py-modules"]
    for name in modules:
        monkeypatch.delitem(sys.modules, name, raising=False)  # of another test, such as that of an example
        (tmp_path / f"{name}.py").write_text(FILES[f"{name}.py"])
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    yield modules
    for name in modules:
        sys.modules.pop(name, None)


def test_the_page_has_the_files_that_it_installs():
    assert sorted(FILES) == ["my_dataset.py", "my_matcher.py", "my_network.py", "pyproject.toml"]
    assert COMMANDS[0] == "pip install ." and len(COMMANDS) > 4


def test_its_commands_run(installed, capsys):
    said = {}
    for line in COMMANDS[1:]:
        words = shlex.split(line)[1:]
        assert cli.main([*words, "--json"], pinned=False) == 0, capsys.readouterr().err
        said[words[0]] = json.loads(capsys.readouterr().out)
    assert {"name": "centroids", "origin": "my-plugins 0.1.0"}.items() <= said["list"]["items"][-1].items()
    found = [f for f in said["doctor"]["findings"] if f["name"].startswith("plug-in")]
    assert len(found) == 3 and not any(finding["warning"] for finding in found)
    assert said["distill"]["recipe"]["network"]["name"] == "little" and said["distill"]["count"] == 3
    assert {row["name"] for row in said["evaluate"]["rows"]} == {"distilled", "random"}
    assert said["evaluate"]["dataset"] == "stripes"


def test_its_check_passes(installed):
    (check,) = [text for kind, text in BLOCKS if kind == "python" and "check_matcher(" in text]
    names = {}
    exec(check, names)
    assert names["check_matcher"]("centroids", steps=3) == list(CLAUSES)


def test_its_network_gives_features_by_name_and_by_path(installed):
    for network in ("little", "my_network:Little"):
        words = ["dataset=stripes", "ipc=1", "matcher=attention", f"network={network}", "network.width=3"]
        words += ["matcher.steps=2", "matcher.real_per_class=5", f"out=runs/{network[:2]}"]
        assert cli.main(["distill", *words], pinned=False) == 0


def test_its_data_is_split_by_content(installed):
    loaded = data.load("stripes")
    assert [len(part) for part in (loaded.fit, loaded.validation, loaded.test)] == [147, 15, 18]
    assert loaded.spec.licence == "CC0-1.0" and loaded.fit.counts == [49, 49, 49]

"""How to cite the project agrees with the project."""

import re
import tomllib
from pathlib import Path

import yaml

TREE = Path(__file__).parents[1]
PROJECT = tomllib.loads((TREE / "pyproject.toml").read_text())["project"]


def test_the_citation_is_whole_and_of_this_version():
    found = yaml.safe_load((TREE / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors", "version", "license", "type"} <= set(found)
    assert found["cff-version"] == "1.2.0" and found["type"] == "software"
    assert found["title"] == PROJECT["name"] and found["license"] == PROJECT["license"]
    assert str(found["version"]) == PROJECT["version"]
    assert found["authors"] == [{"name": "The ddengine authors"}]


def test_the_licence_names_the_same_authors():
    text = (TREE / "LICENSE").read_text()
    assert re.search(r"Copyright \(c\) \d{4} The ddengine authors", text)
    assert text.rstrip().endswith("SOFTWARE.") and "WITHOUT WARRANTY OF ANY KIND" in text


def test_contributing_links_to_files_that_are_there():
    page = (TREE / "CONTRIBUTING.md").read_text()
    named = re.findall(r"\]\(([^)#]+)\)", page) + re.findall(
        r"`((?:matchers|tests|ddengine)/[\w/]+\.py)`", page
    )
    written = [name for name in named if "NAME" not in name]
    assert len(written) >= 5 and all((TREE / name).exists() for name in written)

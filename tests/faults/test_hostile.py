"""Hostile artefacts: refused in one line or shown as text; no code of theirs runs, nothing is written."""

import re
import sys
import warnings
from html.parser import HTMLParser
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import hostile
import hostile_content
import hostile_names

from ddengine.errors import EXIT_ARTEFACT, EXIT_DONE, EXIT_USAGE

GROUPS = (
    hostile.code,
    hostile.members,
    hostile_content.tensors,
    hostile_content.headers,
    hostile_content.texts,
    hostile_content.paths,
    hostile_content.links,
    hostile_names.markup,
    hostile_names.targets,
    hostile_names.configurations,
    hostile_names.commands,
)
CASES = {name: case for group in GROUPS for name, case in group()}
ACTIVE = {"script", "iframe", "object", "embed", "link", "meta", "base", "form", "img", "svg", "a", "style"}


@pytest.fixture(autouse=True)
def _there(tmp_path, monkeypatch):
    """Cases run in their folder, whose modules can be imported, as those of a user's working folder can."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv("DDENGINE_DEBUG", raising=False)
    yield
    sys.modules.pop(hostile_names.MODULE, None)


def snapshot(folder):
    """What lies below a folder, but for what a command was told to write."""
    found = (path for path in folder.rglob("*") if "out" not in path.relative_to(folder).parts)
    found = (path for path in found if "__pycache__" not in path.parts)
    return {p: None if p.is_dir() else (p.is_symlink(), p.read_bytes()) for p in found}


def met(name, tmp_path):
    """What a reader says of a case, which did nothing but what it says."""
    sentinel = tmp_path / "ran"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read = CASES[name].make(tmp_path, sentinel)
        before = snapshot(tmp_path)
        said = read()
    assert snapshot(tmp_path) == before
    assert not sentinel.exists()
    return said


def test_there_are_more_than_three_hundred_cases():
    assert len(CASES) > 300


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.shown])
def test_hostile_artefacts_are_refused_in_one_line_and_do_nothing(name, tmp_path):
    said = met(name, tmp_path)
    assert said.code in (EXIT_ARTEFACT, EXIT_USAGE)
    assert said.out == ""
    assert said.cause.isprintable()
    assert said.lines == 2


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.shown])
def test_hostile_names_are_shown_as_text_and_do_nothing(name, tmp_path, harmless):
    said = met(name, tmp_path)
    assert said.code in (EXIT_DONE, EXIT_ARTEFACT, EXIT_USAGE)
    assert (said.out + said.cause).replace("\n", "").isprintable()
    page = tmp_path / "out" / "page.html"
    if said.code == EXIT_DONE and page.is_file():
        assert elements(page.read_text()) == harmless
        assert_literal(said.out)


class Elements(HTMLParser):
    """Collects elements that can act, and attributes that can or that came from a name."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attributes):
        self.found += [tag] if tag in ACTIVE else []
        for name, value in attributes:
            named = "hostile" in str(value) and name not in ("title", "alt", "aria-label", "data-key")
            outside = name in ("src", "href") and not str(value).startswith(("data:", "#"))
            self.found += [f"{tag} {name}"] if name.startswith("on") or named or outside else []


def elements(document):
    parser = Elements()
    parser.feed(document)
    return sorted(parser.found)


@pytest.fixture(scope="module")
def harmless(tmp_path_factory):
    """The acting elements of a page of plain names."""
    folder = tmp_path_factory.mktemp("harmless")
    CASES[f"names that are {hostile_names.PLAIN}"].make(folder, folder / "ran")()
    found = elements((folder / "out" / "page.html").read_text())
    assert found.count("script") == 1
    return found


def assert_literal(markdown):
    """There is neither HTML nor a link or picture in the Markdown."""
    assert "<" not in markdown
    assert not re.search(r"(?<!\\)(?:\\\\)*\[[^]]*\]\(", markdown)

"""Plug-ins from their metadata to `list` and `doctor`: what is broken is told, and disturbs nothing else."""

import json
import subprocess
import sys
from pathlib import Path

import plugged
import pytest

import matchers
from ddengine import catalog, cli, data, doctor, plugins
from ddengine.errors import UsageError

ROOT = Path(__file__).parents[2]
MATCHERS = """
from dataclasses import dataclass
from matchers.subset import SubsetSelection

good = SubsetSelection()
kind = SubsetSelection
number = 7


class Lacking:
    def steps(self, task):
        return 0


class Raising:
    @property
    def accepts(self):
        raise OSError("no accepts today")


@dataclass
class Loose(SubsetSelection.__mro__[-1]):
    accepts = steps = prepare = init = step = finish = None


@dataclass(frozen=True)
class Bare(Loose.__mro__[-1]):
    accepts = steps = prepare = init = step = finish = None
    options: int = 3


@dataclass(frozen=True)
class Counted(Loose.__mro__[-1]):
    accepts = steps = prepare = init = step = finish = None
    options: int = 3
    network: int = 3


lacking, raising, loose, bare, counted = Lacking(), Raising(), Loose(), Bare(), Counted()
"""
BROKEN = {
    "kind": r"is a class; it must be a value of it: SubsetSelection\(\)",
    "number": "is a int and no matcher: it has no accepts, steps, prepare, init, step, finish",
    "lacking": "is a Lacking and no matcher: it has no accepts, prepare, init, step, finish",
    "raising": "does not load: OSError: no accepts today",
    "loose": "is no frozen dataclass",
    "bare": "has no field network",
    "counted": "has options that are no frozen dataclass",
    "gone": "does not load: AttributeError: .*gone",
    "absent": "does not load: No module named 'nowhere_to_be_found'",
    "ends": "does not load: SystemExit: 3",
    "spelt": "points to no MODULE:NAME",
    "odd": "does not load: Odd: of no usual kind",
}


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Two distributions: one good matcher, every way to be broken, a name of ours, a name given twice."""
    values = {name: f"many_matchers:{name}" for name in ("good", *BROKEN)}
    values |= {
        "absent": "nowhere_to_be_found:x",
        "ends": "many_ends:x",
        "spelt": "a b c",
        "odd": "many_odd:x",
    }
    values |= {"attention": "many_matchers:good", "twice": "many_matchers:good"}
    entries = {"matchers": values, "networks": {"mine": "nowhere_to_be_found:Net", "resnet18": "x:y"}}
    plugged.install(tmp_path, "many-matchers", entries, MATCHERS, summary="Many matchers")
    plugged.install(tmp_path, "other", {"matchers": {"twice": "many_matchers:good"}}, version="0.3")
    (tmp_path / "many_ends.py").write_text("raise SystemExit(3)\n")
    odd = "class Odd(BaseException):\n    pass\n\n\nraise Odd('of no usual kind')\n"
    (tmp_path / "many_odd.py").write_text(odd)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("many_matchers", None)


def test_a_good_plug_in_is_found_and_made(installed):
    assert matchers.find("good") == matchers.MATCHERS["random"]
    assert matchers.make("good") == matchers.MATCHERS["random"]
    assert matchers.names()[: len(matchers.MATCHERS)] == list(matchers.MATCHERS)
    assert {*BROKEN, "good", "twice"} == set(matchers.names()[len(matchers.MATCHERS) :])


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_plug_in_is_one_line_with_its_cause_and_a_remedy(installed, name):
    with pytest.raises(UsageError, match=f"^matcher '{name}' {BROKEN[name]}") as refused:
        matchers.find(name)
    assert "(plug-in of many-matchers 1.0, " in refused.value.cause and "\n" not in refused.value.cause
    assert refused.value.remedy.startswith("Repair, update or uninstall many-matchers; ")


def test_a_name_that_two_distributions_give_is_nobodys(installed):
    with pytest.raises(UsageError, match="'twice' is given by many-matchers 1.0 and by other 0.3\nUninstall"):
        matchers.find("twice")


def test_a_name_of_ours_stays_ours(installed):
    assert matchers.find("attention") is matchers.MATCHERS["attention"]
    assert [row[1] for row in catalog.listing("matchers") if row[0] == "attention"] == ["ddengine"]


def test_list_shows_distribution_and_version_of_plug_ins(installed):
    rows = {row[0]: row[1:] for row in catalog.listing("matchers")}
    assert rows["good"] == ("many-matchers 1.0", "Many matchers")
    assert rows["herding"][0] == "ddengine"
    twice = [row[1:] for row in catalog.listing("matchers") if row[0] == "twice"]
    assert twice == [("many-matchers 1.0", "Many matchers"), ("other 0.3", "many_matchers:good")]


def test_doctor_warns_of_every_broken_plug_in_and_is_content(installed):
    found = {f.name: f for f in doctor.examine() if f.name.startswith("plug-in")}
    assert all(finding.ok for finding in found.values())
    assert found["plug-in matcher good"].value == "many-matchers 1.0, many_matchers:good"
    assert not found["plug-in matcher good"].warning
    bad = {name for name, finding in found.items() if finding.warning}
    names = {*BROKEN, "attention", "twice"}
    networks = {"plug-in network mine", "plug-in network resnet18"}
    assert bad == {*networks, *(f"plug-in matcher {name}" for name in names)}
    assert "No module named 'nowhere_to_be_found'" in found["plug-in network mine"].value
    assert "gives it a name of ours, which hides it" in found["plug-in network resnet18"].value
    assert all("\n" not in finding.value for finding in found.values())


def test_doctor_prints_warnings_and_exits_as_without_them(installed, capsys):
    code = cli.main(["doctor"], pinned=False)
    lines = capsys.readouterr().out.splitlines()
    assert code == 0
    assert "ok   plug-in matcher good: many-matchers 1.0, many_matchers:good" in lines
    assert sum(line.startswith("warn plug-in ") for line in lines) == len(BROKEN) + 5
    assert cli.main(["doctor", "--json"], pinned=False) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] and sum(f["warning"] for f in found["findings"]) == len(BROKEN) + 5


def test_the_broken_name_itself_ends_a_command_in_two_lines(installed, capsys):
    for name in ("absent", "counted", "twice"):
        assert cli.main(["distill", "dataset=digits", f"matcher={name}", "--help"], pinned=False) == 2
        cause, remedy = capsys.readouterr().err.splitlines()
        assert cause.startswith(f"error: matcher '{name}' ") and remedy.startswith("  fix: ")
        assert cli.main(["distill", "dataset=digits", "ipc=1", f"matcher={name}"], pinned=False) == 2
        assert len(capsys.readouterr().err.splitlines()) == 2


def test_lists_import_no_plug_in_and_nothing_heavy(installed):
    code = """
import sys
from ddengine.cli import main
codes = [main(["list", kind]) for kind in ("matchers", "networks", "datasets")] + [main(["--help"])]
heavy = ("torch", "numpy", "hydra", "many_matchers", "many_ends")
print(codes, sorted(set(heavy) & set(sys.modules)))
"""
    path = {"PYTHONPATH": f"{installed}:{ROOT}", "PATH": "/usr/bin"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=path, timeout=60)
    assert (done.stderr, done.stdout.splitlines()[-1]) == ("", "[0, 0, 0, 0] []")
    assert "[many-matchers 1.0]" in done.stdout


def test_the_first_distribution_of_a_name_on_the_path_counts(installed, tmp_path_factory, monkeypatch):
    before = tmp_path_factory.mktemp("before")
    plugged.install(before, "other", {"matchers": {"newer": "a:b"}}, version="0.4")
    monkeypatch.syspath_prepend(before)
    found = {plugin.name: plugin.origin for plugin in plugins.of("matchers")}
    assert found["newer"] == "other 0.4" and found["twice"] == "many-matchers 1.0"


def test_a_distribution_without_metadata_is_a_question_mark(installed):
    for file in installed.glob("*.dist-info/METADATA"):
        file.unlink()
    assert {plugin.origin for plugin in plugins.of("networks")} == {"? ?"}


def test_entry_points_that_cannot_be_read_are_a_warning_and_hide_no_others(tmp_path, monkeypatch):
    """The torn ones stop other packages' own imports too, so that nothing is imported here."""
    plugged.install(tmp_path, "torn", {}, entry_points="[ddengine.datasets]\nno value\n")
    plugged.install(tmp_path, "whole", {"datasets": {"mine": "a:b"}})
    monkeypatch.syspath_prepend(tmp_path)
    for part in ("_torchvision", "_device", "_plugin"):
        monkeypatch.setattr(doctor, part, lambda *given: doctor.Finding("left out", True, ""))
    (found,) = (finding for finding in doctor.examine() if finding.name == "plug-in")
    assert found.ok and found.warning
    assert found.value.startswith("torn: its entry_points.txt cannot be read (")
    assert ("mine", "whole 1.0", "a:b") in catalog.listing("datasets")


SOURCES = """
import dataclasses
import sys
import torch
from ddengine.data import Part, Source

x, y = torch.randint(0, 256, (20, 1, 9, 11), dtype=torch.uint8), torch.arange(20) % 2
NAMES = ("a", "b")


def unchecked(kind, **fields):  # as one is made where the tests' checks of types are not
    made = object.__new__(kind)
    made.__dict__.update({f.name: f.default for f in dataclasses.fields(kind)} | fields)
    return made


def part(x, y):
    return unchecked(Part, x=x, y=y)


def source(classes, train):
    return unchecked(Source, classes=classes, train=train)


def float_pixels(request):
    return Source(NAMES, part(x.float() / 255, y))


def flat(request):
    return Source(NAMES, part(x[:, 0], y))


def soft(request):
    return Source(NAMES, part(x, torch.eye(2)[y]))


def arrays(request):
    return Source(NAMES, part(x.numpy(), y.numpy()))


def fewer(request):
    return Source(NAMES, part(x, y[:17]))


def negative(request):
    return Source(NAMES, part(x, y - 1))


def beyond(request):
    return Source(NAMES, part(x, y + 5))


def pair(request):
    return source(NAMES, (x, y))


def unnamed(request):
    return source(("a", 1), part(x, y))


def doubled(request):
    return Source(("a", "a"), part(x, y))


def other(request):
    return Source(NAMES, part(x, y), test=part(x[:, :, :8], y))


def leaves(request):
    print("loading")
    sys.exit()
"""
WRONG = {
    "float_pixels": r"gives a train part of float32 \[20, 1, 9, 11\] pixels: a tensor uint8 \[n, c, h, w\]",
    "flat": r"gives a train part of uint8 \[20, 9, 11\] pixels",
    "soft": r"gives a train part of float32 \[20, 2\] labels: a tensor of whole numbers \[n\]",
    "arrays": "gives a train part of ndarray pixels",
    "fewer": "gives a train part of 20 images and 17 labels",
    "negative": "gives a train part of the labels -1 to 0: the 2 classes have 0 to 1",
    "beyond": "gives a train part of the labels 5 to 6",
    "pair": "gives a train part of the type tuple",
    "unnamed": r"gives the classes \('a', 1\): a tuple of names",
    "doubled": "gives the class 'a' twice",
    "other": r"gives a test part of images \(1, 8, 11\), and a train part of \(1, 9, 11\)",
    "leaves": "fails: SystemExit",
}


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """A distribution whose datasets are each wrong in one way."""
    values = {name: f"wrong_sources:{name}" for name in WRONG}
    plugged.install(tmp_path, "wrong-sources", {"datasets": values}, SOURCES)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("wrong_sources", None)


@pytest.mark.parametrize("name", WRONG)
def test_a_dataset_that_is_none_is_refused_by_what_is_wrong(sources, name):
    with pytest.raises(UsageError, match=f"^dataset '{name}' {WRONG[name]}") as refused:
        data.load(name)
    assert "(plug-in of wrong-sources 1.0, " in refused.value.cause and "\n" not in refused.value.cause


def test_what_a_plug_in_prints_is_no_result_and_its_exit_is_an_error(sources, tmp_path, capfd):
    words = ["distill", "dataset=leaves", "ipc=1", "matcher=random", f"out={tmp_path / 'run'}", "--json"]
    assert cli.main(words) == 2
    out, err = capfd.readouterr()
    assert out == "" and "loading" in err and "error: dataset 'leaves' fails: SystemExit" in err

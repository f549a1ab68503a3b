import base64
import json
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import matchers
from ddengine import data, evaluating, loop
from ddengine.cli import main
from ddengine.nets.core import NetSpec
from ddengine.report import table_markdown
from ddengine.rng import Rng
from ddengine.runs import Run, read_run
from ddengine.train import Recipe
from ddengine.types import Budget, DataSpec, Task
from synth import Pixels

SMALL = NetSpec("convnet", width=3, depth=1)
RECIPE = Recipe(steps=2, lrs=(0.02,), batch_size=11, augment="none")
NAMES = tuple(f"c{k}|<b>{k}" for k in range(10))
MATCHER = matchers.make("distribution", SMALL, steps=12, real_per_class=3, augment="none")
SCHEDULE = loop.Schedule(log_steps=3)
WORDS = ["dataset=digits", "ipc=1", "matcher=distribution", "matcher.steps=12", "matcher.real_per_class=3"]
WORDS += ["matcher.lr=0.00001", "matcher.schedule=cosine", "network.width=3", "network.depth=1", "seed=5"]
QUICK = ["recipe.steps=2", "recipe.lrs=[0.02]", "recipe.augment=none", "recipe.batch_size=11", "workers=1"]
COMMANDED = "it's a run=1"


def renamed():
    """The digits under class names that a report must escape."""
    digits = data.load("digits")
    spec = replace(digits.fit.spec, classes=NAMES)
    parts = {part: replace(getattr(digits, part), spec=spec) for part in ("fit", "validation", "test")}
    return replace(digits, **parts)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Runs from Python and from the command line, evaluated or not, and folders that are none."""
    root, digits = tmp_path_factory.mktemp("world"), renamed()
    task = Task(digits.fit, Budget(ipc=1), origin={"name": "digits"})
    judged = {"dataset": digits, "networks": [SMALL], "recipe": RECIPE, "rows": ["random", "full"]}
    for name in ("judged", "plain", "a <b>&|=x"):
        loop.distill(task, MATCHER, seed=len(name), out=root / name, schedule=SCHEDULE)
    for name in ("judged", "a <b>&|=x"):
        evaluating.evaluate(root / name, seeds=2, device="cpu", **judged)
    loop.distill(task, matchers.make("random", SMALL), out=root / "stepless")
    assert main(["distill", *WORDS, f"out={root / COMMANDED}"]) == 0
    shutil.copytree(root / "plain", root / "unfinished", ignore=shutil.ignore_patterns("distilled"))
    (root / "empty").mkdir()
    (root / "buffer").mkdir()
    (root / "buffer" / "manifest.json").write_text('{"format": "ddengine/experts"}')
    (root / "notes.txt").write_text("mine")
    return root


@pytest.fixture
def spoiled(world, tmp_path):
    """A copy of the judged run in which one file has other contents."""

    def spoil(name, content):
        folder = tmp_path / "spoiled"
        shutil.copytree(world / "judged", folder)
        (folder / name).write_text(content)
        return folder

    return spoil


def log(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def table_of(folder):
    found = json.loads((folder / "table.json").read_text())
    assert re.fullmatch("[0-9a-f]{64}", found.pop("seal"))
    return found


def test_evaluate_leaves_the_table_that_it_returns_beside_the_log(world, tmp_path):
    given = {"networks": [SMALL], "recipe": RECIPE, "rows": [], "device": "cpu", "out": tmp_path / "kept"}
    distilled = loop.DistilledSet.load(world / "stepless" / "distilled")
    for seed in (0, 1):
        table = evaluating.evaluate(distilled, dataset=renamed(), seeds=1, seed=seed, **given)
        assert table_of(tmp_path / "kept") == table.to_json()
    assert table_of(tmp_path / "kept")["seed"] == 1
    assert len((tmp_path / "kept" / "results.jsonl").read_text().splitlines()) == 4


def test_markdown_has_settings_table_and_both_ends_of_each_curve(call, world):
    code, out, err = call("report", "judged")
    lines, records = out.splitlines(), log(world / "judged")
    assert (code, err) == (0, "")
    assert lines[0] == "## judged"
    assert "| matcher | matchers.distribution.DistributionMatching |" in lines
    assert any(line.startswith("| options | steps 12, ") for line in lines)
    assert "| dataset | digits, images of 1x8x8, standard |" in lines
    assert re.search(r"^\| distilled \| convnet \| 720 \| 10 \| 0 \| 730 \| [\d.]+ \| ", out, re.MULTILINE)
    assert table_markdown(table_of(world / "judged")) in out
    first, last = records[0]["loss"], records[-1]["loss"]
    assert f"| loss | {first:.4g} (step 3) | {last:.4g} (step 12) |" in lines


def test_names_from_files_break_neither_rows_nor_html_of_the_markdown(call):
    _, out, _ = call("report", "a <b>&|=x")
    (row,) = [line for line in out.splitlines() if line.startswith("| classes")]
    escaped = ", ".join(rf"c{k}\|&lt;b>{k}" for k in range(10))
    assert row == f"| classes | 10: {escaped} |"
    assert "<b>" not in out


def test_a_run_without_evaluation_or_set_says_what_to_do(call):
    assert "\nnot evaluated yet: ddengine evaluate plain\n" in call("report", "plain")[1]
    assert "\nnot finished: repeat its distill command\n" in call("report", "unfinished")[1]
    code, out, _ = call("report", "stepless")
    assert (code, "| metric |" in out) == (0, False)


def test_json_is_one_object_of_what_the_files_hold(call, world):
    code, out, err = call("report", "judged", "plain", "--json")
    wanted = []
    for name in ("judged", "plain"):
        identity = json.loads((world / name / "run.json").read_text())["identity"]
        curves = {key: [[r["step"], r[key]] for r in log(world / name)] for key in ("loss", "lr")}
        table = table_of(world / name) if name == "judged" else None
        costs = [{"name": "distilled", "network": None, "train_seconds": None}]
        if table is not None:
            costs = [{key: row[key] for key in ("name", "network", "train_seconds")} for row in table["rows"]]
        made = json.loads((world / name / "distilled" / "manifest.json").read_text())["provenance"]
        spent = {"distil_seconds": made["seconds"], "peak_memory_bytes": made["peak_memory_bytes"]}
        parts = {"images": 720, "labels": 10, "extras": 0, "total": 730}
        for number, cost in enumerate(costs):
            cost |= dict.fromkeys(spent) if number else spent
            cost["bytes"] = table["rows"][number]["bytes"] if number else parts
        wanted.append({"path": name, "run": identity, "table": table, "curves": curves, "costs": costs})
    assert [step for step, _ in wanted[0]["curves"]["loss"]] == [3, 6, 9, 12]
    assert (code, err, out.count("\n")) == (0, "", 1)
    assert json.loads(out) == {"runs": wanted, "comparison": None}


def test_two_evaluated_runs_are_compared_and_a_comparison_can_be_had_alone(call, world, tmp_path):
    names = ("judged", "a <b>&|=x")
    values = [table_of(world / name)["rows"][0]["values"] for name in names]
    code, out, _ = call("report", *names, "--json")
    (found,) = json.loads(out)["comparison"]["comparisons"]
    assert code == 0
    assert found["values"] == [mine - theirs for mine, theirs in zip(*values, strict=True)]
    code, out, _ = call("report", *names, "--html", str(tmp_path / "page.html"))
    assert (code, out.count("## A against B")) == (0, 1)
    assert "<h2>A against B</h2>" in (tmp_path / "page.html").read_text()
    code, out, _ = call("report", "--compare", *names)
    assert (code, out.splitlines()[0], "## " in out) == (0, "A: judged", False)
    assert found["verdict"] in out


def test_runs_that_cannot_be_compared_say_why_or_end_the_command(call, spoiled, world):
    other = str(spoiled("table.json", json.dumps({**table_of(world / "judged"), "seed": 99})))
    code, out, _ = call("report", "judged", other)
    assert code == 0
    assert "- these evaluations cannot be compared: root seed 0 in A and 99 in B" in out.splitlines()
    code, out, err = call("report", "--compare", "judged", other)
    assert (code, out, len(err.splitlines())) == (2, "", 2)
    assert call("report", "--compare", "judged")[0] == 2
    assert "plain is not evaluated" in call("report", "--compare", "judged", "plain")[2]


@pytest.mark.parametrize("spelling", [["--html", "{}"], ["--html={}"]])
def test_html_overlays_the_runs_and_embeds_their_pictures(spelling, call, world, tmp_path):
    file = tmp_path / "my page.html"
    code, out, err = call("report", *(word.format(file) for word in spelling), "judged", "a <b>&|=x")
    document = file.read_text()
    curves = re.findall(r'<polyline [^>]*points="([^"]*)"', document)
    assert (code, err) == (0, f"wrote {file}\n")
    assert out == call("report", "judged", "a <b>&|=x")[1]
    assert [len(points.split()) for points in curves] == [4] * 4
    bars = [float(width) for width in re.findall(r'class="bar[^"]*" style="width:([\d.]+)%', document)]
    means = [row["mean"] for name in ("judged", "a <b>&|=x") for row in table_of(world / name)["rows"]]
    assert bars == [pytest.approx(100 * mean, abs=0.006) for mean in means]
    pictures = re.findall(r'src="data:image/png;base64,([^"]*)"', document)
    assert len(pictures) == 20
    assert all(base64.b64decode(picture).startswith(b"\x89PNG") for picture in pictures)
    cards = re.findall(r'<pre class="card"[^>]*>([^<]*)</pre>', document)
    assert ["no guarantee of privacy is given" in card for card in cards] == [True, True]
    assert "<h2>a &lt;b&gt;&amp;|=x</h2>" in document
    assert "c3|&lt;b&gt;3" in document
    assert "<b>" not in document
    assert [path.name for path in tmp_path.iterdir()] == ["my page.html"]


def test_a_page_replaces_a_page_and_no_other_file(call, world, tmp_path):
    file = tmp_path / "page.html"
    assert call("report", "plain", "--html", str(file))[0] == 0
    assert call("report", "judged", "--html", str(file), "--json")[0] == 0
    assert "<h2>judged</h2>" in file.read_text()
    code, out, err = call("report", "plain", "--html", "notes.txt")
    assert (code, out, (world / "notes.txt").read_text()) == (2, "", "mine")
    assert "notes.txt" in err


@pytest.mark.parametrize(
    ("words", "code", "named"),
    [
        ([], 2, "PATH"),
        (["--json"], 2, "PATH"),
        (["judged", "--html"], 2, "--html names no file"),
        (["judged", "--html="], 2, "--html names no file"),
        (["--html", "--json", "judged"], 2, "--html names no file"),
        (["judged", "--htm=x"], 2, "--htm"),
        (["judged", "--html", "empty"], 2, "empty"),
        (["judged", "--html", "nowhere/page.html"], 2, "nowhere/page.html"),
        (["nowhere"], 2, "nowhere does not exist"),
        (["judged", "empty"], 3, "empty is not a run"),
        (["notes.txt"], 3, "notes.txt is not a run"),
        (["buffer"], 3, "buffer is an expert buffer, not a run"),
        (["judged", "seed=3"], 2, "seed=3 does not exist"),
    ],
)
def test_bad_words_are_one_line_of_cause_and_one_of_remedy(words, code, named, call):
    found, out, err = call("report", *words)
    cause, remedy = err.splitlines()
    assert (found, out) == (code, "")
    assert cause.startswith("error: ")
    assert named in cause
    assert remedy.startswith("  fix: ")


def test_only_report_takes_a_page(call):
    code, out, err = call("inspect", "judged", "--html", "page.html")
    assert (code, out) == (2, "")
    assert "unknown flag '--html'" in err
    assert "--html FILE" in call("report", "--help")[1]
    assert "--html" not in call("inspect", "--help")[1]


ROW = {"name": "x", "network": "mlp", "mean": 0.5, "std": None, "ci95": None, "n": 1, "values": [0.5]}
ROW |= {"lr": 0.1, "steps": 3, "bytes": {"total": 7}, "network_spec": {}}
TABLE = {"dataset": "d", "protocol": "p", "seed": 0, "recipe": {}, "rows": [ROW]}
BROKEN_ROWS = [
    {**ROW, key: value}
    for key, value in [
        ("name", 3),
        ("mean", "0.5"),
        ("mean", True),
        ("std", []),
        ("ci95", [1.0]),
        ("ci95", ["a", "b"]),
        ("n", 1.5),
        ("values", ["x"]),
        ("steps", None),
        ("bytes", {}),
        ("bytes", {"total": "7"}),
        ("network_spec", 1),
        ("bytes", {"total": 7, "images": "7"}),
        ("train_seconds", "1"),
        ("ece", "low"),
        ("worst_class", [0.5]),
        ("per_class", 0.5),
        ("per_class", [0.5, "x"]),
        ("robust", [0.5]),
        ("robust", {"pgd": "x"}),
    ]
]
BROKEN_TABLES = [{**TABLE, key: value} for key, value in [
    ("cost", 3), ("seeds", "5"), ("protocol_spec", "p"), ("scores", []), ("scores", {"hlr": "x"}),
    ("scores", {"network": 3}), ("scores", {"components": 3}), ("scores", {"networks": []}),
    ("scores", {"networks": {"mlp": {"lrs": "x"}}}), ("rows", []), ("seed", "x"),
]]  # fmt: skip


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "3", *map(json.dumps, BROKEN_TABLES)]
    + [json.dumps({**TABLE, "rows": [row]}) for row in [*BROKEN_ROWS, None]]
    + [json.dumps(TABLE).replace("0.5", "NaN")],
)
def test_a_damaged_table_is_named(content, spoiled, call):
    code, out, err = call("report", str(spoiled("table.json", content)))
    assert (code, out, len(err.splitlines())) == (3, "", 2)
    assert "table.json is damaged" in err


def test_a_table_that_knows_nothing_of_scores_and_measures_is_shown(spoiled, call, tmp_path):
    folder = spoiled("table.json", json.dumps(TABLE))
    code, out, _ = call("report", str(folder), "--html", str(tmp_path / "page.html"))
    assert code == 0
    assert "| x | mlp | 50.0 | - | 1 | 0.1 | 3 | 7 |" in out.splitlines()
    assert "HLR" not in out and "HLR" not in (tmp_path / "page.html").read_text()


def test_a_page_of_one_run_stays_under_ten_megabytes_whatever_the_set_holds(tmp_path):
    """A set of 600 images of noise, and a preview that is larger than its room."""
    noise = torch.rand(600, 3, 64, 64, generator=Rng(0).torch("noise"))
    spec = DataSpec("noise", (3, 64, 64), NAMES, (0.5,) * 3, (0.25,) * 3)
    made = loop.DistilledSet.make(
        Pixels(noise, torch.arange(10).repeat(60), spec), recipe={}, provenance={"seconds": 1.0}
    )
    run = Run(tmp_path, {}, None, {}, made, b"x" * (4 << 20), "card", {"distill": None, "evaluate": None})
    shown = run.shown()
    tiles = [len(row["tiles"]) for row in shown["sheet"]["rows"]]
    assert (shown["preview"], len(set(tiles))) == (None, 1)
    assert 200 < sum(tiles) < 600
    assert sum(len(tile["png"]) for row in shown["sheet"]["rows"] for tile in row["tiles"]) < 6 << 20
    half = [len(row["tiles"]) for row in run.shown(2)["sheet"]["rows"]]
    assert half == [tiles[0] // 2] * 10


@pytest.mark.parametrize(
    "line",
    ["{", "[1]", '{"loss": 1}', '{"step": "1", "loss": 1}', '{"step": 1, "loss": NaN}',
     '{"step": 1, "loss": "low"}', '{"step": true}'],
)  # fmt: skip
def test_a_damaged_log_is_named_with_its_line(line, spoiled, call):
    folder = spoiled("metrics.jsonl", '{"step": 1, "seconds": 0.1, "loss": 2}\n' + line + "\n")
    code, out, err = call("report", str(folder))
    assert (code, out, len(err.splitlines())) == (3, "", 2)
    assert "metrics.jsonl, line 2 is damaged" in err


def test_a_torn_last_line_of_the_log_is_left_out(spoiled):
    folder = spoiled("metrics.jsonl", '{"step": 1, "seconds": 0.1, "loss": 2}\n{"step": 2, "lo')
    assert read_run(folder).curves == {"loss": [(1, 2)]}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("run.json", "[]"),
        ("run.json", '{"format": "other", "identity": {}}'),
        ("run.json", '{"format": "ddengine/run", "identity": {"matcher": {"type": 3}}}'),
        ("config.yaml", "a: ["),
        ("config.yaml", ""),
        ("config.yaml", "dataset: digits"),
        ("distilled/manifest.json", "{}"),
        ("distilled/preview.png", "no picture"),
    ],
)
def test_other_damage_is_named(name, content, spoiled, call):
    code, out, err = call("report", str(spoiled(name, content)))
    assert (code, out, len(err.splitlines())) == (3, "", 2)
    assert name in err


def same(table):
    """A table without what differs from time to time, or from one spelling of the command to another."""
    rows = [{key: value for key, value in row.items() if key != "train_seconds"} for row in table["rows"]]
    return {**table, "rows": rows, "command": None}


@pytest.mark.parametrize(
    "words",
    [
        ["rows=[random]", "seeds=1", "networks=[convnet,mlp]"],
        ["rows=[]", "seeds=2", "seed=4", "network=mlp", "network.width=5"],
        ["rows=[full]", "seeds=1", "network.norm=batch", "recipe.momentum=0.5"],
    ],
    ids=" ".join,
)
def test_the_evaluate_command_of_a_run_repeats_its_table(words, call, world):
    assert call("evaluate", COMMANDED, *QUICK, *words)[0] == 0
    command, before = read_run(Path(COMMANDED)).commands["evaluate"], table_of(world / COMMANDED)
    (world / COMMANDED / "table.json").unlink()
    assert call(*shlex.split(command)[1:], "workers=1")[0] == 0
    assert same(table_of(world / COMMANDED)) == same(before)
    assert set(words) < set(shlex.split(command))


def test_the_distill_command_of_a_run_finds_it_finished(call, world):
    _, *words = shlex.split(read_run(world / COMMANDED).commands["distill"])
    assert set(WORDS) - {"matcher.lr=0.00001"} <= set(words)
    assert not any(word.startswith(("matcher.momentum", "device", "checkpoint")) for word in words)
    code, out, _ = call(*words, "--json")
    assert (code, json.loads(out)["resumed_from"]) == (0, 12)


def test_a_run_from_python_has_no_distill_command_and_its_own_evaluation(world):
    assert read_run(world / "plain").commands == {
        "distill": None,
        "evaluate": shlex.join(["ddengine", "evaluate", str(world / "plain")]),
    }
    assert read_run(world / "judged").commands["evaluate"] is None  # it was judged in Python


def test_a_configuration_whose_matcher_is_not_installed_is_spelled_in_full(world, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(world / COMMANDED, folder)
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("name: distribution", "name: plugged"))
    words = shlex.split(read_run(folder).commands["distill"])
    assert {"matcher=plugged", "matcher.momentum=0.5", "dataset.root=null", "device=auto"} <= set(words)

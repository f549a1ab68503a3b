"""Compensators from the command line: teachers, sets, resumed runs, judgements, and what is refused."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ddengine.cli import main
from ddengine.rng import Rng
from synth import DistilledSet

ROOT = Path(__file__).parents[2]
KILLS = int(os.environ.get("DDENGINE_FAULTS", "1"))
TEACHERS = ["dataset=digits", "networks=[convnet,resnet18]", "network.norm=batch", "network.width=4"]
RECORD = [*TEACHERS, "recipe=squeeze", "count=2", "epochs=1", "workers=1"]
DISTILL = ["matcher=compensator", "experts=teachers", "ipc=8", "matcher.steps=12", "workers=1"]
JUDGE = ["seeds=1", "recipe.steps=2", "recipe.lrs=[0.01]", "workers=1"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with teachers, with experts without batch norm, and with a finished run."""
    root = tmp_path_factory.mktemp("world")
    assert main(["buffer", *RECORD, f"out={root / 'teachers'}"]) == 0
    plain = ["dataset=digits", "network.width=2", "network.depth=1", "count=1", "epochs=1", "workers=1"]
    assert main(["buffer", *plain, f"out={root / 'plain'}"]) == 0
    words = [word.replace("experts=", f"experts={root}/") for word in DISTILL]
    assert main(["distill", *words, f"out={root / 'straight'}"]) == 0
    return root


def same(one, other):
    """Whether two sets hold the same bits and say the same but for times."""
    a, b = (DistilledSet.load(path / "distilled") for path in (one, other))
    equal = a.tensors.keys() == b.tensors.keys()
    mine, theirs = ({**s.manifest, "files": 0, "seal": 0, "provenance": 0} for s in (a, b))
    return equal and mine == theirs and all(torch.equal(t, b.tensors[name]) for name, t in a.tensors.items())


def test_a_set_says_what_it_holds_and_keeps_to_its_nominal_bytes(call, world):
    code, out, _ = call("inspect", "straight", "--json")
    found = json.loads(out)
    assert code == 0 and found["kind"] == "compensated" and found["budget"]["total"] <= 8 * 10 * 64
    assert found["recipe"]["labels"] == "static" and found["recipe"]["train"]["loss"] == "kl"
    code, out, _ = call("inspect", "straight")
    assert "real bases" in out and "compensators" in out
    assert call("verify", "straight")[0] == 0


def test_a_run_that_is_killed_again_and_again_ends_with_the_bits_of_a_straight_one(call, world):
    """The process gets SIGKILL at random moments of its work; DDENGINE_FAULTS says how often."""
    moments = Rng(1).fold("kills").torch("seconds")
    words = [*DISTILL, "checkpoint.steps=1", "out=killed"]
    survived = []
    for _ in range(KILLS):
        process = subprocess.Popen(
            [sys.executable, "-m", "ddengine", "distill", *words],
            cwd=world,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        process.stderr.readline()  # the plan was announced: the work starts now
        time.sleep(0.6 * float(torch.rand((), generator=moments)))
        process.send_signal(signal.SIGKILL)
        process.stderr.close()
        survived.append(process.wait(60) == 0)
    code, _, err = call("distill", *words)
    assert code == 0 and not all(survived)
    assert "resuming" in err
    assert same(world / "killed", world / "straight")


def test_it_is_judged_by_its_own_recipe_beside_real_images_with_the_same_labels(call, world):
    code, out, err = call("evaluate", "straight", "experts=teachers", *JUDGE, "--json")
    assert code == 0, err
    found = json.loads(out)
    rows = {row["name"]: row for row in found["rows"]}
    assert rows.keys() >= {"distilled", "random", "random_bytes", "full", "random_same_labels"}
    assert {row["steps"] for row in rows.values()} == {2}
    assert found["recipe"]["loss"] == "kl" and found["recipe"]["optimiser"] == "adamw"
    assert rows["distilled"]["ipc"] == rows["random"]["ipc"] == 8
    total = rows["distilled"]["bytes"]["total"]
    assert total - 79 < rows["random_same_labels"]["bytes"]["total"] <= total


def test_without_teachers_that_row_is_left_out(call, world):
    code, out, _ = call("evaluate", "straight", *JUDGE, "--json")
    assert code == 0
    assert "random_same_labels" not in {row["name"] for row in json.loads(out)["rows"]}


def test_teachers_that_did_not_label_the_set_are_refused(call, world):
    more = [word.replace("count=2", "count=3") for word in RECORD]
    assert call("buffer", *more, "out=more")[0] == 0
    code, out, err = call("evaluate", "straight", "experts=more", *JUDGE)
    assert (code, out) == (2, "") and "are not those that labelled the set" in err


def test_a_budget_in_bytes_beyond_the_images_there_are_holds_them_all(call, world):
    words = [word for word in DISTILL if not word.startswith("ipc")]
    options = ["budget.nbytes=400000", "matcher.recover=none", "matcher.labels=hard", "out=all"]
    code, _, err = call("distill", *words, *options)
    assert code == 0, err
    counts = torch.bincount(DistilledSet.load(world / "all" / "distilled").synth.classes)
    assert counts.min() == counts.max() > 100


def test_a_set_with_dynamic_labels_brings_its_teachers(call, world):
    options = ["matcher.labels=dynamic", "matcher.count_teachers=false", "matcher.recover=none"]
    assert call("distill", *DISTILL, *options, "out=dynamic")[0] == 0
    code, out, err = call("evaluate", "dynamic", *JUDGE, "--json")
    assert code == 0, err
    rows = {row["name"]: row for row in json.loads(out)["rows"]}
    assert rows["random_same_labels"]["bytes"]["extras"] == rows["distilled"]["bytes"]["extras"] > 10_000


@pytest.mark.parametrize(
    ("words", "cause", "remedy"),
    [
        (["experts=plain"], "has no batch norm", "network.norm=batch"),
        (["experts=nowhere"], "there is no folder nowhere", "expert buffer"),
        (["ipc=1"], "too small for one sheet of 10 classes with 2 compensators", "matcher.groups=1"),
        (["matcher.recover=magic"], "magic", "compensator"),
        (["matcher.labels=soft"], "soft", "static"),
        (["matcher.label_codec=top5"], "a softened target lives in its tail", "int8"),
        (["matcher.teachers=[7]"], "no expert 7 in a buffer of 2", "0..1"),
        (["matcher.class_batch=0"], "matcher.class_batch=0", ""),
        (["matcher.groups=two"], "matcher.groups=two", ""),
        (["matcher.labels=dynamic"], "too small for one sheet", "matcher.count_teachers=false"),
        (["matcher.recover=none", "matcher.groups=3"], "matcher.groups means nothing", "Leave it out"),
        (["matcher.parts=2"], "matcher.parts means nothing", "Leave it out"),
        (["matcher.labels=hard", "matcher.label_teachers=[0]"], "label_teachers means nothing", ""),
        (["matcher.count_teachers=false"], "needs matcher.labels=dynamic", ""),
        (["synth=compensated"], "means nothing to matcher=compensator", "Leave synth out"),
        (["dataset=digits", "dataset.preprocessing=zca"], "made with standard", "Record a buffer"),
    ],
)
def test_what_cannot_be_done_is_one_line_with_a_remedy(call, world, words, cause, remedy):
    before = sorted(path.name for path in world.iterdir())
    code, out, err = call("distill", *DISTILL, *words, "out=refused")
    lines = err.strip().splitlines()
    assert (code, out, len(lines)) == (2, "", 2), err
    assert cause in lines[0] and remedy in lines[1], err
    left = world / "refused"
    if left.exists():
        assert not any(left.iterdir())
        left.rmdir()
    assert sorted(path.name for path in world.iterdir()) == before

"""Grids of small images from the command line: made, inspected, verified, exported, judged at equal bytes."""

import json

import pytest

from ddengine.cli import main
from synth import DistilledSet, Factored

QUICK = ["dataset=digits", "ipc=3", "network.width=2", "network.depth=1", "matcher.steps=2", "workers=1"]
FEW = ["matcher.real_per_class=5", "matcher.frequencies=7"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a finished run."""
    root = tmp_path_factory.mktemp("world")
    words = [*QUICK, *FEW, "matcher=characteristic", "synth=factored", f"out={root / 'run'}"]
    assert main(["distill", *words]) == 0
    return root


def test_a_set_says_what_it_holds(call, world):
    code, out, _ = call("inspect", "run", "--json")
    found = json.loads(out)
    assert code == 0 and (found["kind"], found["factor"], found["count"]) == ("factored", 2, 120)
    assert found["budget"]["ipc"] == 3 and found["budget"]["images"] == 30 * (64 + 8)
    assert found["provenance"]["matcher"]["options"]["synth"]["factor"] == 2
    code, out, _ = call("inspect", "run")
    assert "factored, 120 images" in out and "30 stored images, each a grid of 2 x 2" in out
    code, out, _ = call("verify", "run")
    assert code == 0 and "120 images in the cells of 30" in out


def test_the_factor_is_an_option(call, world):
    code, *_ = call("distill", *QUICK, "synth=factored", "matcher.synth.factor=3", "out=three")
    made = DistilledSet.load(world / "three" / "distilled").synth
    assert code == 0 and isinstance(made, Factored) and made.factor == 3 and len(made.decode()) == 270


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["matcher.synth.factor=2"], "matcher.synth.factor=2 and synth is pixels"),
        (["synth=factored", "matcher.synth.factor=9"], "no 9 cells to a side"),
        (["synth=factored", "matcher.synth.groups=2"], "matcher.synth.groups=2 and synth is factored"),
        (["synth=factored", "matcher.synth.factor=half"], "matcher.synth.factor"),
        (["synth=faktored"], "Did you mean 'factored'?"),
    ],
)
def test_what_means_nothing_is_refused_in_two_lines(call, words, said):
    code, out, err = call("distill", *QUICK, *words, "out=refused")
    assert code == 2 and said in err and not out and "Traceback" not in err


def test_it_is_judged_and_exported_decoded_and_costs_what_is_stored(call, world):
    recipe = ["recipe.steps=2", "recipe.lrs=[0.01]"]
    code, out, err = call(
        "evaluate", "run", "seeds=1", *recipe, "rows=[random,random_bytes]", "workers=1", "--json"
    )
    assert code == 0, err
    rows = {row["name"]: row for row in json.loads(out)["rows"]}
    total = 30 * (64 + 8 + 1)
    assert rows["distilled"]["count"] == 120 and rows["distilled"]["bytes"]["total"] == total
    assert rows["random"]["count"] == 30 and rows["random_bytes"]["count"] == total // 65
    code, _, err = call("export", "run/distilled", "--to", "imagefolder", "out=folder")
    assert code == 0 and len(list((world / "folder").rglob("*.png"))) == 120
    assert "120 images decoded from 30 stored ones" in err

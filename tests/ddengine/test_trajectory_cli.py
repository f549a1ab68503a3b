"""Trajectory matching from the command line: a buffer is recorded, distilled from, judged, and refused."""

import json
import shutil

import pytest

from ddengine.cli import main
from ddengine.compose import composed
from ddengine.errors import UsageError
from expert_buffers.store import ExpertBuffer
from synth import DistilledSet

RECORD = ["dataset=digits", "network.width=2", "network.depth=1", "count=2", "epochs=3", "workers=1"]
TRAJECTORY = ["matcher=trajectory", "ipc=1", "matcher.steps=3", "matcher.inner.steps=3"]
JUDGE = ["seeds=1", "rows=[]", "recipe.steps=1", "recipe.lrs=[0.1]", "recipe.augment=none", "workers=1"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a buffer, a damaged copy of it, and something that is no buffer."""
    root = tmp_path_factory.mktemp("world")
    assert main(["buffer", *RECORD, "recipe.lr=0.1", f"out={root / 'experts'}"]) == 0
    shutil.copytree(root / "experts", root / "damaged")
    data = next((root / "damaged").glob("expert_*"))
    content = bytearray(data.read_bytes())
    content[-5] ^= 1
    data.write_bytes(bytes(content))
    shutil.copytree(root / "experts", root / "edited")
    manifest = root / "edited" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"seed": 0', '"seed": 1'))
    (root / "nothing").mkdir()
    return root


def told(err):
    """The cause and the remedy of an error that is all there is on stderr."""
    first, second = err.splitlines()
    return first.removeprefix("error: "), second.removeprefix("  fix: ")


def test_dataset_and_network_come_from_the_buffer_and_the_result_can_be_judged(call, world):
    code, out, err = call("distill", *TRAJECTORY, "experts=experts", "out=run", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert (found["kind"], found["count"], found["provenance"]["steps"]) == ("pixels", 10, 3)
    assert found["recipe"]["network"] == ExpertBuffer(world / "experts").network(0).to_dict()
    assert found["recipe"]["dataset"] == {"name": "digits"}
    assert found["provenance"]["experts"] == ExpertBuffer(world / "experts").identity
    assert "student_lr" in DistilledSet.load(world / "run" / "distilled").tensors
    code, out, err = call("evaluate", "run", *JUDGE, "--json")
    assert code == 0, err
    assert [row["name"] for row in json.loads(out)["rows"]] == ["distilled"]
    assert call("distill", *TRAJECTORY, "experts=experts", "out=run")[0] == 0  # finished: as it is
    assert call("verify", "run")[0] == 0


def test_nested_options_reach_the_matcher_with_their_types(call, world):
    words = [
        "matcher.inner.momentum=0.5",
        "matcher.inner.batch=4",
        "matcher.window.max=1",
        "matcher.middle=equal",
    ]
    code, _, err = call("distill", *TRAJECTORY, *words, "experts=experts", "out=nested", "--json")
    assert code == 0, err
    options = DistilledSet.load(world / "nested" / "distilled").manifest["provenance"]["matcher"]["options"]
    assert (options["inner"]["momentum"], options["inner"]["batch"], options["inner"]["steps"]) == (0.5, 4, 3)
    assert options["inner"]["rate"] == 0.01 and type(options["inner"]["steps"]) is int
    assert (options["window"]["max"], options["window"]["min"], options["middle"]) == (1, 0, "equal")


def test_a_nested_value_of_the_wrong_type_is_refused():
    for text in ("matcher.inner.steps=1.5", "matcher.window.max=late"):
        with pytest.raises(UsageError, match=text):
            composed("distill", ["dataset=digits", "matcher=trajectory", text])


def test_nested_options_have_the_defaults_of_the_matcher():
    node = composed("distill", ["dataset=digits", "matcher=trajectory"]).matcher
    assert (node.inner.steps, node.inner.rate, node.inner.batch) == (20, 0.01, None)
    assert (node.window.min, node.window.max, node.skip_above) == (0, None, None)
    changed = composed("distill", ["dataset=digits", "matcher=trajectory", "matcher.inner.steps=7"]).matcher
    assert changed.inner.steps == 7
    again = composed("distill", ["dataset=digits", "matcher=trajectory"]).matcher
    assert vars(again.inner) == vars(node.inner) and again.inner is not node.inner


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("matcher.inner.stepz=3", "matcher.inner.steps"),
        ("matcher.window.maxx=3", "matcher.window.max"),
        ("matcher.iner.rate=1", "matcher.inner.rate"),
    ],
)
def test_a_misspelt_nested_key_is_answered_with_the_nearest(call, key, near):
    code, out, err = call("distill", "dataset=digits", "matcher=trajectory", key)
    cause, remedy = told(err)
    assert (code, out) == (2, "") and key.partition("=")[0] in cause
    assert f"Did you mean '{near}'?" in remedy


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["experts=experts", "matcher.inner.steps=0"], "matcher.inner.steps=0"),
        (["experts=experts", "matcher.inner.backend=higer"], "higer"),
        (["experts=experts", "matcher.window.min=3", "matcher.window.max=2"], "window.max=2"),
        (["experts=experts", "matcher.window.max=3"], "window.max=3"),
        (["experts=experts", "matcher.expert_epochs=4"], "needs 4"),
        (["experts=nowhere"], "nowhere"),
        (["dataset=digits"], "experts"),
        (["experts=experts", "network.width=3"], "width=3"),
        (["experts=experts", "network=mlp"], "mlp"),
        (["experts=experts", "dataset.preprocessing=zca"], "zca"),
        (
            ["experts=experts", "matcher.labels=learned", "ipc=null", "budget.nbytes=9999"],
            "budget.nbytes=9999",
        ),
    ],
)
def test_what_does_not_fit_is_one_line_of_cause_and_one_of_remedy(call, world, words, named):
    code, out, err = call("distill", *TRAJECTORY, *words, "out=new")
    cause, remedy = told(err)
    assert (code, out) == (2, "") and named in cause and remedy
    assert not (world / "new").exists() or not list((world / "new").iterdir())


@pytest.mark.parametrize(
    ("folder", "named"),
    [("damaged", "expert_0000"), ("edited", "edited/manifest.json"), ("nothing", "nothing/manifest.json")],
)
def test_a_damaged_buffer_is_another_exit_code_that_names_the_file(call, folder, named):
    code, out, err = call("distill", *TRAJECTORY, f"experts={folder}", "out=new")
    cause, _ = told(err)
    assert (code, out) == (3, "") and named in cause


def test_a_pixel_matcher_draws_its_networks_from_the_buffer(call, world):
    words = ["matcher=distribution", "ipc=1", "matcher.steps=2", "matcher.real_per_class=2"]
    code, _, err = call("distill", *words, "matcher.networks=buffer", "experts=experts", "out=drawn")
    assert code == 0, err
    provenance = DistilledSet.load(world / "drawn" / "distilled").manifest["provenance"]
    assert provenance["experts"] == ExpertBuffer(world / "experts").identity
    code, _, err = call("distill", *words, "dataset=digits", "matcher.networks=buffer", "out=new")
    assert code == 2 and "experts" in told(err)[0]


def test_help_of_distill_lists_the_options_of_the_chosen_matcher(capsys):
    assert main(["distill", "matcher=trajectory", "--help"]) == 0
    out = capsys.readouterr().out
    for line in ("matcher.steps=5000", "matcher.inner.rate=0.01", "matcher.window.max=null"):
        assert f"\n  {line}\n" in out
    assert main(["distill", "--help"]) == 0
    assert "matcher.inner" not in capsys.readouterr().out
    assert main(["distill", "matcher=trajektory", "--help"]) == 2
    assert "Did you mean 'trajectory'?" in capsys.readouterr().err

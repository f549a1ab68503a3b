"""What the command line does with a set beyond judging it once: protocols, networks, in and out, tasks."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from ddengine import data
from ddengine.cli import main
from synth import DistilledSet

QUICK = ["recipe.steps=3", "recipe.lrs=[0.01]", "workers=1"]
NETWORK = ["network=mlp", "network.width=5"]
NETS = """
from torch import nn


class Small(nn.Module):
    def __init__(self, in_channels, num_classes):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64 * in_channels, num_classes))

    def forward(self, x):
        return self.body(x)
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A finished run of digits, and a network of the user's own beside it."""
    root = tmp_path_factory.mktemp("world")
    words = ["distill", "dataset=digits", "ipc=1", "matcher=kmeans", *NETWORK, f"out={root / 'run'}"]
    assert main(words) == 0
    (root / "own_small_nets.py").write_text(NETS)
    return root


def two_lines(err):
    lines = [line for line in err.splitlines() if line.startswith(("error: ", "  fix: "))]
    assert len(lines) == 2, err
    return lines


def table_of(call, *words):
    code, out, err = call("evaluate", "run", "seeds=1", *QUICK, *words, "--json")
    assert code == 0, err
    return json.loads(out)


def test_rows_are_kept_for_the_next_evaluation_unless_told_otherwise(call, world, tmp_path):
    words = ["rows=[random,full]", f"out={tmp_path / 'judged'}"]

    def kept(*more):
        table_of(call, *words, *more)
        lines = (tmp_path / "judged" / "results.jsonl").read_text().splitlines()[-6:]
        return [record["row"] for record in map(json.loads, lines) if record.get("kept")]

    folder = f"kept={tmp_path / 'rows'}"
    assert kept(folder) == []
    assert kept(folder) == ["random", "full"] * 2
    assert kept("kept=none") == []
    assert len(list((tmp_path / "rows").iterdir())) == 4


def test_a_publications_protocol_says_its_name_and_takes_no_other_recipe(call, world, tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("name: mine\nversion: 2\nsource: me\nepochs: 3\nrates: fixed\nrecipe: {lrs: [0.02]}\n")
    words = ["evaluate", "run", "seeds=1", "rows=[random]", "workers=1", f"protocol={mine}"]
    code, out, _ = call(*words, "--json")
    table = json.loads(out)
    assert (code, table["protocol"], table["protocol_spec"]["version"]) == (0, "mine", 2)
    assert {row["steps"] for row in table["rows"]} == {3} and table["rows"][0]["trials"] == []
    for name in (str(mine), "paper/dm"):
        code, _, err = call("evaluate", "run", f"protocol={name}", "recipe.steps=9")
        assert code == 2 and "has a recipe of its own, and recipe.steps is given" in two_lines(err)[0]
    code, _, err = call("evaluate", "run", "protocol=paper/mtf")
    assert code == 2 and "Did you mean 'paper/mtt'?" in two_lines(err)[1]
    code, _, err = call("evaluate", "run", "protocol=nowhere.yaml")
    assert code == 2 and "cannot read the protocol nowhere.yaml" in two_lines(err)[0]


def test_a_set_is_judged_across_architectures_by_one_word(call, world, monkeypatch):
    from ddengine import judge

    asked = []
    monkeypatch.setattr(judge, "evaluate", lambda *a, **k: asked.append(k["networks"]) or 1 / 0)
    assert call("evaluate", "run", "networks=grid")[0] == 1
    assert [net.name for net in asked[0]] == ["convnet", "alexnet", "vgg11", "resnet18", "vit"]


def test_networks_of_torchvision_and_of_ones_own_are_judged_by_name(call, world):
    found = table_of(call, "networks=[own_small_nets:Small,mobilenet_v3_small]", "rows=[]")
    assert [row["network"] for row in found["rows"]] == ["own_small_nets:Small", "mobilenet_v3_small"]
    code, _, err = call("evaluate", "run", "network=own_small_nets:Smal")
    assert code == 2 and "Did you mean 'Small'?" in two_lines(err)[1]


def test_a_network_that_only_an_artefact_names_is_never_imported(call, world, tmp_path):
    made = DistilledSet.load(world / "run" / "distilled")
    (world / "trap_nets.py").write_text("raise SystemExit('code of an artefact ran')\n")
    recipe = {**made.manifest["recipe"], "network": {"name": "trap_nets:Net"}}
    DistilledSet.make(made.synth, recipe=recipe, provenance={}).save(tmp_path / "hostile")
    code, out, err = call("evaluate", tmp_path / "hostile")
    assert (code, out) == (2, "") and "trap_nets:Net" in two_lines(err)[0]
    assert "trap_nets" not in sys.modules
    code, out, err = call(
        "evaluate", tmp_path / "hostile", "networks=[mlp]", "rows=[]", "seeds=1", *QUICK, "--json"
    )
    assert code == 0 and [row["network"] for row in json.loads(out)["rows"]] == ["mlp"], err
    assert "trap_nets" not in sys.modules
    code, _, err = call("evaluate", tmp_path / "hostile", "network=mlp", "rows=[]", "seeds=1", *QUICK)
    assert code == 0, err


def test_a_table_of_a_set_on_its_own_is_kept_where_it_is_told_to_and_reported(call, world, tmp_path):
    for name in ("one", "two"):
        shutil.copytree(world / "run" / "distilled", tmp_path / "sets" / name)
    words = ["seeds=2", "rows=[]", *QUICK]
    code, _, err = call("evaluate", tmp_path / "sets" / "one", *words)
    assert code == 0 and "note: this table is not kept: with out=DIR it is" in err
    code, _, err = call("report", "--compare", tmp_path / "sets" / "one", tmp_path / "sets" / "two")
    assert code == 2 and "out=DIR, then compare that DIR" in two_lines(err)[1]
    for name in ("one", "two"):
        code, _, err = call("evaluate", tmp_path / "sets" / name, *words, f"out={tmp_path / 'kept' / name}")
        assert code == 0 and "not kept" not in err
    code, out, _ = call("report", "--compare", tmp_path / "kept" / "one", tmp_path / "kept" / "two", "--json")
    assert code == 0 and json.loads(out)["comparisons"][0]["values"] == [0, 0]
    shutil.rmtree(tmp_path / "sets")
    code, out, _ = call("report", tmp_path / "kept" / "one", "--html", tmp_path / "page.html")
    assert code == 0 and "matcher | not known" in out and "examples: fit 1,293, validation 145" in out


def test_a_report_shows_the_set_of_an_evaluation_or_a_set_alone(call, world, tmp_path):
    shutil.copytree(world / "run" / "distilled", tmp_path / "set")
    code, _, err = call(
        "evaluate", tmp_path / "set", "seeds=1", "rows=[]", *QUICK, f"out={tmp_path / 'kept'}"
    )
    assert code == 0, err
    for name, said in (("kept", "examples: fit"), ("set", "not evaluated yet")):
        code, out, _ = call("report", tmp_path / name, "--html", tmp_path / f"{name}.html")
        assert code == 0 and said in out and "SubsetSelection" in out and "| size | 10 images" in out
        assert "data:image/png;base64," in (tmp_path / f"{name}.html").read_text()
    code, _, err = call("evaluate", "run", "seeds=1", "rows=[]", *QUICK, f"out={tmp_path / 'kept'}")
    assert code == 0 and json.loads((tmp_path / "kept" / "set.json").read_text())["path"].endswith(
        "run/distilled"
    )
    (tmp_path / "kept" / "set.json").write_text('{"path": 5}')
    code, _, err = call("report", tmp_path / "kept")
    assert code == 3 and "set.json" in two_lines(err)[0]


def test_a_set_from_data_that_no_command_knows_says_how_it_is_judged(call, world, tmp_path):
    made = DistilledSet.load(world / "run" / "distilled")
    recipe = {**made.manifest["recipe"], "dataset": {"name": "mine"}}
    DistilledSet.make(made.synth, recipe=recipe, provenance={}).save(tmp_path / "own")
    code, _, err = call("evaluate", tmp_path / "own", "rows=[]", "seeds=1", *QUICK)
    assert code == 2 and two_lines(err)[0].startswith("error: the set was made from 'mine'")
    code, _, err = call("evaluate", tmp_path / "own", "dataset=digits", "rows=[]", "seeds=1", *QUICK)
    assert code == 0, err


@pytest.mark.parametrize("command", ["evaluate", "inspect", "verify", "export", "audit", "report"])
def test_a_path_at_which_there_is_nothing_is_a_wrong_word(command, call, world, tmp_path):
    more = ["--to", "hf", f"out={tmp_path / 'new'}"] if command == "export" else []
    code, _, err = call(command, tmp_path / "nowhere", *more)
    assert code == 2 and two_lines(err)[0].endswith("nowhere does not exist")


def test_a_class_without_a_test_image_is_named(call, world, tmp_path):
    draw = np.random.default_rng(0)
    for label, count in enumerate((1, 20, 20)):
        folder = tmp_path / "pictures" / f"class {label}"
        folder.mkdir(parents=True)
        for number in range(count):
            Image.fromarray(draw.integers(0, 256, (9, 9, 3), np.uint8)).save(folder / f"{number}.png")
    words = ["dataset=image_folder", f"dataset.root={tmp_path / 'pictures'}"]
    made = ["distill", *words, "ipc=1", "matcher=random", *NETWORK, f"out={tmp_path / 'few'}"]
    assert call(*made)[0] == 0
    code, out, _ = call("evaluate", tmp_path / "few", "seeds=1", "rows=[]", *QUICK)
    assert code == 0 and "examples: fit 33, validation 4, test 4" in out
    assert "warning: the test part has no example of 'class 0': scores are of the other classes" in out
    code, out, _ = call("report", tmp_path / "few", "--json")
    assert json.loads(out)["runs"][0]["table"]["untested"] == ["class 0"]


@pytest.mark.parametrize("form", ["npz", "torch"])
def test_a_set_goes_out_and_comes_back_as_it_was(call, world, tmp_path, form):
    out = tmp_path / f"set.{ {'npz': 'npz', 'torch': 'pt'}[form] }"
    code, said, _ = call("export", "run", "--to", form, f"out={out}", "--json")
    assert (code, json.loads(said)["path"]) == (0, str(out))
    words = ["import", out, "--from", form, "dataset=digits", *NETWORK, f"out={tmp_path / 'back'}"]
    code, said, err = call(*words, "--json")
    assert code == 0, err
    back, own = DistilledSet.load(tmp_path / "back"), DistilledSet.load(world / "run" / "distilled")
    assert torch.equal(back.decode().x, own.decode().x) and torch.equal(back.decode().y, own.decode().y)
    assert json.loads(said)["provenance"]["format"] == form
    code, out, err = call("evaluate", tmp_path / "back", "rows=[]", "seeds=1", *QUICK, "--json")
    assert code == 0 and json.loads(out)["rows"][0]["network_spec"]["name"] == "mlp", err


def test_a_foreign_set_says_what_was_inferred_and_is_judged(call, world, tmp_path):
    fit = data.load("digits").fit
    first = [int((fit.y == label).nonzero()[0]) for label in range(10)]
    np.savez(tmp_path / "mine.npz", x=fit.x[first, 0].numpy(), y=np.arange(10))
    words = ["import", tmp_path / "mine.npz", "--from", "npz", "dataset=digits", *NETWORK]
    code, _, err = call(*words, f"out={tmp_path / 'set'}")
    assert code == 0 and "note: " in err
    made = DistilledSet.load(tmp_path / "set").decode()
    torch.testing.assert_close(made.x, fit.model_input(torch.tensor(first)))


def test_files_that_are_damaged_or_ask_too_much_are_refused(call, world, tmp_path):
    (tmp_path / "bad.pt").write_bytes(b"PK" + bytes(100))
    for form in ("mtt", "dm", "torch"):
        words = ["import", tmp_path / "bad.pt", "--from", form, "dataset=digits", f"out={tmp_path / 'x'}"]
        code, _, err = call(*words)
        assert code == 3 and "bad.pt" in two_lines(err)[0]
    assert not (tmp_path / "x").exists()
    code, _, err = call("import", tmp_path / "bad.pt", "--from", "mt", "dataset=digits", "out=x")
    assert code == 2 and "Did you mean 'mtt'?" in two_lines(err)[1]
    code, _, err = call("export", "run", "--to", "zip", f"out={tmp_path / 'y'}")
    assert code == 2 and "unknown target 'zip'" in two_lines(err)[0]
    code, _, err = call("export", "run", f"out={tmp_path / 'y'}")
    assert code == 2 and "--to FORMAT" in two_lines(err)[0]


def test_an_audit_is_one_object_and_says_that_nothing_is_guaranteed(call, world, tmp_path):
    words = ["audit", "run", "seeds=1", *QUICK, f"out={tmp_path}"]
    code, out, err = call(*words, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["neighbours"]["rows"][0]["copies"] == 10  # k-means picks real images
    assert json.loads((tmp_path / "audit.json").read_text()) == found
    code, out, _ = call(*words)
    assert code == 0 and "10 of 10 images are copies" in out and "no guarantee" in out


def test_continual_learning_has_its_rows_and_stages(call, world, tmp_path):
    words = ["downstream", "continual", "run", "steps=2", "orders=2", *QUICK, f"out={tmp_path}"]
    code, out, err = call(*words, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert (found["task"], found["steps"], found["orders"]) == ("continual", 2, 2)
    assert {row["name"] for row in found["rows"]} == {"distilled", "random", "herding", "full"}
    assert json.loads((tmp_path / "continual.json").read_text()) == found
    assert "all classes at once" in err


def test_architecture_search_ranks_its_space(call, world):
    space = ["widths=[2,3]", "depths=[1]", "norms=[none]", "rows=[random]", "reference.steps=4"]
    code, out, err = call("downstream", "nas", "run", *space, *QUICK, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["task"] == "nas" and {"distilled", "random"} <= {row["name"] for row in found["rows"]}


@pytest.mark.parametrize(
    ("words", "match"),
    (
        (["downstream"], "downstream takes a task"),
        (["downstream", "nos", "run"], "unknown task 'nos'"),
        (["downstream", "continual"], "downstream takes one PATH, not 0"),
        (["downstream", "continual", "run", "steps=11"], "11"),
        (["audit", "run", "seeds=0"], "0"),
        (["audit", "nowhere"], "nowhere"),
        (["evaluate", "run", "robust=[fog]"], "unknown robust 'fog'"),
        (["report", "--compare", "run"], "two runs, not 1"),
        (["report", "--compare", "run", "run"], "not evaluated"),
    ),
)
def test_what_cannot_be_done_is_one_cause_and_one_remedy(call, world, words, match, monkeypatch):
    (world / "run" / "table.json").unlink(missing_ok=True)
    code, out, err = call(*words)
    assert code in (2, 3) and out == ""
    assert match in two_lines(err)[0]


def test_two_evaluations_are_compared_by_pairs_of_networks(call, world, tmp_path):
    words = ["distill", "dataset=digits", "ipc=1", "matcher=random", *NETWORK, f"out={tmp_path / 'other'}"]
    assert call(*words)[0] == 0
    for path in ("run", tmp_path / "other"):
        assert call("evaluate", path, "seeds=3", "rows=[]", *QUICK)[0] == 0
    code, out, err = call("report", "--compare", "run", tmp_path / "other", "--json")
    assert code == 0, err
    found = json.loads(out)["comparisons"][0]
    tables = [json.loads((path / "table.json").read_text()) for path in (world / "run", tmp_path / "other")]
    a, b = (table["rows"][0]["values"] for table in tables)
    assert found["values"] == [one - two for one, two in zip(a, b, strict=True)]
    covers = found["ci95"][0] <= 0 <= found["ci95"][1]
    assert (found["verdict"] == "no difference shown") == covers
    text = call("report", "--compare", "run", tmp_path / "other")[1]
    assert found["verdict"] in text
    assert found["verdict"] in call("report", "run", tmp_path / "other")[1]

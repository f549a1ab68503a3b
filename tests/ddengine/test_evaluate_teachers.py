"""Teachers on the way to the judge: from a buffer or from the set itself, by command and from Python."""

import json
from dataclasses import replace

import pytest
import torch
import trained_experts

import ddengine.judge
from ddengine import evaluating
from ddengine.cli import main
from ddengine.data import load
from ddengine.errors import ArtefactError, UsageError
from ddengine.nets import NetSpec
from expert_buffers.store import ExpertBuffer
from synth import DistilledSet, Pixels

MLP, BATCHED = NetSpec("mlp", width=7), NetSpec("convnet", width=3, depth=1, norm="batch")
JUDGE = ["seeds=1", "recipe.steps=2", "recipe.lrs=[0.1]", "workers=1"]


@pytest.fixture(scope="module")
def digits():
    return load("digits")


@pytest.fixture(scope="module")
def world(tmp_path_factory, digits):
    """A buffer of two kinds of experts, and a set with static labels that asks for its own recipe."""
    root = tmp_path_factory.mktemp("teachers")
    few = digits.fit.take(torch.arange(0, len(digits.fit), 29))
    trained_experts.write(root / "experts", few, MLP, BATCHED, count=1, epochs=2)
    index = torch.arange(0, len(digits.fit), 61)
    logits = torch.randn(len(index), 10, generator=torch.Generator().manual_seed(0))
    train = {"loss": "kl", "temperature": 4.0, "augment": "crop", "augment_mode": "item", "lrs": [0.01]}
    recipe = {"network": MLP.to_dict(), "dataset": {"name": "digits"}, "labels": "static", "train": train}
    pixels = Pixels(digits.fit.model_input(index), logits, few.spec, "logit")
    DistilledSet.make(pixels, recipe=recipe, provenance={}).save(root / "set")
    return root


def given_to_judge(monkeypatch):
    seen, real = [], ddengine.judge.evaluate
    monkeypatch.setattr(ddengine.judge, "evaluate", lambda *a, **k: seen.append(k) or real(*a, **k))
    return seen


def test_the_command_labels_with_the_last_checkpoints_of_experts(world, monkeypatch, capsys):
    seen = given_to_judge(monkeypatch)
    assert main(["evaluate", str(world / "set"), "experts=" + str(world / "experts"), *JUDGE, "--json"]) == 0
    table = json.loads(capsys.readouterr().out)
    assert "random_same_labels" in [row["name"] for row in table["rows"]]
    buffer, teachers = ExpertBuffer(world / "experts"), seen[0]["teachers"]
    assert len(teachers) == 2
    for i, teacher in enumerate(teachers):
        own = buffer.build(i, 2).state_dict()
        assert all(torch.equal(tensor, own[name]) for name, tensor in teacher.state_dict().items())
        assert not any(module.training for module in teacher.modules())
    assert any("running_mean" in name for name in teachers[1].state_dict())
    recipe = table["recipe"]
    said = {key: recipe[key] for key in ("steps", "lrs", "loss", "temperature", "augment", "momentum")}
    assert said == {
        "steps": 2, "lrs": [0.1], "loss": "kl", "temperature": 4.0, "augment": "crop", "momentum": 0.9,
    }  # fmt: skip
    assert "every operator in turn" in recipe["augment_mode"]


def test_experts_of_other_data_are_refused_before_any_training(world, tmp_path, digits):
    few = digits.fit.take(torch.arange(0, len(digits.fit), 61))
    other = replace(few, spec=replace(few.spec, fingerprint="ab" * 32))
    trained_experts.write(tmp_path / "other", other, MLP, count=1, epochs=1)
    with pytest.raises(UsageError, match="the buffer was recorded on 'digits' .fingerprint abababababab."):
        evaluating.evaluate(world / "set", experts=tmp_path / "other", dataset=digits, seeds=1, rows=[])


def test_a_set_without_teachers_is_judged_beside_the_usual_rows(world, monkeypatch, capsys):
    seen = given_to_judge(monkeypatch)
    assert main(["evaluate", str(world / "set"), *JUDGE, "rows=[random]"]) == 0
    assert seen[0]["teachers"] == [] and "random_same_labels" not in capsys.readouterr().out
    assert main(["evaluate", str(world / "set"), *JUDGE, "rows=[random_same_labels]"]) == 2
    assert "fix: Give experts=DIR" in capsys.readouterr().err


@pytest.mark.parametrize("named", ([], [2], [-1], [True], ["0"], "01", None, {"0": 1}))
def test_a_set_that_names_experts_which_the_buffer_lacks_is_refused(world, digits, named):
    buffer = ExpertBuffer(world / "experts")
    made = DistilledSet.load(world / "set")
    recipe = {**made.manifest["recipe"], "labelled_by": {"digest": buffer.digest, "experts": named}}
    hostile = replace(made, manifest={**made.manifest, "recipe": recipe})
    with pytest.raises(ArtefactError, match="labelled_by names the experts"):
        evaluating.evaluate(hostile, experts=buffer, dataset=digits, seeds=1, rows=[])

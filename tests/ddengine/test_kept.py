"""Rows that depend on data and recipe alone are trained once, and believed only while they are whole."""

import json
from dataclasses import replace

import pytest
import torch

import ddengine.bench
from ddengine.data import load
from ddengine.judge import evaluate
from ddengine.keeping import keepable
from ddengine.kept import Kept, kept_folder
from ddengine.nets import NetSpec
from ddengine.rng import Rng
from ddengine.train import Recipe
from synth import DistilledSet, Pixels
from synth.starts import random

MLP = NetSpec("mlp", width=7)
RECIPE = Recipe(steps=2, lrs=(0.01, 0.1), batch_size=32, augment="color_scale")
ROWS = ("random", "random_bytes", "full", "distilled_plain", "random_plain")


@pytest.fixture(scope="module")
def digits():
    return load("digits")


def packed(fit, seed, ipc=1):
    chosen = fit.take(random(fit, ipc, Rng(seed)))
    pixels = Pixels(chosen.model_input(), chosen.y, fit.spec)
    return DistilledSet.make(pixels, recipe={"network": MLP.to_dict()}, provenance={})


class Judging:
    """Evaluations into one folder of kept rows, and the rows that each of them trained."""

    def __init__(self, root, digits, monkeypatch):
        self.kept, self.digits, self.trained = Kept(root), digits, []
        real = ddengine.bench.Bench.training_set
        note = lambda bench, row, index: self.trained.append(row) or real(bench, row, index)
        monkeypatch.setattr(ddengine.bench.Bench, "training_set", note)

    def __call__(self, distilled, **changes):
        settings = {
            "networks": [MLP],
            "seeds": 2,
            "rows": ROWS,
            "recipe": RECIPE,
            "kept": self.kept,
        } | changes
        self.trained.clear()
        log = []
        dataset = settings.pop("dataset", self.digits)
        table = evaluate(distilled, dataset, log=log.append, **settings).to_json()
        return table, [(r["row"], r["kind"]) for r in log if not r.get("kept")]


@pytest.fixture
def judging(tmp_path, digits, monkeypatch):
    return Judging(tmp_path / "rows", digits, monkeypatch)


def test_the_next_set_is_judged_beside_the_same_rows_without_training_them_again(judging, digits):
    first, trained = judging(packed(digits.fit, 1))
    assert {row for row, _ in trained} == {"distilled", *ROWS}
    second, trained = judging(packed(digits.fit, 2))
    assert {row for row, _ in trained} == {"distilled", "distilled_plain"}
    for one, two in zip(first["rows"], second["rows"], strict=True):
        assert (one == two) == (one["name"] not in ("distilled", "distilled_plain"))


def test_a_kept_row_is_what_training_it_would_give(judging, digits):
    judging(packed(digits.fit, 1))
    kept, _ = judging(packed(digits.fit, 2))
    fresh, _ = judging(packed(digits.fit, 2), kept=None)
    strip = lambda table: {**table, "rows": [{**row, "train_seconds": 0} for row in table["rows"]]}
    assert strip(kept) == strip(fresh)


@pytest.mark.parametrize(
    "change",
    (
        {"seed": 1},
        {"networks": [NetSpec("mlp", width=5)]},
        {"recipe": replace(RECIPE, steps=3)},
        {"robust": ("contrast",)},
        {"precision": "bf16"},
    ),
)
def test_another_setting_is_another_row(judging, digits, change):
    distilled = packed(digits.fit, 1)
    judging(distilled)
    _, trained = judging(distilled, **change)
    assert ("full", "final") in trained and ("random", "final") in trained


def test_other_data_are_another_row(judging, digits):
    distilled = packed(digits.fit, 1)
    judging(distilled)
    labels = digits.test.y.flip(0)
    _, trained = judging(distilled, dataset=replace(digits, test=replace(digits.test, y=labels)))
    assert ("full", "final") in trained


def test_a_set_of_other_bytes_shares_all_rows_but_those_of_its_size(judging, digits):
    judging(packed(digits.fit, 1))
    _, trained = judging(packed(digits.fit, 1, ipc=2))
    assert {row for row, _ in trained} == {
        "distilled",
        "distilled_plain",
        "random",
        "random_bytes",
        "random_plain",
    }


@pytest.mark.parametrize(
    "damage",
    (
        lambda text: text[: len(text) // 2],
        lambda text: text.replace('"test": 0.', '"test": 0.9'),
        lambda text: text.replace('"lr"', '"LR"'),
        lambda text: "[]",
        lambda text: json.dumps({**json.loads(text), "record": 3}),
    ),
)
def test_a_damaged_entry_is_not_believed_and_is_made_again(judging, digits, damage):
    distilled = packed(digits.fit, 1)
    before, _ = judging(distilled, rows=("full",))
    entries = sorted(judging.kept.root.iterdir())
    whole = [path.read_text() for path in entries]
    for path, text in zip(entries, whole, strict=True):
        path.write_text(damage(text))
    after, trained = judging(distilled, rows=("full",))
    assert [row for row, _ in trained].count("full") == sum(
        damage(text) != text for text in whole
    )  # a replacement may not apply to each
    assert [row["values"] for row in after["rows"]] == [row["values"] for row in before["rows"]]
    assert all(json.loads(path.read_text())["seal"] for path in entries)


def test_rows_of_the_set_or_its_teachers_are_never_kept():
    assert not any(map(keepable, ("distilled", "distilled_hard", "distilled_plain", "random_same_labels")))
    assert all(map(keepable, ("random", "herding", "full", "full_converged", "random_plain", "random_bytes")))


def test_an_entry_answers_to_all_that_it_depends_on(tmp_path):
    kept, depends = Kept(tmp_path), {"row": "full", "lr": 0.1, "index": None, "recipe": {"lrs": (0.1,)}}
    assert kept.find(depends) is None
    kept.put(depends, {"test": 0.5})
    assert kept.find(dict(reversed(depends.items()))) == {"test": 0.5}
    assert all(kept.find({**depends, key: 7}) is None for key in depends)


def test_workers_share_the_kept_rows(judging, digits):
    one, _ = judging(packed(digits.fit, 1), workers=2)
    two, trained = judging(packed(digits.fit, 1))
    assert {row for row, _ in trained} == {"distilled", "distilled_plain"}
    assert [row["values"] for row in one["rows"]] == [row["values"] for row in two["rows"]]


def test_the_usual_folder_is_in_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("DDENGINE_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert kept_folder() == tmp_path / "ddengine" / "rows"
    monkeypatch.setenv("DDENGINE_CACHE", str(tmp_path / "mine"))
    assert kept_folder() == tmp_path / "mine"


def test_labels_of_the_test_part_stay_sealed_while_it_is_hashed(digits):
    from ddengine.kept import content
    from ddengine.sealed import Sealed

    sealed = Sealed(digits.test)
    assert sealed.hashed(content) == content(digits.test)
    assert sealed.hashed(content) != content(replace(digits.test, y=torch.zeros_like(digits.test.y)))


def test_what_a_killed_evaluation_left_is_removed_and_other_folders_are_left_alone(tmp_path):
    for name in ("thesis.tex", ".tmp-thesis"):
        (tmp_path / name).write_text("of another program")
    Kept(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    (tmp_path / "thesis.tex").unlink()
    Kept(tmp_path).put({"row": "full"}, {"test": 0.5})
    assert not (tmp_path / ".tmp-thesis").exists()
    assert Kept(tmp_path).find({"row": "full"}) == {"test": 0.5}

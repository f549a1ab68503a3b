import json
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import ddengine.bench
import ddengine.judge
from ddengine.data import load
from ddengine.errors import UsageError
from ddengine.judge import ROWS, Judged, count_for_bytes, evaluate, label_networks, trial_rates
from ddengine.nets import NetSpec
from ddengine.rng import Rng
from ddengine.tables import spread
from ddengine.train import Recipe
from ddengine.types import Images
from synth import DistilledSet, Pixels
from synth.starts import random

MLP = NetSpec("mlp", width=11)
CONVNET = NetSpec("convnet", width=5, depth=2)
TINY = Recipe(steps=3, lrs=(0.01, 0.1), batch_size=64, augment="color_scale")
NAMES = ("distilled", *ROWS)


@pytest.fixture(scope="module")
def digits():
    return load("digits")


def packed(fit, ipc=1, y_kind="class", student_lr=None, network=MLP):
    chosen = fit.take(random(fit, ipc, Rng(11)))
    labels = chosen.y if y_kind == "class" else F.one_hot(chosen.y, 10).float()
    pixels = Pixels(chosen.model_input(), labels, fit.spec, y_kind, student_lr=student_lr)
    provenance = {"seconds": 1.5, "steps": 7, "peak_memory_bytes": 1000}
    return DistilledSet.make(pixels, recipe={"network": network.to_dict()}, provenance=provenance)


@pytest.fixture(scope="module")
def distilled(digits):
    return packed(digits.fit)


@dataclass
class Run:
    table: dict
    log: list = field(default_factory=list)
    progress: list = field(default_factory=list)


def judged(distilled, dataset, **changes):
    run = Run({})
    settings = {"networks": [MLP], "seeds": 2, "recipe": TINY} | changes
    note = lambda done, total: run.progress.append((done, total))
    table = evaluate(distilled, dataset, log=run.log.append, on_progress=note, **settings)
    return replace(run, table=table.to_json())


@pytest.fixture(scope="module")
def run(distilled, digits):
    return judged(distilled, digits, networks=[MLP, CONVNET])


def timeless(table):
    return {**table, "rows": [{**row, "train_seconds": 0} for row in table["rows"]]}


def test_spread_is_mean_sample_deviation_and_students_interval():
    mean, std, ci95 = spread([0.1, 0.2, 0.6])
    assert mean == pytest.approx(0.3)
    assert std == pytest.approx((0.14 / 2) ** 0.5)
    half = 4.302652729911275 * (0.07 / 3) ** 0.5  # t quantile .975 with 2 degrees of freedom, from a table
    assert ci95 == pytest.approx((0.3 - half, 0.3 + half))


def test_spread_of_equal_values_is_a_point_and_of_one_value_unknown():
    assert spread([0.5, 0.5]) == (0.5, 0.0, (0.5, 0.5))
    assert spread([0.5]) == (0.5, None, None)


def test_the_stored_set_is_what_the_judge_accepts(distilled):
    assert isinstance(distilled, Judged)


def test_json_has_the_documented_shape_and_survives_a_round_trip(run):
    table = run.table
    assert json.loads(json.dumps(table, allow_nan=False)) == table
    assert (table["protocol"], table["dataset"], table["scores"]) == ("standard-v1", "digits", {})
    assert [(row["network"], row["name"]) for row in table["rows"]] == [
        (net, name) for net in ("mlp", "convnet") for name in NAMES
    ]
    for row in table["rows"]:
        assert row["metric"] == "accuracy" and row["n"] == len(row["values"]) == 2
        assert row["mean"] == pytest.approx(np.mean(row["values"]))
        assert row["std"] == pytest.approx(np.std(row["values"], ddof=1))
        assert row["ci95"][0] <= row["mean"] <= row["ci95"][1]
        assert all(0 <= value <= 1 for value in row["values"])
        parts = row["bytes"]
        assert parts["total"] == parts["images"] + parts["labels"] + parts["extras"]
    assert table["cost"]["seconds"] == 1.5 and table["cost"]["peak_memory_bytes"] == 1000
    assert table["recipe"]["steps"] == 3 and table["source_matches"] is True


def test_every_row_gets_the_same_steps_and_number_of_trials(run):
    assert {row["steps"] for row in run.table["rows"]} == {3}
    assert {tuple(trial["lr"] for trial in row["trials"]) for row in run.table["rows"]} == {(0.01, 0.1)}
    assert {record["steps"] for record in run.log} == {3}


def test_the_log_has_a_record_for_each_network_and_progress_reaches_its_total(run):
    trials = [r for r in run.log if r["kind"] == "trial"]
    finals = [r for r in run.log if r["kind"] == "final"]
    assert (len(trials), len(finals)) == (2 * 6 * 2, 2 * 6 * 2)
    assert all("validation" in r and "test" not in r for r in trials)
    assert all("test" in r and "validation" not in r for r in finals)
    assert run.progress == [(i, 48) for i in range(1, 49)]


def test_families_that_the_matcher_used_are_marked(run):
    seen = {row["network"]: row["seen_by_matcher"] for row in run.table["rows"]}
    assert seen == {"mlp": True, "convnet": False}


def test_byte_equal_rivals_fit_the_bytes_of_the_set(run, digits):
    rows = {row["name"]: row for row in run.table["rows"] if row["network"] == "mlp"}
    total = rows["distilled"]["bytes"]["total"]
    assert total == 10 * (64 + 8 + 1)  # uint8 pixels, offset and scale per image, one label byte
    assert rows["random_bytes"]["count"] == total // 65 == 11
    assert rows["random_bytes"]["bytes"] == {"images": 704, "labels": 11, "extras": 0, "total": 715}
    assert rows["random"]["count"] == rows["herding"]["count"] == 10 and rows["random"]["ipc"] == 1
    assert rows["full"]["count"] == len(digits.fit)
    assert count_for_bytes(64, digits.fit) == 1 and count_for_bytes(10**9, digits.fit) == len(digits.fit)


def test_validation_never_chooses_an_absurd_rate(distilled, digits):
    for lrs in ((1e3, 0.05), (0.05, 1e3)):
        recipe = replace(TINY, steps=25, lrs=lrs)
        table = judged(distilled, digits, rows=("random", "full"), recipe=recipe, seeds=1).table
        assert {row["lr"] for row in table["rows"]} == {0.05}
        for row in table["rows"]:
            assert row["lr"] == max(row["trials"], key=lambda trial: trial["validation"])["lr"]


def test_shuffled_test_labels_change_nothing_but_test_accuracy(distilled, digits):
    shuffled = digits.test.y[torch.randperm(len(digits.test), generator=Rng(0).torch("labels"))]
    corrupt = replace(digits, test=replace(digits.test, y=shuffled))
    kept = {"lr", "trials", "count", "bytes", "name"}
    recipe = replace(TINY, steps=25)
    true, false = (judged(distilled, d, rows=("random", "full"), recipe=recipe) for d in (digits, corrupt))
    for mine, theirs in zip(true.table["rows"], false.table["rows"], strict=True):
        assert {key: mine[key] for key in kept} == {key: theirs[key] for key in kept}
        assert mine["mean"] > theirs["mean"] + 0.05


def test_the_test_part_is_scored_once_for_each_network_after_all_trials(distilled, digits, monkeypatch):
    seen = []
    real = ddengine.bench.accuracy
    spy = lambda net, images: seen.append(len(images)) or real(net, images)
    monkeypatch.setattr(ddengine.bench, "accuracy", spy)
    judged(distilled, digits, rows=("random",), seeds=3)
    assert seen == [len(digits.validation)] * 4 + [len(digits.test)] * 6


def test_equal_training_sets_score_alike_because_streams_are_paired(digits):
    whole = Pixels(digits.fit.model_input(), digits.fit.y, digits.fit.spec, codec="fp32")
    copy = DistilledSet.make(whole, recipe={}, provenance={})
    mine, full = judged(copy, digits, rows=("full",), seeds=3).table["rows"]
    assert mine["values"] == full["values"] and mine["trials"] == full["trials"]
    assert len(set(mine["values"])) > 1
    assert mine["seen_by_matcher"] is None


def test_the_random_row_draws_anew_for_each_network(distilled, digits, monkeypatch):
    seen = []
    real = ddengine.bench.train
    spy = lambda spec, images, *rest: seen.append(images) or real(spec, images, *rest)
    monkeypatch.setattr(ddengine.bench, "train", spy)
    judged(distilled, digits, rows=("random", "kmeans"), seeds=2)
    drawn, means = [seen[i].x for i in (2, 8, 9)], [seen[i].x for i in (4, 10, 11)]
    assert torch.equal(seen[2].x, seen[3].x)
    assert not any(torch.equal(drawn[a], drawn[b]) for a, b in ((0, 1), (0, 2), (1, 2)))
    assert torch.equal(means[0], means[1]) and torch.equal(means[0], means[2])


def test_same_seed_same_table_another_seed_another(distilled, digits, run):
    again, other = (judged(distilled, digits, seed=seed).table for seed in (0, 1))
    mine = timeless(run.table)["rows"][: len(NAMES)]
    assert timeless(again)["rows"] == mine  # which other networks are judged changes nothing
    assert timeless(other)["rows"] != mine


def test_two_workers_give_the_bits_of_one(distilled, digits, run):
    both = judged(distilled, digits, workers=2)
    assert timeless(both.table)["rows"] == timeless(run.table)["rows"][: len(NAMES)]
    mine = [{**record, "seconds": 0} for record in run.log if record["network"] == "mlp"]
    assert [{**record, "seconds": 0} for record in both.log] == mine


def test_judging_leaves_set_and_global_generators_alone(distilled, digits):
    tensors = {name: tensor.clone() for name, tensor in distilled.tensors.items()}
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), torch.get_num_threads()
    judged(distilled, digits, rows=ROWS)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in distilled.tensors.items())
    assert torch.equal(before[0], torch.get_rng_state()) and torch.get_num_threads() == before[2]
    assert (before[1] == np.random.get_state()[1]).all()


def test_soft_one_hot_labels_score_as_hard_ones(digits):
    hard, soft = (packed(digits.fit, y_kind=kind) for kind in ("class", "prob"))
    recipe = replace(TINY, steps=10)
    rows = [judged(s, digits, rows=(), recipe=recipe).table["rows"][0] for s in (hard, soft)]
    assert rows[0]["values"] == pytest.approx(rows[1]["values"], abs=1.5 / len(digits.test))
    assert rows[1]["bytes"]["labels"] > rows[0]["bytes"]["labels"]


def test_a_learned_rate_takes_the_place_of_the_nearest_trial(digits):
    learned = packed(digits.fit, student_lr=0.0625)
    mine, random_row = judged(learned, digits, rows=("random",), seeds=1).table["rows"]
    assert [trial["lr"] for trial in mine["trials"]] == [0.01, 0.0625]
    assert [trial["lr"] for trial in random_row["trials"]] == [0.01, 0.1]
    assert trial_rates(Recipe(lrs=(0.003, 0.01, 0.03)), 0.0001) == (0.0001, 0.01, 0.03)
    assert trial_rates(Recipe(lrs=(0.003, 0.01)), 0.01) == (0.003, 0.01)


def test_one_network_has_no_deviation(distilled, digits):
    row = judged(distilled, digits, rows=(), seeds=1).table["rows"][0]
    assert (row["n"], row["std"], row["ci95"]) == (1, None, None)


def test_the_set_brings_its_own_preprocessing(digits):
    whitened = load("digits", preprocessing="zca")
    white_set = packed(whitened.fit)
    tables = [judged(white_set, dataset, rows=("full",), seeds=1).table for dataset in (digits, whitened)]
    assert timeless(tables[0]) == timeless(tables[1])


def test_the_default_recipe_follows_the_dataset(distilled, digits, monkeypatch):
    monkeypatch.setattr(ddengine.judge, "Recipe", partial(Recipe, steps=1))
    table = evaluate(distilled, digits, networks=[MLP], seeds=1, rows=(), recipe=None).to_json()
    assert table["recipe"]["augment"] == "color_crop_cutout_scale_rotate"


def test_networks_of_one_name_are_told_apart():
    specs = [NetSpec("mlp"), NetSpec("convnet"), NetSpec("convnet", width=5, norm="batch")]
    assert label_networks(specs) == ["mlp", "convnet", "convnet(width=5, norm=batch)"]


def emptied(images):
    return Images(images.x[:0], images.y[:0], images.spec)


def test_an_empty_validation_or_test_part_is_refused(distilled, digits):
    for name in ("validation", "test"):
        with pytest.raises(UsageError, match=f"the {name} part of 'digits' is empty"):
            judged(distilled, replace(digits, **{name: emptied(getattr(digits, name))}))


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"rows": ("full", "herdin")}, "unknown row 'herdin'"),
        ({"rows": ("full", "full")}, "repeat"),
        ({"networks": []}, "empty"),
        ({"networks": [MLP, MLP]}, "repeat"),
        ({"seeds": 0}, "seeds=0"),
        ({"workers": 0}, "workers=0"),
        ({"precision": "fp64"}, "fp64"),
    ],
)
def test_settings_that_cannot_be_judged_are_refused(distilled, digits, wrong, match):
    with pytest.raises(UsageError, match=match):
        judged(distilled, digits, **wrong)


def test_a_set_of_other_classes_is_refused(distilled, digits):
    names = tuple("abcdefghij")
    foreign = {part: replace(getattr(digits, part), spec=replace(digits.spec, classes=names))
               for part in ("fit", "validation", "test")}  # fmt: skip
    with pytest.raises(UsageError, match="classes differ"):
        judged(distilled, replace(digits, **foreign))

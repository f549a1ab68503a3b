import json
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import ddengine.bench
import ddengine.stacked
import ddengine.train
from ddengine.composites import Composites
from ddengine.data import load
from ddengine.errors import ArtefactError, UsageError
from ddengine.judge import Judged, evaluate, label_networks, trial_rates
from ddengine.nets import NetSpec, build
from ddengine.rivals import ROWS, count_for_bytes, label_mode
from ddengine.rng import Rng
from ddengine.tables import spread
from ddengine.train import Recipe
from ddengine.types import Images
from synth import DistilledSet, Pixels
from synth.labels import encode_labels
from synth.starts import random

MLP = NetSpec("mlp", width=11)
CONVNET = NetSpec("convnet", width=5, depth=2)
TINY = Recipe(steps=3, lrs=(0.01, 0.1), batch_size=64, augment="color_scale")
PLAIN = ("distilled_plain", "random_plain")
NAMES = ("distilled", *ROWS, *PLAIN)


@pytest.fixture(scope="module")
def digits():
    return load("digits")


def packed(fit, ipc=1, y_kind="class", student_lr=None, network=MLP, **recipe):
    chosen = fit.take(random(fit, ipc, Rng(11)))
    labels = chosen.y if y_kind == "class" else F.one_hot(chosen.y, 10).float()
    pixels = Pixels(chosen.model_input(), labels, fit.spec, y_kind, student_lr=student_lr)
    provenance = {"seconds": 1.5, "steps": 7, "peak_memory_bytes": 1000}
    return DistilledSet.make(pixels, recipe={"network": network.to_dict(), **recipe}, provenance=provenance)


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
    assert (table["protocol"], table["dataset"]) == ("standard-v1", "digits")
    assert set(table["scores"]) >= {"hlr", "ior", "lrs", "ars"} and table["scores"]["network"] == "mlp"
    assert table["protocol_spec"]["version"] == 1 and table["protocol_spec"]["rates"] == "validation"
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
    assert (len(trials), len(finals)) == (2 * 8 * 2, 2 * 8 * 2)
    assert all("validation" in r and "test" not in r for r in trials)
    assert all("test" in r and "validation" not in r for r in finals)
    assert run.progress == [(i, 64) for i in range(1, 65)]


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
    for name in ("accuracy", "probabilities"):
        real = getattr(ddengine.bench, name)
        spy = lambda net, images, real=real: seen.append(len(images)) or real(net, images)
        monkeypatch.setattr(ddengine.bench, name, spy)
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


def test_the_default_recipe_is_the_sets_own_and_its_augmentation_follows_the_dataset(digits):
    asks = packed(digits.fit, train={"steps": 1, "lrs": [0.5], "optimiser": "adamw"})
    table = evaluate(asks, digits, networks=[MLP], seeds=1, rows=()).to_json()
    own = Recipe(steps=1, lrs=(0.5,), optimiser="adamw", augment="color_crop_cutout_scale_rotate")
    assert table["recipe"] == own.to_dict()
    assert judged(asks, digits, rows=(), seeds=1).table["recipe"] == TINY.to_dict()
    with pytest.raises(ArtefactError, match="recipe.train.pace=3"):
        evaluate(packed(digits.fit, train={"pace": 3}), digits, networks=[MLP])


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


KD = Recipe(steps=4, lrs=(0.01,), batch_size=32, augment="crop", augment_mode="item", optimiser="adamw",
            loss="kl", temperature=5.0, mix="mixup", ema=0.5)  # fmt: skip
SAME = "random_same_labels"


class Made:
    """A set of composites as the judge sees one, without a file."""

    def __init__(self, composites, mode, nbytes, stored=0):
        self.made = composites
        self.tensors = {"images": composites.bases, "teachers.0": torch.zeros(stored, dtype=torch.float16)}
        if mode == "static":
            self.tensors |= encode_labels(composites.y, "int8")
        recipe = {"network": MLP.to_dict(), "labels": mode}
        self.manifest = {
            "recipe": recipe,
            "y_kind": composites.y_kind,
            "budget": {"ipc": 2},
            "count": len(composites),
        }
        self.nbytes = {"images": nbytes - 2 * stored, "labels": 0, "extras": 2 * stored, "total": nbytes}

    def composites(self):
        return self.made

    def decode(self):
        raise AssertionError("composites are not to be decoded")


@pytest.fixture(scope="module")
def teachers(digits):
    recipe = Recipe(steps=30, augment="none")
    nets = [
        ddengine.train.train(spec, digits.fit, recipe, 0.1, Rng(i)).eval()
        for i, spec in enumerate((MLP, CONVNET))
    ]
    for net in nets:
        net.zero_grad()
    return nets


def composed(fit, teachers, mode, nbytes=1500, stored=0):
    chosen = fit.take(random(fit, 1, Rng(11)))
    u = torch.randn(1, 2, *fit.spec.shape, generator=Rng(0).torch("u")) / 9
    classes = chosen.y.repeat(3)
    bare = Composites(chosen.x, u, torch.zeros(10, dtype=torch.long), classes, fit.spec)
    if mode == "static":
        bare = replace(bare, y=mean_of(teachers, bare.model_input()), y_kind="logit")
    return Made(bare, mode, nbytes, stored)


def mean_of(teachers, x):
    with torch.no_grad():
        return sum(teacher(x) for teacher in teachers) / len(teachers)


def trained_on(monkeypatch):
    """What each network was trained on, in the order of the jobs."""
    seen, real = [], ddengine.bench.train

    def spy(spec, images, *rest):
        seen.append((images, rest[-2]))
        return real(spec, images, *rest)

    monkeypatch.setattr(ddengine.bench, "train", spy)
    return seen


@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_every_row_of_a_distillation_takes_the_same_steps_and_passes(digits, teachers, monkeypatch, mode):
    counted, row = {}, []
    job, step, make = ddengine.stacked.run_job, torch.optim.AdamW.step, ddengine.train.build

    def note(what, count):
        counted.setdefault(what, {}).setdefault(row[-1], []).append(count)

    def build_counting(*args):
        net = make(*args)
        net.register_forward_pre_hook(lambda net, x: note("passes", len(x[0])) if net.training else None)
        return net

    monkeypatch.setattr(ddengine.stacked, "run_job", lambda bench, j: row.append(j.row) or job(bench, j))
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *a, **k: note("steps", 1) or step(*a, **k))
    monkeypatch.setattr(ddengine.train, "build", build_counting)
    made = composed(digits.fit, teachers, mode)
    table = judged(made, digits, recipe=KD, teachers=teachers, rows=None).table
    names = ["distilled", *ROWS, SAME, "distilled_hard", *PLAIN]
    assert [found["name"] for found in table["rows"]] == names
    networks = 1 + 2  # one trial and two finals of four steps each
    assert {name: len(counted["steps"][name]) for name in names} == dict.fromkeys(names, 4 * networks)
    assert {name: len(counted["passes"][name]) for name in names} == dict.fromkeys(names, 4 * networks)
    assert {found["steps"] for found in table["rows"]} == {4}
    counts = {found["name"]: found["count"] for found in table["rows"]}
    for name in names:  # a batch is never larger than the set
        assert set(counted["passes"][name]) == {min(32, counts[name])}


def test_static_labels_of_random_images_are_the_teachers_mean_logits(digits, teachers, monkeypatch):
    seen = trained_on(monkeypatch)
    made = composed(digits.fit, teachers, "static")
    run = judged(made, digits, recipe=KD, teachers=teachers, rows=(SAME, "random"), seeds=2)
    subject, same, plain = (row for row in run.table["rows"])
    assert subject["count"] == 30 and isinstance(seen[0][0], Composites) and plain["count"] == 20
    drawn = [images for images, _ in (seen[1], seen[5], seen[6])]
    for images in drawn:
        assert images.y_kind == "logit"
        expected = mean_of(teachers, images.model_input())  # stored in as many bits as those of the set
        step = (expected.amax(1) - expected.amin(1)).max() / 255
        assert 0 < (images.y - expected).abs().max() < 0.6 * step
    assert not torch.equal(drawn[1].x, drawn[2].x)
    assert all(asked is None for _, asked in seen)
    assert seen[2][0].y_kind == "class"
    assert same["count"] == 1500 // (64 + 10 + 4) == 19
    assert same["bytes"] == {"images": 19 * 64, "labels": 19 * 14, "extras": 0, "total": 19 * 78}


def test_dynamic_labels_are_asked_of_the_teachers_for_set_and_rival_alone(digits, teachers, monkeypatch):
    seen = trained_on(monkeypatch)
    made = composed(digits.fit, teachers, "dynamic", nbytes=1500, stored=250)
    run = judged(made, digits, recipe=KD, teachers=teachers, rows=(SAME, "full"), seeds=1)
    x = digits.fit.model_input(slice(0, 7))
    for (_, asked), row in zip(seen, ["distilled", SAME, "full"] * 2, strict=True):
        assert (asked is None) == (row == "full")
        if asked is not None:
            torch.testing.assert_close(asked(x), mean_of(teachers, x))
    same = run.table["rows"][1]
    assert same["count"] == (1500 - 500) // 65 == 15
    assert same["bytes"] == {"images": 15 * 64, "labels": 15, "extras": 500, "total": 15 * 65 + 500}
    assert seen[1][0].y_kind == "class"


def test_two_workers_give_the_bits_of_one_with_teachers_too(digits, teachers):
    made = [composed(digits.fit, teachers, "dynamic", stored=100) for _ in range(2)]
    one, two = (
        judged(each, digits, recipe=KD, teachers=teachers, rows=(SAME,), workers=workers, seeds=2).table
        for workers, each in enumerate(made, 1)
    )
    assert timeless(one)["rows"] == timeless(two)["rows"]


def test_judging_leaves_the_teachers_alone(digits, teachers):
    before = [{name: tensor.clone() for name, tensor in net.state_dict().items()} for net in teachers]
    judged(
        composed(digits.fit, teachers, "dynamic"), digits, recipe=KD, teachers=teachers, rows=(SAME,), seeds=1
    )
    for net, old in zip(teachers, before, strict=True):
        assert all(torch.equal(tensor, old[name]) for name, tensor in net.state_dict().items())
        assert not net.training and all(p.grad is None for p in net.parameters())


def test_without_teachers_the_usual_rows_have_hard_labels_only(digits, teachers):
    static = composed(digits.fit, teachers, "static")
    names = [row["name"] for row in judged(static, digits, recipe=KD, seeds=1, rows=None).table["rows"]]
    assert names == ["distilled", *ROWS, "distilled_hard", *PLAIN]
    hard = judged(packed(digits.fit), digits, teachers=teachers, seeds=1, rows=None).table["rows"]
    assert [row["name"] for row in hard] == list(NAMES)


def test_labels_that_need_teachers_are_refused_without_them(digits, teachers):
    static, dynamic = (composed(digits.fit, teachers, mode) for mode in ("static", "dynamic"))
    with pytest.raises(UsageError, match="a set with dynamic labels needs teachers.*\n.*experts=DIR"):
        judged(dynamic, digits)
    with pytest.raises(UsageError, match=f"row '{SAME}' needs teachers"):
        judged(static, digits, rows=(SAME,))
    with pytest.raises(UsageError, match="hard labels.*\n.*random_bytes"):
        judged(packed(digits.fit), digits, teachers=teachers, rows=(SAME,))


def test_teachers_in_train_mode_or_of_other_classes_are_refused(digits, teachers):
    static = composed(digits.fit, teachers, "static")
    shape = digits.spec.shape
    with pytest.raises(UsageError, match="teacher 1 is in train mode"):
        judged(static, digits, teachers=[teachers[0], build(MLP, shape, 10, Rng(0).torch("w"))])
    with pytest.raises(UsageError, match="teacher 0 has 7 classes"):
        judged(static, digits, teachers=[build(MLP, shape, 7, Rng(0).torch("w")).eval()])


@pytest.mark.parametrize(
    ("kind", "said", "mode"),
    [
        ("class", None, "hard"), ("logit", None, "static"), ("prob", None, "static"),
        ("class", "hard", "hard"),
        ("logit", "static", "static"), ("class", "dynamic", "dynamic"), ("logit", "dynamic", "dynamic"),
    ],
)  # fmt: skip
def test_the_label_mode_is_what_the_manifest_says_or_the_kind_of_its_labels(kind, said, mode):
    assert label_mode({"y_kind": kind, "recipe": {} if said is None else {"labels": said}}) == mode


@pytest.mark.parametrize(("kind", "said"), [("class", "static"), ("logit", "hard"), ("class", "soft")])
def test_a_label_mode_that_the_labels_belie_is_refused(kind, said):
    with pytest.raises(ArtefactError, match=f"recipe.labels={said}"):
        label_mode({"y_kind": kind, "recipe": {"labels": said}})


def test_rows_on_the_same_images_differ_in_what_they_are_there_to_show(digits, teachers, monkeypatch):
    seen, real = [], ddengine.bench.train
    spy = lambda spec, images, *rest: seen.append((images, rest[0])) or real(spec, images, *rest)
    monkeypatch.setattr(ddengine.bench, "train", spy)
    monkeypatch.setattr(ddengine.bench, "PASSES", 2)
    made = composed(digits.fit, teachers, "static")
    rows = ("random", "distilled_hard", "distilled_plain", "random_plain", "full_converged")
    table = judged(made, digits, recipe=KD, rows=rows, seeds=1).table
    own, drawn, hard, plain, drawn_plain, full = seen[:6]
    assert torch.equal(hard[0].y, made.made.y.argmax(1)) and hard[0].y_kind == "class" and hard[1] == KD
    assert plain[0] is own[0] and torch.equal(drawn[0].x, drawn_plain[0].x)
    for _, recipe in (plain, drawn_plain):
        assert recipe == replace(KD, augment="none", mix="none") != KD
    passes = full[1].steps * KD.batch_size / len(digits.fit)
    assert 2 <= passes < 2 + 2 * KD.batch_size / len(digits.fit)
    steps = {row["name"]: row["steps"] for row in table["rows"]}
    assert steps.pop("full_converged") == full[1].steps and set(steps.values()) == {KD.steps}
    size = {row["name"]: (row["count"], row["bytes"]["total"]) for row in table["rows"]}
    assert size["distilled_hard"] == size["distilled_plain"] == size["distilled"]
    assert size["random_plain"] == size["random"] and size["full_converged"][0] == len(digits.fit)


def test_scores_and_measures_are_those_of_the_table(run, digits):
    means = {(row["network"], row["name"]): row["mean"] for row in run.table["rows"]}
    scores = run.table["scores"]
    for net in ("mlp", "convnet"):
        hlr = means[net, "full"] - means[net, "distilled"]
        ior = means[net, "distilled"] - means[net, "random"]
        found = scores["networks"][net]
        assert (found["hlr"], found["ior"]) == (pytest.approx(hlr), pytest.approx(ior))
        alpha = (ior - hlr) / 2
        assert found["lrs"] == pytest.approx((np.exp(alpha) - np.exp(-1)) / (np.e - np.exp(-1)))
        plain = means[net, "distilled_plain"] - means[net, "random_plain"]
        beta = (ior + plain) / 2
        assert found["ars"] == pytest.approx((np.exp(beta) - np.exp(-1)) / (np.e - np.exp(-1)))
    counts = np.bincount(digits.test.y.numpy())
    for row in run.table["rows"]:
        assert np.dot(row["per_class"], counts) / counts.sum() == pytest.approx(row["mean"])
        assert 0 <= row["worst_class"] <= min(row["per_class"]) + 1e-12 and 0 <= row["ece"] <= 1


def test_robustness_is_measured_where_it_is_asked_for(distilled, digits):
    given = {"rows": ("random",), "seeds": 2, "robust": ("contrast", "pgd"), "severity": 5}
    rows = judged(distilled, digits, **given).table["rows"]
    assert all(set(row["robust"]) == {"contrast", "pgd"} for row in rows)
    assert all(row["robust"]["pgd"] <= row["mean"] for row in rows)
    for wrong in ({"robust": ("fog",)}, {"robust": ("pgd",), "severity": 6}):
        with pytest.raises(UsageError, match="unknown robust 'fog'|unknown severity '6'"):
            judged(distilled, digits, rows=(), **wrong)

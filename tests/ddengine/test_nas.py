import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from global_rng import global_rng_untouched
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

import ddengine.downstream_bench as bench
import ddengine.nas as module
from ddengine.data import Dataset, load
from ddengine.errors import UsageError
from ddengine.nas import Setting, compared, convnet_space, nas, reference, search
from ddengine.nas_table import (
    NasTable,
    Scored,
    correlation_interval,
    rank_correlation,
    ranking,
    table_text,
)
from ddengine.nets import NetSpec, build
from ddengine.rng import Rng
from ddengine.train import Recipe
from synth.starts import random

SPACE = (
    NetSpec("convnet", width=2, depth=1),
    NetSpec("convnet", width=3, depth=2, norm="batch"),
    NetSpec("mlp", 5),
)
TINY = Recipe(steps=2, lrs=(0.05,), batch_size=32, augment="none")
LONG = replace(TINY, steps=3)
NBYTES = {"images": 640, "labels": 10, "extras": 0, "total": 650}


@pytest.fixture(scope="module")
def digits():
    whole = load("digits")
    parts = (whole.fit, whole.validation, whole.test)
    few = [part.take(random(part, n, Rng(3))) for part, n in zip(parts, (11, 5, 7), strict=True)]
    return Dataset(*few)


@pytest.fixture(scope="module")
def distilled(digits):
    return digits.fit.take(random(digits.fit, 2, Rng(5)))


def run(dataset, sets=None, **changes):
    given = {"space": SPACE, "recipe": TINY, "reference_recipe": LONG, "rows": ("random", "full"), "ipc": 2}
    return nas(dataset, sets or {}, **given | changes)


def timeless(rows):
    return [replace(row, seconds=0.0) for row in rows]


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 6)), min_size=2, max_size=17))
@settings(deadline=None, max_examples=60)
def test_rank_correlation_is_scipys_with_ties_and_none_where_undefined(pairs):
    a, b = zip(*pairs, strict=True)
    if len(set(a)) == 1 or len(set(b)) == 1:
        assert rank_correlation(a, b) is None
    else:
        assert rank_correlation(a, b) == pytest.approx(spearmanr(a, b).statistic)


def test_rank_correlation_by_hand():
    # 1 - 6 * (sum of squared rank differences) / (n (n^2 - 1)): ranks of b are 1 2 4 3 5, then 4 1 2 3 5
    assert rank_correlation([1, 2, 3, 4, 5], [2, 2.5, 9, 3, 10]) == pytest.approx(1 - 6 * (1 + 1) / 120)
    assert rank_correlation([5, 1, 4, 2, 3], [4, 1, 2, 3, 5]) == pytest.approx(1 - 6 * (1 + 4 + 1 + 4) / 120)
    assert rank_correlation([0.1, 0.5, 0.9], [3, 2, 1]) == pytest.approx(-1)


def test_the_interval_is_the_percentile_bootstrap_over_architectures():
    a, b = [0.3, 0.1, 0.9, 0.7, 0.4, 0.8, 0.2], [0.2, 0.4, 0.6, 0.9, 0.1, 0.7, 0.3]
    rng = Rng(2).fold("nas")
    drawn = rng.numpy("bootstrap").integers(7, size=(2000, 7))
    found = [spearmanr(np.array(a)[i], np.array(b)[i]).statistic for i in drawn if len(set(i.tolist())) > 1]
    assert correlation_interval(a, b, rng) == pytest.approx(tuple(np.percentile(found, [2.5, 97.5])))
    assert correlation_interval(a, a, rng) == pytest.approx((1, 1))
    assert correlation_interval(a[:4], b[:4], rng) is None
    assert correlation_interval([1.0] * 7, b, rng) is None


def scored(name, means):
    return Scored(name, tuple((mean,) for mean in means), (0.05,) * len(means), 2, 10, NBYTES, 1.5)


def made(mine, truth):
    space = tuple(NetSpec("mlp", width) for width in range(1, len(truth) + 1))
    names = tuple(f"mlp({net.width})" for net in space)
    return NasTable(
        "toy", names, space, scored("reference", truth), (scored("distilled", mine),), TINY, LONG, 0
    )


def test_pick_regret_and_the_top_fifth_are_by_hand():
    truth = [i / 100 for i in range(23)]
    mine = list(truth)
    mine[22], mine[19] = mine[19], mine[22]  # the row's best is 19, then 21, 20, 22, 18
    row = made(mine, truth).to_json()["rows"][0]
    assert ranking(mine)[:5] == [19, 21, 20, 22, 18]
    assert row["pick"] == "mlp(20)" and row["pick_test"] == 0.19
    assert row["regret"] == pytest.approx(0.03)
    assert row["top_count"] == 5
    # ranks within the top: mine 5 4 3 2 1, of the reference 2 4 3 5 1
    assert row["top_correlation"] == pytest.approx(1 - 6 * (9 + 0 + 0 + 9 + 0) / 120)
    assert row["correlation"] == pytest.approx(spearmanr(mine, truth).statistic)
    few = made(truth[:20], truth[:20]).to_json()["rows"][0]
    assert few["top_correlation"] is None and few["top_count"] == 4


def test_equal_scores_rank_in_the_order_of_the_space():
    assert ranking([0.5, 0.9, 0.5, 0.9]) == [1, 3, 0, 2]


def test_json_is_plain_and_the_text_says_what_a_pick_costs():
    table = made([0.3, 0.2, 0.5, 0.4, 0.1, 0.1], [0.5, 0.2, 0.3, 0.9, 0.1, 0.4]).to_json()
    assert json.loads(json.dumps(table, allow_nan=False)) == table
    assert table["task"] == "nas" and table["reference"]["best"] == 0.9
    text = table_text(table)
    assert "mlp(3)" in text and "60.0" in text  # picks 30.0 where 90.0 was to be had
    assert "a pick at random has a regret of 50.0 points on average" in text
    assert "percentile bootstrap over architectures, 2000 draws" in text
    flat = made([0.5] * 6, [0.5, 0.2, 0.3, 0.9, 0.1, 0.4]).to_json()
    assert flat["rows"][0]["correlation"] is None and flat["rows"][0]["ci95"] is None
    assert json.dumps(flat, allow_nan=False) and table_text(flat)


def test_the_search_ranks_by_validation_and_the_reference_by_test(digits, distilled, monkeypatch):
    """With scores that widths alone decide: up on validation of small sets, down on test."""
    space = [NetSpec("mlp", width, depth=2) for width in (3, 7, 2, 11, 5)]
    sizes = {len(digits.validation): 1, len(digits.test): -1}
    untrained = lambda spec, images, *rest: build(spec, images.spec.shape, 10, Rng(0).torch("w"))
    width = lambda net: next(net.parameters()).shape[0]
    monkeypatch.setattr(bench, "train", untrained)
    monkeypatch.setattr(bench, "accuracy", lambda net, images: 0.5 + sizes[len(images)] * width(net) / 100)
    table = run(digits, {"distilled": distilled}, space=space).to_json()
    assert table["reference"]["means"] == pytest.approx([0.47, 0.43, 0.48, 0.39, 0.45])
    for row in table["rows"]:
        assert row["means"] == pytest.approx([0.53, 0.57, 0.52, 0.61, 0.55])
        assert row["correlation"] == pytest.approx(-1) and row["ci95"] == pytest.approx([-1, -1])
        assert row["pick"] == "mlp(width=11, depth=2)" and row["regret"] == pytest.approx(0.09)


def test_the_search_never_sees_the_test_part(digits, distilled, monkeypatch):
    rounds, jobs = [], module.run_jobs
    monkeypatch.setattr(module, "run_jobs", lambda s, *rest: rounds.append(s) or jobs(s, *rest))
    lrs = replace(LONG, lrs=(0.01, 0.05))
    true = run(digits, {"distilled": distilled}, reference_recipe=lrs)
    assert [shared.part for shared in rounds] == ["validation", "validation", "test"]
    for shared in rounds:
        part = digits.test if shared.part == "test" else digits.validation
        assert [view.images.x is part.x for view in shared.scored.values()] == [True]
        assert all(view.images.x is not digits.test.x for view in shared.trained.values())
    turned = replace(digits, test=replace(digits.test, y=digits.test.y.roll(9)))
    false = run(turned, {"distilled": distilled}, reference_recipe=lrs)
    assert timeless(true.rows) == timeless(false.rows)
    assert true.reference.lrs == false.reference.lrs and true.reference.values != false.reference.values


def test_every_network_of_every_row_gets_the_same_trials_and_the_best_mean_counts(digits, distilled):
    log, progress = [], []
    recipe = replace(TINY, steps=9, lrs=(1e-6, 0.05))
    given = {"seeds": 2, "space": SPACE[:2], "log": log.append}
    note = lambda done, total: progress.append((done, total))
    table = run(digits, {"distilled": distilled}, recipe=recipe, on_progress=note, **given)
    mine = [r for r in log if r["kind"] == "search"]
    assert len(mine) == 3 * 2 * 2 * 2 and {r["steps"] for r in mine} == {9}
    assert progress == [(i, 28) for i in range(1, 29)]
    for row in table.rows:
        for arch, (values, lr) in enumerate(zip(row.values, row.lrs, strict=True)):
            by_rate = {
                rate: tuple(
                    r["validation"]
                    for r in mine
                    if (r["row"], r["architecture"], r["lr"]) == (row.name, arch, rate)
                )
                for rate in recipe.lrs
            }
            assert values == by_rate[lr] and sum(values) == max(map(sum, by_rate.values()))
    assert all(len(values) == 2 for values in table.reference.values)
    assert [r["steps"] for r in log if r["kind"] == "final"] == [3] * 4


def test_all_the_data_as_a_set_scores_as_the_full_row_does(digits):
    table = run(digits, {"copy": digits.fit}, seeds=2, rows=("full",))
    copy, full = table.rows
    assert copy.values == full.values and copy.count == full.count == 110
    assert full.nbytes == {"images": 110 * 64, "labels": 110, "extras": 0, "total": 110 * 65}


def test_random_rows_are_drawn_anew_for_each_seed(digits, monkeypatch):
    trained, train = [], bench.train
    monkeypatch.setattr(bench, "train", lambda s, i, *rest: trained.append(i.x) or train(s, i, *rest))
    run(digits, rows=("random", "herding"), seeds=2, space=SPACE[:2])
    first, second, again, _ = trained[:4]
    assert torch.equal(first, again) and not torch.equal(first, second)
    assert torch.equal(trained[4], trained[5])


def test_workers_and_other_rows_change_nothing_and_the_parts_make_the_whole(digits, distilled):
    with global_rng_untouched():
        one = run(digits, {"distilled": distilled})
    setting = Setting(SPACE, workers=2)
    two = search(digits, {"distilled": distilled}, TINY, setting, rows=("full",))
    assert timeless(two) == timeless(one.rows)[::2]
    truth = reference(digits, LONG, replace(setting, workers=1))
    assert timeless([truth]) == timeless([one.reference])
    assert compared(digits, setting, one.rows, one.reference, TINY, LONG) == one
    other = search(digits, {}, TINY, Setting(SPACE, seed=1), rows=("random",), ipc=2)
    assert timeless(other) != timeless(one.rows[1:2])


def test_the_space_is_every_width_depth_and_norm_once():
    space = convnet_space((2, 3), (1, 2, 3), ("none", "batch"))
    assert len(space) == len(set(space)) == 12
    assert {(net.width, net.depth, net.norm) for net in space} == {
        (w, d, n) for w in (2, 3) for d in (1, 2, 3) for n in ("none", "batch")
    }
    assert len(convnet_space()) == 36 and {net.name for net in convnet_space()} == {"convnet"}


def test_bad_input_is_refused_in_one_line(digits, distilled):
    other = replace(distilled, spec=replace(distilled.spec, std=(0.9,)))
    ten = tuple("abcdefghij")
    renamed = replace(distilled, spec=replace(distilled.spec, classes=ten))
    for message, sets, changes in (
        ("space of 1 architectures", {}, {"space": SPACE[:1]}),
        ("space of 4 architectures, 3 of them", {}, {"space": (*SPACE, SPACE[0])}),
        ("seeds=0", {}, {"seeds": 0}),
        ("workers=0", {}, {"workers": 0}),
        ("unknown row", {}, {"rows": ("ful",)}),
        ("have no size", {}, {"ipc": None}),
        ("ipc=12 is more than class", {}, {"ipc": 12}),
        ("repeat", {"random": distilled}, {}),
        ("set 'renamed' holds", {"renamed": renamed}, {}),
        ("set 'empty' is empty", {"empty": distilled.take(torch.arange(0))}, {}),
        ("normalised differently", {"a": distilled, "b": other}, {}),
        ("halves 8x8 images", {}, {"space": convnet_space((2,), (1, 5))}),
    ):
        with pytest.raises(UsageError, match=message) as found:
            run(digits, sets, **changes)
        assert "\n" not in found.value.cause and found.value.remedy

import json
import math
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddengine.errors import UsageError
from ddengine.scores import augmentation_robust, hlr, ior, label_robust, scores_of, table_scores

FULL = {
    "distilled": 0.60,
    "distilled_hard": 0.55,
    "distilled_plain": 0.40,
    "random": 0.35,
    "random_plain": 0.30,
    "random_same_labels": 0.50,
    "random_bytes": 0.36,
    "full": 0.85,
    "full_converged": 0.95,
}
fractions = st.floats(0, 1)
quickly = settings(deadline=None, max_examples=60)


def row(name, network, *values, metric="accuracy"):
    return SimpleNamespace(name=name, network=network, metric=metric, values=values)


def test_the_four_scores_of_a_full_table_by_hand():
    scores = scores_of(FULL)
    assert scores["hlr"] == pytest.approx(0.40)
    assert scores["ior"] == pytest.approx(0.10)
    # alpha = (0.10 - 0.40) / 2 = -0.15; e^-0.15 = 0.8607080, e^-1 = 0.3678794, e - e^-1 = 2.3504024
    assert scores["lrs"] == pytest.approx(0.2096784, abs=1e-7)
    # beta = ((0.60 - 0.35) + (0.40 - 0.30)) / 2 = 0.175; e^0.175 = 1.1912462
    assert scores["ars"] == pytest.approx(0.3503089, abs=1e-7)
    assert scores["components"]["alpha"] == pytest.approx(-0.15)
    assert scores["components"]["beta"] == pytest.approx(0.175)
    assert scores["components"]["missing"] == {}


def test_the_components_say_which_rows_were_read():
    parts = scores_of(FULL)["components"]
    assert parts["rows"] == {
        "subject": "distilled",
        "full": "full_converged",
        "hard": "distilled_hard",
        "rival": "random_same_labels",
        "random": "random",
        "subject_plain": "distilled_plain",
        "random_plain": "random_plain",
    }
    assert parts["accuracies"] == {role: FULL[name] for role, name in parts["rows"].items()}


@pytest.mark.parametrize(
    ("present", "role", "taken"),
    [
        (("full",), "full", "full"),
        (("full", "full_converged"), "full", "full_converged"),
        ((), "hard", "distilled"),
        (("distilled_hard",), "hard", "distilled_hard"),
        (("random_bytes",), "rival", "random_bytes"),
        (("random_bytes", "random"), "rival", "random"),
        (("random_bytes", "random", "random_same_labels"), "rival", "random_same_labels"),
    ],
)
def test_the_preferred_row_that_is_there_plays_the_part(present, role, taken):
    means = {name: FULL[name] for name in ("distilled", *present)}
    assert scores_of(means)["components"]["rows"][role] == taken


def test_a_score_without_its_rows_is_none_and_says_what_it_lacks():
    scores = scores_of({"distilled": 0.6, "random": 0.4})
    assert scores["ior"] == pytest.approx(0.2)
    assert scores["hlr"] is scores["lrs"] is scores["ars"] is None
    assert scores["components"]["alpha"] is scores["components"]["beta"] is None
    assert scores["components"]["missing"] == {
        "hlr": ["full_converged or full"],
        "lrs": ["full_converged or full"],
        "ars": ["distilled_plain", "random_plain"],
    }


def test_random_of_the_same_bytes_does_not_stand_in_for_random_in_the_augmentation_score():
    means = {name: FULL[name] for name in ("distilled", "distilled_plain", "random_plain", "random_bytes")}
    assert scores_of(means)["ars"] is None
    assert scores_of(means)["components"]["missing"]["ars"] == ["random"]


def test_without_any_row_every_score_is_none():
    scores = scores_of({})
    assert [scores[name] for name in ("hlr", "ior", "lrs", "ars")] == [None] * 4
    assert set(scores["components"]["missing"]) == {"hlr", "ior", "lrs", "ars"}


@given(st.dictionaries(st.sampled_from(sorted(FULL)), fractions))
@quickly
def test_a_score_is_none_exactly_where_something_is_missing(means):
    scores = scores_of(means)
    missing = scores["components"]["missing"]
    assert {name for name in ("hlr", "ior", "lrs", "ars") if scores[name] is None} == set(missing)
    assert all(missing.values())
    json.dumps(scores, allow_nan=False)


@given(fractions, fractions, fractions, fractions, fractions)
@quickly
def test_robust_scores_of_fractions_are_fractions(full, hard, subject, rival, weight):
    assert 0 <= label_robust(ior(subject, rival), hlr(full, hard), weight) <= 1
    assert 0 <= augmentation_robust(ior(subject, rival), ior(hard, full), weight) <= 1


@given(fractions, fractions, fractions, fractions)
@quickly
def test_robust_scores_rise_with_the_subject(low, high, full, rival):
    low, high = sorted((low, high))
    worse, better = (label_robust(ior(acc, rival), hlr(full, acc)) for acc in (low, high))
    assert worse <= better
    assert better > worse or high - low < 1e-6
    worse, better = (augmentation_robust(acc - rival, acc - full) for acc in (low, high))
    assert worse <= better


def test_the_ends_and_the_middle_of_the_scale():
    assert label_robust(1, -1) == augmentation_robust(1, 1) == 1
    assert label_robust(-1, 1) == augmentation_robust(-1, -1) == 0
    assert label_robust(0, 0) == augmentation_robust(0, 0) == pytest.approx(0.26894142137, abs=1e-11)
    assert label_robust(0.3, 0.3) == pytest.approx(1 / (1 + math.e))


@given(st.floats(-1, 1), st.floats(-1, 1), fractions)
@quickly
def test_robust_scores_follow_their_formula(first, second, weight):
    e = math.e

    def formula(exponent):
        return (e**exponent - 1 / e) / (e - 1 / e)

    wanted = formula(weight * first - (1 - weight) * second)
    assert label_robust(first, second, weight) == pytest.approx(wanted, abs=1e-12)
    wanted = formula(weight * first + (1 - weight) * second)
    assert augmentation_robust(first, second, weight) == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("weight", [-0.1, 1.1, math.nan])
def test_a_weight_outside_its_range_is_refused(weight):
    with pytest.raises(UsageError, match="weight"):
        label_robust(0.1, 0.2, weight)
    with pytest.raises(UsageError, match="weight"):
        augmentation_robust(0.1, 0.2, weight)


def test_percentage_points_are_refused():
    with pytest.raises(UsageError, match="fractions"):
        label_robust(12.0, 30.0)
    with pytest.raises(UsageError, match="accuracy 60 of row 'distilled'"):
        scores_of({"distilled": 60, "random": 40})
    with pytest.raises(UsageError, match="nan"):
        scores_of({"distilled": math.nan})


def test_a_table_is_scored_network_by_network_from_means_over_seeds():
    rows = [
        row("distilled", "convnet", 0.5, 0.7),
        row("random", "convnet", 0.3, 0.4),
        row("full", "convnet", 0.9),
        row("distilled", "vit", 0.2, 0.4),
        row("random", "vit", 0.4),
    ]
    scores = table_scores(rows)
    assert scores["network"] == "convnet"
    assert list(scores["networks"]) == ["convnet", "vit"]
    assert scores["ior"] == pytest.approx(0.25)
    assert scores["hlr"] == pytest.approx(0.3)
    assert scores["lrs"] == scores["networks"]["convnet"]["lrs"]
    assert scores["components"] == scores["networks"]["convnet"]["components"]
    assert scores["networks"]["vit"]["ior"] == pytest.approx(-0.1)
    assert scores["networks"]["vit"]["hlr"] is None
    json.dumps(scores, allow_nan=False)


def test_other_metrics_and_networks_without_the_set_are_left_out():
    rows = [
        row("distilled", "gin", 0.8, metric="roc_auc"),
        row("full", "gin", 0.9),
        row("distilled", "gcn", 0.7),
        row("full", "gcn", 0.9),
    ]
    scores = table_scores(rows)
    assert scores["network"] == "gcn"
    assert list(scores["networks"]) == ["gcn"]
    assert scores["hlr"] == pytest.approx(0.2)


def test_a_table_without_the_set_has_no_scores():
    assert table_scores([]) == {}
    assert table_scores([row("random", "convnet", 0.4), row("full", "convnet", 0.9)]) == {}
    assert table_scores([row("distilled", "gin", 0.8, metric="roc_auc")]) == {}


def test_soft_labels_need_the_row_with_hard_ones_for_what_is_lost():
    means = {"distilled": 0.5, "random": 0.4, "full": 0.8}
    found = scores_of(means, soft=True)
    assert (found["hlr"], found["lrs"]) == (None, None) and found["ior"] == pytest.approx(0.1)
    assert found["components"]["missing"]["hlr"] == ["distilled_hard"]
    assert scores_of({**means, "distilled_hard": 0.3}, soft=True)["hlr"] == pytest.approx(0.5)

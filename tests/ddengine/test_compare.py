import copy
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ddengine.compare import Comparison, Pair, compare, grids, pair_of
from ddengine.errors import UsageError

SPEC = {"name": "convnet", "width": 8, "depth": 2, "norm": "instance"}


def row(values, name="distilled", network="convnet", **changes):
    found = {"name": name, "network": network, "metric": "accuracy", "values": list(values)}
    found |= {"network_spec": SPEC, "bytes": {"images": 640, "labels": 10, "extras": 0, "total": 650}}
    return found | {"n": len(values), "mean": sum(values) / len(values), "train_seconds": 2.5} | changes


def table(*rows, **changes):
    found = {"dataset": "digits", "protocol": "standard-v1", "seed": 7, "rows": list(rows)}
    found |= {"recipe": {"steps": 500, "lrs": [0.01, 0.03], "augment": "none"}}
    return found | {"cost": {"seconds": 1.25, "peak_memory_bytes": None}} | changes


A, B = (0.52, 0.61, 0.58, 0.57, 0.55), (0.50, 0.60, 0.55, 0.56, 0.52)


def test_differences_and_their_interval_are_those_of_a_paired_t_test():
    (found,) = compare(table(row(A)), table(row(B)))
    shown, test = found.to_json(), stats.ttest_rel(A, B)
    low, high = test.confidence_interval(0.95)
    assert shown["values"] == pytest.approx([0.02, 0.01, 0.03, 0.01, 0.03])
    assert shown["ci95"] == pytest.approx([low, high])
    assert (shown["a"], shown["b"], shown["n"]) == (pytest.approx(0.566), pytest.approx(0.546), 5)
    assert shown["difference"] == pytest.approx(0.02)
    assert test.pvalue < 0.05
    assert shown["verdict"] == "A above B by 2.0 points"


def test_pairs_show_what_means_alone_do_not():
    found = compare(table(row(A)), table(row(B)))[0].to_json()
    assert stats.ttest_ind(A, B).pvalue > 0.05
    assert found["verdict"] != "no difference shown"


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=7))
def test_a_verdict_turns_round_with_its_sides_and_agrees_with_the_interval(pairs):
    a, b = map(tuple, zip(*pairs, strict=True))
    mine, theirs = (Comparison("mlp", "accuracy", *sides, {}) for sides in ((a, b), (b, a)))
    low, high = mine.to_json()["ci95"]
    none = "no difference shown"
    assert (mine.verdict == none) == (low <= 0 <= high) == (theirs.verdict == none)
    swapped = mine.verdict.translate(str.maketrans("AB", "BA"))
    assert theirs.verdict == (none if mine.verdict == none else swapped)
    assert theirs.values == tuple(-value for value in mine.values)


def test_one_network_shows_no_difference_and_has_no_interval():
    (found,) = compare(table(row([0.9])), table(row([0.1])))
    assert found.verdict == "no difference shown"
    assert (found.to_json()["ci95"], found.to_json()["n"]) == (None, 1)
    assert "no difference shown" in Pair("a", "b", "", (found,)).text()


def test_a_table_against_itself_shows_no_difference():
    (found,) = compare(table(row(A)), table(row(A)))
    assert (found.verdict, found.to_json()["ci95"]) == ("no difference shown", [0, 0])


def test_only_networks_and_metrics_of_both_are_compared():
    mine = table(row(A), row(B, network="mlp"), row(A, metric="roc_auc"), row(B, "random"))
    theirs = table(row(B, metric="roc_auc"), row(A, network="vit"), row(B))
    assert [(c.network, c.metric) for c in compare(mine, theirs)] == [
        ("convnet", "accuracy"),
        ("convnet", "roc_auc"),
    ]


def test_bytes_and_costs_stand_beside_one_another_and_unknown_ones_are_left_out():
    other = row(B, bytes={"images": 320, "total": 320}, train_seconds=None)
    (found,) = compare(table(row(A)), table(other, cost={"seconds": "long"}))
    assert found.cost == {
        "images_bytes": (640, 320),
        "labels_bytes": (10, None),
        "extras_bytes": (0, None),
        "total_bytes": (650, 320),
        "distil_seconds": (1.25, None),
        "train_seconds": (2.5, None),
    }
    assert found.to_json()["cost"]["total_bytes"] == {"a": 650, "b": 320}


REFUSED = [
    ({"dataset": "mnist"}, "dataset digits in A and mnist in B"),
    ({"fingerprint": "c0ffee"}, "digits has the fingerprint decaf in A and c0ffee in B"),
    ({"protocol": "paper/dm"}, "protocol standard-v1 in A and paper/dm in B"),
    ({"seed": 8}, "root seed 7 in A and 8 in B"),
    ({"recipe": {"steps": 9, "lrs": [0.01, 0.03], "augment": "all"}}, "recipe.steps is 500 in A and 9 in B"),
    ({"recipe": {"steps": 500, "lrs": [0.01, 0.03]}}, "recipe.augment is none in A and absent in B"),
    ({"rows": [row(A[:4])]}, "5 networks of convnet in A and 4 in B"),
    ({"rows": [row(A, network_spec=SPEC | {"width": 16})]}, "convnet.width is 8 in A and 16 in B"),
    ({"rows": [row(A, network="mlp")]}, "A has accuracy of convnet and B has accuracy of mlp"),
    ({"rows": [row(A, "random")]}, "B has no row 'distilled'"),
    ({"rows": [row(A)], "seeds": 10}, "B reports 5 of 10 networks of convnet"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "said"), REFUSED, ids=[said for _, said in REFUSED])
def test_what_makes_no_pairs_is_refused_in_one_line_that_names_it(change, said):
    with pytest.raises(UsageError) as refusal:
        compare(table(row(A)) | {"fingerprint": "decaf"}, table(row(B)) | change)
    assert said in refusal.value.cause
    assert "\n" not in refusal.value.cause
    assert refusal.value.remedy


def test_the_first_differing_entry_of_protocols_of_one_name_is_named():
    mine, theirs = ({"protocol_spec": {"name": "p", "version": n, "select": "last step"}} for n in (1, 2))
    with pytest.raises(UsageError, match=r"protocol\.version is 1 in A and 2 in B"):
        compare(table(row(A), **mine), table(row(B), **theirs))
    assert len(compare(table(row(A), **mine), table(row(B)))) == 1


@pytest.mark.parametrize(("protocol", "allowed"), [("paper/dm", True), ("mine-v1", False)])
def test_choice_on_the_test_part_is_compared_only_within_a_publications_protocol(protocol, allowed):
    chosen = {"protocol": protocol, "protocol_spec": {"select": "best on test"}}
    sides = table(row(A), **chosen), table(row(B), **chosen)
    if allowed:
        assert compare(*sides)[0].verdict == "A above B by 2.0 points"
    else:
        with pytest.raises(UsageError, match="chooses on the test part"):
            compare(*sides)


def shown(path, found):
    return {"path": path, "table": found}


def test_two_runs_with_tables_are_a_pair_and_others_are_none():
    runs = [shown("a", table(row(A))), shown("b", table(row(B)))]
    found = pair_of(runs)
    assert (found.a, found.b, found.refused, len(found.comparisons)) == ("a", "b", None, 1)
    assert pair_of(runs[:1]) is None
    assert pair_of([*runs, runs[0]]) is None
    assert pair_of([runs[0], shown("b", None)]) is None


def test_what_cannot_be_compared_is_said_or_with_required_refused():
    runs = [shown("a", table(row(A))), shown("b", table(row(B), seed=8))]
    found = pair_of(runs)
    assert found.refused == "these evaluations cannot be compared: root seed 7 in A and 8 in B"
    assert grids(found.comparisons) == []
    assert found.refused in found.text() and found.refused in found.markdown()
    with pytest.raises(UsageError, match="root seed"):
        pair_of(runs, required=True)
    with pytest.raises(UsageError, match="two runs, not 1"):
        pair_of(runs[:1], required=True)
    with pytest.raises(UsageError, match="b is not evaluated"):
        pair_of([runs[0], shown("b", None)], required=True)


def test_texts_and_json_say_the_same():
    sides = table(row(A)), table(row(B))
    before = copy.deepcopy(sides)
    found = pair_of([shown("<i>a|", sides[0]), shown("b\n", sides[1])])
    text, markdown, plain = found.text(), found.markdown(), json.loads(json.dumps(found.to_json()))
    assert sides == before
    assert text.splitlines()[:4] == [
        "A: <i>a|",
        "B: b\\n",
        "digits, standard-v1, seed 7: row distilled, paired over networks that start alike",
        "convnet: A above B by 2.0 points",
    ]
    assert "- A: &lt;i>a|" in markdown.splitlines()
    line = "| convnet | accuracy | 56.6 | 54.6 | +2.0 | +0.8 to +3.2 | 5 | +2.0 +1.0 +3.0 +1.0 +3.0 |"
    assert line in markdown.splitlines()
    assert " ".join(line.replace("|", " ").split()) in [" ".join(told.split()) for told in text.splitlines()]
    assert plain["comparisons"][0]["verdict"] == "A above B by 2.0 points"
    assert "| convnet | total bytes | 650 | 650 |" in markdown.splitlines()

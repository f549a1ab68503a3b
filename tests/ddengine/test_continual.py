import json
from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
import torch
from global_rng import global_rng_untouched
from hypothesis import given, settings
from hypothesis import strategies as st

import ddengine.downstream_bench as bench
from ddengine.composites import Composites
from ddengine.continual import class_groups, continual, set_memory, staged_memory
from ddengine.continual_table import ContinualRow, ContinualTable, table_text
from ddengine.data import Dataset, load
from ddengine.downstream_bench import View, only
from ddengine.errors import UsageError
from ddengine.nets import NetSpec
from ddengine.rng import Rng
from ddengine.tables import spread
from ddengine.train import Recipe
from ddengine.types import DataSpec, Images
from synth.starts import random

NETWORK = NetSpec("mlp", width=17, depth=2)
TINY = Recipe(steps=2, lrs=(0.05,), batch_size=32, augment="none")
LEARNS = Recipe(steps=20, lrs=(0.05,), batch_size=32, augment="none")


@pytest.fixture(scope="module")
def digits():
    whole = load("digits")
    parts = (whole.fit, whole.validation, whole.test)
    few = [part.take(random(part, n, Rng(3))) for part, n in zip(parts, (11, 3, 5), strict=True)]
    return Dataset(*few)


@pytest.fixture(scope="module")
def toy():
    """Five classes that any network tells apart: class c lights the rows c and c + 1."""
    spec = DataSpec("toy", (1, 8, 8), tuple("abcde"), (0.5,), (0.5,))

    def part(each, seed):
        y = torch.arange(5).repeat_interleave(each)
        x = torch.randint(0, 60, (len(y), 1, 8, 8), generator=Rng(seed).torch("toy")).to(torch.uint8)
        for i, c in enumerate(y.tolist()):
            x[i, :, c : c + 2] += 190
        return Images(x, y, spec)

    return Dataset(part(13, 0), part(3, 1), part(7, 2))


def run(dataset, memories=None, **changes):
    given = {
        "network": NETWORK,
        "recipe": TINY,
        "steps": 3,
        "orders": 2,
        "rows": ("random", "full"),
        "ipc": 2,
    }
    return continual(dataset, memories or {}, **given | changes)


def values(table):
    return {row.name: row.values for row in table.rows}


@given(st.integers(2, 23), st.data(), st.integers(0, 5))
@settings(deadline=None, max_examples=25)
def test_groups_are_a_drawn_order_cut_as_evenly_as_can_be(classes, data, order):
    steps = data.draw(st.integers(2, classes))
    groups = class_groups(classes, steps, 4, order)
    drawn = torch.randperm(classes, generator=Rng(4).fold("order", order).torch("classes")).tolist()
    assert list(chain(*groups)) == drawn
    sizes = [len(group) for group in groups]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] - sizes[-1] <= 1 and len(sizes) == steps


def test_ten_classes_in_three_groups_are_four_three_three_and_orders_differ():
    first, second = (class_groups(10, 3, 0, order) for order in (0, 1))
    assert [len(group) for group in first] == [4, 3, 3]
    assert first != second and first == class_groups(10, 3, 0, 0)


@pytest.mark.parametrize("steps", [1, 11, 0, -2])
def test_one_group_or_more_groups_than_classes_are_refused(steps):
    with pytest.raises(UsageError, match=f"steps={steps} for 10 classes"):
        class_groups(10, steps, 0, 0)


def test_only_keeps_the_images_of_the_classes_and_numbers_them_in_their_order(toy):
    found = only(toy.fit, (4, 1))
    wanted = [(x, (4, 1).index(y)) for x, y in zip(toy.fit.x, toy.fit.y.tolist(), strict=True) if y in (4, 1)]
    assert found.spec.classes == ("e", "b") and found.y.tolist() == [y for _, y in wanted]
    assert torch.equal(found.x, torch.stack([x for x, _ in wanted]))


def test_only_masks_soft_labels_as_unseen_logits_at_minus_infinity_would(toy):
    logits = torch.randn(65, 5, generator=Rng(0).torch("soft"))
    masked = logits.masked_fill(torch.tensor([True, False, True, False, True]), -torch.inf).softmax(1)
    mine = (logits.argmax(1) == 1) | (logits.argmax(1) == 3)
    kept = only(replace(toy.fit, y=logits, y_kind="logit"), (3, 1))
    shares = only(replace(toy.fit, y=logits.softmax(1), y_kind="prob"), (3, 1))
    assert 0 < len(kept) == mine.sum() < 65
    torch.testing.assert_close(kept.y.softmax(1), masked[mine][:, [3, 1]])
    torch.testing.assert_close(shares.y, masked[mine][:, [3, 1]])
    assert (kept.y_kind, shares.y_kind) == ("logit", "prob")


def test_every_stage_trains_on_and_is_scored_on_the_classes_seen_so_far_alone(digits, monkeypatch):
    trained, scored = [], []
    train, accuracy = bench.train, bench.accuracy
    monkeypatch.setattr(bench, "train", lambda s, i, *rest: trained.append(i) or train(s, i, *rest))
    monkeypatch.setattr(bench, "accuracy", lambda n, i: scored.append((n, i)) or accuracy(n, i))
    run(digits, rows=("full",), orders=1)
    seen = []
    for stage, group in enumerate(class_groups(10, 3, 0, 0)):
        seen += group
        net, images = scored[stage]
        for part, found in ((digits.fit, trained[stage]), (digits.test, images)):
            pairs = zip(part.x, part.y.tolist(), strict=True)
            wanted = [(x, seen.index(y)) for x, y in pairs if y in seen]
            assert found.y.tolist() == [y for _, y in wanted]
            assert torch.equal(found.x, torch.stack([x for x, _ in wanted]))
        assert net(images.model_input()).shape[1] == len(seen)
    assert len(scored) == 3


def test_a_true_memory_is_always_right_and_one_with_turned_labels_always_wrong(toy):
    def turned(groups, order):
        seen = list(chain(*groups))
        right = only(toy.fit, seen)
        wrong = torch.tensor(seen)[(right.y + 1) % len(seen)]
        return Images(right.x, wrong, toy.spec)

    table = run(toy, {"true": set_memory(toy.fit), "turned": turned}, rows=("full",), recipe=LEARNS)
    found = values(table)
    assert found["true"] == found["full"] == (((1.0,), (1.0,)),) * 3
    assert found["turned"] == (((0.0,), (0.0,)),) * 3


def test_a_memory_of_all_fit_images_scores_as_the_full_row_does(digits):
    table = run(digits, {"copy": lambda groups, order: toured(digits.fit, groups)}, networks=2)
    found = values(table)
    assert found["copy"] == found["full"] != found["random"]
    assert len({value for order in found["copy"][2] for value in order}) > 1


def toured(images, groups):
    """The images of the groups with their own numbers, in the order of the set."""
    return images.take(torch.isin(images.y, torch.tensor(list(chain(*groups)))).nonzero().squeeze(1))


def test_composites_may_be_a_memory(toy):
    picks = toy.fit.take(random(toy.fit, 2, Rng(0)))
    bases = Composites(
        picks.x, torch.zeros(1, 0, 1, 8, 8), torch.zeros(10, dtype=torch.long), picks.y, toy.spec
    )
    table = run(toy, {"composites": set_memory(bases), "images": set_memory(picks)}, rows=(), recipe=LEARNS)
    assert values(table)["composites"] == values(table)["images"]


def test_random_memories_grow_within_an_order_and_are_drawn_anew_for_each(digits, monkeypatch):
    trained = []
    train = bench.train
    monkeypatch.setattr(bench, "train", lambda s, i, *rest: trained.append(i) or train(s, i, *rest))
    run(digits, rows=("random", "herding"))
    held = [{x.numpy().tobytes() for x in images.x} for images in trained]
    assert [len(images) for images in trained] == [8, 14, 20] * 4
    for first in (0, 3, 6, 9):
        assert held[first] < held[first + 1] < held[first + 2]
    assert held[2] != held[5] and held[8] == held[11]


def test_the_rate_is_chosen_once_for_a_row_on_validation(toy):
    recipe = replace(LEARNS, lrs=(1e-6, 0.05))
    table = run(toy, rows=("random", "full"), recipe=recipe)
    for row in table.rows:
        assert row.lr == 0.05 and [trial["lr"] for trial in row.trials] == [1e-6, 0.05]
        assert row.trials[1]["validation"] > row.trials[0]["validation"]


def test_choosing_sees_no_test_image_and_shuffled_test_labels_change_scores_alone(toy, monkeypatch):
    import ddengine.continual as module

    rounds, log = [], []
    jobs = module.run_jobs
    monkeypatch.setattr(module, "run_jobs", lambda s, *rest: rounds.append(s) or jobs(s, *rest))
    recipe = replace(LEARNS, lrs=(0.02, 0.05))
    true = run(toy, recipe=recipe, log=log.append)
    choosing, scoring = rounds
    assert {id(view.images.x) for view in choosing.scored.values()} == {id(toy.validation.x)}
    assert {id(view.images.x) for view in scoring.scored.values()} == {id(toy.test.x)}
    assert all(view.images.x is toy.fit.x for view in choosing.trained.values())
    assert [r["kind"] for r in log] == ["trial"] * 4 + ["final"] * 12
    assert all(("test" in r) != ("validation" in r) for r in log)
    turned = replace(toy, test=replace(toy.test, y=toy.test.y.roll(7)))
    false = run(turned, recipe=recipe)
    for mine, theirs in zip(true.rows, false.rows, strict=True):
        assert (mine.lr, mine.trials) == (theirs.lr, theirs.trials)
        assert mine.values[-1] > theirs.values[-1]


def timeless(table):
    return replace(table, rows=tuple(replace(row, train_seconds=0.0) for row in table.rows))


def test_workers_and_other_rows_change_nothing_and_no_global_generator_is_touched(digits):
    memories = {"distilled": set_memory(digits.fit.take(random(digits.fit, 2, Rng(9))))}
    progress = []
    note = lambda done, total: progress.append((done, total))
    with global_rng_untouched():
        one = run(digits, memories, on_progress=note)
    assert progress == [(i, 18) for i in range(1, 19)]
    assert timeless(run(digits, memories, workers=2)) == timeless(one)
    alone = run(digits, rows=("random",))
    assert timeless(alone).rows == timeless(one).rows[1:2]
    assert values(run(digits, memories, seed=1)) != values(one)


def test_staged_memories_distil_each_group_alone_and_once(toy):
    asked = []

    def distil(images):
        asked.append(images.spec.classes)
        return images.take(random(images, 2, Rng(0)))

    memory = staged_memory(toy.fit, distil)
    for stage in (1, 2):
        found = memory([(3, 0), (4,)][:stage], 0)
        assert found.spec == toy.spec
    assert asked == [("a", "d"), ("e",)]
    assert found.y.tolist() == [0, 0, 3, 3, 4, 4]
    for x, c in zip(found.x, found.y.tolist(), strict=True):
        assert any(torch.equal(x, other) for other in toy.fit.x[toy.fit.y == c])


def test_soft_labels_of_staged_memories_give_other_groups_nothing(toy):
    logits = torch.tensor([[2.0, 1.0], [0.0, 3.0]])
    soft = lambda images: Images(
        images.x[[0, -1]], logits[:, : len(images.spec.classes)], images.spec, "logit"
    )
    found = staged_memory(toy.fit, soft)([(3, 1)], 0)
    assert found.y_kind == "prob"
    torch.testing.assert_close(found.y[:, [1, 3]], logits.softmax(1))
    assert found.y[:, [0, 2, 4]].abs().sum() == 0


def table_of(values, orders=3, networks=2):
    groups = tuple(class_groups(5, 2, 0, order) for order in range(orders))
    nbytes = {"images": 640, "labels": 10, "extras": 0, "total": 650}
    rows = tuple(
        ContinualRow(name, stages, (6, 10), 0.05, (), nbytes, 1.5) for name, stages in values.items()
    )
    return ContinualTable("toy", groups, networks, NETWORK, rows, TINY, 0)


def test_statistics_are_over_orders_whose_networks_are_averaged_first():
    mine = (((1.0, 0.8), (0.7, 0.9), (0.6, 0.8)), ((0.5, 0.5), (0.4, 0.6), (0.2, 0.4)))
    row = table_of({"random": mine}).to_json()["rows"][0]
    assert [stage["classes"] for stage in row["stages"]] == [3, 5]
    first, last = row["stages"]
    assert first["mean"] == pytest.approx(0.8) and last["mean"] == pytest.approx((0.5 + 0.5 + 0.3) / 3)
    assert first["std"] == pytest.approx(np.std([0.9, 0.8, 0.7], ddof=1)) and first["n"] == 3
    assert first["ci95"] == pytest.approx(spread([0.9, 0.8, 0.7])[2])
    assert last["values"] == [0.5, 0.5, 0.4, 0.6, 0.2, 0.4] and row["final"].items() <= last.items()
    assert row["average"]["values"] == pytest.approx([0.7, 0.65, 0.5])


def test_json_is_plain_and_the_text_pairs_rows_by_order():
    wide = (((0.9,), (0.5,), (0.7,)), ((0.9,), (0.5,), (0.7,)))
    shifted = tuple(tuple((v + 0.1,) for (v,) in stage) for stage in wide)
    noise = (((0.6,), (0.8,), (0.7,)), ((0.6,), (0.8,), (0.7,)))
    table = table_of({"distilled": shifted, "random": wide, "herding": noise}, networks=1).to_json()
    assert json.loads(json.dumps(table, allow_nan=False)) == table
    assert {"task", "dataset", "steps", "orders", "rows", "recipe", "seed"} <= set(table)
    assert (table["task"], table["steps"], table["orders"]) == ("continual", 2, 3)
    text = table_text(table)
    assert "distilled is 10.0 points above random: a difference, 95 % interval 10.0 to 10.0" in text
    assert "herding is 0.0 points" in text and "no difference shown" in text
    assert "80.0 ± 20.0" in text and text.endswith("\n")
    one = table_of(dict.fromkeys(("random", "full"), (((0.5,),), ((0.5,),))), orders=1, networks=1).to_json()
    assert one["rows"][0]["average"]["ci95"] is None and "no interval, one order" in table_text(one)


def test_real_rows_are_as_large_as_the_memory_and_cost_their_bytes(digits):
    memory = set_memory(digits.fit.take(random(digits.fit, 3, Rng(0))))
    known = {"set": {"images": 5, "labels": 1, "extras": 1, "total": 7}}
    table = run(digits, {"set": memory}, ipc=None, rows=("random", "full"), orders=1, nbytes=known)
    by_name = {row.name: row for row in table.rows}
    assert by_name["set"].nbytes == known["set"]
    assert by_name["random"].counts == by_name["set"].counts == (12, 21, 30)
    assert by_name["random"].nbytes == {"images": 30 * 64, "labels": 30, "extras": 0, "total": 30 * 65}
    assert by_name["full"].counts == (44, 77, 110)


def test_bad_input_is_refused_in_one_line(digits, toy):
    few = digits.fit.take(random(digits.fit, 1, Rng(0)))
    other = replace(few, spec=replace(few.spec, mean=(0.1,)))
    for message, arguments in {
        "steps=11 for 10 classes": ({}, {"steps": 11}),
        "orders=0": ({}, {"orders": 0}),
        "networks=-1": ({}, {"networks": -1}),
        "workers=0": ({}, {"workers": 0}),
        "ipc=0": ({}, {"ipc": 0}),
        "ipc=12 is more than class": ({}, {"ipc": 12}),
        "unknown row 'rnadom'": ({}, {"rows": ("rnadom",)}),
        r"rows \[\] are none": ({}, {"rows": ()}),
        "repeat": ({"full": set_memory(few)}, {}),
        "have no size": ({}, {"ipc": None}),
        "holds images of unseen class": ({"all": lambda groups, order: few}, {}),
        "has no image of class '0'": ({"part": set_memory(few.take(torch.arange(1, 10)))}, {}),
        "set 'toy' holds": ({"toy": set_memory(toy.fit)}, {}),
        "normalised differently": ({"a": set_memory(few), "b": set_memory(other)}, {}),
        "halves 8x8 images": ({}, {"network": NetSpec("convnet", width=2, depth=5)}),
    }.items():
        with pytest.raises(UsageError, match=message) as found:
            run(digits, arguments[0], **arguments[1])
        assert "\n" not in found.value.cause and found.value.remedy


def test_a_class_without_test_images_is_refused(digits):
    short = replace(digits, test=digits.test.take((digits.test.y != 4).nonzero().squeeze(1)))
    with pytest.raises(UsageError, match="class '4' has no image in the test part"):
        run(short)


def test_a_view_counts_what_it_gives(toy):
    view = View(toy.fit, torch.tensor([0, 1, 14, 30, 64]), (2, 0))
    assert view.counts == [2, 0, 1, 0, 0]
    assert torch.bincount(view.get().y, minlength=2).tolist() == [1, 2]

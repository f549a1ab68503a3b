"""Protocols: what their files say, what they make of a set, and how they choose."""

import math
from dataclasses import fields, replace

import pytest
import torch

import ddengine.bench
from ddengine import catalog, evaluating
from ddengine.data import load
from ddengine.errors import ArtefactError, UsageError
from ddengine.judge import evaluate
from ddengine.nets import NetSpec
from ddengine.protocols import STANDARD, Protocol, parse_protocol
from ddengine.rng import Rng
from ddengine.train import Recipe, train
from synth import DistilledSet, Pixels
from synth.starts import random

MLP = NetSpec("mlp", width=7)
IMAGES = [name for name in catalog.PROTOCOLS if name != "paper/mirage"]


@pytest.fixture(scope="module")
def digits():
    return load("digits")


def packed(fit, student_lr=None, **recipe):
    chosen = fit.take(random(fit, 1, Rng(5)))
    pixels = Pixels(chosen.model_input(), chosen.y, fit.spec, student_lr=student_lr)
    return DistilledSet.make(pixels, recipe={"network": MLP.to_dict(), **recipe}, provenance={})


def test_the_standard_protocol_in_its_file_spells_out_the_defaults():
    found = evaluating.find_protocol("standard-v1")
    assert replace(found, recipe={}) == STANDARD
    assert set(found.recipe) == {f.name for f in fields(Recipe)}
    assert found.recipe_for({}, "cifar10", 100) == Recipe()
    assert found.recipe_for({}, "digits", 100) == STANDARD.recipe_for({}, "digits", 100)


def test_every_protocol_that_is_listed_has_a_file_under_its_name_and_the_other_way_round():
    folder = catalog.folder() / "protocols"
    files = {str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.yaml")}
    assert files == set(IMAGES)
    for name in IMAGES:
        found = evaluating.find_protocol(name)
        assert found.name == name and found.version == 1 and (found.name == "standard-v1") == found.own_recipe


@pytest.mark.parametrize(
    ("name", "images", "steps", "batch", "seeds", "rate"),
    (
        ("paper/dm", 10, 1001, 256, 20, 0.01),
        ("paper/dm", 500, 2 * 1001, 256, 20, 0.01),
        ("paper/datadam", 100, 2 * 1801, 64, 10, 0.01),
        ("paper/mtt", 257, 2 * 1001, 256, 5, 0.01),
        ("paper/infer", 465, 8 * 400, 64, 5, 0.001),
    ),
)
def test_publications_count_passes_over_the_set(name, images, steps, batch, seeds, rate):
    found = evaluating.find_protocol(name)
    recipe = found.recipe_for({"recipe": {"train": {"steps": 7, "lrs": [0.5]}}}, "cifar10", images)
    assert (recipe.steps, recipe.batch_size, found.seeds, recipe.lrs) == (steps, batch, seeds, (rate,))
    assert recipe.steps == math.ceil(images / batch) * (recipe.steps // math.ceil(images / batch))


def test_teachers_that_label_at_training_time_take_the_fewer_passes_of_the_publication():
    found = evaluating.find_protocol("paper/infer")
    assert found.recipe_for({}, "cifar10", 64, dynamic=True).steps == 80
    assert found.recipe_for({}, "cifar10", 64).steps == 400


def test_the_rate_drops_to_a_tenth_and_momentum_is_forgotten_in_the_middle(digits):
    """Against plain SGD with a fresh optimiser for the second half, on the same batches without change."""
    few = digits.fit.take(torch.arange(0, len(digits.fit), 200))
    recipe = Recipe(steps=5, lrs=(0.05,), batch_size=64, augment="none", schedule="drop")
    found = train(MLP, few, recipe, 0.05, Rng(2))
    from ddengine.nets import build

    net = build(MLP, few.spec.shape, 10, Rng(2).torch("weights")).train()
    for rate, steps in ((0.05, 3), (0.005, 2)):
        optimiser = torch.optim.SGD(net.parameters(), rate, 0.9, weight_decay=5e-4)
        for _ in range(steps):
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(net(few.model_input()), few.y).backward()
            optimiser.step()
    for one, two in zip(found.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_a_fixed_rate_is_not_searched_and_a_learned_one_is_taken_for_every_row(digits):
    fixed = Protocol("mine", 1, "me", recipe={"lrs": (0.02,), "steps": 2}, rates="fixed", seeds=2)
    log = []
    given = {"networks": [MLP], "rows": ("random",)}
    table = evaluate(packed(digits.fit, 0.3), digits, protocol=fixed, log=log.append, **given)
    assert {record["kind"] for record in log} == {"final"} and len(log) == 4
    assert [row.lr for row in table.rows] == [0.02, 0.02]
    learned = replace(fixed, rates="learned")
    table = evaluate(packed(digits.fit, 0.3), digits, protocol=learned, **given)
    assert [row.lr for row in table.rows] == [pytest.approx(0.3)] * 2
    table = evaluate(packed(digits.fit), digits, protocol=learned, **given)
    assert [row.lr for row in table.rows] == [0.02] * 2


def test_the_best_on_test_is_never_under_the_last_step_and_says_its_name(digits):
    last = Protocol("mine", 1, "me", recipe={"lrs": (0.3,), "steps": 9}, rates="fixed", seeds=2)
    best = replace(last, select="best on test", looks=9)
    given = {"networks": [MLP], "rows": ("random", "full")}
    tables = [evaluate(packed(digits.fit), digits, protocol=rules, **given) for rules in (last, best)]
    pairs = [
        (one, two)
        for a, b in zip(*(table.rows for table in tables), strict=True)
        for one, two in zip(a.values, b.values, strict=True)
    ]
    assert all(two >= one for one, two in pairs) and any(two > one for one, two in pairs)
    said = tables[1].to_json()
    assert said["protocol"] == "mine" and said["protocol_spec"]["select"] == "best on test"


def test_looks_are_as_many_as_the_protocol_has(digits, monkeypatch):
    seen, real = [], ddengine.bench.accuracy
    monkeypatch.setattr(ddengine.bench, "accuracy", lambda net, images: seen.append(1) or real(net, images))
    rules = Protocol(
        "mine", 1, "me", recipe={"lrs": (0.3,), "steps": 12}, rates="fixed", seeds=1,
        select="best on test", looks=4,
    )  # fmt: skip
    evaluate(packed(digits.fit), digits, protocol=rules, networks=[MLP], rows=())
    assert len(seen) == 3  # after 3, 6 and 9 steps; the last step is scored as always


@pytest.mark.parametrize(
    ("values", "match"),
    (
        ([], "holds no table"),
        ({"name": "a", "version": 1}, "source: None"),
        ({"name": "a", "version": "1", "source": "b"}, "version: 1"),
        ({"name": "a", "version": 1, "source": "b", "seed": 3}, "unknown entry seed"),
        ({"name": "a", "version": 1, "source": "b", "epochs": 1.5}, "epochs: 1.5"),
        ({"name": "a", "version": 1, "source": "b", "epochs": 0}, "protocol.epochs=0 is out of range"),
        ({"name": "a", "version": 1, "source": "b", "rates": "best"}, "unknown protocol.rates 'best'"),
        ({"name": "a", "version": 1, "source": "b", "rates": "fixed"}, "needs one rate"),
        ({"name": "a", "version": 1, "source": "b", "select": "best"}, "unknown protocol.select"),
        ({"name": "a", "version": 1, "source": "b", "recipe": {"step": 3}}, "recipe.step: 3"),
        ({"name": "a", "version": 1, "source": "b", "recipe": {"steps": "3"}}, "recipe.steps: 3"),
        ({"name": "a", "version": 1, "source": "b", "recipe": {"steps": -3}}, "recipe.steps=-3"),
        ({"name": "a", "version": 1, "source": "b", "epochs": 2, "recipe": {"steps": 3}}, "are both given"),
    ),
)
def test_a_file_that_is_wrong_is_one_line_that_names_the_entry(values, match):
    with pytest.raises(UsageError, match=match) as caught:
        parse_protocol(values, "mine.yaml")
    assert caught.value.cause.startswith("mine.yaml") and "\n" not in caught.value.cause


def test_a_protocol_of_ones_own_comes_from_its_file_and_takes_the_sets_recipe_where_it_says_so(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\nversion: 3\nsource: me\nown_recipe: true\nrecipe: {steps: 40, lrs: [0.5]}\n")
    found = evaluating.find_protocol(str(path))
    assert (found.name, found.version) == ("mine", 3)
    assert found.recipe_for({"recipe": {"train": {"lrs": [0.1]}}}, "cifar10", 9) == Recipe(40, (0.1,))
    with pytest.raises(ArtefactError, match="recipe.train"):
        found.recipe_for({"recipe": {"train": {"lrs": "many"}}}, "cifar10", 9)


@pytest.mark.parametrize(
    ("text", "match"),
    (
        (None, "cannot read the protocol"),
        ("name: [", "is no YAML"),
        ("name: standard-v1\nversion: 9\nsource: me\n", "is named standard-v1, as one of ours is"),
        ("- 3\n", "holds no table"),
    ),
)
def test_a_file_that_cannot_be_a_protocol_is_refused(tmp_path, text, match):
    path = tmp_path / "mine.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UsageError, match=match):
        evaluating.find_protocol(str(path))


def test_unknown_names_and_those_for_graphs_are_refused():
    with pytest.raises(UsageError, match="unknown protocol 'paper/dn'"):
        evaluating.find_protocol("paper/dn")
    with pytest.raises(UsageError, match="is for graphs"):
        evaluating.find_protocol("paper/mirage")


def test_a_publications_recipe_cannot_be_changed(digits):
    with pytest.raises(UsageError, match="has a recipe of its own"):
        evaluating.evaluate(packed(digits.fit), dataset=digits, protocol="paper/dm", recipe=Recipe(steps=2))

"""Bases and compensators under the pixel matchers: the gradient reaches both, and the bytes are counted."""

import pytest
import torch
import trained_experts

import matchers
from ddengine.data import load
from ddengine.errors import UsageError
from ddengine.nets import NetSpec
from ddengine.rng import Rng
from ddengine.types import Budget, Task
from matchers import descent, parametrised
from matchers.parametrised import Beside, FormOptions
from synth import DistilledSet
from synth.budget import SheetPlan
from synth.compensated import Compensated
from synth.pixels import Pixels

NET = NetSpec("convnet", width=4, depth=2)
SHARED = FormOptions("compensated", compensators=2, groups=2)


@pytest.fixture(scope="module")
def task():
    digits = load("digits").fit
    return Task(digits.take(torch.arange(0, len(digits), 7)), Budget(6))


def start(task, o=SHARED, seed=0):
    count = parametrised.per_class(task, o, "uint8")
    x = torch.arange(float(10 * count))[:, None, None, None].expand(-1, 1, 8, 8).clone()
    return parametrised.form(task, x, o, "uint8", Rng(seed)), count


def test_bases_are_the_start_sheet_by_sheet_and_the_last_sheet_is_partial(task):
    synth, count = start(task)
    assert isinstance(synth, Compensated) and not synth.real
    made = parametrised.sheet_plan(task, SHARED, "uint8")
    assert made.last > 0 and count == made.sheets + 1 and len(synth.bases) == 10 * made.sheets + made.last
    for place, (base, label) in enumerate(zip(synth.bases, synth.classes, strict=True)):
        assert int(base[0, 0, 0]) == int(label) * count + place // 10  # of its class, of its sheet
    whole = synth.classes[: 10 * made.sheets]
    assert torch.equal(whole, torch.arange(10).repeat(made.sheets))


def test_all_bytes_are_within_the_nominal_ones(task):
    synth, _ = start(task)
    nominal = 6 * 10 * 64
    assert DistilledSet.make(synth, recipe={}, provenance={}).nbytes["total"] <= nominal
    assert nominal - synth.nbytes["total"] < 64 + 8 + 2


def test_compensators_start_small_and_apart(task):
    synth, _ = start(task)
    flat = synth.compensators.flatten(0, 1).flatten(1)
    assert 0 < flat.abs().max() < 1.5 and torch.pdist(flat).min() > 0.5
    assert not torch.equal(start(task, seed=1)[0].compensators, synth.compensators)


def test_a_gradient_for_images_is_pulled_back_to_all_factors(task):
    synth, _ = start(task)
    weights = torch.randn(synth.decode().x.shape, generator=torch.Generator().manual_seed(0))
    found = parametrised.pulled_back(synth, weights)
    b = len(synth.bases)
    torch.testing.assert_close(found["bases"], weights[:b] + weights[b : 2 * b] + weights[2 * b :])
    for g in range(2):
        for m in range(2):
            mine = weights[(m + 1) * b : (m + 2) * b][synth.group == g].sum(0)
            torch.testing.assert_close(found["compensators"][g, m], mine)
    assert set(found) == {"bases", "compensators"}
    pixels = Pixels(weights, torch.zeros(len(weights), dtype=torch.long), synth.spec)
    assert torch.equal(parametrised.pulled_back(pixels, weights)["images"], weights)


@pytest.mark.parametrize("name", ["attention", "distribution"])
def test_a_step_moves_bases_and_compensators(task, name):
    matcher = matchers.make(name, NET, steps=2, real_per_class=5, synth={"name": "compensated", "rate": 0.5})
    rng = Rng(0)
    state, work = matcher.init(task, rng), matcher.prepare(task, rng)
    after, _ = matcher.step(state, work, rng)
    for key in ("bases", "compensators"):
        moved = after.synth.params()[key] - state.synth.params()[key]
        assert moved.abs().max() > 0
        factor = 0.5 if key == "compensators" else 1.0
        torch.testing.assert_close(
            moved, -factor * matcher.options.lr * after.velocity[key], rtol=1e-3, atol=1e-5
        )
    work.close()


def test_matching_sees_every_composite_of_a_class(task):
    synth, _ = start(task)
    classes = descent.classes_of(synth)
    assert torch.equal(classes, synth.decode().classes) and len(classes) == 3 * len(synth.bases)


def test_a_name_alone_chooses_the_form():
    assert matchers.make("attention", NET, synth="compensated").options.synth == FormOptions("compensated")
    assert matchers.make("trajectory", NET).options.synth == FormOptions()


@pytest.mark.parametrize("labels", ["hard", "learned", "target"])
def test_trajectory_matching_moves_factors_and_stores_its_labels_and_rate(tmp_path, task, labels):
    buffer = trained_experts.write(tmp_path / "buffer", task.images, NET, count=1, epochs=3)
    work_on = Task(task.images, Budget(6), buffer)
    options = {
        "steps": 2,
        "labels": labels,
        "lr": 1.0,
        "inner": {"steps": 2, "rate": 0.02},
        "synth": "compensated",
    }
    matcher = matchers.make("trajectory", NET, **options)
    rng = Rng(0)
    state, work = matcher.init(work_on, rng), matcher.prepare(work_on, rng)
    first = state
    while state.step < 2:
        state, _ = matcher.step(state, work, rng)
    synth = matcher.finish(state, work, rng)
    work.close()
    assert not torch.equal(state.synth.bases, first.synth.bases)
    assert not torch.equal(state.synth.compensators, first.synth.compensators)
    stored = DistilledSet.make(synth, recipe={}, provenance={})
    assert stored.nbytes["total"] <= 6 * 10 * 64 and float(stored.tensors["student_lr"]) > 0
    assert synth.y_kind == ("class" if labels == "hard" else "logit")
    if labels == "target":  # probabilities, as their logarithms
        torch.testing.assert_close(synth.labels.logsumexp(1), torch.zeros(synth.count), rtol=0, atol=1e-4)


def test_soft_labels_and_the_rate_take_their_bytes_from_the_images(task):
    plain = parametrised.sheet_plan(task, SHARED, "uint8")
    beside = parametrised.sheet_plan(task, SHARED, "uint8", Beside(4, 20))
    assert isinstance(plain, SheetPlan) and beside.sheets < plain.sheets and beside.nbytes <= 6 * 640
    assert parametrised.count(task, SHARED, "uint8") == 3 * (10 * plain.sheets + plain.last)
    assert parametrised.count(task, FormOptions(), "uint8") == 60


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"name": "factored"}, "synth"),
        ({"compensators": 0}, "matcher.synth.compensators"),
        ({"groups": -1}, "matcher.synth.groups"),
        ({"rate": 0}, "matcher.synth.rate"),
    ],
)
def test_options_out_of_range_are_refused_by_name(options, said):
    with pytest.raises(UsageError) as refused:
        FormOptions(**options)
    assert said in str(refused.value)


def test_a_budget_below_one_sheet_is_refused(task):
    with pytest.raises(UsageError, match="too small for one sheet of 10 classes with 2 compensators"):
        parametrised.form(Task(task.images, Budget(1)), torch.zeros(10, 1, 8, 8), SHARED, "uint8", Rng(0))

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
from synth.factored import Factored
from synth.pixels import Pixels

NET = NetSpec("convnet", width=4, depth=2)
SHARED = FormOptions("compensated", compensators=2, groups=2)
PIXEL_MATCHERS = ("attention", "distribution", "characteristic")


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
        ({"name": "facored"}, "Did you mean 'factored'"),
        ({"name": "factored", "factor": 0}, "matcher.synth.factor=0"),
        ({"factor": 2}, "matcher.synth.factor=2 and synth is pixels\nGive synth=factored"),
        ({"name": "factored", "groups": 2}, "matcher.synth.groups=2 and synth is factored\nGive synth=comp"),
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


def small(task):
    """Four stored images a class: 16 cells of the 18 images that the smallest class has."""
    return Task(task.images, Budget(4))


def factored(task, factor=2):
    o, task = FormOptions("factored", factor), small(task)
    count = parametrised.per_class(task, o, "uint8")
    x = torch.arange(float(10 * count))[:, None, None, None].expand(-1, 1, 8, 8).clone()
    return parametrised.form(task, x, o, "uint8", Rng(0)), count


@pytest.mark.parametrize("factor", [1, 2])
def test_grids_start_from_as_many_images_as_they_have_cells(task, factor):
    synth, count = factored(task, factor)
    assert isinstance(synth, Factored) and count == 4 * factor**2 and len(synth.images) == 40
    assert torch.equal(synth.labels, torch.arange(10).repeat_interleave(4))
    decoded = synth.decode()
    assert len(decoded) == parametrised.count(small(task), FormOptions("factored", factor), "uint8")
    assert sorted(decoded.x[:, 0, 4, 4].round().int().tolist()) == list(range(10 * count))
    assert torch.equal(decoded.x[:, 0, 4, 4].round().int() // count, decoded.y.int())
    assert torch.equal(descent.classes_of(synth), decoded.y)
    assert synth.nbytes == factored(task, 1)[0].nbytes


@pytest.mark.parametrize("name", PIXEL_MATCHERS)
def test_a_factor_of_one_is_matching_of_pixels_bit_for_bit(task, name):
    sets = []
    for form in ("pixels", {"name": "factored", "factor": 1}):
        matcher = matchers.make(name, NET, steps=2, real_per_class=5, synth=form)
        rng = Rng(0)
        state, work = matcher.init(task, rng), matcher.prepare(task, rng)
        for _ in range(2):
            state, _ = matcher.step(state, work, rng)
        sets.append(matcher.finish(state, work, rng))
        work.close()
    assert [type(synth) for synth in sets] == [Pixels, Factored]
    assert torch.equal(sets[0].decode().x, sets[1].decode().x) and sets[0].nbytes == sets[1].nbytes


@pytest.mark.parametrize("name", PIXEL_MATCHERS)
def test_a_step_moves_every_stored_pixel(task, name):
    matcher = matchers.make(name, NET, steps=2, real_per_class=5, augment="none", synth="factored")
    rng, task = Rng(0), small(task)
    state, work = matcher.init(task, rng), matcher.prepare(task, rng)
    after, _ = matcher.step(state, work, rng)
    moved = after.synth.images - state.synth.images
    torch.testing.assert_close(moved, -matcher.options.lr * after.velocity["images"], rtol=1e-3, atol=1e-5)
    assert (moved != 0).float().mean() > 0.9 and matcher.options.synth.factor == 2
    work.close()


def test_a_gradient_for_cells_is_pulled_back_to_the_stored_images(task):
    synth, _ = factored(task)
    weights = torch.randn(synth.decode().x.shape, generator=Rng(1).torch("w"))
    found = parametrised.pulled_back(synth, weights)
    total = weights.reshape(4, 40, 64).sum(2)  # what each cell gets: the weights of up-sampling add up to 1
    cells = found["images"].reshape(40, 2, 4, 2, 4).sum((2, 4)).reshape(40, 4).T
    torch.testing.assert_close(cells, total, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("labels", ["hard", "soft", "learned", "target"])
def test_trajectory_matching_moves_grids(tmp_path, task, labels):
    buffer = trained_experts.write(tmp_path / "buffer", task.images, NET, count=1, epochs=3)
    inner = {"steps": 2, "rate": 0.02}
    matcher = matchers.make("trajectory", NET, steps=2, labels=labels, lr=1.0, inner=inner, synth="factored")
    rng, work_on = Rng(0), Task(task.images, Budget(3), buffer)
    first = state = matcher.init(work_on, rng)
    work = matcher.prepare(work_on, rng)
    while state.step < 2:
        state, _ = matcher.step(state, work, rng)
    synth = matcher.finish(state, work, rng)
    work.close()
    assert isinstance(synth, Factored) and not torch.equal(synth.images, first.synth.images)
    assert len(synth.images) == 30 and len(synth.decode()) == 120
    assert synth.y_kind == {"hard": "class", "target": "prob"}.get(labels, "logit")
    assert torch.equal(synth.labels, first.synth.labels) == (labels in ("hard", "soft"))
    stored = DistilledSet.make(synth, recipe={}, provenance={})
    assert stored.manifest["budget"]["ipc"] == 3 and float(stored.tensors["student_lr"]) > 0


def test_too_few_images_for_the_cells_and_too_small_images_are_refused(task):
    few = Task(task.images, Budget(max(task.images.counts)))
    with pytest.raises(UsageError, match="images a class start from .* the smallest class has") as refused:
        parametrised.per_class(few, FormOptions("factored"), "uint8")
    assert "\n" not in refused.value.cause + refused.value.remedy
    with pytest.raises(UsageError, match="matcher.synth.factor=9: .* no 9 cells to a side"):
        parametrised.per_class(Task(task.images, Budget(1)), FormOptions("factored", 9), "uint8")


def test_grids_and_a_rate_share_a_budget_in_bytes(tmp_path, task):
    buffer = trained_experts.write(tmp_path / "buffer", task.images, NET, count=1, epochs=3)
    exact = Task(task.images, Budget(nbytes=2 * 10 * (64 + 8 + 1)), buffer)
    with pytest.raises(UsageError, match="no room for the student's rate\nGive budget.nbytes=1464"):
        matchers.make("trajectory", NET, synth="factored").init(exact, Rng(0))
    with pytest.raises(UsageError, match="bytes are for hard labels"):
        some = Task(task.images, Budget(nbytes=2000), buffer)
        matchers.make("trajectory", NET, synth="factored", labels="learned").init(some, Rng(0))

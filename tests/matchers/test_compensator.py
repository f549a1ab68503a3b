"""Compensators and their family: budgets, labels, controls, what they refuse, workers that change nothing."""

import math
from dataclasses import replace

import pytest
import torch
import trained_experts

import matchers
from ddengine import loop
from ddengine.composites import in_pixels
from ddengine.data import load
from ddengine.errors import UsageError
from ddengine.nets import NetSpec
from ddengine.ops import kd
from ddengine.rng import Rng
from ddengine.types import Budget, Task, class_order
from matchers import compensator
from matchers.compensator import CompensatorMatching
from matchers.compensator_options import CompensatorOptions
from synth import DistilledSet
from synth.labels import label_row_bytes

NETS = [NetSpec("convnet", width=5, depth=2, norm=norm) for norm in ("batch", "instance")]
MLP = NetSpec("resnet18", width=2)


@pytest.fixture(scope="module")
def source():
    digits = load("digits").fit
    return digits.take(torch.arange(0, len(digits), 7))


@pytest.fixture(scope="module")
def buffer(tmp_path_factory, source):
    """Experts 0 to 5: batch norm, instance norm, a ResNet, twice."""
    root = tmp_path_factory.mktemp("experts") / "buffer"
    return trained_experts.write(root, source, *NETS, MLP, count=2, epochs=3)


@pytest.fixture(scope="module")
def task(source, buffer):
    return Task(source, Budget(8), buffer)


def made(task, seed=0, **options):
    """The finished set and the last state."""
    options = {"teachers": (0, 2), "steps": 5, **options}
    matcher = matchers.make("compensator", NETS[0], **options)
    rng = Rng(seed)
    work, state = matcher.prepare(task, rng), matcher.init(task, rng)
    while state.step < matcher.steps(task):
        state, _ = matcher.step(state, work, rng)
    synth = matcher.finish(state, work, rng)
    work.close()
    return synth, state


def test_sheets_and_compensators_fill_the_nominal_bytes(task):
    synth, _ = made(task)
    assert synth.compensators.shape[1:] == (2, 1, 8, 8) and len(synth.compensators) == len(
        set(synth.group.tolist())
    )
    nominal, total = 8 * 10 * 64, synth.nbytes["total"]
    base = 64 + 1 + 1 + 3 * label_row_bytes(10, "int8")
    assert nominal - base < total <= nominal
    assert DistilledSet.make(synth, recipe={}, provenance={}).nbytes["total"] == total


def test_one_group_leaves_room_for_more_sheets(task):
    (each, _), (one, _) = made(task), made(task, groups=1)
    assert len(one.compensators) == 1 and len(one.bases) > len(each.bases)


def test_a_budget_below_one_sheet_is_refused_with_what_it_needs(source, buffer):
    with pytest.raises(
        UsageError, match=r"(?s)too small for one sheet of 10 classes.*bytes\n.*matcher.groups=1"
    ):
        made(Task(source, Budget(1), buffer))


def test_static_labels_are_mean_logits_of_what_the_stored_set_decodes_to(task, buffer):
    synth, _ = made(task, label_codec="fp32")
    stored = DistilledSet.make(synth, recipe={}, provenance={})
    x = stored.decode().x
    nets = [buffer.build(i, buffer.epochs(i)).eval() for i in range(6)]
    with torch.no_grad():
        expected = sum(net(x) for net in nets) / 6
    torch.testing.assert_close(stored.decode().y, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected, sum(net(x) for net in nets[:2]) / 2, atol=1e-2)


def test_label_teachers_are_chosen_apart_from_those_of_recovery(task, buffer):
    synth, _ = made(task, label_codec="fp32", label_teachers=(1,))
    with torch.no_grad():
        expected = buffer.build(1, buffer.epochs(1)).eval()(synth.quantised().decode().x)
    torch.testing.assert_close(synth.labels, expected, rtol=1e-4, atol=1e-4)


def test_teachers_in_another_order_give_the_same_labels(task, buffer):
    composites = made(task)[0].quantised().composites()
    nets = [buffer.build(i, buffer.epochs(i)).eval() for i in (0, 1, 2)]
    one, other = (kd.soft_labels(order, composites, "cpu") for order in (nets, nets[::-1]))
    torch.testing.assert_close(one, other)


def test_dynamic_labels_come_with_their_teachers_whose_bytes_count(task, buffer):
    synth, _ = made(task, labels="dynamic", count_teachers=False, label_teachers=(2, 0))
    run = loop.distill(
        task, matchers.make("compensator", NETS[0], teachers=(0,), steps=2, labels="dynamic",
                            count_teachers=False, label_teachers=(2, 0)),
    )  # fmt: skip
    found, x = run.distilled.teachers(), synth.decode().x
    for net, number in zip(found, (2, 0), strict=True):
        with torch.no_grad():
            expected = buffer.build(number, buffer.epochs(number)).eval()(x)
            torch.testing.assert_close(net(x), expected, rtol=0.02, atol=0.02)
    stored = sum(2 * len(p) + 4 * len(s) for p, s in synth.teachers)
    assert synth.nbytes["total"] > 8 * 10 * 64 and synth.nbytes["total"] - stored <= 8 * 10 * 64
    with pytest.raises(UsageError, match="too small for one sheet"):
        made(task, labels="dynamic")
    counted, _ = made(Task(task.images, Budget(nbytes=9000), buffer), labels="dynamic", label_teachers=(0,))
    assert counted.nbytes["total"] <= 9000


def test_the_manifest_says_how_to_train_on_the_set(task):
    recipe = loop.distill(
        task, matchers.make("compensator", NETS[0], teachers=(0,), steps=1)
    ).distilled.manifest["recipe"]
    assert (
        recipe["labels"] == "static"
        and recipe["train"]["loss"] == "kl"
        and recipe["train"]["augment"] == "crop"
    )
    assert recipe["class_order"] == class_order(task.images.spec.classes) and "teachers" not in recipe
    assert class_order(task.images.spec.classes[::-1]) != recipe["class_order"]
    assert recipe["labelled_by"] == {"experts": [0, 1, 2, 3, 4, 5], "digest": task.experts.digest}


def test_noise_has_the_deviations_of_what_it_stands_for(task):
    (real, _), (noise, _) = made(task), made(task, recover="noise")
    assert torch.equal(real.bases, noise.bases) and not torch.allclose(real.compensators, noise.compensators)
    sizes = [s.compensators.square().mean((0, 3, 4)).sqrt() for s in (real, noise)]
    torch.testing.assert_close(sizes[1], sizes[0], rtol=1e-4, atol=1e-6)


def test_without_compensators_there_are_real_images_alone(task):
    synth, state = made(task, recover="none")
    assert synth.count == len(synth.bases) > len(made(task)[0].bases) and not state.jobs
    known = {x.numpy().tobytes() for x in task.images.x}
    assert all(x.numpy().tobytes() in known for x in synth.bases)


def test_recovered_images_start_from_real_ones_and_move_each_on_its_own(task):
    (real, _), (moved, state) = made(task, recover="none"), made(task, recover="images")
    assert moved.bases.shape == real.bases.shape and torch.equal(moved.classes, real.classes)
    change = moved.bases.float() - real.bases.float()
    assert (change.flatten(1).abs().amax(1) > 1).all() and not torch.equal(change[0], change[1])
    assert len(state.jobs) == len(set(moved.group.tolist()))


def test_zero_steps_of_rate_leave_compensators_at_zero(task):
    matcher = matchers.make("compensator", NETS[0], teachers=(0,), steps=1)
    state, work = matcher.init(task, Rng(0)), matcher.prepare(task, Rng(0))
    synth = matcher.finish(state, work, Rng(0))
    b = len(synth.bases)
    x = synth.decode().x
    assert torch.equal(x[:b], task.images.spec.normalise(synth.bases)) and torch.equal(x[:b], x[b:])


def test_what_is_added_in_model_input_is_added_to_pixels(source):
    u = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    x = source.x[:3].float() / 255
    expected = source.spec.denormalise(source.spec.normalise(source.x[:3]) + u)
    torch.testing.assert_close(x + in_pixels(u, source.spec), expected)


def test_workers_and_chunks_share_the_work_without_a_trace(source, buffer, monkeypatch):
    monkeypatch.setattr(compensator, "WORTH", 1)
    sets = [made(Task(source, Budget(8), buffer, workers=n), chunk=40)[0] for n in (1, 2)]
    assert torch.equal(sets[0].compensators, sets[1].compensators) and torch.equal(
        sets[0].labels, sets[1].labels
    )
    other, _ = made(Task(source, Budget(8), buffer), chunk=1)
    torch.testing.assert_close(other.compensators, sets[0].compensators, rtol=0.02, atol=0.02)


def test_bf16_recovers_nearly_the_same(source, buffer):
    sets = [made(Task(source, Budget(8), buffer, precision=p))[0] for p in ("fp32", "bf16")]
    a, b = (s.compensators.flatten() for s in sets)
    assert not torch.equal(a, b) and float(torch.corrcoef(torch.stack([a, b]))[0, 1]) > 0.7


def test_a_teacher_without_batch_norm_is_refused_for_recovery_alone(task):
    with pytest.raises(UsageError, match="expert 1, a convnet, has no batch norm\nRecord the experts with"):
        made(task, teachers=(0, 1))
    made(task, teachers=(1,), recover="none")


def test_experts_that_are_not_there_or_of_other_classes_are_refused(task, source):
    with pytest.raises(UsageError, match="no expert 6 in a buffer of 6\nGive numbers of 0..5"):
        made(task, teachers=(6,))
    names = tuple(reversed(source.spec.classes))
    swapped = replace(source, spec=replace(source.spec, classes=names))
    with pytest.raises(UsageError, match="classes"):
        made(Task(swapped, Budget(8), task.experts))
    with pytest.raises(UsageError, match="experts are a int"):
        made(Task(source, Budget(8), 3))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"recover": "magic"}, "matcher.recover"),
        ({"labels": "soft"}, "matcher.labels"),
        ({"steps": 0}, "matcher.steps"),
        ({"groups": -2}, "matcher.groups"),
        ({"crop": 0}, "0 < crop <= 1"),
        ({"lr": -1}, "matcher.lr"),
        ({"temperature": 0}, "matcher.temperature"),
        ({"ce_weight": 0, "r_bn": 0}, "both 0"),
        ({"teachers": (1, 1)}, "empty or repeats"),
        ({"label_teachers": ()}, "empty or repeats"),
        ({"label_codec": "top5"}, "lives in its tail"),
        ({"label_codec": "top5", "temperature": 2}, "sets store every logit"),
        ({"label_codec": "top"}, "matcher.label_codec"),
        ({"jitter": -1}, "matcher.jitter"),
        ({"first_weight": math.nan}, "matcher.first_weight"),
    ],
)
def test_options_out_of_range_are_refused_by_name(options, said):
    with pytest.raises(UsageError) as refused:
        CompensatorOptions(**options)
    assert said in str(refused.value) and "\n" not in refused.value.cause


def test_the_published_default_is_the_released_recipe():
    o = CompensatorMatching().options
    assert (o.steps, o.lr, o.r_bn, o.first_weight, o.weighting, o.groups) == (
        1000,
        0.25,
        1.0,
        10.0,
        "released",
        None,
    )
    assert o.temperature == 30

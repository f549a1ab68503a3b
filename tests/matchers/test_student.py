"""The student's loss, batches, augmentation and targets, by hand; what batch norm leaves behind."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from ddengine.errors import UsageError
from ddengine.nets import NetSpec, build
from ddengine.ops import dsa
from ddengine.rng import Rng
from ddengine.types import Budget, DataSpec, Images, Task
from expert_buffers.params import ParamSpec
from expert_buffers.segment import Segment
from matchers import student
from matchers.student import InnerOptions

SHAPE, K = (1, 8, 11), 7
NET = NetSpec("convnet", width=5, depth=2)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def network(norm="instance"):
    return build(replace(NET, norm=norm), SHAPE, K, torch.Generator().manual_seed(1))


def test_hard_criterion_is_the_mean_log_probability_of_the_class():
    logits, labels = randn(5, 3), torch.tensor([2, 0, 1, 1, 2])
    by_hand = 0.0
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        by_hand -= row[label] - math.log(sum(math.exp(v) for v in row))
    assert math.isclose(student.criterion(logits, labels), by_hand / 5, rel_tol=1e-12)


def test_soft_criterion_is_the_cross_entropy_of_two_softmaxes():
    logits, labels = randn(5, 3), randn(5, 3, seed=1)
    by_hand = 0.0
    for f, y in zip(logits.tolist(), labels.tolist(), strict=True):
        p, q = ([math.exp(v) / sum(map(math.exp, row)) for v in row] for row in (y, f))
        by_hand -= sum(a * math.log(b) for a, b in zip(p, q, strict=True))
    assert math.isclose(student.criterion(logits, labels), by_hand / 5, rel_tol=1e-12)


def test_logits_of_fifty_are_hard_labels():
    logits, labels = randn(5, 3), torch.tensor([2, 0, 1, 1, 2])
    sure = 100.0 * F.one_hot(labels, 3) - 50
    hard, soft = student.criterion(logits, labels), student.criterion(logits, sure.double())
    torch.testing.assert_close(soft, hard, rtol=1e-14, atol=0)


def test_loss_on_flat_parameters_is_that_of_a_network_that_holds_them():
    net, other = network(), build(NET, SHAPE, K, torch.Generator().manual_seed(2))
    layout = ParamSpec.of(net)
    theta = layout.flatten(dict(other.named_parameters())).detach()
    x, y = randn(3, *SHAPE, dtype=torch.float32), torch.tensor([0, 6, 2])
    before = {k: v.clone() for k, v in net.state_dict().items()}
    found = student.student_loss(net, layout)(theta, x, y)
    torch.testing.assert_close(found, F.cross_entropy(other(x), y))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize(("batch", "count"), [(None, 21), (5, 5), (50, 21)])
@pytest.mark.parametrize("soft", [False, True])
def test_probe_has_the_shapes_that_a_student_meets(batch, count, soft):
    spec = DataSpec("noise", SHAPE, tuple("abcdefg"), (0.5,), (0.25,))
    source = Images(torch.zeros(21, *SHAPE, dtype=torch.uint8), torch.arange(7).repeat_interleave(3), spec)
    net = network()
    theta, x, y = student.probe(net, ParamSpec.of(net), Task(source, Budget(3)), batch, soft)
    assert theta.shape == (sum(p.numel() for p in net.parameters()),) and x.shape == (count, *SHAPE)
    assert y.shape == ((count, K) if soft else (count,)) and y.is_floating_point() == soft


def test_batches_are_reshuffled_passes_over_the_set():
    found = student.batches(Rng(3), 7, 3, 5)
    assert [len(batch) for batch in found] == [3] * 5
    drawn = torch.cat(found).tolist()
    assert sorted(drawn[:7]) == sorted(drawn[7:14]) == list(range(7)) and drawn[:7] != drawn[7:14]
    assert sorted(torch.cat(student.batches(Rng(3), 6, 3, 2)).tolist()) == list(range(6))


def test_batches_are_repeatable_and_differ_between_steps_of_the_descent():
    first, again, other = (student.batches(rng, 23, 5, 9) for rng in (Rng(3), Rng(3), Rng(3).fold(1)))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(torch.cat(first), torch.cat(other))


@pytest.mark.parametrize("batch", [None, 7, 8])
def test_without_a_smaller_batch_every_step_sees_the_whole_set(batch):
    found = student.batches(Rng(3), 7, batch, 4)
    assert len(found) == 4 and all(torch.equal(b, torch.arange(7)) for b in found)


def test_augmentation_is_the_same_whenever_it_is_asked_and_new_in_each_step():
    index, x = [torch.arange(5)] * 3, randn(5, *SHAPE, dtype=torch.float32)
    change = student.augmentation(Rng(3), "crop_scale_rotate", index, SHAPE[1:])
    seen = [change(x, step) for step in (0, 1, 2)]
    assert torch.equal(change(x, 1), seen[1])
    assert not any(torch.equal(a, b) for a, b in ((seen[0], seen[1]), (seen[1], seen[2]), (seen[0], x)))
    again = student.augmentation(Rng(3), "crop_scale_rotate", index, SHAPE[1:])
    assert torch.equal(again(x, 2), seen[2])


def test_augmentation_has_one_operator_a_step_and_other_numbers_for_each_image(monkeypatch):
    drawn, sample = [], dsa.sample
    monkeypatch.setattr(dsa, "sample", lambda *a, **k: drawn.append(sample(*a, **k)) or drawn[-1])
    student.augmentation(Rng(3), dsa.STRATEGY, [torch.arange(5)] * 13, SHAPE[1:])
    assert len(drawn) == 13 and all(len(p) == 5 and len(p.op.unique()) == 1 for p in drawn)
    assert len({int(p.op[0]) for p in drawn}) > 2 and all(len(p.angle.unique()) == 5 for p in drawn)


def test_no_augmentation_gives_the_images_themselves():
    x = randn(5, *SHAPE, dtype=torch.float32)
    assert student.augmentation(Rng(3), "none", [torch.arange(5)], SHAPE[1:])(x, 0) is x


def test_balance_is_a_logarithm_of_base_five():
    assert math.isclose(student.balance(7, 7), 1.2920, abs_tol=5e-5)
    assert math.isclose(student.balance(6, 7), 1 / 1.3652, abs_tol=5e-5)
    assert math.isclose(student.balance(24, 7), 2) and math.isclose(student.balance(0, 17), 0.5)
    factors = [student.balance(epoch, 7) for epoch in range(20)]
    assert factors == sorted(factors)


def test_perturbation_moves_convolutions_alone_by_their_relative_size():
    net = build(replace(NET, width=11), (3, 8, 8), K, torch.Generator().manual_seed(1))
    layout = ParamSpec.of(net)
    theta = layout.flatten(dict(net.named_parameters())).detach().double()
    found = student.perturbed(theta, layout, torch.Generator().manual_seed(5), 0.7)
    convolutions = 0
    for before, after, shape in zip(
        *(v.split(layout.sizes) for v in (theta, found)), layout.shapes, strict=True
    ):
        if len(shape) != 4:
            assert torch.equal(after, before)
            continue
        convolutions += 1
        change = after - before
        assert math.isclose((change / before).norm(), 0.7, rel_tol=1e-9)
        assert math.isclose(change.norm() / before.norm(), 0.7 / math.sqrt(len(before)), rel_tol=0.3)
    assert convolutions == 2


def test_perturbation_of_zero_changes_nothing_and_of_two_twice_as_much():
    net = network()
    layout = ParamSpec.of(net)
    theta = layout.flatten(dict(net.named_parameters())).detach().double()
    none, one, two = (
        student.perturbed(theta, layout, torch.Generator().manual_seed(5), a) for a in (0, 1, 2)
    )
    assert torch.equal(none, theta) and not torch.equal(one, theta)
    torch.testing.assert_close(two - theta, 2 * (one - theta), rtol=1e-9, atol=1e-15)
    other = student.perturbed(theta, layout, torch.Generator().manual_seed(6), 1)
    assert not torch.equal(other, one)


@pytest.mark.parametrize(
    ("middle", "steps", "weights"),
    [("off", [10], [1]), ("equal", [3, 6, 10], [1, 1, 1]), ("adaptive", [3, 6, 10], [1 / 3, 2 / 3, 1])],
)
def test_matching_points_of_three_epochs_in_ten_steps(middle, steps, weights):
    segment = Segment(0, 4, randn(5), randn(3, 5, seed=1))
    begin = randn(5, seed=2)  # as a perturbation leaves it
    points = student.matching_points(segment, begin, 10, middle)
    later = student.matching_points(segment, begin, 11, middle)  # thirds rounded down before they add up
    assert [p.step for p in later] == [*steps[:-1], 11]
    assert [p.step for p in points] == steps and [p.weight for p in points] == pytest.approx(weights)
    targets = segment.targets[-1:] if middle == "off" else segment.targets
    for point, target in zip(points, targets, strict=True):
        assert torch.equal(point.target, target)
        assert math.isclose(point.distance, sum((begin - target).tolist()[i] ** 2 for i in range(5)))


@pytest.mark.parametrize("middle", ["equal", "adaptive"])
def test_one_epoch_has_no_middle(middle):
    segment = Segment(0, 4, randn(5), randn(1, 5, seed=1))
    (one,) = student.matching_points(segment, segment.start, 10, middle)
    (off,) = student.matching_points(segment, segment.start, 10, "off")
    assert (one.step, one.weight) == (off.step, off.weight) == (10, 1.0)


def test_without_running_statistics_a_forward_pass_leaves_no_trace():
    net = student.without_running_statistics(network("batch"))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    x = randn(13, *SHAPE, dtype=torch.float32)
    seen = net.train()(x)
    assert not list(net.named_buffers())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert torch.equal(net.eval()(x), seen)  # the batch's own statistics, in evaluation too
    torch.testing.assert_close(seen, network("batch").train()(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "matcher.inner.steps=0 is out of range"),
        ({"batch": -2}, "matcher.inner.batch=-2 is out of range"),
        ({"rate": 0.0}, "matcher.inner.rate=0.0 is out of range"),
        ({"rate": math.nan}, "matcher.inner.rate=nan is out of range"),
        ({"weight_decay": -1.0}, "matcher.inner.weight_decay=-1.0"),
        ({"momentum": 1.0}, r"matcher.inner.momentum=1.0 is out of range\nGive 0 <= momentum < 1"),
        ({"backend": "highr"}, r"unknown matcher.inner.backend 'highr'\nDid you mean 'higher'\?"),
    ],
)
def test_inner_options_outside_their_range_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        InnerOptions(**options)

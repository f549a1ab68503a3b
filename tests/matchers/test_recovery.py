"""Recovery, against one compensator at a time written out, and what its draws depend on."""

import math
from dataclasses import replace

import pytest
import torch
import torchvision.transforms.v2.functional as tv
from global_rng import global_rng_untouched
from naive_recovery import recover_one

from ddengine.data import load
from ddengine.errors import UsageError
from ddengine.nets import NetSpec, build
from ddengine.rng import Rng
from matchers import recovery
from matchers.recovery import Block, RecoverOptions, Session, advance, begin, channels_of, view

OPTIONS = RecoverOptions(7, 0.25, 1.0, 1.0, 10.0, "released", 2, 1.0, False, None)


@pytest.fixture(scope="module")
def digits():
    return load("digits").fit


@pytest.fixture(scope="module")
def nets(digits):
    """Two networks whose running statistics are those of real images."""
    made = []
    for number, name in enumerate(("convnet", "alexnet")):
        net = build(NetSpec(name, width=5, norm="batch"), (1, 8, 8), 10, Rng(number).torch("w"))
        with torch.no_grad():
            for start in range(0, 600, 100):
                net(digits.model_input(torch.arange(start, len(digits), 17)[:100]))
        made.append(net.eval().requires_grad_(False))
    return tuple(made)


def session(digits, nets, sheets=3, options=OPTIONS, seed=0, groups=None):
    """Sheets of one image a class; one group a sheet, or `groups` as given."""
    starts = [sum(digits.counts[:c]) for c in range(10)]
    index = torch.tensor([[s + k for s in starts] for k in range(sheets)]).flatten()
    group = torch.arange(sheets).repeat_interleave(10) if groups is None else groups
    rows = tuple((group == g).nonzero().squeeze(1) for g in range(int(group.max()) + 1))
    return Session(digits.x[index], digits.y[index], rows, nets, digits.spec, options, Rng(seed), "fp32")


def run(made, teacher, groups, steps=None, count=1, channels=0):
    """The jobs after all steps, and the losses on the way."""
    jobs = tuple(begin(count, made.spec, channels, torch.device("cpu")) for _ in groups)
    losses = []
    for step in range(made.options.steps if steps is None else steps):
        jobs, (ce, bn) = advance(made, Block(step, teacher, tuple(groups), jobs))
        losses.append(made.options.ce_weight * ce + made.options.r_bn * bn)
    return jobs, losses


def shifts(made, teacher, group):
    generator = made.rng.fold("job", teacher, group).torch("views")
    drawn = torch.rand((made.options.steps, 7), generator=generator)
    return [tuple(int(v * (made.options.jitter + 1)) for v in row[5:]) for row in drawn.tolist()]


def test_a_job_without_a_finite_gradient_stays_as_it_was_and_the_others_go_on(digits, nets):
    made = session(digits, nets)
    jobs, _ = run(made, 0, [0, 1], steps=2)
    alone, _ = advance(made, Block(2, 0, (1,), jobs[1:]))
    wild = replace(jobs[0], u=torch.full_like(jobs[0].u, 1e38))
    (kept, moved), levels = advance(made, Block(2, 0, (0, 1), (wild, jobs[1])))
    assert all(math.isnan(level) for level in levels)
    assert torch.equal(kept.u, wild.u) and torch.equal(kept.first, wild.first)
    torch.testing.assert_close(moved.u, alone[0].u, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("teacher", [0, 1])
def test_it_is_the_loop_written_out(digits, nets, teacher):
    made = session(digits, nets)
    (job,), losses = run(made, teacher, [1])
    images = digits.spec.normalise(made.bases[10:20])
    expected, theirs = recover_one(nets[teacher], images, made.classes[10:20], shifts(made, teacher, 1), 7)
    torch.testing.assert_close(job.u, expected, rtol=1e-3, atol=1e-3)
    assert losses == pytest.approx(theirs, rel=1e-4)
    assert losses[-1] < losses[0] and job.u.abs().max() > 0.1


def test_groups_in_one_forward_pass_are_as_if_alone(digits, nets):
    made = session(digits, nets)
    together, _ = run(made, 0, [0, 1, 2])
    for group in range(3):
        (alone,), _ = run(made, 0, [group])
        torch.testing.assert_close(together[group].u, alone.u, rtol=1e-3, atol=1e-3)


def test_a_group_of_all_sheets_is_one_stacked_sheet(digits, nets):
    made = session(digits, nets, groups=torch.zeros(30, dtype=torch.long))
    (job,), _ = run(made, 0, [0])
    images = digits.spec.normalise(made.bases)
    expected, _ = recover_one(nets[0], images, made.classes, shifts(made, 0, 0), 7)
    torch.testing.assert_close(job.u, expected, rtol=1e-3, atol=1e-3)


def test_the_gradient_of_what_is_shared_is_the_sum_over_images(digits, nets):
    made = session(digits, nets)
    (shared,), _ = run(made, 0, [0], steps=1)
    (each,), _ = run(made, 0, [0], steps=1, count=10)
    torch.testing.assert_close(shared.first[0], each.first.sum(0), rtol=1e-4, atol=1e-6)


def test_teachers_stay_as_they_are(digits, nets):
    made = session(digits, nets)
    before = [{k: v.clone() for k, v in net.state_dict().items()} for net in nets]
    with global_rng_untouched():
        run(made, 0, [0], steps=2)
    for net, kept in zip(nets, before, strict=True):
        assert not net.training and all(torch.equal(v, kept[k]) for k, v in net.state_dict().items())


def test_a_step_leaves_its_input_alone_and_is_a_function_of_it(digits, nets):
    made = session(digits, nets)
    jobs, _ = run(made, 0, [0], steps=2)
    kept = jobs[0].u.clone()
    once, twice = (advance(made, Block(2, 0, (0,), jobs))[0][0].u for _ in range(2))
    assert torch.equal(jobs[0].u, kept) and torch.equal(once, twice) and not torch.equal(once, kept)


def test_jobs_of_other_teachers_and_groups_are_rolled_otherwise(digits, nets):
    made = session(digits, nets, options=replace(OPTIONS, steps=40))
    drawn = {tuple(shifts(made, t, g)) for t in range(2) for g in range(3)}
    assert len(drawn) == 6 and {v for job in drawn for pair in job for v in pair} == {0, 1, 2}


def test_parts_of_a_group_see_every_image_once_a_pass(digits, nets):
    made = session(digits, nets, options=replace(OPTIONS, batch=7))
    seen = torch.cat([recovery._pick(made, Block(step, 0, (1,), ()), 0)[1] for step in range(10)])
    for number in range(7):
        assert sorted(seen[10 * number : 10 * (number + 1)].tolist()) == list(range(10))
    rows, here = recovery._pick(made, Block(3, 0, (1,), ()), 0)
    assert torch.equal(rows, made.rows[1][here])


def test_a_batch_of_the_whole_group_is_no_batch(digits, nets):
    plain, _ = run(session(digits, nets), 0, [0])
    whole, _ = run(session(digits, nets, options=replace(OPTIONS, batch=10)), 0, [0])
    assert torch.equal(plain[0].u, whole[0].u)


def test_parts_of_a_group_lower_the_loss_of_the_whole(digits, nets):
    groups = torch.zeros(30, dtype=torch.long)
    options = replace(OPTIONS, steps=40, batch=11, jitter=0)
    made = session(digits, nets, options=options, groups=groups)
    channels = channels_of(nets[0], digits.spec, torch.device("cpu"))
    jobs, _ = run(made, 0, [0], channels=channels)
    whole = replace(made, options=replace(options, batch=None))
    levels = [
        advance(whole, Block(0, 0, (0,), (replace(jobs[0], u=u),)))[1]
        for u in (torch.zeros_like(jobs[0].u), jobs[0].u)
    ]
    assert sum(levels[1]) < 0.7 * sum(levels[0])


def test_a_view_without_options_is_the_image_itself():
    x = torch.randn(3, 2, 5, 7, generator=torch.Generator().manual_seed(0))
    assert torch.equal(view(x, [0.9] * 7, 0, 1.0, False), x)


def test_a_roll_is_undone_by_its_inverse_and_is_one_for_the_batch():
    x = torch.randn(3, 2, 5, 7, generator=torch.Generator().manual_seed(0))
    rolled = view(x, [0.0] * 5 + [0.6, 0.99], 4, 1.0, False)
    assert torch.equal(rolled.roll((-3, -4), (2, 3)), x)


@pytest.mark.parametrize("drawn", [[0.0, 0.5, 0.3, 0.8, 0.9, 0.0, 0.0], [0.7, 0.1, 0.9, 0.2, 0.1, 0.0, 0.0]])
def test_a_crop_is_torchvisions(drawn):
    x = torch.rand(2, 3, 13, 17, generator=torch.Generator().manual_seed(0))
    area, ratio = (0.3 + 0.7 * drawn[0]) * 13 * 17, math.exp(math.log(0.75) + math.log(16 / 9) * drawn[1])
    rows, columns = min(round((area / ratio) ** 0.5), 13), min(round((area * ratio) ** 0.5), 17)
    top, left = int(drawn[2] * (13 - rows + 1)), int(drawn[3] * (17 - columns + 1))
    expected = tv.resized_crop(x, top, left, rows, columns, [13, 17], antialias=False)
    expected = expected.flip(3) if drawn[4] < 0.5 else expected
    torch.testing.assert_close(view(x, drawn, 0, 0.3, True), expected)


def test_a_network_without_batch_norm_has_nothing_to_recover_from(digits):
    net = build(NetSpec("convnet", width=2), (1, 8, 8), 10, Rng(0).torch("w"))
    with pytest.raises(UsageError, match="without batch norm .*\nRecord the experts with network.norm=batch"):
        channels_of(net, digits.spec, torch.device("cpu"))

"""One step against the formulas, in chunks; the limit to distribution matching; draws; memory."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ddengine.errors import UsageError
from ddengine.nets import NetSpec, build, resolve
from ddengine.ops import dsa
from ddengine.rng import Rng
from ddengine.types import Budget, DataSpec, Images, Task
from matchers import descent, descent_options, target_bank
from matchers.attention import AttentionMatching, AttentionOptions, Statistics, attention_matching_loss
from matchers.distribution import DistributionMatching, DistributionOptions

NET = NetSpec("convnet", width=5, depth=2)
QUICK = AttentionOptions(steps=10, real_per_class=7, lr=3.0)


def task(classes=3, each=(11, 13, 17), ipc=2, shape=(1, 8, 9), name="noise"):
    """Random uint8 images, class-sorted, of unequal class sizes."""
    counts = [each[c % len(each)] for c in range(classes)]
    generator = torch.Generator().manual_seed(classes)
    x = torch.randint(0, 256, (sum(counts), *shape), dtype=torch.uint8, generator=generator)
    y = torch.arange(classes).repeat_interleave(torch.tensor(counts))
    spec = DataSpec(name, shape, tuple(map(str, range(classes))), (0.5,) * shape[0], (0.25,) * shape[0])
    return Task(Images(x, y, spec), Budget(ipc))


def stepped(matcher, problem, steps=1, seed=3):
    """The state and the losses after some steps."""
    rng = Rng(seed)
    state, work, losses = matcher.init(problem, rng), matcher.prepare(problem, rng), []
    for _ in range(steps):
        state, metrics = matcher.step(state, work, rng)
        losses.append(metrics["loss"])
    return state, torch.stack(losses)


def class_statistics(net, x, p):
    """Mean attention of each ReLU layer but the last, and mean embedding, written out layer by layer."""
    maps = []
    for conv, norm in zip(net.convs, net.norms, strict=True):
        x = norm(conv(x)).clamp(min=0)
        z = (x.abs() ** p).sum(1).flatten(1)
        maps.append((z / z.norm(dim=1, keepdim=True)).mean(0))
        x = nn.functional.avg_pool2d(x, 2)
    return [*maps[:-1], x.flatten(1).mean(0)]


def reference_gradient(problem, o, synthetic, rng, norm="instance", net=None):
    """Loss and gradient class by class from the formulas, with the draws of one network of a step."""
    source, spec = problem.source, problem.source.spec
    classes, ipc = len(spec.classes), problem.ipc
    resolved = resolve(replace(NET, norm=norm), spec.shape)
    net = build(resolved, spec.shape, classes, rng.torch("weights")) if net is None else net
    params = dsa.sample(rng.torch("augment"), dsa.strategy_for(spec.name), classes, spec.shape[1:])
    picks = source.draw(rng.torch("real"), range(classes), o.real_per_class)
    synthetic = synthetic.detach().clone().requires_grad_()
    loss = torch.zeros((), dtype=synthetic.dtype)
    for c in range(classes):
        row = params[torch.tensor([c])]
        real = (source.x[picks[c]].to(synthetic.dtype) / 255 - 0.5) / 0.25
        with torch.no_grad():
            target = class_statistics(net, dsa.apply(real, row), o.p)
        mine = class_statistics(net, dsa.apply(synthetic[c * ipc : (c + 1) * ipc], row), o.p)
        for layer, (a, b) in enumerate(zip(target, mine, strict=True)):
            embedding = o.mmd_weight * (2048 / len(a) if o.follow_width else 1)
            weight = embedding if layer == len(mine) - 1 else o.sam_weight
            loss = loss + o.scale * weight * ((a - b) ** 2).sum()
    return loss.detach(), torch.autograd.grad(loss, synthetic)[0]


@pytest.mark.parametrize(
    ("p", "name", "follow"), [(4, "noise", False), (1, "digits", False), (2, "noise", True)]
)
def test_a_step_is_the_formula_class_by_class(p, name, follow):
    problem, matcher = task(name=name), AttentionMatching(replace(QUICK, p=p, follow_width=follow), NET)
    rng, o = Rng(3), matcher.options.resolved()
    before = matcher.init(problem, rng)
    loss, gradient = reference_gradient(problem, o, before.synth.images, rng.fold("step", 0).fold(0))
    after, losses = stepped(matcher, problem)
    torch.testing.assert_close(losses[0], loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(
        after.velocity["images"], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max())
    )
    assert torch.equal(after.synth.images, before.synth.images - 3 * after.velocity["images"])
    assert after.step == 1 and not before.velocity["images"].any()


def test_a_step_is_the_formula_in_double_precision():
    problem = task()
    matcher = AttentionMatching(QUICK, NET)
    rng, o = Rng(3), matcher.options
    state, work = matcher.init(problem, rng), matcher.prepare(problem, rng)
    draws = rng.fold("step", 0, 0)
    images = state.synth.images.double()
    net = descent.draw_network(work, draws, o, 0).double()
    params = dsa.sample(draws.torch("augment"), dsa.STRATEGY, 3, (8, 9))
    work.data = SimpleNamespace(
        spec=problem.source.spec, draw=problem.source.draw,
        model_input=lambda index: (problem.source.x[index].double() / 255 - 0.5) / 0.25,
    )  # fmt: skip
    targets = descent.real_targets(work, net, draws, params, o, 7)
    synth = replace(state.synth, images=images)
    weights = 0.01 * descent_options.width_factor(targets[-1].shape[1], True)

    def loss(real, synthetic):
        pair = [Statistics(tuple(s[:-1]), s[-1]) for s in (real, synthetic)]
        return attention_matching_loss(*pair, weights)

    found, total = descent.matching_gradient(synth, work, net, params, targets, o, loss)
    wanted, gradient = reference_gradient(problem, o, images, draws, net=net)
    torch.testing.assert_close(total, wanted, rtol=1e-12, atol=0)
    torch.testing.assert_close(found["images"], gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("real", [None, 11])
def test_a_step_with_the_bank_is_the_formula_of_its_pair(real, tmp_path, monkeypatch):
    monkeypatch.setenv("DDENGINE_CACHE", str(tmp_path))
    monkeypatch.setattr(target_bank, "BLOCK", 2)
    problem = task()
    banked = replace(QUICK, bank="on", bank_reuse=2, bank_real=real, networks_per_step=2, momentum=0.0)
    matcher, rng = AttentionMatching(banked, NET), Rng(3)
    state, work = matcher.init(problem, rng), matcher.prepare(problem, rng)
    o = replace(matcher.options, real_per_class=real or 7)
    for numbers in ((0, 1), (0, 1), (2, 3)):
        images = state.synth.images
        runs = [reference_gradient(problem, o, images, rng.fold("bank", number)) for number in numbers]
        gradient = torch.stack([g for _, g in runs]).mean(0)
        state, metrics = matcher.step(state, work, rng)
        torch.testing.assert_close(
            metrics["loss"], torch.stack([loss for loss, _ in runs]).mean(), rtol=1e-5, atol=0
        )
        largest = float(gradient.abs().max())
        torch.testing.assert_close(state.velocity["images"], gradient, rtol=1e-3, atol=1e-5 * largest)


def test_compiled_steps_do_not_go_on_where_there_is_no_compiler(monkeypatch):
    def fail(*arguments):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", lambda function: function)
    problem, rng, o = task(), Rng(3), replace(QUICK, compile="on")
    matcher = AttentionMatching(o, NET)
    state, work = matcher.init(problem, rng), matcher.prepare(problem, rng)
    assert work.notes == () and state.compiled is None
    state, _ = matcher.step(state, work, rng)
    assert state.compiled is True
    monkeypatch.setattr(torch, "compile", lambda function: fail)
    other = matcher.prepare(problem, rng)
    assert other.notes == ("not compiled, which is slower: no compiler",)
    with pytest.raises(UsageError, match="the steps so far were compiled, the next would be not compiled"):
        matcher.step(state, other, rng)


@pytest.mark.parametrize(
    ("told", "steps", "device", "expected"),
    [
        ("auto", 10, "cuda", False),
        ("auto", 5000, "cuda", True),
        ("auto", 5000, "cpu", False),
        ("on", 10, "cpu", True),
        ("off", 5000, "cuda", False),
    ],
)
def test_long_runs_on_a_gpu_are_compiled(told, steps, device, expected):
    o = replace(QUICK, compile=told)
    assert descent._compiles(o, steps, torch.device(device)) == expected


def test_momentum_and_rate_follow_their_formula_over_steps():
    problem = task()
    matcher = AttentionMatching(replace(QUICK, momentum=0.7, schedule="drop", steps=4), NET)
    rng, o = Rng(3), matcher.options.resolved()
    images = matcher.init(problem, rng).synth.images
    velocity = torch.zeros_like(images)
    for step, lr in enumerate((3, 3, 0.3)):
        _, gradient = reference_gradient(problem, o, images, rng.fold("step", step).fold(0))
        velocity = 0.7 * velocity + gradient
        images = images - lr * velocity
    state, _ = stepped(matcher, problem, 3)
    torch.testing.assert_close(state.synth.images, images, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("chunk", [1, 7, 64, 10**6])
def test_chunks_change_neither_loss_nor_gradient(chunk):
    problem = task(classes=23, ipc=3)
    whole, loss = stepped(AttentionMatching(replace(QUICK, chunk=23 * 7), NET), problem)
    parts, same = stepped(AttentionMatching(replace(QUICK, chunk=chunk), NET), problem)
    a, b = whole.velocity["images"], parts.velocity["images"]
    torch.testing.assert_close(same, loss, rtol=1e-5, atol=0)
    assert (a - b).norm() <= 1e-5 * a.norm()


@pytest.mark.parametrize(("chunk", "ipc"), [(16, 2), (16, 9), (64, 1), (7, 3)])
def test_no_forward_is_larger_than_the_chunk(chunk, ipc):
    problem, matcher = task(classes=11, ipc=ipc), AttentionMatching(replace(QUICK, chunk=chunk), NET)
    rng, sizes = Rng(0), []
    work = matcher.prepare(problem, rng)
    statistics = work.extra["statistics"]

    def recorded(net, x):
        sizes.append(len(x))
        return statistics(net, x)

    work.extra["statistics"] = recorded
    matcher.step(matcher.init(problem, rng), work, rng)
    assert sum(sizes) == 11 * (7 + ipc) and max(sizes) <= chunk


@pytest.mark.parametrize(("chunk", "follow"), [(9, True), (512, False)])
def test_attention_without_its_attention_term_is_distribution_matching_bit_for_bit(chunk, follow):
    shared = {"steps": 5, "real_per_class": 7, "chunk": chunk, "lr": 0.3, "networks_per_step": 2}
    shared["follow_width"] = follow
    attention = AttentionMatching(AttentionOptions(sam_weight=0, mmd_weight=1, scale=1, **shared), NET)
    distribution = DistributionMatching(DistributionOptions(**shared), NET)
    (a, losses), (b, same) = (stepped(matcher, task(), 3) for matcher in (attention, distribution))
    assert torch.equal(losses, same) and losses.all()
    assert torch.equal(a.velocity["images"], b.velocity["images"])
    assert torch.equal(a.synth.images, b.synth.images)


@pytest.mark.parametrize("follow", [False, True])
def test_distribution_matching_is_its_formula(follow):
    problem = task()
    matcher = DistributionMatching(DistributionOptions(steps=3, real_per_class=7, follow_width=follow), NET)
    o = AttentionOptions(p=2.0, real_per_class=7, sam_weight=0, mmd_weight=1, scale=1, follow_width=follow)
    rng = Rng(3)
    images = matcher.init(problem, rng).synth.images
    loss, gradient = reference_gradient(problem, o, images, rng.fold("step", 0).fold(0))
    state, losses = stepped(matcher, problem)
    torch.testing.assert_close(losses[0], loss, rtol=1e-5, atol=0)
    largest = float(gradient.abs().max())
    torch.testing.assert_close(state.velocity["images"], gradient, rtol=1e-4, atol=1e-5 * largest)


def test_batch_norm_sees_all_classes_together_real_and_synthetic_apart():
    problem = task()
    matcher = AttentionMatching(replace(QUICK, variant="released", chunk=1, follow_width=False), NET)
    rng, spec, o = Rng(3), problem.source.spec, matcher.options.resolved()
    draws = rng.fold("step", 0).fold(0)
    images = matcher.init(problem, rng).synth.images
    net = build(resolve(replace(NET, norm="batch"), spec.shape), spec.shape, 3, draws.torch("weights"))
    params = dsa.sample(draws.torch("augment"), dsa.STRATEGY, 3, spec.shape[1:])
    picks = problem.source.draw(draws.torch("real"), range(3), 7)

    def means(x, place):
        hidden = net.norms[0](net.convs[0](dsa.apply(x, params, place))).clamp(min=0)
        last = net.norms[1](net.convs[1](nn.functional.avg_pool2d(hidden, 2))).clamp(min=0)
        z = hidden.sum(1).flatten(1)
        rows = torch.cat(
            [z / z.norm(dim=1, keepdim=True), 0.1 * nn.functional.avg_pool2d(last, 2).flatten(1)], 1
        )
        return torch.stack([rows[place == c].mean(0) for c in range(3)])

    real = means(problem.source.model_input(torch.cat(picks)), torch.arange(3).repeat_interleave(7))
    loss = 100 * (real - means(images, torch.arange(3).repeat_interleave(2))).square().sum()
    _, losses = stepped(matcher, problem)
    torch.testing.assert_close(losses[0], loss.detach(), rtol=1e-5, atol=0)
    apart, _ = reference_gradient(problem, o, images, draws, "batch")
    assert abs(apart - loss) > 1e-3 * loss  # a hundred times the tolerance above


def test_instance_norm_does_not_see_which_classes_go_together():
    problem, matcher = task(classes=5), AttentionMatching(QUICK, NET)
    rng = Rng(3)
    state, work = matcher.init(problem, rng), matcher.prepare(problem, rng)
    apart, _ = matcher.step(state, work, rng)
    work.extra["together"] = True
    together, _ = matcher.step(state, work, rng)
    torch.testing.assert_close(together.velocity["images"], apart.velocity["images"], rtol=1e-4, atol=1e-5)


def test_the_gradient_is_the_mean_over_the_networks_of_a_step():
    problem, matcher = task(), AttentionMatching(replace(QUICK, networks_per_step=3), NET)
    rng, o = Rng(3), matcher.options.resolved()
    images = matcher.init(problem, rng).synth.images
    runs = [reference_gradient(problem, o, images, rng.fold("step", 0).fold(i)) for i in range(3)]
    assert len({float(loss) for loss, _ in runs}) == 3
    state, losses = stepped(matcher, problem)
    torch.testing.assert_close(losses[0], torch.stack([loss for loss, _ in runs]).mean(), rtol=1e-5, atol=0)
    gradient = torch.stack([g for _, g in runs]).mean(0)
    torch.testing.assert_close(
        state.velocity["images"], gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max())
    )


def test_every_real_image_is_drawable_and_none_twice_in_a_batch():
    problem, matcher = task(), AttentionMatching(replace(QUICK, sam_weight=0), NET)
    rng, batches = Rng(1), []
    state, work = matcher.init(problem, rng), matcher.prepare(problem, rng)
    data = work.data

    def recorded(index):
        batches.append(index.tolist())
        return data.model_input(index)

    work.data = SimpleNamespace(spec=data.spec, draw=data.draw, model_input=recorded)
    for _ in range(30):
        state, _ = matcher.step(state, work, rng)
    assert all(len(set(batch)) == len(batch) == 3 * 7 for batch in batches)
    assert {index for batch in batches for index in batch} == set(range(len(data)))
    assert len({tuple(sorted(batch)) for batch in batches}) == 30
    assert all(sum(int(data.y[i]) == c for i in batch) == 7 for batch in batches for c in range(3))


def test_a_class_smaller_than_the_batch_gives_all_its_images():
    problem = task(each=(3, 13, 5))
    o = replace(QUICK, real_per_class=11).resolved()
    rng = Rng(3)
    matcher = AttentionMatching(o, NET)
    loss, _ = reference_gradient(
        problem, o, matcher.init(problem, rng).synth.images, rng.fold("step", 0).fold(0)
    )
    _, losses = stepped(matcher, problem)
    torch.testing.assert_close(losses[0], loss, rtol=1e-5, atol=0)


def test_networks_and_augmentations_are_drawn_anew_in_each_step():
    problem, matcher = task(), AttentionMatching(replace(QUICK, lr=1e-12), NET)
    _, losses = stepped(matcher, problem, 4)
    assert len(set(losses.tolist())) == 4


def test_real_images_as_their_own_synthetic_set_do_not_move():
    problem = task(classes=2, each=(5,), ipc=5)
    matcher = AttentionMatching(replace(QUICK, real_per_class=5), NET)
    state, losses = stepped(matcher, problem)
    assert losses[0] < 1e-7 and state.velocity["images"].abs().max() < 1e-4


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("constant", [2.0] * 6),
        ("drop", [2.0, 2.0, 2.0, 0.2, 0.2, 0.2]),
        ("cosine", [1 + math.cos(math.pi * step / 6) for step in range(6)]),
    ],
)
def test_schedules_are_as_computed_by_hand(schedule, rates):
    for step, rate in enumerate(rates):
        assert math.isclose(descent_options.scheduled(2.0, schedule, step, 6), rate, rel_tol=1e-12)


def test_metrics_name_the_rate_of_the_step():
    problem, matcher = task(), AttentionMatching(replace(QUICK, schedule="cosine", steps=2), NET)
    rng = Rng(0)
    state, work = matcher.init(problem, rng), matcher.prepare(problem, rng)
    rates = []
    for _ in range(2):
        state, metrics = matcher.step(state, work, rng)
        rates.append(metrics["lr"])
    assert rates == pytest.approx([3.0, 1.5])


def test_groups_cover_the_classes_in_order():
    for classes, per_class, chunk, sizes in [
        (7, 5, 11, [2, 2, 2, 1]),
        (3, 5, 4, [1, 1, 1]),
        (5, 2, 100, [5]),
    ]:
        parts = list(descent.groups(classes, per_class, chunk, False))
        assert [len(part) for part in parts] == sizes and torch.cat(parts).tolist() == list(range(classes))
    assert len(next(descent.groups(7, 5, 1, True))) == 7


def test_bf16_follows_fp32():
    problem = task(classes=5)
    gradients, losses = [], []
    for precision in ("fp32", "bf16"):
        state, loss = stepped(AttentionMatching(QUICK, NET), replace(problem, precision=precision))
        gradients.append(state.velocity["images"].flatten())
        losses.append(loss)
    assert state.synth.images.dtype == torch.float32
    torch.testing.assert_close(losses[1], losses[0], rtol=0.05, atol=0)
    assert nn.functional.cosine_similarity(*gradients, dim=0) > 0.98
    assert not torch.equal(*gradients)


def test_fractions_of_a_step_are_refused():
    for key in ("steps", "chunk", "networks_per_step", "real_per_class", "bank_reuse", "bank_real"):
        with pytest.raises(UsageError, match=f"matcher.{key}=2.5 is out of range\nGive a whole number"):
            descent_options.check_options(SimpleNamespace(**{**vars(QUICK), key: 2.5}))

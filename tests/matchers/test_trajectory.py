"""The outer loop against plain autograd; what each option changes and what it leaves alone; skipped steps."""

import math
from dataclasses import replace
from types import SimpleNamespace

import naive_trajectory
import pytest
import torch
import torch.nn.functional as F
import trained_experts

import matchers
from ddengine import checkpoint
from ddengine.data import load
from ddengine.errors import DDError, UsageError
from ddengine.nets import NetSpec, build
from ddengine.ops import dsa
from ddengine.rng import Rng
from ddengine.types import Budget, Task
from matchers import student, trajectory
from matchers.trajectory import TrajectoryOptions, clip_factor, trajectory_loss
from synth import DistilledSet

NET = NetSpec("convnet", width=4, depth=2)
IPC = 2
INNER = {"steps": 3, "rate": 0.02}
REFUSED = (UsageError, TypeError)  # TypeError where annotations are checked
pytestmark = pytest.mark.filterwarnings("ignore:no expert is right about")


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    digits = load("digits").fit
    some = digits.take(torch.arange(0, len(digits), 13))
    buffer = trained_experts.write(tmp_path_factory.mktemp("experts") / "buffer", some, NET, batch=7)
    return Task(some, Budget(IPC), buffer)


@pytest.fixture(scope="module")
def plain(task):
    """The state after three steps of the published method."""
    return stepped(task).state


def make(network=NET, **options):
    return matchers.make("trajectory", network, **{"steps": 4, "inner": INNER, **options})


class Run:
    """A matcher at work: `go` steps it, `spy` changes what its gradient method returns."""

    def __init__(self, matcher, task, seed=3):
        self.matcher, self.rng = matcher, Rng(seed)
        self.state = matcher.init(task, self.rng)
        self.work = matcher.prepare(task, self.rng)
        self.metrics, self.calls = [], []

    def spy(self, change=lambda found, count: found):
        method = self.work.extra["method"]

        def spied(*args):
            found = method(*args)
            self.calls.append(SimpleNamespace(args=args, found=found))
            return change(found, len(self.calls))

        self.work.extra["method"] = spied
        return self

    def go(self, steps=1):
        for _ in range(steps):
            self.state, measured = self.matcher.step(self.state, self.work, self.rng)
            self.metrics.append({key: float(value) for key, value in measured.items()})
        return self.state

    def finish(self):
        synth = self.matcher.finish(self.state, self.work, self.rng)
        self.work.close()
        return synth


def stepped(task, steps=3, network=NET, **options):
    run = Run(make(network, **options), task)
    run.go(steps)
    run.work.close()
    return run


def bits(state, *without):
    return {k: v for k, v in checkpoint.leaves(state) if not k.startswith(tuple(f"/{w}" for w in without))}


def same(a, b, *without):
    one, two = bits(a, *without), bits(b, *without)
    return one.keys() == two.keys() and all(
        torch.equal(v, two[k]) if isinstance(v, torch.Tensor) else v == two[k] for k, v in one.items()
    )


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_loss_is_the_ratio_of_two_squared_distances():
    start, end, target = randn(11), randn(11, seed=1), randn(11, seed=2)
    above = sum((a - b) ** 2 for a, b in zip(end.tolist(), target.tolist(), strict=True))
    below = sum((a - b) ** 2 for a, b in zip(start.tolist(), target.tolist(), strict=True))
    assert math.isclose(trajectory_loss(start, end, target), above / below, rel_tol=1e-14)


def test_loss_is_one_at_the_start_and_zero_at_the_target():
    start, target = randn(11), randn(11, seed=2)
    assert trajectory_loss(start, start, target) == 1 and trajectory_loss(start, target, target) == 0


@pytest.mark.parametrize(("scale", "shift"), [(7.0, 0.0), (1e-3, 0.0), (1.0, 5.0), (-0.2, -3.0)])
def test_loss_ignores_what_is_common_to_all_three_vectors(scale, shift):
    vectors = [randn(11, seed=s) for s in range(3)]
    moved = trajectory_loss(*(scale * v + shift for v in vectors))
    torch.testing.assert_close(moved, trajectory_loss(*vectors), rtol=1e-11, atol=0)


def test_gradient_of_the_loss_is_exact():
    start, target = randn(11), randn(11, seed=2)
    end = randn(11, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: trajectory_loss(start, v, target), end)


def test_loss_refuses_vectors_of_other_lengths_and_an_expert_that_stood_still():
    with pytest.raises(REFUSED, match=r"parameter vectors of shapes|student"):
        trajectory_loss(randn(11), randn(7), randn(11))
    with pytest.raises(UsageError, match=r"start and target are equal\nGive a target that differs"):
        trajectory_loss(randn(11), randn(11, seed=1), randn(11))


def given_of(run, task, o):
    """The segment, batches and augmentation of each step, from the run's draws alone."""
    plan, images = run.work.extra["plan"], 10 * task.ipc

    def given(step):
        expert, epoch = plan.draw(step)
        rows, _ = task.experts.rows(expert, range(epoch, epoch + o.expert_epochs + 1))
        rng = run.rng.fold("step", step)
        index = student.batches(rng.fold("batches"), images, o.inner.batch, o.inner.steps)
        strategy = dsa.strategy_for("digits")
        augment = student.augmentation(rng.fold("augment"), strategy, index, (8, 8))
        return SimpleNamespace(start=rows[0], targets=rows[1:]), index, augment

    return given


@pytest.mark.parametrize(("labels", "batch"), [("hard", None), ("hard", 7), ("learned", 7)])
def test_three_steps_at_the_defaults_are_the_paper_under_plain_autograd(task, labels, batch):
    inner = {} if batch is None else {"batch": batch, "steps": 11}
    o = TrajectoryOptions()
    assert (o.lr, o.momentum, o.lr_rate, o.inner.rate, o.expert_epochs) == (100, 0.5, 1e-5, 0.01, 2)
    matcher = matchers.make("trajectory", NET, steps=3, clip=0, labels=labels, inner=inner)
    run, o = Run(matcher, task), matcher.options
    net = build(NET, (1, 8, 8), 10, torch.Generator().manual_seed(0))
    before = run.state.synth
    images, y, a, losses = naive_trajectory.descend(
        net, before.images, before.labels, 0.01, 3, given_of(run, task, o), 100, 1e-5, 2.0, 0.5, 0.9
    )
    state = run.go(3)
    run.work.close()
    assert (images - before.images).norm() > 1e-2 * before.images.norm()  # so that equal means something
    torch.testing.assert_close(state.synth.images, images, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(state.log_rate - math.log(0.01), a - math.log(0.01), rtol=1e-3, atol=2e-6)
    assert [m["loss"] for m in run.metrics] == pytest.approx(losses, rel=1e-4)
    assert abs(float(a) - math.log(0.01)) > 1e-4
    if labels == "learned":
        torch.testing.assert_close(state.synth.labels, y, rtol=1e-4, atol=1e-5)
        assert (y - before.labels).abs().max() > 1e-3


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_all_exact_gradients_agree_and_teslas_does_not(task, momentum):
    inner = {**INNER, "momentum": momentum, "weight_decay": 1e-3, "batch": 7}
    ways = {
        "adjoint": {"gradient": "adjoint", "inner": inner},
        "unroll": {"gradient": "unroll", "inner": inner},
        "higher": {"gradient": "unroll", "inner": {**inner, "backend": "higher"}},
        "tesla": {"gradient": "tesla", "inner": inner},
    }
    shared = {"labels": "learned", "middle": "equal", "balance": True}
    velocities = {}
    for name, way in ways.items():
        velocities[name] = stepped(task, 1, **shared, **way).state.velocity
    for key, truth in velocities["unroll"].items():
        gaps = {n: float((v[key] - truth).norm() / truth.norm()) for n, v in velocities.items()}
        assert gaps["adjoint"] < 1e-4 and gaps["higher"] < 1e-4, (key, gaps)
        assert gaps["tesla"] > 1e-4 + 10 * gaps["adjoint"], (key, gaps)


def test_learned_labels_of_fifty_give_the_gradient_of_hard_ones(task):
    hard, soft = Run(make(), task), Run(make(labels="learned"), task)
    sure = 100.0 * F.one_hot(hard.state.synth.labels, 10) - 50
    soft.state = replace(soft.state, synth=soft.state.synth.replace({"labels": sure.float()}))
    hard.go()
    soft.go()
    assert soft.metrics[0]["loss"] == pytest.approx(hard.metrics[0]["loss"], rel=1e-6)
    torch.testing.assert_close(soft.state.velocity["images"], hard.state.velocity["images"])


def test_an_average_that_is_not_read_changes_nothing_else(task, plain):
    averaged = stepped(task, ema=0.9).state
    assert same(plain, averaged, "average") and set(averaged.average) == {"images"}


@pytest.mark.parametrize(
    "options",
    [
        {"window": {"min": 0, "max": 3}},
        {"window": {"start": 3, "max": 3, "expand": 100}},
        {"middle": "off", "balance": False, "perturb": 0.0, "ema": 0.0, "skip_above": None},
        {"skip_above": 1e9},
        {"inner": {**INNER, "batch": 10 * IPC}},
        {"clip": 0},  # nothing is clipped before eight norms are known
    ],
)
def test_switches_that_are_off_leave_every_bit(task, plain, options):
    assert same(plain, stepped(task, **options).state)


def test_one_epoch_has_no_middle_to_match(task):
    plain = stepped(task, expert_epochs=1).state
    assert same(plain, stepped(task, expert_epochs=1, middle="equal").state)


@pytest.mark.parametrize(
    "options",
    [
        {"middle": "equal"},
        {"middle": "adaptive"},
        {"balance": True},
        {"perturb": 1.0},
        {"window": {"min": 2}},
        {"window": {"max": 1}},
        {"window": {"start": 1, "max": 3, "expand": 100}},
        {"order": "sequential"},
        {"expert_epochs": 1},
        {"inner": {**INNER, "momentum": 0.9}},
        {"inner": {**INNER, "weight_decay": 0.1}},
        {"inner": {**INNER, "batch": 7}},
        {"augment": "none"},
        {"schedule": "drop"},
        {"gradient": "tesla"},
        {"labels": "soft"},
        {"labels": "target"},
        {"start": "correct"},
        {"start": "representative"},
    ],
)
def test_a_switch_that_is_on_changes_the_set(task, plain, options):
    other = stepped(task, **options).state.synth
    assert other.images.isfinite().all() and not torch.equal(plain.synth.images, other.images)


def test_adaptive_and_equal_middles_differ(task):
    equal, adaptive = (stepped(task, 1, middle=middle).metrics[0]["loss"] for middle in ("equal", "adaptive"))
    assert equal > adaptive


def test_soft_labels_stay_and_learned_ones_move(task):
    for labels, moves in (("soft", False), ("learned", True)):
        run = Run(make(labels=labels), task)
        before = run.state.synth.labels.clone()
        after = run.go(2).synth.labels
        run.work.close()
        assert torch.equal(before, after) != moves
        assert set(run.state.velocity) == {"images", "rate", *(["labels"] if moves else [])}


def test_target_labels_are_those_of_the_checkpoint_that_is_to_be_reached(task):
    run = Run(make(labels="target"), task).spy()
    for step in range(3):
        images = run.state.synth.images.clone()
        run.go()
        expert, epoch = (int(run.metrics[-1][key]) for key in ("expert", "epoch"))
        assert (expert, epoch) == run.work.extra["plan"].draw(step)
        with torch.no_grad():
            expected = task.experts.build(expert, epoch + 2).eval()(images)
        torch.testing.assert_close(run.calls[-1].args[3], expected)
    assert len({m["epoch"] for m in run.metrics}) > 1 or len({m["expert"] for m in run.metrics}) > 1
    found = run.finish().decode()
    assert found.y_kind == "prob"
    torch.testing.assert_close(found.y.sum(1), torch.ones(20))
    last = torch.stack([task.experts.build(i, 4).eval()(found.x).softmax(1) for i in range(2)]).mean(0)
    torch.testing.assert_close(found.y, last.detach())  # the last epoch that a segment ends at


def test_metrics_describe_the_segment_and_the_step(task):
    run = Run(make(), task).spy()
    run.go()
    (found,) = run.metrics
    rows, _ = task.experts.rows(int(found["expert"]), [int(found["epoch"]), int(found["epoch"]) + 2])
    assert found["distance"] == pytest.approx(float((rows[0] - rows[1]).square().sum()), rel=1e-5)
    assert found["rate"] == pytest.approx(0.02) and found["skipped"] == 0
    gradient = run.calls[0].found
    assert found["gradient_images"] == pytest.approx(float(gradient.images.norm()))
    assert found["gradient_rate"] == pytest.approx(abs(float(gradient.rate)) * 0.02)
    assert found["loss"] == pytest.approx(float(gradient.miss))


BROKEN = {
    "loss": lambda found: found._replace(miss=found.miss * torch.nan),
    "images": lambda found: found._replace(images=found.images.index_fill(0, torch.tensor([3]), torch.inf)),
    "rate": lambda found: found._replace(rate=found.rate * torch.nan),
    "labels": lambda found: found._replace(labels=found.labels * torch.nan),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_step_that_is_not_finite_moves_nothing_is_counted_and_passed_over(task, what):
    run = Run(make(labels="learned", ema=0.9), task)
    run.spy(lambda found, count: BROKEN[what](found) if count == 2 else found)
    before = run.go()
    after = run.go()
    assert same(before, after, "step", "skipped", "in_row")
    assert (after.step, after.skipped, after.in_row) == (2, 1, 1)
    assert all(math.isfinite(value) for value in run.metrics[-1].values()) and "loss" not in run.metrics[-1]
    last = run.go()
    assert (last.step, last.skipped, last.in_row) == (3, 1, 0) and run.metrics[-1]["skipped"] == 1
    assert not torch.equal(last.synth.images, after.synth.images)
    assert not torch.equal(last.synth.labels, after.synth.labels)


def test_images_that_are_not_finite_stop_at_the_skip(task):
    run = Run(make(), task)
    pixels = run.state.synth.images.clone()
    pixels[3, 0, 2, 5] = torch.nan
    run.state = replace(run.state, synth=run.state.synth.replace({"images": pixels}))
    before = run.state
    after = run.go()
    assert after.skipped == 1 and torch.equal(after.log_rate, before.log_rate)
    assert not after.velocity["images"].any() and "loss" not in run.metrics[0]


def test_a_loss_above_the_bound_moves_nothing_and_one_below_does(task):
    loss = stepped(task, 1).metrics[0]["loss"]
    assert stepped(task, 1, skip_above=loss).state.skipped == 0  # at the bound is not above it
    tight = Run(make(skip_above=loss * 0.999), task)
    before = tight.state
    after = tight.go()
    assert same(before, after, "step", "skipped", "in_row", "compiled") and after.skipped == 1
    assert tight.metrics[0]["loss"] == loss


def test_too_many_skipped_steps_in_a_row_end_the_run_with_a_remedy(task, monkeypatch):
    monkeypatch.setattr(trajectory, "PATIENCE", 3)
    run = Run(make(skip_above=1e-9), task)
    run.go(2)
    with pytest.raises(DDError, match=r"3 steps in a row were skipped, the last with loss .*\nLower matcher"):
        run.go()
    spaced = Run(make(), task).spy(lambda found, count: BROKEN["rate"](found) if count % 3 else found)
    assert spaced.go(6).skipped == 4  # never three in a row


def rate_after(task, gradient, **options):
    run = Run(make(momentum=0.0, **options), task)
    run.spy(lambda found, count: found._replace(rate=torch.tensor(gradient)))
    return float(run.go().log_rate.exp())


@pytest.mark.parametrize("gradient", [1e4, -1e3, 3e4])
def test_the_rate_stays_positive_where_the_published_step_would_not(task, gradient):
    published = 0.02 - 1e-5 * gradient
    found = rate_after(task, gradient)
    assert 0 < found < math.inf and (published < 0) == (gradient > 0)


@pytest.mark.parametrize("gradient", [0.5, -3.0, 7.0])
def test_a_small_step_of_the_rate_is_the_published_one(task, gradient):
    found = rate_after(task, gradient, lr_rate=1e-5)
    assert found - 0.02 == pytest.approx(-1e-5 * gradient, rel=5e-3, abs=1e-8)


def test_a_rate_of_zero_for_the_rate_leaves_it(task):
    assert stepped(task, lr_rate=0.0).state.log_rate == torch.tensor(math.log(0.02), dtype=torch.float32)


def test_clipping_is_to_a_multiple_of_the_median_norm():
    known = torch.cat([torch.zeros(24), torch.arange(1.0, 9.0)])  # median 4, the lower one
    assert clip_factor(torch.tensor(16.0), known, 2) == 0.5
    assert clip_factor(torch.tensor(8.0), known, 2) == 1
    assert clip_factor(torch.tensor(1e-9), known, 2) == 1
    assert clip_factor(torch.tensor(80.0), known, 10) == 0.5
    assert clip_factor(torch.tensor(1e9), known, 0) == 1
    few = torch.cat([torch.zeros(25), torch.arange(1.0, 8.0)])
    assert clip_factor(torch.tensor(1e9), few, 2) == 1
    assert clip_factor(torch.tensor(0.0), known, 2) == 1


def test_a_spike_is_clipped_when_norms_are_known_and_remembered_as_it_was(task):
    spike = 1e3
    run = Run(make(lr=100, clip=2, momentum=0.0, steps=20), task)
    run.spy(lambda found, count: found._replace(images=found.images * spike) if count == 9 else found)
    state = run.go(8)
    sizes = [m["gradient_images"] for m in run.metrics]
    assert state.norms["images"][-8:].tolist() == pytest.approx(sizes)
    before = state.synth.images
    after = run.go()
    bound = 2 * sorted(sizes)[3]
    assert float(after.velocity["images"].norm()) == pytest.approx(bound, rel=1e-4)
    assert float((after.synth.images - before).norm()) == pytest.approx(100 * bound, rel=1e-3)
    assert float(after.norms["images"][-1]) == pytest.approx(run.metrics[-1]["gradient_images"])


def test_batch_norm_works_and_leaves_no_trace(task, tmp_path):
    norm = replace(NET, norm="batch")
    buffer = trained_experts.write(tmp_path / "buffer", task.source, norm, count=1, epochs=3)
    run = Run(make(norm, labels="target", gradient="unroll"), replace(task, experts=buffer))
    weights = {k: v.clone() for k, v in run.work.extra["net"].state_dict().items()}
    first = run.go(2)
    assert all(torch.equal(v, weights[k]) for k, v in run.work.extra["net"].state_dict().items())
    assert not any("running" in k for k in weights) and first.skipped == 0
    again = Run(make(norm, labels="target", gradient="unroll"), replace(task, experts=buffer))
    assert same(again.go(2), first) and run.finish().decode().x.isfinite().all()


def test_the_finished_set_has_the_rate_and_survives_being_stored(task, tmp_path):
    run = Run(make(labels="learned", codec="fp32"), task)
    state = run.go(3)
    synth = run.finish()
    assert synth.student_lr == float(state.log_rate.exp()) != 0.02
    assert torch.equal(synth.images, state.synth.images) and torch.equal(synth.labels, state.synth.labels)
    DistilledSet.make(synth, recipe={}, provenance={}).save(tmp_path / "set")
    stored = DistilledSet.load(tmp_path / "set")
    images = stored.decode()
    assert torch.equal(images.x, synth.images) and images.y_kind == "logit"
    assert torch.equal(images.y, synth.labels)
    assert float(stored.tensors["student_lr"]) == pytest.approx(synth.student_lr)


def test_the_finished_set_is_the_average_of_what_it_was(task):
    run = Run(make(labels="learned", ema=0.75), task)
    averages = dict(run.state.synth.params())
    for _ in range(3):
        found = run.go().synth.params()
        averages = {key: 0.75 * value + 0.25 * found[key] for key, value in averages.items()}
    synth = run.finish()
    torch.testing.assert_close(synth.images, averages["images"])
    torch.testing.assert_close(synth.labels, averages["labels"])
    assert synth.student_lr == float(run.state.log_rate.exp())
    assert not torch.equal(synth.images, run.state.synth.images)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "matcher.steps=0 is out of range"),
        ({"expert_epochs": -1}, "matcher.expert_epochs=-1 is out of range"),
        ({"lr": math.nan}, "matcher.lr=nan is out of range"),
        ({"lr_rate": -1e-5}, "matcher.lr_rate=-1e-05"),
        ({"skip_above": 0}, "matcher.skip_above=0 is out of range"),
        ({"clip": -1}, "matcher.clip=-1 is out of range"),
        ({"ema": 1.0}, r"matcher.ema=1.0 is out of range\nGive 0 <= value < 1"),
        ({"momentum": 1}, "matcher.momentum=1 is out of range"),
        ({"gradient": "adjont"}, r"unknown matcher.gradient 'adjont'\nDid you mean 'adjoint'\?"),
        ({"labels": "soft_"}, r"unknown matcher.labels 'soft_'\nDid you mean 'soft'\?"),
        ({"start": "corect"}, r"unknown matcher.start 'corect'\nDid you mean 'correct'\?"),
        ({"middle": "on"}, "unknown matcher.middle 'on'"),
        ({"order": "random"}, "unknown matcher.order 'random'"),
        ({"compile": "maybe"}, "unknown matcher.compile 'maybe'"),
        ({"augment": "crop_flop"}, "unknown augmentation 'flop'"),
        ({"inner": student.InnerOptions(backend="higher")}, "backend=higher with matcher.gradient=adjoint"),
        ({"inner": student.InnerOptions(steps=1), "middle": "equal"}, "with 1 steps for 2 epochs"),
    ],
)
def test_options_outside_their_range_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        TrajectoryOptions(**options)


@pytest.mark.parametrize("kind", [TrajectoryOptions, student.InnerOptions])
def test_fractions_of_a_step_are_refused(kind):
    with pytest.raises(UsageError, match=r"steps=2.5 is not a whole number\nGive a whole number"):
        kind.__post_init__(SimpleNamespace(**{**vars(kind()), "steps": 2.5}))


def test_one_wild_gradient_moves_the_rate_by_no_more_than_a_factor_e(task):
    run = Run(make(lr_rate=1e6), task)
    before = run.state.log_rate
    assert abs(float(run.go().log_rate - before)) == pytest.approx(1.0)

"""Pixel matchers whose networks are checkpoints of experts: which ones they draw, and when they refuse."""

from dataclasses import replace

import pytest
import torch
import toy_experts

import matchers
from ddengine.data import load
from ddengine.errors import UsageError
from ddengine.loop import check_fit
from ddengine.nets import NetSpec
from ddengine.rng import Rng
from ddengine.types import Budget, Task
from matchers import descent

NET = NetSpec("convnet", width=3, depth=2)
BATCH = replace(NET, norm="batch")
EPOCHS = {0: 4, 1: 5, 2: 3}  # experts 0 and 2 have NET, expert 1 has batch norm


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    digits = load("digits").fit
    some = digits.take(torch.arange(0, len(digits), 29))
    walks = [
        toy_experts.walk((NET, BATCH)[i % 2], epochs, i, 0.01, some.spec) for i, epochs in EPOCHS.items()
    ]
    root = tmp_path_factory.mktemp("experts") / "buffer"
    return Task(some, Budget(1), toy_experts.write(root, walks, (NET, BATCH), spec=some.spec))


def make(name, network=NET, **options):
    small = {"steps": 3, "real_per_class": 2, "networks": "buffer"}
    return matchers.make(name, network, **{**small, **options})


def checkpoints(buffer):
    """(weights and statistics, (expert, epoch)) of every checkpoint."""
    for i in range(len(buffer)):
        both = zip(*buffer.rows(i, range(buffer.epochs(i) + 1)), strict=True)
        yield from ((torch.cat(pair), (i, epoch)) for epoch, pair in enumerate(both))


def found_in(table, net):
    """(expert, epoch) of the checkpoint whose weights and statistics a network has, bit for bit."""
    tensors = [*net.parameters(), *net.buffers()]
    held = torch.cat([t.detach().float().flatten() for t in tensors])
    return next(place for row, place in table if torch.equal(row, held))


def drawn(task, matcher, iteration, count):
    """The checkpoints that so many draws of an iteration give."""
    work, table = matcher.prepare(task, Rng(3)), list(checkpoints(task.experts))
    rngs = [Rng(3).fold("step", n) for n in range(count)]
    nets = (descent.draw_network(work, rng, matcher.options, iteration) for rng in rngs)
    return [found_in(table, net) for net in nets]


@pytest.mark.parametrize("name", ["attention", "distribution"])
def test_every_network_of_a_step_is_a_checkpoint_of_an_expert(task, name, monkeypatch):
    seen, draw, table = [], descent.draw_network, list(checkpoints(task.experts))

    def spied(work, *rest):
        net = draw(work, *rest)
        assert net.training
        seen.append(found_in(table, net))
        return net

    monkeypatch.setattr(descent, "draw_network", spied)
    matcher, rng = make(name, networks_per_step=2), Rng(3)
    state, work = matcher.init(task, rng), matcher.prepare(task, rng)
    for _ in range(3):
        state, metrics = matcher.step(state, work, rng)
        assert metrics["loss"].isfinite()
    assert len(seen) == 6 and len(set(seen)) > 2 and {i for i, _ in seen} <= {0, 2}


def test_all_checkpoints_of_the_window_are_drawn_and_no_other(task):
    everything = set(drawn(task, make("attention"), 0, 90))
    assert everything == {(i, epoch) for i in (0, 2) for epoch in range(EPOCHS[i] + 1)}
    some = set(drawn(task, make("attention", window={"min": 1, "max": 3}), 0, 40))
    assert some == {(i, epoch) for i in (0, 2) for epoch in (1, 2)}


def test_the_window_grows_with_the_iterations(task):
    matcher = make("attention", window={"start": 1, "max": 3, "expand": 10})
    for iteration, last in ((4, 0), (5, 1), (9, 1), (10, 2)):
        epochs = {epoch for _, epoch in drawn(task, matcher, iteration, 20)}
        assert epochs == set(range(last + 1))


def test_statistics_of_batch_norm_come_with_the_weights(task):
    found = drawn(task, make("attention", BATCH), 0, 12)
    assert {i for i, _ in found} == {1} and len(set(found)) > 3


@pytest.mark.parametrize(
    ("window", "beyond"), [({"max": 5}, 3), ({"min": 4}, 3), ({"start": 5, "max": 9}, 3)]
)
def test_a_window_beyond_the_buffer_is_refused_with_what_it_holds(task, window, beyond):
    with pytest.raises(
        UsageError, match=rf"window reaches beyond the {beyond} epochs .*\nGive .*max={beyond + 1}"
    ):
        make("attention", window=window).prepare(task, Rng(3))
    make("attention", window={"max": 4}).prepare(task, Rng(3))


def test_experts_are_asked_for_and_must_be_a_buffer_with_the_network(task):
    matcher = make("distribution")
    assert matcher.accepts.experts and not make("distribution", networks="random").accepts.experts
    with pytest.raises(UsageError, match=r"learns from experts and was given none\nGive experts=DIR"):
        check_fit(replace(task, experts=None), matcher)
    with pytest.raises(UsageError, match="experts are a str"):
        matcher.prepare(replace(task, experts="runs/experts"), Rng(3))
    with pytest.raises(
        UsageError, match=r"the buffer holds convnet width=3.*the matcher uses convnet width=5"
    ):
        make("attention", replace(NET, width=5)).prepare(task, Rng(3))


def test_random_networks_do_not_read_the_buffer(task, monkeypatch):
    monkeypatch.setattr(type(task.experts), "rows", lambda *a: pytest.fail("a buffer was read"))
    states = []
    for problem in (task, replace(task, experts=None)):
        matcher, rng = make("attention", networks="random"), Rng(3)
        states.append(matcher.step(matcher.init(problem, rng), matcher.prepare(problem, rng), rng)[0])
    assert torch.equal(states[0].synth.images, states[1].synth.images)

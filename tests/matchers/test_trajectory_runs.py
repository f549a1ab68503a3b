"""Trajectory matching in its folder: stopped and resumed, refused by name, compiled or told why not."""

import os
import re
import signal
from dataclasses import replace

import pytest
import torch
import toy_experts
import trained_experts

import matchers
from ddengine.data import load
from ddengine.errors import Interrupted, UsageError
from ddengine.loop import Schedule, distill
from ddengine.nets import NetSpec
from ddengine.ops import compiled
from ddengine.types import Budget, Task
from matchers import trajectory, trajectory_options
from matchers.student import InnerOptions
from matchers.trajectory import TrajectoryOptions

NET = NetSpec("convnet", width=4, depth=2)
EACH = Schedule(checkpoint_steps=2, log_steps=1)
STEPS = 7
WIDE = {"labels": "learned", "start": "correct", "ema": 0.9, "middle": "equal", "perturb": 1.0}


@pytest.fixture(scope="module")
def source():
    digits = load("digits").fit
    return digits.take(torch.arange(0, len(digits), 13))


@pytest.fixture(scope="module")
def task(source, tmp_path_factory):
    root = tmp_path_factory.mktemp("experts") / "buffer"
    return Task(source, Budget(1), trained_experts.write(root, source, NET, batch=7))


def make(network=NET, **options):
    return matchers.make("trajectory", network, **{"steps": STEPS, "inner": {"steps": 2}, **options})


@pytest.fixture(scope="module")
def straight(task, tmp_path_factory):
    """A run that nothing stopped."""
    return distill(task, make(**WIDE), seed=2, out=tmp_path_factory.mktemp("runs") / "run", schedule=EACH)


def stop_at(at):
    """A progress callback that interrupts this process at one step."""

    def progress(step, steps, values):
        if step == at:
            os.kill(os.getpid(), signal.SIGINT)

    return progress


def same_set(a, b):
    return a.tensors.keys() == b.tensors.keys() and all(
        torch.equal(t, b.tensors[name]) for name, t in a.tensors.items()
    )


def losses(folder):
    return [line.split('"seconds"')[0] + line.split('"rate"')[1] for line in _lines(folder)]


def _lines(folder):
    return (folder / "metrics.jsonl").read_text().splitlines()


def test_interrupted_runs_end_with_the_bits_and_the_log_of_a_straight_one(straight, task, tmp_path):
    out = tmp_path / "run"
    for at in (1, 4, 5):
        with pytest.raises(Interrupted, match=f"stopped by SIGINT at step {at} of {STEPS}"):
            distill(task, make(**WIDE), seed=2, out=out, schedule=EACH, progress=stop_at(at))
    result = distill(task, make(**WIDE), seed=2, out=out, schedule=EACH)
    assert result.resumed_from == 5 and same_set(result.distilled, straight.distilled)
    assert losses(out) == losses(straight.folder) and len(losses(out)) == STEPS


def test_a_run_without_a_folder_gives_the_same_set(straight, task):
    assert same_set(distill(task, make(**WIDE), seed=2).distilled, straight.distilled)


def test_a_run_stores_its_rate_its_labels_and_which_experts_it_had(straight, task):
    manifest = straight.distilled.manifest
    assert float(straight.distilled.tensors["student_lr"]) > 0
    assert manifest["provenance"]["experts"] == task.experts.identity
    assert manifest["provenance"]["experts"]["digest"] == task.experts.digest
    assert manifest["provenance"]["matcher"]["options"]["inner"]["steps"] == 2
    assert manifest["provenance"]["matcher"]["options"]["window"]["min"] == 0
    assert straight.distilled.decode().y_kind == "logit"


@pytest.mark.parametrize("finished", [True, False])
def test_a_run_does_not_go_on_with_other_experts(straight, task, source, tmp_path, finished):
    out = straight.folder
    if not finished:
        out = tmp_path / "run"
        with pytest.raises(Interrupted):
            distill(task, make(**WIDE), seed=2, out=out, schedule=EACH, progress=stop_at(4))
    walk = toy_experts.walk(NET, 4, 0, 0.01, source.spec)
    other = toy_experts.write(tmp_path / "other", [walk], (NET,), spec=source.spec)
    wanted = f"experts.count is {len(task.experts)} there and {len(other)} here"
    with pytest.raises(UsageError, match=f"holds another run: {wanted}\nChoose another out=DIR"):
        distill(replace(task, experts=other), make(**WIDE), seed=2, out=out, schedule=EACH)


def other_dataset(task):
    changed = task.source.x.clone()
    changed[0, 0, 0, 0] += 1
    spec = replace(task.source.spec, name="ciphers", fingerprint="f0" * 32)
    return replace(task, source=replace(task.source, x=changed, spec=spec)), make()


def other_preprocessing(task):
    zca = load("digits", preprocessing="zca").fit
    return replace(task, source=zca.take(torch.arange(0, len(zca), 13))), make()


def other_values(task):
    spec = replace(task.source.spec, mean=(0.123,))
    return replace(task, source=replace(task.source, spec=spec)), make()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_dataset, r"the buffer was recorded on 'digits' .*this task is 'ciphers' \(f0f0f0f0f0f0\)"),
        (other_preprocessing, "the buffer was made with standard, this task has zca"),
        (other_values, "the buffer's standard preprocessing has other values"),
        (lambda task: (task, make(replace(NET, width=5))), "buffer holds .*width=4.*matcher uses .*width=5"),
        (lambda task: (task, make(NetSpec("mlp"))), "buffer holds convnet .*the matcher uses mlp"),
        (lambda task: (task, make(expert_epochs=5)), "the buffer holds 4 epochs; .*needs 5"),
        (lambda task: (task, make(window={"max": 4})), "window.max=4 with expert_epochs=2 needs 5"),
        (lambda task: (replace(task, experts=None), make()), "learns from experts and was given none"),
    ],
)
def test_a_buffer_that_does_not_fit_is_refused_by_name_and_claims_no_folder(task, tmp_path, change, message):
    with pytest.raises(UsageError, match=message):
        distill(*change(task), out=tmp_path / "run")
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())


def test_experts_that_are_no_buffer_are_refused(task):
    with pytest.raises(UsageError, match=r"experts are a str\nGive an ExpertBuffer: experts=DIR"):
        make().init(replace(task, experts="runs/experts"), trajectory.Rng(0))


LONG = {"steps": 5000, "inner": InnerOptions(steps=4)}


@pytest.mark.parametrize(
    ("options", "device", "compiler", "expected"),
    [
        ({**LONG}, "cpu", "g++", True),
        ({**LONG}, "cpu", None, False),
        ({**LONG}, "cuda", None, True),
        ({**LONG, "steps": 4999}, "cpu", "g++", False),
        ({**LONG, "gradient": "unroll"}, "cpu", "g++", False),
        ({**LONG, "gradient": "tesla"}, "cpu", "g++", False),
        ({**LONG, "compile": "off"}, "cuda", "g++", False),
        ({"steps": 1, "compile": "on"}, "cpu", None, True),
        ({"steps": 1, "compile": "on", "gradient": "unroll"}, "cpu", None, True),
    ],
)
def test_compiling_is_chosen_where_it_pays_and_can_be_done(monkeypatch, options, device, compiler, expected):
    monkeypatch.setattr(trajectory_options.shutil, "which", lambda name: name if name == compiler else None)
    assert trajectory_options.compiles(TrajectoryOptions(**options), torch.device(device)) is expected


def test_a_compiler_that_fails_is_told_once_and_the_run_goes_on_as_without_it(task, monkeypatch):
    def broken(loss):
        raise RuntimeError("no C++\n   compiler")

    monkeypatch.setattr(compiled, "compiled", broken)
    told: list[str] = []
    slow = distill(task, make(compile="on"), seed=2, notice=told.append)
    assert told == ["not compiled, which is slower: no C++ compiler"]
    told.clear()
    plain = distill(task, make(compile="off"), seed=2, notice=told.append)
    assert told == [] and same_set(slow.distilled, plain.distilled)


def test_reading_ahead_ends_with_the_run(task, monkeypatch):
    held = []
    prepare = trajectory.TrajectoryMatching.prepare

    def kept(self, task, rng):
        work = prepare(self, task, rng)
        held.append(work.extra["readers"].each[0])
        return work

    monkeypatch.setattr(trajectory.TrajectoryMatching, "prepare", kept)
    distill(task, make(steps=1))
    with pytest.raises(UsageError, match="needs"):
        distill(task, make(expert_epochs=9))
    assert len(held) == 1 and not held[0]._thread.is_alive()


def test_a_run_does_not_go_on_otherwise_compiled(task, tmp_path, monkeypatch):
    with pytest.raises(Interrupted):
        distill(task, make(), seed=2, out=tmp_path / "run", schedule=EACH, progress=stop_at(2))
    step = trajectory.TrajectoryMatching.step

    def elsewhere(self, state, work, rng):
        work.extra["derivatives"] = compiled.Compiled(work.extra["derivatives"].first, {})
        return step(self, state, work, rng)

    monkeypatch.setattr(trajectory.TrajectoryMatching, "step", elsewhere)
    with pytest.raises(UsageError, match="the steps so far were not compiled, here they are compiled"):
        distill(task, make(), seed=2, out=tmp_path / "run", schedule=EACH)


def test_a_long_run_says_what_it_takes_and_why_it_is_slow(task, monkeypatch):
    monkeypatch.setattr(trajectory_options.shutil, "which", lambda name: None)
    matcher = make(steps=20_000, inner={"steps": 1})
    work = matcher.prepare(task, trajectory.Rng(0))
    work.close()
    assert work.notes[0] == "not compiled, which is slower: there is no C++ compiler"
    assert re.fullmatch(
        r"20000 steps of 1 student steps: about \d+ min, 0 MiB for the .* path", work.notes[1]
    )


def test_half_precision_is_refused(task):
    with pytest.raises(
        UsageError, match="computes in float32, precision=bf16 was given\nGive precision=fp32"
    ):
        distill(replace(task, precision="bf16"), make())


def test_a_budget_in_bytes_counts_the_rate(task):
    exact = distill(replace(task, budget=Budget(ipc=1)), make(steps=1)).distilled.nbytes["total"]
    assert (
        distill(replace(task, budget=Budget(nbytes=exact)), make(steps=1)).distilled.nbytes["total"] == exact
    )
    with pytest.raises(UsageError, match=f"no room for the student's rate\nGive budget.nbytes={exact}"):
        distill(replace(task, budget=Budget(nbytes=exact - 1)), make(steps=1))


def test_a_matcher_that_uses_no_experts_says_so(task):
    told: list[str] = []
    distill(task, matchers.make("random"), notice=told.append)
    assert told == ["note: this matcher uses no experts; the pixel matchers do with matcher.networks=buffer"]


def test_higher_cannot_be_compiled():
    with pytest.raises(UsageError, match="matcher.compile=on with matcher.inner.backend=higher"):
        make(compile="on", gradient="unroll", inner={"backend": "higher"})

"""Several processes for one run: the replicas they share, the bits they agree on, and how they end."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import chain
from pathlib import Path

import forked_ranks
import pytest
import torch
import trained_experts
from hypothesis import given, settings
from hypothesis import strategies as st

import matchers
from ddengine import checkpoint
from ddengine.cli import main
from ddengine.data import load
from ddengine.errors import DDError, Interrupted, UsageError
from ddengine.loop import Schedule, distill, run_identity
from ddengine.nets import NetSpec
from ddengine.ranks import ProcessLostError, Ranks, check_replicas, joined, local_rank
from ddengine.rng import Rng
from ddengine.types import Budget, Task
from synth import DistilledSet

NET = NetSpec("convnet", width=3, depth=2)
EACH = Schedule(checkpoint_steps=4, log_steps=1)
STEPS = 9
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    digits = load("digits").fit
    some = digits.take(torch.arange(0, len(digits), 13))
    buffer = trained_experts.write(tmp_path_factory.mktemp("experts") / "buffer", some, NET)
    return Task(some, Budget(1), buffer, replicas=2)


ATTENTION = matchers.make("attention", NET, steps=STEPS, real_per_class=3)
TRAJECTORY = matchers.make("trajectory", NET, steps=4, labels="learned", inner={"steps": 2})


@pytest.fixture(scope="module")
def straight(task, tmp_path_factory):
    """What one process makes of two replicas: of attention matching, in a folder."""
    return distill(task, ATTENTION, seed=2, out=tmp_path_factory.mktemp("runs") / "run", schedule=EACH)


def same_set(a, b):
    return a.tensors.keys() == b.tensors.keys() and all(
        torch.equal(t, b.tensors[name]) for name, t in a.tensors.items()
    )


def records(folder):
    read = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key != "seconds"} for record in read]


def announced(monkeypatch, rank, world):
    for name, value in forked_ranks.environment(rank, world).items():
        monkeypatch.setenv(name, value)


# what each computes


@given(st.integers(1, 7), st.integers(1, 7))
@settings(deadline=None, max_examples=30)
def test_replicas_are_dealt_in_order_and_in_equal_shares(world, share):
    dealt = [list(Ranks(rank, world).dealt(world * share)) for rank in range(world)]
    assert list(chain(*dealt)) == list(range(world * share))
    assert {len(part) for part in dealt} == {share}


def test_streams_are_those_of_the_replicas_and_the_only_one_has_that_of_the_run(task):
    rng = Rng(3).fold("step", 5)
    assert replace(task, replicas=1).streams(rng) == [rng]
    whole = replace(task, replicas=6).streams(rng)
    assert [s.path for s in whole] == [("step", 5, "replica", r) for r in range(6)]
    for world in (2, 3):
        dealt = [replace(task, replicas=6, ranks=Ranks(r, world)).streams(rng) for r in range(world)]
        assert list(chain(*dealt)) == whole


def test_the_mean_is_summed_in_replica_order_whatever_the_shapes():
    generator = torch.Generator().manual_seed(0)
    parts = [
        {"x": torch.randn(2, 3, 5, generator=generator), "rate": torch.randn((), generator=generator)}
        for _ in range(3)
    ]
    found = Ranks().mean(parts)
    assert list(found) == ["x", "rate"]
    for key, value in found.items():
        a, b, c = (part[key] for part in parts)
        assert value.shape == a.shape and torch.equal(value, ((a + b) + c) / 3)
    alone = Ranks().mean(parts[:1])
    assert all(alone[key] is value for key, value in parts[0].items())


def test_processes_find_the_same_mean_for_any_number_of_them():
    def work(rank):
        with joined(CPU) as ranks:
            generator = torch.Generator().manual_seed(7)
            drawn = [torch.randn(3, 7, generator=generator) for _ in range(6)]
            return ranks.mean([{"x": drawn[r]} for r in ranks.dealt(6)])["x"].tolist()

    whole = work(0)
    assert forked_ranks.run(2, work) == [whole] * 2
    assert forked_ranks.run(3, work) == [whole] * 3


@pytest.mark.parametrize("matcher", [ATTENTION, TRAJECTORY], ids=["attention", "trajectory"])
def test_a_step_follows_the_mean_of_the_replicas_gradients(task, matcher, monkeypatch):
    rng = Rng(4)

    def first_step(some):
        work = matcher.prepare(some, rng)
        try:
            return matcher.step(matcher.init(some, rng), work, rng)
        finally:
            work.close()

    together, metrics = first_step(task)
    apart = []
    for r in range(2):
        monkeypatch.setattr(Task, "streams", lambda task, rng, r=r: [rng.fold("replica", r)])
        apart.append(first_step(replace(task, replicas=1)))
    for key, found in together.velocity.items():  # from rest: the gradient
        a, b = (state.velocity[key] for state, _ in apart)
        assert not torch.equal(a, b) and torch.equal(found, (a + b) / 2)
    losses = [measured["loss"] for _, measured in apart]
    assert torch.equal(metrics["loss"], (losses[0] + losses[1]) / 2)
    start = matcher.init(task, rng).synth.params()["images"]
    moved = matcher.options.lr * together.velocity["images"]
    assert torch.equal(together.synth.params()["images"], start - moved)


def test_replicas_of_a_trajectory_run_have_segments_of_their_own(task):
    rng = Rng(4)
    work = TRAJECTORY.prepare(replace(task, replicas=3), rng)
    plans = [reader._plan for reader in work.extra["readers"].each]
    work.close()
    assert [plan.rng for plan in plans] == [rng.fold("replica", r, "segments") for r in range(3)]
    assert len({tuple(plan.draw(step) for step in range(20)) for plan in plans}) == 3
    alone = TRAJECTORY.prepare(replace(task, replicas=1), rng)
    assert alone.extra["readers"].each[0]._plan.rng == rng.fold("segments")
    alone.close()


# what a run is


def test_replicas_belong_to_a_run(straight, task):
    assert straight.distilled.manifest["provenance"]["replicas"] == 2
    assert "replicas" not in run_identity(replace(task, replicas=1), ATTENTION, 2)
    with pytest.raises(UsageError, match="holds another run: replicas is 2 there and None here"):
        distill(replace(task, replicas=1), ATTENTION, seed=2, out=straight.folder)


def test_replicas_compute_on_one_thread_so_that_their_processes_may(task, straight):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        result = distill(task, ATTENTION, seed=2)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert result.distilled.manifest["provenance"]["threads"] == 1
    assert same_set(result.distilled, straight.distilled)


def test_what_cannot_be_dealt_is_refused(task, monkeypatch):
    with pytest.raises(UsageError, match=r"no replicas that several processes could share \(replicas=2, 1 "):
        distill(task, matchers.make("random", NET))
    announced(monkeypatch, 1, 2)
    assert (Ranks.here(), local_rank()) == (Ranks(1, 2), 1)
    with pytest.raises(UsageError, match=r"replicas=3 cannot be dealt to 2 processes\nGive replicas=2"):
        distill(replace(task, replicas=3), ATTENTION)
    with pytest.raises(UsageError, match=r"replicas=1, 2 processes\)\nLeave replicas out"):
        distill(replace(task, replicas=1), matchers.make("herding", NET))
    check_replicas(4, Ranks.here(), True)
    monkeypatch.delenv("MASTER_ADDR")  # a scheduler's RANK and WORLD_SIZE alone announce nothing
    assert (Ranks.here(), local_rank()) == (Ranks(), 0)


def test_only_distill_runs_in_several_processes(monkeypatch, capsys):
    announced(monkeypatch, 0, 2)
    assert main(["buffer", "dataset=digits"]) == 2
    said = "error: buffer runs in one process\n  fix: Start it without torchrun\n"
    assert capsys.readouterr().err == said
    assert main(["distill", "dataset=digits", "ipc=1"]) == 2
    assert "error: replicas=1 cannot be dealt to 2 processes" in capsys.readouterr().err


def test_processes_of_different_runs_are_refused(task):
    def work(rank):
        return distill(task, ATTENTION, seed=rank)

    first, second = forked_ranks.run(2, work)
    assert isinstance(second, UsageError) and "another run than process 0: seed is 0 there" in str(second)
    assert isinstance(first, ProcessLostError) and first.code == 1


# what they make


def test_two_processes_make_what_one_makes_and_the_first_keeps_it(straight, task, tmp_path):
    out, said = tmp_path / "run", [tmp_path / "said 0", tmp_path / "said 1"]

    def work(rank):
        told = said[rank].open("w")
        return distill(
            task, ATTENTION, seed=2, out=out, schedule=EACH, config="seed: 2\n",
            progress=lambda step, steps, values: print(step, file=told, flush=True),
        )  # fmt: skip

    first, second = forked_ranks.run(2, work)
    assert same_set(first.distilled, straight.distilled) and same_set(second.distilled, straight.distilled)
    assert (first.folder, second.folder, first.steps, second.steps) == (out, None, STEPS, STEPS)
    assert records(out) == records(straight.folder)
    assert {p.name for p in out.iterdir()} - {p.name for p in straight.folder.iterdir()} == {"config.yaml"}
    assert (len(said[0].read_text().split()), said[1].read_text()) == (STEPS, "")
    again = forked_ranks.run(2, work)
    assert [result.resumed_from for result in again] == [STEPS, STEPS]
    assert all(same_set(result.distilled, straight.distilled) for result in again)


def test_two_processes_make_what_one_makes_of_trajectories(task):
    whole = distill(task, TRAJECTORY, seed=3)
    found = forked_ranks.run(2, lambda rank: distill(task, TRAJECTORY, seed=3))
    assert all(same_set(result.distilled, whole.distilled) for result in found)
    assert "labels" in whole.distilled.tensors and whole.distilled.decode().y_kind == "logit"


def test_a_mistake_of_the_first_is_told_to_all(task, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    found = forked_ranks.run(2, lambda rank: distill(task, ATTENTION, out=tmp_path))
    assert [type(error) for error in found] == [UsageError, UsageError]
    assert all("holds files that are not a run" in error.cause and error.remedy for error in found)


def test_data_are_read_by_one_process_of_a_machine_before_the_others(tmp_path):
    def work(rank):
        def read():
            time.sleep(0.2 * (rank == 0))
            (tmp_path / str(len(list(tmp_path.iterdir())))).write_text(str(rank))
            if rank == 0:
                raise UsageError("no such data")

        with joined(CPU) as ranks:
            ranks.one_by_machine(read)

    found = forked_ranks.run(2, work)
    assert isinstance(found[0], UsageError) and found[1] is None
    assert [(tmp_path / name).read_text() for name in "01"] == ["0", "1"]


# how they end


def stopping(task, out, rank_of_it, at, number):
    """Two processes of a run, of which one gets a signal at a step."""

    def work(rank):
        step = type(ATTENTION).step

        def stepped(self, state, work, rng):
            if rank == rank_of_it and state.step == at:
                os.kill(os.getpid(), number)
            return step(self, state, work, rng)

        type(ATTENTION).step = stepped
        return distill(task, ATTENTION, seed=2, out=out, schedule=EACH)

    return forked_ranks.run(2, work)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_stops_all_after_the_same_step_and_the_state_is_saved(straight, task, tmp_path, rank):
    out = tmp_path / "run"
    found = stopping(task, out, rank, 5, signal.SIGTERM)
    assert all(isinstance(error, Interrupted) and error.code == 130 for error in found)
    said = f"stopped by SIGTERM at step 6 of {STEPS}; its state is in {out}"
    assert [error.cause for error in found] == [said, said]
    assert checkpoint.steps(out / "checkpoints") == [6, 4]
    assert records(out) == records(straight.folder)[:6]
    result = distill(task, ATTENTION, seed=2, out=out, schedule=EACH)  # with one process
    assert result.resumed_from == 6 and same_set(result.distilled, straight.distilled)
    assert records(out) == records(straight.folder)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_the_run_which_goes_on_with_any_number_of_them(straight, task, tmp_path, rank):
    out, began = tmp_path / "run", time.monotonic()
    found = stopping(task, out, rank, 6, signal.SIGKILL)
    assert time.monotonic() - began < forked_ranks.SECONDS / 2
    assert found[rank] is None and isinstance(found[1 - rank], ProcessLostError)
    assert found[1 - rank].code == DDError.code and f"process {1 - rank} of this run lost" in str(
        found[1 - rank]
    )
    kept = 6 if rank == 1 else 4  # the first saves what it has; without it there is the last regular state
    assert checkpoint.steps(out / "checkpoints")[0] == kept and not (out / "distilled").exists()
    found = forked_ranks.run(2, lambda rank: distill(task, ATTENTION, seed=2, out=out, schedule=EACH))
    assert [result.resumed_from for result in found] == [kept, kept]
    assert all(same_set(result.distilled, straight.distilled) for result in found)
    assert records(out) == records(straight.folder)


def test_torchrun_runs_the_command_and_survives_the_death_of_a_process(tmp_path):
    words = ["dataset=digits", "ipc=1", "network.width=3", "network.depth=2", "matcher.real_per_class=3"]
    words += ["matcher.steps=40", "replicas=2", "seed=2", "checkpoint.steps=5"]
    assert main(["distill", *words, f"out={tmp_path / 'one'}"]) == 0
    out, log = tmp_path / "two", tmp_path / "two" / "metrics.jsonl"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, "-m", "ddengine", "distill", *words, f"out={out}", "--json"]
    place = {"cwd": Path(__file__).parents[2], "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **place) as run:
        until = time.monotonic() + 120
        while not log.exists() and time.monotonic() < until:
            time.sleep(0.05)
        os.kill(children(run.pid)[1], signal.SIGKILL)
        died = time.monotonic()
        said, complaint = run.communicate(timeout=120)
    assert run.returncode == 1 and said == "" and time.monotonic() - died < 40
    # torchrun may end the other before it notices
    ends = ("error: process 0 of this run lost", "error: interrupted")
    assert [line for line in complaint.splitlines() if line.startswith(ends)], complaint
    assert not (out / "distilled").exists() and checkpoint.steps(out / "checkpoints")
    assert main(["distill", *words, f"out={out}"]) == 0
    made = [DistilledSet.load(tmp_path / name / "distilled") for name in ("one", "two")]
    assert same_set(*made) and records(out)[-1] == records(tmp_path / "one")[-1]


def children(number):
    """The processes that one has started, in order."""
    text = Path(f"/proc/{number}/task/{number}/children").read_text()
    return sorted(map(int, text.split()))

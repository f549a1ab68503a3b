"""A run in its folder: to the end, stopped and resumed, refused, diverged, damaged."""

import json
import math
import os
import random
import signal
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import matchers
from ddengine import checkpoint, recipes
from ddengine.data import load
from ddengine.errors import DDError, Interrupted, UsageError
from ddengine.loop import Schedule, as_device, distill
from ddengine.nets import NetSpec, resolve
from ddengine.rng import Rng
from ddengine.types import Budget, DataSpec, Images, Task
from synth import DistilledSet

NET = NetSpec("convnet", width=4, depth=2)
EACH = Schedule(checkpoint_steps=4, log_steps=1)
STEPS = 15
VOLATILE = {"seconds", "peak_memory_bytes", "host"}


@pytest.fixture(scope="module")
def task():
    digits = load("digits").fit
    return Task(digits.take(torch.arange(0, len(digits), 13)), Budget(1))


@pytest.fixture(scope="module")
def matcher():
    return matchers.make("attention", NET, steps=STEPS, real_per_class=3)


@pytest.fixture(scope="module")
def straight(task, matcher, tmp_path_factory):
    """A run that nothing stopped."""
    return distill(task, matcher, seed=2, out=tmp_path_factory.mktemp("runs") / "straight", schedule=EACH)


def killer(at, number=signal.SIGINT):
    """A progress callback that sends this process a signal at one step."""

    def progress(step, steps, values):
        if step == at:
            os.kill(os.getpid(), number)

    return progress


def log(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder):
    return {record["step"]: record["loss"] for record in log(folder)}


def snapshot(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def same_set(a, b):
    manifests = [{**s.manifest, "files": 0, "seal": 0, "provenance": 0} for s in (a, b)]
    provenances = [{k: v for k, v in s.manifest["provenance"].items() if k not in VOLATILE} for s in (a, b)]
    return (
        a.tensors.keys() == b.tensors.keys()
        and all(torch.equal(t, b.tensors[name]) for name, t in a.tensors.items())
        and manifests[0] == manifests[1]
        and provenances[0] == provenances[1]
    )


def test_a_run_leaves_its_set_its_log_and_its_states(straight, task, matcher):
    folder = straight.folder
    assert {p.name for p in folder.iterdir()} == {"run.json", "metrics.jsonl", "checkpoints", "distilled"}
    assert straight.steps == STEPS and straight.resumed_from is None and straight.seconds > 0
    assert straight.distilled.decode().counts == [1] * 10
    assert [record["step"] for record in log(folder)] == list(range(1, STEPS + 1))
    assert all(record["loss"] > 0 and record["lr"] == 1 for record in log(folder))
    assert checkpoint.steps(folder / "checkpoints") == [12, 8]
    manifest = straight.distilled.manifest
    assert manifest["provenance"]["steps"] == STEPS and manifest["provenance"]["seed"] == 2
    assert manifest["provenance"]["matcher"]["options"]["real_per_class"] == 3
    assert manifest["recipe"]["network"] == resolve(NET, (1, 8, 8)).to_dict()
    assert manifest["recipe"]["dataset"] == {"name": "digits"}


def test_without_a_folder_the_set_is_the_same(straight, task, matcher):
    result = distill(task, matcher, seed=2)
    assert result.folder is None and same_set(result.distilled, straight.distilled)


def test_the_loss_falls(task, matcher, tmp_path):
    some = replace(matcher, options=replace(matcher.options, steps=40, lr=0.1, real_per_class=9))
    distill(task, some, out=tmp_path / "run", schedule=Schedule(log_steps=1))
    measured = list(losses(tmp_path / "run").values())
    assert sum(measured[-10:]) < 0.8 * sum(measured[:10])


def test_five_interrupts_change_nothing(straight, task, matcher, tmp_path):
    out, notices = tmp_path / "run", []
    stops = sorted(random.Random(11).sample(range(1, STEPS), 5))
    for stop in stops:
        with pytest.raises(
            Interrupted, match=rf"stopped by SIGINT at step {stop} of {STEPS}.*\nRepeat"
        ) as caught:
            distill(
                task, matcher, seed=2, out=out, schedule=EACH, progress=killer(stop), notice=notices.append
            )
        assert caught.value.code == 130 and checkpoint.steps(out / "checkpoints")[0] == stop
        assert not (out / "distilled").exists()
    result = distill(task, matcher, seed=2, out=out, schedule=EACH, notice=notices.append)
    assert result.resumed_from == stops[-1] and same_set(result.distilled, straight.distilled)
    assert notices == [f"resuming {out} at step {stop} of {STEPS}" for stop in stops]
    assert [record["step"] for record in log(out)] == list(range(1, STEPS + 1))
    assert losses(out) == losses(straight.folder)
    seconds = [record["seconds"] for record in log(out)]
    assert seconds == sorted(seconds) and result.seconds >= seconds[-1]


def test_a_killed_run_goes_on_from_its_last_state_and_repeats_the_log(straight, task, matcher, tmp_path):
    out = tmp_path / "run"

    def die(step, steps, values):
        if step == 11:
            raise MemoryError

    with pytest.raises(MemoryError):
        distill(task, matcher, seed=2, out=out, schedule=EACH, progress=die)
    assert log(out)[-1]["step"] == 11 and checkpoint.steps(out / "checkpoints") == [8, 4]
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 12, "lo')
    result = distill(task, matcher, seed=2, out=out, schedule=EACH)
    assert result.resumed_from == 8 and same_set(result.distilled, straight.distilled)
    assert [record["step"] for record in log(out)] == list(range(1, STEPS + 1))
    assert losses(out) == losses(straight.folder)


def test_a_run_killed_before_its_first_state_starts_again(straight, task, matcher, tmp_path):
    out = tmp_path / "run"

    def die(step, steps, values):
        raise MemoryError

    with pytest.raises(MemoryError):
        distill(task, matcher, seed=2, out=out, schedule=Schedule(log_steps=1), progress=die)
    result = distill(task, matcher, seed=2, out=out, schedule=EACH)
    assert result.resumed_from is None and same_set(result.distilled, straight.distilled)
    assert losses(out) == losses(straight.folder)


def test_sigterm_saves_too_and_the_handlers_are_put_back(task, matcher, tmp_path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted, match="stopped by SIGTERM at step 3"):
        distill(task, matcher, out=tmp_path / "run", schedule=EACH, progress=killer(3, signal.SIGTERM))
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == [3]


def test_a_second_signal_stops_at_once(task, matcher):
    def twice(step, steps, values):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        distill(task, matcher, schedule=EACH, progress=twice)


def test_a_signal_at_the_last_step_finishes_the_run(straight, task, matcher, tmp_path):
    result = distill(task, matcher, seed=2, out=tmp_path / "run", schedule=EACH, progress=killer(STEPS))
    assert same_set(result.distilled, straight.distilled)


def test_an_interrupt_without_a_folder_says_how_to_keep_the_state(task, matcher):
    with pytest.raises(Interrupted, match=rf"at step 2 of {STEPS}\nGive out=DIR"):
        distill(task, matcher, schedule=EACH, progress=killer(2))


def test_a_run_in_another_thread_leaves_signals_alone(straight, task, matcher):
    results = []
    thread = threading.Thread(target=lambda: results.append(distill(task, matcher, seed=2)))
    thread.start()
    thread.join()
    assert same_set(results[0].distilled, straight.distilled)


def test_a_finished_run_returns_at_once_as_it_is(straight, task, matcher, monkeypatch):
    def never(*args):
        raise AssertionError("a finished run was started")

    before = snapshot(straight.folder)
    for name in ("init", "prepare", "step"):
        monkeypatch.setattr(type(matcher), name, never)
    result = distill(task, matcher, seed=2, out=straight.folder)
    assert same_set(result.distilled, straight.distilled) and result.resumed_from == STEPS
    assert abs(result.seconds - straight.seconds) < 0.001
    assert snapshot(straight.folder) == before


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"seed": 3}, "seed is 2 there and 3 here"),
        ({"steps": 24}, f"matcher.options.steps is {STEPS} there and 24 here"),
        ({"width": 5}, "matcher.network.width is 4 there and 5 here"),
        ({"ipc": 2}, "budget.ipc is 1 there and 2 here"),
        ({"name": "herding"}, "matcher"),
    ],
)
def test_a_folder_that_holds_another_run_is_refused_unchanged(straight, task, matcher, change, what):
    before = snapshot(straight.folder)
    other = replace(matcher, options=replace(matcher.options, steps=change.get("steps", STEPS)))
    other = replace(other, network=replace(NET, width=change.get("width", 4)))
    other = matchers.make("herding", NET) if "name" in change else other
    work = replace(task, budget=Budget(change.get("ipc", 1)))
    with pytest.raises(UsageError, match=f"holds another run: {what}.*\nChoose another out=DIR"):
        distill(work, other, seed=change.get("seed", 2), out=straight.folder)
    assert snapshot(straight.folder) == before


def test_foreign_files_and_files_in_the_way_are_refused_unchanged(task, matcher, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"holds files that are not a run of ddengine\nChoose another"):
        distill(task, matcher, out=tmp_path)
    with pytest.raises(UsageError, match=r"notes.txt is a file\nChoose another"):
        distill(task, matcher, out=tmp_path / "notes.txt")
    with pytest.raises(UsageError, match=r"cannot create the folder .*notes.txt/run.*\nChoose another"):
        distill(task, matcher, out=tmp_path / "notes.txt" / "run")
    assert snapshot(tmp_path) == {Path("notes.txt"): b"mine"}


def test_a_run_that_cannot_start_does_not_claim_its_folder(task, matcher, tmp_path):
    unfit = replace(matcher, network=replace(NET, depth=9))
    with pytest.raises(UsageError, match="halves 8x8 images to nothing"):
        distill(task, unfit, out=tmp_path / "run")
    assert snapshot(tmp_path) == {}
    assert distill(task, matcher, out=tmp_path / "run").steps == STEPS


def test_the_configuration_is_kept_beside_the_run(task, tmp_path):
    subset = matchers.make("random", NET)
    result = distill(task, subset, out=tmp_path / "run", config="seed: 0\n")
    assert (tmp_path / "run" / "config.yaml").read_text() == "seed: 0\n"
    assert result.distilled.kind == "subset" and result.steps == 0


def test_more_images_than_the_smallest_class_has_are_refused(task, matcher, tmp_path):
    smallest = min(task.source.counts)
    name = task.source.spec.classes[task.source.counts.index(smallest)]
    with pytest.raises(
        UsageError, match=rf"ipc=50 is more than the {smallest} images that class '{name}' has"
    ):
        distill(replace(task, budget=Budget(50)), matcher, out=tmp_path / "run")
    assert snapshot(tmp_path) == {}


@pytest.mark.parametrize("log_steps", [1, 1000])
def test_a_run_that_diverges_ends_with_the_reason_and_without_a_set(task, matcher, tmp_path, log_steps):
    wild = replace(matcher, options=replace(matcher.options, lr=1e30), network=replace(NET, norm="none"))
    with pytest.raises(
        DDError, match=f"the last {STEPS - 1} of {STEPS} steps were skipped.*\nLower matcher.lr"
    ) as caught:
        distill(task, wild, out=tmp_path / "run", schedule=Schedule(checkpoint_steps=7, log_steps=log_steps))
    assert caught.value.code == 1
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == [14, 7]
    assert not (tmp_path / "run" / "distilled").exists()


def broken_at(monkeypatch, bad):
    """Make the loss of attention matching, at the calls in `bad`, not finite."""
    calls = iter(range(10**9))
    real = matchers.attention.attention_matching_loss

    def loss(*given, **named):
        return real(*given, **named) * (math.nan if next(calls) in bad else 1.0)

    monkeypatch.setattr(matchers.attention, "attention_matching_loss", loss)


def test_steps_without_a_finite_loss_are_left_out_and_counted(task, matcher, tmp_path, monkeypatch):
    broken_at(monkeypatch, {3, 4, 9})
    result = distill(task, matcher, seed=2, out=tmp_path / "run", schedule=EACH)
    records = {record["step"]: record for record in log(tmp_path / "run")}
    assert [records[step]["skipped"] for step in (3, 4, 5, 9, 10, 15)] == [0, 1, 2, 2, 3, 3]
    assert [step for step in range(1, STEPS + 1) if "loss" not in records[step]] == [4, 5, 10]
    assert all("in_row" not in record for record in records.values())
    assert result.distilled.decode().x.isfinite().all()


def test_too_many_steps_in_a_row_end_the_run_with_the_last_good_state(task, tmp_path, monkeypatch):
    long = matchers.make("attention", NET, steps=60, real_per_class=3)
    broken_at(monkeypatch, set(range(5, 100)))
    with pytest.raises(DDError, match="the last 20 of 25 steps were skipped"):
        distill(task, long, seed=2, out=tmp_path / "run", schedule=Schedule(log_steps=1))
    monkeypatch.undo()
    rng = Rng(2)
    state, work = long.init(task, rng), long.prepare(task, rng)
    for _ in range(5):
        state, _ = long.step(state, work, rng)
    kept, _ = checkpoint.load(tmp_path / "run" / "checkpoints", 25, state)
    assert torch.equal(kept.synth.images, state.synth.images)
    assert torch.equal(kept.velocity["images"], state.velocity["images"])
    assert int(kept.skipped) == int(kept.in_row) == 20


@pytest.mark.parametrize("name", ["manifest.json", "state.safetensors"])
def test_a_damaged_state_is_passed_over_for_the_one_before(straight, task, matcher, tmp_path, name):
    out, notices = tmp_path / "run", []
    with pytest.raises(Interrupted):
        distill(task, matcher, seed=2, out=out, schedule=EACH, progress=killer(10))
    assert checkpoint.steps(out / "checkpoints") == [10, 8]
    path = out / "checkpoints" / "step_000010" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    result = distill(task, matcher, seed=2, out=out, schedule=EACH, notice=notices.append)
    assert len(notices) == 2 and "step_000010" in notices[0] and "going on from an older state" in notices[0]
    assert notices[1] == f"resuming {out} at step 8 of {STEPS}"
    assert result.resumed_from == 8 and same_set(result.distilled, straight.distilled)
    assert losses(out) == losses(straight.folder)


def test_a_run_whose_states_are_all_damaged_starts_again_and_saves_again(straight, task, matcher, tmp_path):
    out, notices = tmp_path / "run", []
    with pytest.raises(Interrupted):
        distill(task, matcher, seed=2, out=out, schedule=EACH, progress=killer(14))
    for path in (out / "checkpoints").rglob("state.safetensors"):
        path.write_bytes(b"")
    with pytest.raises(Interrupted):
        distill(task, matcher, seed=2, out=out, schedule=EACH, progress=killer(6), notice=notices.append)
    assert len(notices) == 2 and checkpoint.steps(out / "checkpoints") == [6, 4]
    result = distill(task, matcher, seed=2, out=out, schedule=EACH)
    assert result.resumed_from == 6 and same_set(result.distilled, straight.distilled)


def test_states_are_saved_by_minutes_too(task, matcher, tmp_path):
    distill(task, matcher, out=tmp_path / "run", schedule=Schedule(checkpoint_minutes=0.0))
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == [STEPS - 1, STEPS - 2]


def test_the_log_has_every_nth_step_and_the_last(task, matcher, tmp_path):
    distill(task, matcher, out=tmp_path / "run", schedule=Schedule(log_steps=10))
    assert [record["step"] for record in log(tmp_path / "run")] == [10, STEPS]


def test_the_set_of_a_run_is_complete_on_its_own(straight):
    loaded = DistilledSet.load(straight.folder / "distilled")
    assert same_set(loaded, straight.distilled)
    assert torch.equal(loaded.decode().x, straight.distilled.decode().x)


def test_devices_are_found_by_name():
    assert as_device("cpu") == torch.device("cpu")
    assert as_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(UsageError, match="device=cpuu, but PyTorch finds no such device"):
        as_device("cpuu")


def test_a_mistake_that_shows_in_the_first_step_leaves_the_folder_free(task, tmp_path):
    wrong = matchers.make("attention", NET, steps=2, layers=(9,))
    with pytest.raises(UsageError, match="layers"):
        distill(task, wrong, out=tmp_path / "run")
    right = matchers.make("attention", NET, steps=2, layers=(0,), real_per_class=4)
    assert distill(task, right, out=tmp_path / "run").steps == 2


def test_images_that_no_network_takes_are_refused_before_the_first_step(tmp_path):
    x = torch.randint(0, 256, (20, 1, 7, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    spec = DataSpec("small", (1, 7, 5), ("a", "b"), (0.5,), (0.25,))
    task = Task(Images(x, torch.arange(20) // 10, spec), Budget(1))
    with pytest.raises(UsageError, match="images of 7x5 pixels are too small"):
        distill(task, matchers.make("random"), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("given", "device", "bf16", "settled"),
    [
        ("auto", "cuda", True, "bf16"),
        ("auto", "cuda", False, "fp32"),
        ("auto", "cpu", True, "fp32"),
        ("bf16", "cuda", False, "bf16"),
        ("fp32", "cuda", True, "fp32"),
    ],
)
def test_precision_auto_is_what_device_and_matcher_serve(given, device, bf16, settled):
    task = Task(load("digits").fit, Budget(1), device=torch.device(device), precision=given)
    assert task.settled(bf16).precision == settled


def test_a_task_for_a_gpu_leaves_the_precision_to_the_matcher(monkeypatch):
    monkeypatch.setattr(recipes, "device_of", torch.device)
    assert recipes.task("digits", ipc=1, device="cuda").precision == "auto"
    assert recipes.task("digits", ipc=1, device="cuda", precision="bf16").precision == "bf16"
    assert recipes.task("digits", ipc=1, device="cpu").precision == "fp32"


def test_a_task_that_leaves_the_precision_open_is_that_of_fp32_on_a_cpu(tmp_path):
    task, matcher = Task(load("digits").fit, Budget(1), precision="auto"), matchers.make("random")
    made = distill(task, matcher, out=tmp_path / "run").distilled
    assert made.manifest["provenance"]["precision"] == "fp32"

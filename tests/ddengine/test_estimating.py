"""Estimates beside what the commands then take, on tiny runs; and what is refused for lack of room."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from ddengine import data, estimating, estimating_evaluation, identity
from ddengine.cli import main
from ddengine.compose import composed
from ddengine.evaluating import find_protocol
from ddengine.forecast import disk_room
from ddengine.given import Watch
from ddengine.loop import peak_memory
from ddengine.ops import memory
from ddengine.recipes import distillation
from expert_buffers import recorder
from expert_buffers.store import ExpertBuffer
from synth import DistilledSet

TINY = ["network.width=2", "network.depth=1"]
ATTENTION = ["dataset=digits", "matcher=attention", "ipc=2", "matcher.steps=5", *TINY]
BUFFER = ["dataset=digits", "count=2", "epochs=3", "workers=1", *TINY]
JUDGE = ["seeds=2", "rows=[random,full]", "recipe.steps=3", "recipe.lrs=[0.1,0.01]", "workers=1", "kept=none"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a finished run and a buffer."""
    root = tmp_path_factory.mktemp("world")
    assert main(["distill", *ATTENTION, f"out={root / 'run'}"]) == 0
    assert main(["buffer", *BUFFER, f"out={root / 'experts'}"]) == 0
    return root


def estimated(call, *words):
    code, out, err = call("estimate", *words, "--json")
    assert code == 0, err
    return json.loads(out)


def size(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_distill_is_estimated_and_nothing_is_written(call, world):
    before = sorted(world.rglob("*"))
    found = estimated(call, "distill", *ATTENTION, "out=other")
    assert sorted(world.rglob("*")) == before
    assert found["command"] == "distill"
    assert found["subject"] == "attention on digits, ipc 2"
    assert found["counts"]["images"] == len(data.load("digits").fit)
    assert found["counts"]["data bytes"] == 64 * found["counts"]["images"]
    # pixels, velocity, labels, counters
    assert found["counts"]["state bytes"] == 2 * 4 * 20 * 64 + 8 * 20 + 8
    assert found["seconds"] == pytest.approx(sum(found["parts"].values()))
    assert found["seconds"] > 0
    assert peak_memory(torch.device("cpu")) / 2 < found["memory_bytes"] <= peak_memory(torch.device("cpu"))
    assert 2 / 3 < found["disk_bytes"] / size(world / "run") < 3 / 2
    assert found["fits"]
    assert found["lacking"] == []


def test_checkpoints_take_their_room_on_disk(call):
    plain = estimated(call, "distill", *ATTENTION)
    saved = estimated(call, "distill", *ATTENTION, "checkpoint.steps=2")
    assert saved["disk_bytes"] - plain["disk_bytes"] == pytest.approx(
        3 * plain["counts"]["state bytes"], abs=99
    )


def test_selections_without_steps_are_estimated_whole(call):
    found = estimated(call, "distill", "dataset=digits", "matcher=kcenter", "ipc=1")
    assert found["counts"]["steps"] == 0
    assert found["parts"]["0 steps"] == 0


def test_trajectory_is_estimated_with_the_buffer_that_it_learns_from(call):
    words = [
        "matcher=trajectory",
        "ipc=1",
        "matcher.steps=4",
        "matcher.inner.steps=2",
        "matcher.window.max=1",
    ]
    found = estimated(call, "distill", *words, "matcher.window.max=1", "experts=experts")
    assert found["counts"]["steps"] == 4
    assert found["parts"]["4 steps"] > 0


def test_a_few_classes_stand_for_all_where_all_would_take_too_long(monkeypatch):
    algorithm, task_on = distillation(composed("distill", ATTENTION))
    task = task_on(data.load("digits"))
    whole, asked, probe = estimating._probe(task, algorithm, 0, 1.0), [], estimating._probe

    def noted(task, *given):
        asked.append(len(task.source.spec.classes))
        return probe(task, *given)

    monkeypatch.setattr(estimating, "_probe", noted)
    found = estimating.probed(task, algorithm, 0, limit=0.0)
    assert asked == [2, 3]
    assert found.state == whole.state
    assert math.isfinite(found.step)
    estimating.probed(task, algorithm, 0, limit=1e6)
    assert asked[2:] == [2, 10]


def test_a_line_is_carried_on_and_never_falls():
    few, more = (
        estimating.Probe(1.0, 2.0, 0.5, 0.0, 100, 10, 7),
        estimating.Probe(1.5, 2.0, 0.75, 0.0, 90, 15, 8),
    )
    assert estimating._carried_on(few, more, 2, 3, 11) == estimating.Probe(5.5, 2.0, 2.75, 0.0, 90, 55, 16)


def test_activations_are_what_a_hand_counts():
    net = nn.Sequential(nn.Flatten(), nn.Linear(2 * 3 * 5, 7), nn.ReLU(), nn.Linear(7, 4))
    assert estimating.activations(net, (2, 3, 5)) == 4 * (30 + 7)  # inputs of both layers, float32


def test_a_buffer_is_estimated(call, world):
    found = estimated(call, "buffer", *BUFFER, "out=new")
    files = sum(path.stat().st_size for path in (world / "experts").glob("expert*"))
    assert 2 / 3 < found["disk_bytes"] / files < 3 / 2
    assert found["subject"] == "digits: 2 experts x 3 epochs of 6 steps on 1 worker"
    assert found["seconds"] > 0
    assert not (world / "new").exists()


def test_what_a_buffer_has_already_is_not_estimated_again(call, world):
    before = {path: path.stat().st_mtime_ns for path in (world / "experts").rglob("*")}
    done = estimated(call, "buffer", *BUFFER, "out=experts")
    assert (done["subject"], done["disk_bytes"]) == ("digits: nothing is left to record", 0)
    more = estimated(call, "buffer", *BUFFER, "count=3", "out=experts")
    assert more["subject"].startswith("digits: 1 experts x 3 epochs")
    assert {path: path.stat().st_mtime_ns for path in (world / "experts").rglob("*")} == before


def test_an_evaluation_is_estimated_by_its_networks(call, world):
    found = estimated(call, "evaluate", "run", *JUDGE)
    assert found["subject"] == "digits, 12 networks on 1 worker"  # 3 rows of 2 rates and 2 finals
    assert found["counts"]["optimiser steps"] == 36
    assert not (world / "run" / "results.jsonl").exists()
    code, _, err = call("evaluate", "run", *JUDGE)
    assert code == 0, err
    assert len((world / "run" / "results.jsonl").read_text().splitlines()) == 12
    written = sum((world / "run" / name).stat().st_size for name in ("results.jsonl", "table.json"))
    assert 1 / 2 < found["disk_bytes"] / written < 2


def test_an_estimate_reads_no_test_image(world):
    distilled, dataset = DistilledSet.load(world / "run" / "distilled"), data.load("digits")
    config = composed("evaluate", ["dataset=digits", *JUDGE, *TINY])
    bench, rows = estimating_evaluation._bench(
        distilled, dataset, config, find_protocol("standard-v1"), Watch()
    )
    assert rows == ("distilled", "random", "full")
    assert torch.equal(bench.test.images.x, dataset.validation.x[: len(bench.test)])


def test_the_converged_row_counts_its_own_steps(call):
    rows = ["seeds=1", "rows=[full_converged]", "recipe.lrs=[0.1]", "recipe.steps=3", "workers=1"]
    found = estimated(call, "evaluate", "run", *rows)
    full = 50 * math.ceil(len(data.load("digits").fit) / 256)
    assert found["counts"]["optimiser steps"] == 2 * 3 + 2 * full


def test_what_does_not_fit_ends_with_code_1_and_what_to_change(call, monkeypatch):
    monkeypatch.setattr(estimating, "memory_room", lambda device: 12_345_678)
    code, out, _ = call("estimate", "distill", "dataset=digits", "matcher=random", "ipc=1")
    assert code == 1
    assert "does not fit: distill would need" in out
    assert "of memory, there are 12.3 MB" in out
    assert "matcher.chunk" in out.splitlines()[-1]
    code, out, _ = call("estimate", "distill", "dataset=digits", "matcher=random", "ipc=1", "--json")
    assert code == 1
    assert json.loads(out)["fits"] is False


def test_a_full_disk_does_not_fit(call, monkeypatch):
    monkeypatch.setattr(estimating, "disk_room", lambda folder: 100)
    code, out, _ = call("estimate", "buffer", *BUFFER, "out=new")
    assert code == 1
    assert "of disk, there are 0.1 kB" in out


def test_distill_refuses_only_what_certainly_cannot_fit(call, world, monkeypatch):
    need = 20 * 64 * 4
    monkeypatch.setattr(identity, "free_memory", lambda device: need - 1)
    code, _, err = call("distill", *ATTENTION, "out=refused")
    assert code == 2
    assert "take 5,120 bytes of memory before the first step, 5,119 are free" in err
    assert "smaller ipc" in err
    assert not (world / "refused").exists()
    monkeypatch.setattr(identity, "free_memory", lambda device: need)
    assert call("distill", *ATTENTION, "matcher.steps=1", "out=allowed")[0] == 0


def test_a_buffer_without_memory_for_one_step_is_refused(call, world, monkeypatch):
    monkeypatch.setattr(recorder, "free_memory", lambda device: 10_000)
    code, _, err = call("buffer", *BUFFER, "out=refused")
    assert code == 2
    assert "1 experts at a time need" in err
    assert "recipe.batch_size" in err
    assert not list((world / "refused").glob("expert*"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "estimate takes a command"),
        (["dataset=digits"], "estimate takes a command"),
        (["distil", "ipc=1"], "unknown command to estimate 'distil'"),
        (["distill", "dataset=digits", "matcher=attention"], "a budget needs either ipc or nbytes"),
        (["evaluate", "experts"], "experts"),
    ],
)
def test_mistakes_are_one_line_and_a_remedy(call, words, said):
    code, out, err = call("estimate", *words)
    assert code in (2, 3)
    assert out == ""
    assert said in err
    assert len(err.splitlines()) == 2


def test_the_estimate_reads_well(call):
    code, out, _ = call("estimate", "distill", *ATTENTION)
    assert code == 0
    first, second, *_ = out.splitlines()
    assert first.startswith("attention on digits, ipc 2: about ")
    assert "GiB of memory" in first
    assert second.startswith("  time: load ")


def test_free_memory_is_the_least_of_system_and_control_group(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "GROUPS", ())
    monkeypatch.setattr(memory, "GROUPS", ((str(tmp_path), "max", "now", "inactive"),))
    for name, text in {"max": "7000", "now": "5000", "memory.stat": "anon 1\ninactive 1500\n"}.items():
        (tmp_path / name).write_text(text)
    assert memory.available_memory() == 7000 - 5000 + 1500
    (tmp_path / "max").write_text("max")
    assert memory.available_memory() > 2**20
    peak = peak_memory(torch.device("cpu"))  # the system counts both by the batch of pages
    assert 2**20 < memory.resident_memory() <= 1.02 * peak


def test_room_on_a_disk_is_that_of_the_nearest_folder_there_is(tmp_path):
    assert disk_room(tmp_path / "a" / "b") == pytest.approx(disk_room(tmp_path), rel=0.1)
    assert disk_room(Path("not/there")) > 0


def test_a_step_costs_its_memory_and_time(world):
    buffer = ExpertBuffer(world / "experts")
    options = {
        "count": 2, "epochs": 5, "max_start_epoch": 1, "expert_epochs": 1, "full_experts": 0, "seed": 0,
        "encoding": "delta16", "workers": 1, "device": "cpu", "precision": "fp32", "save_minutes": 5.0,
        "recipe": "mtt", "origin": {"name": "digits"},
    }  # fmt: skip
    fit, network = data.load("digits").fit, buffer.network(0)
    one, _ = recorder.forecast(fit, network, world / "none", **options)
    two, _ = recorder.forecast(fit, network, world / "none", **{**options, "count": 4, "workers": 2})
    assert two.least_bytes == 2 * one.least_bytes > 0
    assert two.disk_bytes == 2 * one.disk_bytes
    wide, _ = recorder.forecast(fit, replace(network, width=16), world / "none", **options)
    assert wide.least_bytes > one.least_bytes


def test_an_estimate_with_a_bank_leaves_nothing_in_it(call, tmp_path, monkeypatch):
    monkeypatch.setenv("DDENGINE_CACHE", str(tmp_path / "cache"))
    found = estimated(call, "distill", *ATTENTION, "matcher.bank=on")
    assert found["seconds"] > 0 and not list(tmp_path.rglob("*.safetensors"))

"""A sample of tests/faults/long_run.py, and what it would say of leaks."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))

import long_run

EVEN = {
    "done": 1,
    "per_second": 20.0,
    "rate": 10.0,
    "resident": 500 << 20,
    "tensors": 37,
    "handles": 7,
    "hooks": 2,
}


def test_memory_tensors_handles_and_hooks_stay_over_steps_and_evaluations(tmp_path):
    steps = long_run.steps(100, tmp_path / "run", samples=10)
    assert [sample["done"] for sample in steps] == list(range(10, 101, 10))
    assert long_run.grown(steps) == []
    evaluations = long_run.evaluations(4, tmp_path / "run" / "distilled")
    assert [sample["done"] for sample in evaluations] == [1, 2, 3, 4]
    assert long_run.grown(evaluations) == []


@pytest.mark.parametrize("key", ["resident", "tensors", "handles", "hooks"])
def test_what_grows_by_a_little_at_each_step_is_told(key):
    even = [dict(EVEN) for _ in range(50)]
    assert long_run.grown(even) == [] and long_run.slowed(even) == []
    growing = [{**EVEN, key: EVEN[key] * (1 + 0.002 * number)} for number in range(50)]
    (told,) = long_run.grown(growing)
    assert told.startswith("memory" if key == "resident" else key)


def test_a_rate_that_falls_by_more_than_a_tenth_is_told():
    falling = [{**EVEN, "rate": 10.0 - 0.05 * number} for number in range(50)]
    assert long_run.slowed(falling) == ["rate: 9.275 units, then 7.775"]
    assert long_run.slowed([{**EVEN, "rate": 10.0 - 0.01 * number} for number in range(50)]) == []


def test_live_tensors_open_handles_and_hooks_are_counted(tmp_path):
    before = long_run.resources()
    net = nn.Linear(2, 3)
    net.register_forward_hook(lambda *given: None)
    net.weight.register_hook(lambda grad: None)
    kept = [torch.zeros(5) for _ in range(7)]
    with (tmp_path / "open").open("w"):
        after = long_run.resources()
    assert {key: after[key] - before[key] for key in long_run.COUNTED} == {
        "tensors": len(kept) + 2,
        "handles": 1,
        "hooks": 2,
    }

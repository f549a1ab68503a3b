"""A matcher's runs, laid side by side bit for bit, and the global generators, watched."""

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from ddengine import checkpoint
from ddengine.rng import Rng
from ddengine.types import Matcher, SynthSet, Task

DRAWS = (
    "seed", "random", "uniform", "randint", "randrange", "choice", "choices", "sample", "shuffle", "gauss",
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """All states of a run, the metrics of each step, and the finished set."""

    states: list[Any]
    metrics: list[dict[str, float]]
    synth: SynthSet


def run(matcher: Matcher[Any], task: Task, seed: int, state: Any = None) -> Run:
    """Run a matcher from its start, or from `state`, to the end."""
    rng = Rng(seed)
    states, metrics = [matcher.init(task, rng) if state is None else state], []
    work = matcher.prepare(task, rng)
    try:
        while states[-1].step < matcher.steps(task):
            state, measured = matcher.step(states[-1], work, rng)
            states.append(state)
            metrics.append({key: float(value) for key, value in measured.items()})
            if len(states) > matcher.steps(task) + 1:
                break  # its states do not count
        return Run(states, metrics, matcher.finish(states[-1], work, rng))
    finally:
        work.close()


def same(a: Any, b: Any) -> bool:
    """Whether two states or sets hold the same bits under the same names."""
    return unchanged(b, dict(checkpoint.leaves(a)))


def copied(state: Any) -> dict[str, Any]:
    """A copy of every leaf of a state or a source, by path."""
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in checkpoint.leaves(state)}


def unchanged(value: Any, before: dict[str, Any]) -> bool:
    """Whether a state or a source still holds what `copied` found in it, and nothing else."""
    now = dict(checkpoint.leaves(value))
    return now.keys() == before.keys() and all(_equal(v, now[k]) for k, v in before.items())


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    return type(a) is type(b) and a == b


@contextmanager
def global_rng_untouched() -> Iterator[None]:
    """Fails (AssertionError) when what runs inside draws from or seeds a global generator.

    Python's is guarded call by call and not by its state: checks of annotations may draw bits from it.
    """

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("Python's global generator was used")

    before: tuple[Any, Any] = torch.get_rng_state(), np.random.get_state()
    with ExitStack() as stack:
        for name in DRAWS:
            stack.enter_context(mock.patch.object(random, name, refuse))
        yield
    assert torch.equal(torch.get_rng_state(), before[0]), "torch's global generator moved"
    after: Any = np.random.get_state()
    same_numpy = (after[1] == before[1][1]).all() and after[2:] == before[1][2:]
    assert same_numpy, "numpy's global generator moved"

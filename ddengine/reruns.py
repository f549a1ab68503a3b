"""A matcher's runs, laid side by side bit for bit, and the global generators, watched."""

import random
from collections.abc import Callable, Iterator
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

MARK = 0.6180339887498949  # the Gaussian that Python's generator holds back while it is watched


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
        return isinstance(b, Tensor) and a.dtype == b.dtype and a.shape == b.shape and _same_bits(a, b)
    if type(a) is type(b) and isinstance(a, float):
        return a.hex() == b.hex()
    return type(a) is type(b) and a == b


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape and dtype hold the same bytes: NaN is itself, and -0 is not 0."""
    one, two = (x.detach().contiguous().flatten().view(torch.uint8) for x in (a, b))
    return torch.equal(one, two)


@contextmanager
def global_rng_untouched() -> Iterator[None]:
    """Fails (AssertionError) when what runs inside draws from or seeds a global generator.

    The generators start from states that no seed gives, so that seeding shows too, and end as they were.
    Python's is guarded call by call and by MARK, which seeding takes away, and not by its whole state: checks
    of annotations may draw bits from it.
    """
    held, used = _states(), list[str]()
    with ExitStack() as stack:
        stack.callback(_put, held)
        _put(_fresh())
        before: Any = _states()
        _refuse_draws(stack, used)
        yield
        after: Any = _states()
        assert torch.equal(after[0], before[0]), "torch's global generator moved"
        same_numpy = (after[1][1] == before[1][1]).all() and after[1][2:] == before[1][2:]
        assert same_numpy, "numpy's global generator moved"
        assert not used and after[2][2] == MARK, "Python's global generator was used"


def _states() -> tuple[Any, Any, Any]:
    """The states of the global generators of torch (on the CPU), numpy and Python."""
    return torch.get_rng_state(), np.random.get_state(), random.getstate()


def _put(states: tuple[Any, Any, Any]) -> None:
    torch.set_rng_state(states[0])
    np.random.set_state(states[1])
    random.setstate(states[2])


def _fresh() -> tuple[Any, Any, Any]:
    """States from the system's entropy, some draws on; Python's has MARK as its second Gaussian."""
    generator = torch.Generator()
    generator.seed()
    torch.rand(7, generator=generator)
    version, words, _ = random.getstate()
    return generator.get_state(), np.random.MT19937().state, (version, words, MARK)


def _refuse_draws(stack: ExitStack, used: list[str]) -> None:
    """Until the stack ends, let every function of Python's global generator fail and tell `used`.

    A module that was first imported meanwhile may have kept one by name, which then draws again.
    """
    watching = [True]
    stack.callback(watching.clear)

    def refused(name: str, draw: Callable[..., Any]) -> Callable[..., Any]:
        def refuse(*args: Any, **kwargs: Any) -> Any:
            if not watching:
                return draw(*args, **kwargs)
            used.append(name)
            raise AssertionError("Python's global generator was used")

        return refuse

    for name in random.__all__:
        draw = getattr(random, name)
        if getattr(draw, "__self__", None) is random._inst and name not in ("getstate", "setstate"):
            stack.enter_context(mock.patch.object(random, name, refused(name, draw)))

"""The contract of a matcher, clause by clause: each says in words what broke it, or None where it is kept."""

import json
import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import matchers
from ddengine import checkpoint
from ddengine.data import graph_source, registry
from ddengine.identity import evaluation_recipe, run_identity
from ddengine.loop import LOGGED
from ddengine.reruns import Run, copied, global_rng_untouched, run, same, unchanged
from ddengine.rng import Rng
from ddengine.types import Matcher, Task
from synth import Compensated, DistilledSet, nominal_bytes, verify


@dataclass(frozen=True)
class Case:
    """A matcher on a task, a seed, and an empty folder to write in."""

    matcher: Matcher[Any]
    task: Task
    seed: int
    folder: Path

    @cached_property
    def straight(self) -> Run:
        """The run from the start, made once."""
        return self.run()

    @property
    def taken(self) -> bool:
        """Whether the matcher has taken the task: the run from the start was made."""
        return "straight" in vars(self)

    def run(self, state: Any = None) -> Run:
        """Another run, from its start or from `state`."""
        return run(self.matcher, self.task, self.seed, state)


Clause = Callable[[Case], str | None]


def frozen_value(case: Case) -> str | None:
    """The matcher is a frozen dataclass with `options` and `network`, and describes itself in plain JSON."""
    wrong = matchers.problem(case.matcher)
    if wrong:
        return f"it {wrong}"
    for said in (run_identity(case.task, case.matcher, 0), evaluation_recipe(case.task, case.matcher)):
        try:
            if json.loads(json.dumps(said, allow_nan=False)) != said:
                return f"{said} is not what JSON gives back of it"
        except (TypeError, ValueError) as error:
            return f"its options or what it tells a judge are not JSON: {error}"
    return None


def counted_steps(case: Case) -> str | None:
    """States count their steps from 0, one by one, to `steps(task)`, a whole number that may be 0."""
    steps = case.matcher.steps(case.task)
    if not isinstance(steps, int) or steps < 0:
        return f"steps(task) says {steps!r}, which is no whole number from 0 on"
    seen = [state.step for state in case.straight.states]
    return None if seen == list(range(steps + 1)) else f"its states say step {seen}, steps(task) says {steps}"


def finite_numbers(case: Case) -> str | None:
    """Every metric and all of the set is finite; no state holds NaN (a running minimum starts from inf)."""
    for step, metrics in enumerate(case.straight.metrics, 1):
        for key, value in metrics.items():
            if not math.isfinite(value):
                return f"{key} is {value} after step {step}"
    for state in case.straight.states:
        path = _first(state, torch.isnan)
        if path is not None:
            return f"the state of step {state.step} holds NaN in '{path}'"
    path = _first(case.straight.synth, lambda x: ~torch.isfinite(x))
    return None if path is None else f"the set holds what is not finite in '{path}'"


def _first(value: Any, bad: Callable[[Tensor], Tensor]) -> str | None:
    """The path of the first number or tensor of a state or a set that is bad somewhere."""
    for path, leaf in checkpoint.leaves(value):
        if isinstance(leaf, Tensor | float) and bool(bad(torch.as_tensor(leaf)).any()):
            return path
    return None


def named_metrics(case: Case) -> str | None:
    """Metrics have texts for names, none of them a name under which the log of a run says something else."""
    for key in {key: None for metrics in case.straight.metrics for key in metrics}:
        if not isinstance(key, str):
            return f"a metric is called {key!r}, which is no text"
        if key in LOGGED:
            return f"a metric is called '{key}', as what the log says itself ({', '.join(LOGGED)})"
    return None


def same_seed(case: Case) -> str | None:
    """The same seed gives the same bits: states, metrics and set, whatever ran or was prepared before."""
    one, two = case.straight, case.run()
    for first, second in zip(one.states, two.states, strict=True):
        if not same(first, second):
            return f"two runs of seed {case.seed} differ in the state of step {first.step}"
    if one.metrics != two.metrics:
        return f"two runs of seed {case.seed} differ in their metrics"
    return None if same(one.synth, two.synth) else f"two runs of seed {case.seed} differ in what they finish"


def resumed(case: Case) -> str | None:
    """A run that goes on from any saved state equals one that was never interrupted."""
    straight = case.straight
    for done, state in enumerate(straight.states):
        checkpoint.save(case.folder / "states", state.step, state, {"done": done})
        template = case.matcher.init(case.task, Rng(case.seed))
        loaded, extra = checkpoint.load(case.folder / "states", state.step, template)
        if extra != {"done": done} or not same(loaded, state):
            return f"the state of step {done} does not come back from disk as it was"
        rest = case.run(loaded)
        later = all(same(a, b) for a, b in zip(rest.states, straight.states[done:], strict=True))
        if not later or rest.metrics != straight.metrics[done:] or not same(rest.synth, straight.synth):
            return f"resumed from step {done} it does not end as the run without an interruption"
    return None


def input_untouched(case: Case) -> str | None:
    """Neither `step` nor `finish` changes the state that it is given, nor the source of the task."""
    matcher, task, rng = case.matcher, case.task, Rng(case.seed)
    source, state, work = copied(task.source), matcher.init(task, rng), matcher.prepare(task, rng)
    for _ in range(2):
        before, after = copied(state), state
        for _ in range(max(2, matcher.steps(task) - state.step)):
            after, _ = matcher.step(after, work, rng)
        if not unchanged(state, before):
            return f"its steps change the state of step {state.step} that was given"
        kept = copied(after)
        matcher.finish(after, work, rng)
        if not unchanged(state, before) or not unchanged(after, kept):
            return "finish changes a state"
        state, _ = matcher.step(state, work, rng)
    work.close()
    return None if unchanged(task.source, source) else "it changes the source"


def any_workspace(case: Case) -> str | None:
    """What `prepare` makes never changes a result: a used workspace steps and finishes as a fresh one."""
    matcher, task, rng = case.matcher, case.task, Rng(case.seed)
    state, used = matcher.init(task, rng), matcher.prepare(task, rng)
    for _ in range(2):
        matcher.step(state, used, rng)
        matcher.finish(case.straight.states[-1], used, rng)
    fresh = matcher.prepare(task, rng)
    stepped = [matcher.step(state, work, rng)[0] for work in (used, fresh)]
    finished = [matcher.finish(case.straight.states[-1], work, rng) for work in (used, fresh)]
    used.close()
    fresh.close()
    if not same(*stepped):
        return "a step differs between a used workspace and a fresh one"
    return None if same(*finished) else "finish differs between a used workspace and a fresh one"


def no_global_generator(case: Case) -> str | None:
    """Every draw takes a generator of the run's: those of torch, numpy and Python end as they were."""
    try:
        with global_rng_untouched():
            case.run()
    except AssertionError as error:
        return str(error)
    return None


def no_other_data(case: Case) -> str | None:
    """A matcher sees the source of its task alone: it loads no dataset, whose test part would be in reach."""
    opened: list[str] = []

    def refuse(*given: Any) -> Any:
        opened.append(str(given[1] if isinstance(given[0], Path) else given[0]))
        raise LookupError(f"the dataset '{opened[-1]}' is out of a matcher's reach")

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(registry, "find", refuse))
        stack.enter_context(mock.patch.dict(graph_source.GRAPHS, dict.fromkeys(graph_source.GRAPHS, refuse)))
        try:
            case.run()
        except LookupError:
            if not opened:
                raise
    return f"it loads the dataset '{opened[0]}', test part and all" if opened else None


def budget_and_classes(case: Case) -> str | None:
    """The set holds every class of the source, as its spec says, and no more than the budget allows."""
    synth: Any = case.straight.synth
    spec = case.task.source.spec
    decoded = synth.decode()
    if decoded.spec != spec:
        return "the set has another spec than the source"
    counts = torch.bincount(decoded.classes.cpu(), minlength=len(spec.classes)).tolist()
    if min(counts) < 1 and getattr(decoded, "y_kind", "class") == "class":
        return f"class '{spec.classes[counts.index(min(counts))]}' has no item"
    budget = case.task.budget
    if budget is None:
        return None
    if budget.ipc is None or isinstance(synth, Compensated):
        return _bytes_problem(case)
    stored = len(synth.pack()["images"]) if case.task.kind == "images" else len(decoded)
    if stored > budget.ipc * len(spec.classes) or (stored == len(decoded) and _crowded(decoded, budget.ipc)):
        return f"{stored} items of {len(spec.classes)} classes, by class {counts}, at ipc={budget.ipc}"
    return None


def _crowded(decoded: Any, ipc: int) -> bool:
    """Whether a class of hard labels has more items than its share."""
    hard = getattr(decoded, "y_kind", "class") == "class"
    return hard and int(torch.bincount(decoded.classes.cpu()).max()) > ipc


def _bytes_problem(case: Case) -> str | None:
    synth, budget = case.straight.synth, case.task.budget
    assert budget is not None
    parts = synth.nbytes
    held = parts["images"] + parts.get("trees", 0) + parts["labels"]
    allowed = budget.nbytes
    if isinstance(synth, Compensated):
        teachers = sum(2 * len(params) + 4 * len(statistics) for params, statistics in synth.teachers)
        held, allowed = parts["total"] - teachers, nominal_bytes(budget, synth.spec)
    assert allowed is not None
    return None if held <= allowed else f"the set holds {held} bytes, the budget {allowed}"


def stored(case: Case) -> str | None:
    """The set is stored and read again with the same bits, bytes and manifest."""
    synth: Any = case.straight.synth
    folder = case.folder / "set"
    recipe = evaluation_recipe(case.task, case.matcher)
    provenance = run_identity(case.task, case.matcher, case.seed)
    made = DistilledSet.make(synth, recipe=recipe, provenance=provenance)
    made.save(folder)
    read = DistilledSet.load(folder)
    verify(folder)
    if made.nbytes != synth.nbytes or sum(t.nbytes for t in synth.pack().values()) != synth.nbytes["total"]:
        return f"it says {dict(synth.nbytes)} bytes, stored are {made.nbytes}"
    if {key: read.manifest[key] for key in made.manifest} != made.manifest:
        return "the manifest does not come back from disk as it was"
    if not all(torch.equal(t, read.tensors[name]) for name, t in made.tensors.items()):
        return "the tensors do not come back from disk as they were"
    return None if same(made.decode(), read.decode()) else "the set decodes to something else once stored"


CLAUSES: dict[str, Clause] = {
    "a frozen value": frozen_value,
    "steps are counted": counted_steps,
    "numbers are finite": finite_numbers,
    "metrics have names of their own": named_metrics,
    "inputs are left alone": input_untouched,
    "same seed, same bits": same_seed,
    "a workspace changes no result": any_workspace,
    "resumed equals straight": resumed,
    "no global generator": no_global_generator,
    "no data but the task's": no_other_data,
    "budget and classes": budget_and_classes,
    "stored and read again": stored,
}

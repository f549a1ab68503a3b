"""The one loop: init, step, finish; checkpoints are states, the same call resumes, interrupts are clean."""

import math
import platform
import resource
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ddengine import __version__, checkpoint, files
from ddengine.errors import DDError, Interrupted, UsageError
from ddengine.identity import check_fit, check_memory, evaluation_recipe, run_identity
from ddengine.locks import writing
from ddengine.parallel import one_thread, signals
from ddengine.ranks import ProcessLostError, Ranks, joined, local_rank
from ddengine.rng import Rng
from ddengine.run_folder import Notice, claim, open_run, resume
from ddengine.types import Matcher, Metrics, Task, Workspace
from synth import DistilledSet

Progress = Callable[[int, int, Mapping[str, float]], None]
LOGGED = ("step", "seconds")  # what a record of metrics.jsonl says beside a matcher's metrics
PATIENCE = 20  # steps in a row that a matcher leaves out before a run ends


@dataclass(frozen=True)
class Schedule:
    """How often the loop saves and logs: checkpoints by steps and by minutes (whichever comes first)."""

    checkpoint_steps: int | None = None
    checkpoint_minutes: float = 5.0
    log_steps: int = 10


@dataclass(frozen=True)
class Result:
    """What a run made: the distilled set, the run's folder, steps done, seconds over all its sessions."""

    distilled: DistilledSet
    folder: Path | None
    steps: int
    seconds: float
    resumed_from: int | None


def distill(
    task: Task,
    matcher: Matcher[Any],
    *,
    seed: int = 0,
    out: str | Path | None = None,
    schedule: Schedule = Schedule(),
    progress: Progress | None = None,
    notice: Notice | None = None,
    config: str | None = None,
) -> Result:
    """Run `matcher` on `task` and return the distilled set; with `out`, keep all that it makes there.

    `config` is kept as config.yaml. The same call resumes an interrupted run bit for bit and returns a
    finished one as it is. Raises UsageError when `out` holds something else, another process writes
    there, or the task does not fit the matcher, Interrupted (state saved) on SIGINT or SIGTERM, DDError when
    the loss is no longer finite.
    Where torchrun started several processes they share the replicas of the task: the first keeps `out` and
    has the result's folder, and ProcessLostError is what the others raise when one dies.
    """
    task = task.settled(matcher.accepts.bf16)
    check_fit(task, matcher)
    check_memory(task, matcher)
    evaluation_recipe(task, matcher)  # refuses now what could not be stored at the end
    identity = run_identity(task, matcher, seed)
    # one thread: the same bits for any number of processes
    exact = one_thread() if task.replicas > 1 and task.device.type == "cpu" else nullcontext()
    with joined(task.device) as ranks, exact, ExitStack() as held:
        task = replace(task, ranks=ranks)
        watch = (progress, notice or _silent) if ranks.first else (None, _silent)
        run = _Run(Path(out) if out is not None else None, ranks.first, schedule, matcher.steps(task))
        _require_same(ranks, identity)
        ranks.from_first(lambda: held.enter_context(writing(run.folder, watch[1])))
        finished = ranks.from_first(lambda: None if run.out is None else open_run(run.out, identity))
        if finished is not None:
            watch[1](f"note: {run.out} is finished, and is returned as it is")
            seconds = float(finished.manifest["provenance"]["seconds"])
            return Result(finished, run.folder, run.steps, seconds, run.steps)
        return _work(task, matcher, Rng(seed), run, identity, config, *watch)


@dataclass(frozen=True)
class _Run:
    """A run in this process: `out` is where it is kept, which `owner` alone reads and writes."""

    out: Path | None
    owner: bool
    schedule: Schedule
    steps: int
    began: float = 0.0

    @property
    def folder(self) -> Path | None:
        return self.out if self.owner else None

    def due(self, step: int, saved_at: float) -> tuple[bool, bool]:
        """Whether to save after `step`, and whether to log it; the last is logged and kept as the result."""
        last, every = step == self.steps, self.schedule.checkpoint_steps
        minutes = (time.monotonic() - saved_at) / 60
        save = bool(every and step % every == 0) or minutes >= self.schedule.checkpoint_minutes
        return save and not last, last or save or step % self.schedule.log_steps == 0

    def save(self, state: Any) -> None:
        if self.folder is not None:
            extra = {"seconds": time.monotonic() - self.began}
            checkpoint.save(self.folder / "checkpoints", state.step, state, extra)


def _require_same(ranks: Ranks, identity: dict[str, Any]) -> None:
    """Refuse processes that were started for different runs (UsageError)."""
    other = files.difference(ranks.from_first(lambda: identity), identity)
    if other:
        raise UsageError(
            f"process {ranks.rank} was started for another run than process 0: {other}",
            "Start all processes with the same command, on the same data",
        )


def _work(
    task: Task,
    matcher: Matcher[Any],
    rng: Rng,
    run: _Run,
    identity: dict[str, Any],
    config: str | None,
    progress: Progress | None,
    notice: Notice,
) -> Result:
    """What is left to do of a run, and its result; only the first process of several has its folder."""
    state, extra, resumed = _start(task, matcher, rng, run, notice)
    work = matcher.prepare(task, rng)
    for note in (*work.notes, *_expert_notes(task, matcher)):
        notice(note)
    try:
        run = replace(run, began=time.monotonic() - float(extra.get("seconds", 0.0)))
        claimed = partial(claim, run.folder, identity, config) if run.folder is not None else lambda: None
        state = _advance(state, matcher, work, rng, run, progress, claimed)
        claimed()
        seconds = time.monotonic() - run.began
        finished = partial(_finished, state, matcher, work, rng, run, {**identity, "seconds": seconds})
        return Result(task.ranks.from_first(finished), run.folder, run.steps, seconds, resumed)
    finally:
        work.close()


def _finished(
    state: Any, matcher: Matcher[Any], work: Workspace, rng: Rng, run: _Run, facts: dict[str, Any]
) -> DistilledSet:
    """The distilled set of a run's last state, as it was stored where the run has a folder."""
    task = work.task
    provenance = {
        **facts, "steps": run.steps, "seconds": round(facts["seconds"], 3),
        "peak_memory_bytes": peak_memory(task.device), "device": str(task.device),
        "threads": torch.get_num_threads(), "host": platform.node(),
        "versions": {
            "ddengine": __version__, "torch": torch.__version__, "python": platform.python_version(),
        },
    }  # fmt: skip
    synth = matcher.finish(state, work, rng)
    distilled = DistilledSet.make(synth, recipe=evaluation_recipe(task, matcher), provenance=provenance)
    if run.folder is None:
        return distilled
    distilled.save(run.folder / "distilled")
    return DistilledSet.load(run.folder / "distilled")


def _expert_notes(task: Task, matcher: Matcher[Any]) -> tuple[str, ...]:
    if task.experts is None:
        return ()
    unused = "note: this matcher uses no experts; the pixel matchers do with matcher.networks=buffer"
    return task.experts.notes if matcher.accepts.experts else (unused,)


def _silent(text: str) -> None:
    pass


def _start(
    task: Task, matcher: Matcher[Any], rng: Rng, run: _Run, notice: Notice
) -> tuple[Any, dict[str, Any], int | None]:
    """The state to go on from, what was saved beside it, and its step (None: from the start).

    Several processes all start from the bits that the first has.
    """
    start = matcher.init(task, rng)

    def found() -> tuple[Any, dict[str, Any], int | None]:
        return (start, {}, None) if run.folder is None else resume(run.folder, start, run.steps, notice)

    def sent() -> tuple[dict[str, Any], dict[str, Any], int | None]:
        state, extra, step = found()
        values = {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in checkpoint.leaves(state)}
        return values, extra, step

    if task.ranks.world == 1:
        return found()
    values, extra, step = task.ranks.from_first(sent)
    return checkpoint.rebuild(start, values), extra, step


def _advance(
    state: Any,
    matcher: Matcher[Any],
    work: Workspace,
    rng: Rng,
    run: _Run,
    progress: Progress | None,
    claimed: Callable[[], None],
) -> Any:
    """Step from the state's step to the last, logging, saving, and stopping at a signal.

    The folder is claimed after the first step: a mistake that only shows there leaves it free. All processes
    stop after the same step, whichever of them got the signal; one that loses another saves what it has.
    """
    ranks, began, saved_at = work.task.ranks, state.step, time.monotonic()
    with signals() as stop:
        try:
            while state.step < run.steps:
                state, metrics = matcher.step(state, work, rng)
                if state.step == began + 1:
                    claimed()
                due, logged = run.due(state.step, saved_at)
                if logged:
                    _log(state, metrics, run, progress)
                stopped = 0 if state.step == run.steps else ranks.largest(stop[0] if stop else 0)
                if stopped and not logged:
                    _log(state, metrics, run, progress)
                if due or stopped:
                    run.save(state)
                    saved_at = time.monotonic()
                if stopped:
                    ranks.largest(0)  # until the first has saved: torchrun ends all when one has ended
                    raise _stopped(stopped, state.step, run)
        except ProcessLostError:
            if state.step > began and work.task.device.type == "cpu":  # a GPU would wait for the lost one
                run.save(state)
            raise
    return state


def _stopped(number: int, step: int, run: _Run) -> Interrupted:
    where = f"; its state is in {run.out}" if run.out else ""
    remedy = "Repeat the same command to go on" if run.out else "Give out=DIR to keep a run's state"
    name = signal.Signals(number).name
    return Interrupted(f"stopped by {name} at step {step} of {run.steps}{where}", remedy)


def _log(state: Any, metrics: Metrics, run: _Run, progress: Progress | None) -> None:
    """Write the metrics of the state's last step and show them (DDError where the run cannot go on).

    A matcher that leaves steps out says how many up to now ("in_row"): what is not finite in those is no
    metric, and PATIENCE of them, or more than one at the end, end the run. Metrics called as LOGGED are left
    out.
    """
    values = {key: float(value) for key, value in metrics.items()}
    in_row = int(values.pop("in_row", 0))
    bad = next((key for key, value in values.items() if not math.isfinite(value)), None)
    if bad is not None and not in_row:
        raise DDError(
            f"{bad} is {values[bad]} at step {state.step}: the run diverged",
            "Lower matcher.lr; the last good state stays in checkpoints/",
        )
    last = state.step == run.steps
    if in_row >= min(PATIENCE, run.steps) or (last and in_row > 1):
        if not last:
            run.save(state)
        raise DDError(
            f"the last {in_row} of {state.step} steps were skipped: their loss or gradient was not finite",
            "Lower matcher.lr and look for values of the data that are out of range; the last good state "
            "stays in checkpoints/",
        )
    values = {key: value for key, value in values.items() if math.isfinite(value) and key not in LOGGED}
    if run.folder is not None:
        seconds = round(time.monotonic() - run.began, 3)
        files.append_json_line(
            run.folder / "metrics.jsonl", {"step": state.step, "seconds": seconds, **values}
        )
    if progress is not None:
        shown = {key: value for key, value in values.items() if value or key != "skipped"}
        progress(state.step, run.steps, shown)


def peak_memory(device: torch.device) -> int:
    """Peak bytes: allocated on a CUDA device, else resident in this process since its start."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def as_device(name: str) -> torch.device:
    """The device called auto, cpu or cuda (UsageError when CUDA is asked for and is not there)."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and Ranks.here().world > 1:
        name = f"cuda:{local_rank()}"
    if name != "cpu" and (name.partition(":")[0] != "cuda" or not torch.cuda.is_available()):
        raise UsageError(f"device={name}, but PyTorch finds no such device", "Give device=cpu or device=auto")
    if name != "cpu" and int(name.partition(":")[2] or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"device={name}, but PyTorch finds {torch.cuda.device_count()} GPUs",
            "Start as many processes as there are GPUs, or give device=cpu",
        )
    return torch.device(name)

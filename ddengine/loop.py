"""The one loop: init, step, finish; checkpoints are states, the same call resumes, interrupts are clean."""

import json
import math
import platform
import resource
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ddengine import __version__, checkpoint, files
from ddengine.errors import ArtefactError, DDError, Interrupted, UsageError
from ddengine.nets import resolve
from ddengine.nets.graph import resolve_graph, usual_graph
from ddengine.parallel import signals
from ddengine.rng import Rng
from ddengine.types import Evaluated, Matcher, Metrics, Task, Workspace, no_budget
from synth import DistilledSet

Progress = Callable[[int, int, Mapping[str, float]], None]
Notice = Callable[[str], None]
RUN_FORMAT, RUN_VERSION = "ddengine/run", 1


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
    finished one as it is. Raises UsageError when `out` holds something else or the task does not fit the
    matcher, Interrupted (state saved) on SIGINT or SIGTERM, DDError when the loss is no longer finite.
    """
    check_fit(task, matcher)
    rng, identity = Rng(seed), run_identity(task, matcher, seed)
    folder = Path(out) if out is not None else None
    if folder is not None:
        finished = open_run(folder, identity)
        if finished is not None:
            seconds = float(finished.manifest["provenance"]["seconds"])
            return Result(finished, folder, matcher.steps(task), seconds, matcher.steps(task))
    state, extra, resumed = _start(task, matcher, rng, folder, notice)
    work = matcher.prepare(task, rng)
    for note in (*work.notes, *_expert_notes(task, matcher)):
        (notice or _silent)(note)
    try:
        run = _Run(folder, schedule, matcher.steps(task), time.monotonic() - float(extra.get("seconds", 0.0)))
        claim = partial(_claim, folder, identity, config) if folder is not None else lambda: None
        state = _advance(state, matcher, work, rng, run, progress, claim)
        claim()
        seconds = time.monotonic() - run.began
        synth = matcher.finish(state, work, rng)
    finally:
        work.close()
    provenance = {
        **identity, "steps": run.steps, "seconds": round(seconds, 3),
        "peak_memory_bytes": peak_memory(task.device), "device": str(task.device),
        "threads": torch.get_num_threads(), "host": platform.node(),
        "versions": {
            "ddengine": __version__, "torch": torch.__version__, "python": platform.python_version(),
        },
    }  # fmt: skip
    distilled = DistilledSet.make(synth, recipe=evaluation_recipe(task, matcher), provenance=provenance)
    if folder is not None:
        distilled.save(folder / "distilled")
        distilled = DistilledSet.load(folder / "distilled")
    return Result(distilled, folder, run.steps, seconds, resumed)


@dataclass(frozen=True)
class _Run:
    folder: Path | None
    schedule: Schedule
    steps: int
    began: float


def _expert_notes(task: Task, matcher: Matcher[Any]) -> tuple[str, ...]:
    if task.experts is None:
        return ()
    unused = "note: this matcher uses no experts; the pixel matchers do with matcher.networks=buffer"
    return task.experts.notes if matcher.accepts.experts else (unused,)


def _silent(text: str) -> None:
    pass


def check_fit(task: Task, matcher: Matcher[Any]) -> None:
    """Refuse a task whose source, budget or experts do not fit the matcher (UsageError)."""
    if matcher.accepts.source not in ("any", task.kind):
        raise UsageError(
            f"this matcher works on {matcher.accepts.source}, '{task.source.spec.name}' holds {task.kind}",
            "Give matcher=computation_tree, tree_herding, random or kcenter for graphs"
            if task.kind == "graphs"
            else "Give one of the matchers for images, such as matcher=attention",
        )
    if task.budget is None and matcher.accepts.budget:
        raise no_budget()
    if matcher.accepts.experts and task.experts is None:
        raise UsageError(
            "this matcher learns from experts and was given none",
            "Give experts=DIR, a folder that `ddengine buffer` recorded",
        )
    if task.precision == "bf16" and not matcher.accepts.bf16:
        raise UsageError("this matcher computes in float32, precision=bf16 was given", "Give precision=fp32")
    counted = task.budget is not None and task.budget.ipc is not None
    if task.kind == "images" and (counted or not matcher.accepts.plans):
        _check_count(task)


def _check_count(task: Task) -> None:
    """Refuse more images per class than the smallest class has (UsageError)."""
    ipc = task.ipc
    smallest = min(range(len(task.source.counts)), key=task.source.counts.__getitem__)
    if ipc > task.source.counts[smallest]:
        raise UsageError(
            f"ipc={ipc} is more than the {task.source.counts[smallest]} images that class "
            f"'{task.source.spec.classes[smallest]}' has to learn from",
            f"Give ipc={task.source.counts[smallest]} or less",
        )


def run_identity(task: Task, matcher: Matcher[Any], seed: int) -> dict[str, Any]:
    """What makes two runs the same: matcher and options, budget, data, precision and seed (plain JSON)."""
    kind = type(matcher)
    return {
        "matcher": {"type": f"{kind.__module__}.{kind.__qualname__}", **_plain(asdict(matcher))},  # type: ignore[call-overload]
        "budget": None if task.budget is None else asdict(task.budget),
        "dataset": {
            "name": task.source.spec.name,
            "fingerprint": task.source.spec.fingerprint,
            "preprocessing": task.source.spec.preprocessing,
            **({"shape": list(task.images.spec.shape)} if task.kind == "images" else _graph_identity(task)),
        },
        "precision": task.precision,
        "seed": seed,
        **({"experts": task.experts.identity} if matcher.accepts.experts else {}),
    }


def _graph_identity(task: Task) -> dict[str, Any]:
    return {"kind": "graphs", "shape": list(task.graphs.spec.node_sizes)}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


def evaluation_recipe(task: Task, matcher: Matcher[Any]) -> dict[str, Any]:
    """What the manifest tells a judge: the protocol, the network that distilled the set, the dataset, and
    what the matcher adds.
    """
    network = getattr(matcher, "network", None)
    if network is not None:
        graphs = task.kind == "graphs"
        network = (
            resolve_graph(usual_graph(network)) if graphs else resolve(network, task.images.spec.shape)
        ).to_dict()
    dataset = _plain(dict(task.origin)) or {"name": task.source.spec.name}
    own = matcher.evaluation(task) if isinstance(matcher, Evaluated) else {}
    return {"protocol": "standard-v1", "network": network, "dataset": dataset, **own}


def open_run(folder: Path, identity: Mapping[str, Any]) -> DistilledSet | None:
    """Make `folder`, or see that it holds this run. Returns the set of a finished run, None for any other.

    Raises UsageError if the folder holds another run or foreign files; nothing in it is changed.
    """
    marker = folder / "run.json"
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"out={folder} is a file", "Choose another out=DIR")
    if marker.exists():
        found = files.read_json(marker)
        difference = _difference(found.get("identity", {}) if isinstance(found, dict) else {}, identity)
        if difference:
            raise UsageError(f"out={folder} holds another run: {difference}", "Choose another out=DIR")
        return DistilledSet.load(folder / "distilled") if (folder / "distilled").is_dir() else None
    if folder.is_dir() and any(not p.name.startswith(files.TEMPORARY) for p in folder.iterdir()):
        raise UsageError(f"out={folder} holds files that are not a run of ddengine", "Choose another out=DIR")
    files.make_folder(folder)
    return None


def _claim(folder: Path, identity: Mapping[str, Any], config: str | None) -> None:
    """Write what is missing of run.json and config.yaml, in this order: the first makes a folder a run's."""
    if not (folder / "run.json").exists():
        files.write_json(
            folder / "run.json", {"format": RUN_FORMAT, "version": RUN_VERSION, "identity": dict(identity)}
        )
    if config is not None and not (folder / "config.yaml").exists():
        files.write_bytes(folder / "config.yaml", config.encode())


def _difference(old: Any, new: Any, path: str = "") -> str:
    if isinstance(old, dict) and isinstance(new, dict):
        found = (
            _difference(old.get(k), new.get(k), f"{path}.{k}" if path else k) for k in sorted({*old, *new})
        )
        return next((text for text in found if text), "")
    return "" if old == new else f"{path} is {old} there and {new} here"


def _start(
    task: Task, matcher: Matcher[Any], rng: Rng, folder: Path | None, notice: Notice | None
) -> tuple[Any, dict[str, Any], int | None]:
    state = matcher.init(task, rng)
    if folder is None:
        return state, {}, None
    checkpoint.clean(folder)
    checkpoint.clean(folder / "checkpoints")
    for step in checkpoint.steps(folder / "checkpoints"):
        try:
            state, extra = checkpoint.load(folder / "checkpoints", step, state)
        except ArtefactError as error:
            if notice is not None:
                notice(f"{error.cause}: going on from an older state")
            continue
        _cut_metrics(folder / "metrics.jsonl", step)
        if notice is not None:
            notice(f"resuming {folder} at step {step} of {matcher.steps(task)}")
        return state, extra, step
    _cut_metrics(folder / "metrics.jsonl", 0)
    return state, {}, None


def _cut_metrics(path: Path, step: int) -> None:
    if path.exists():
        kept = [json.dumps(record) + "\n" for record in files.read_json_lines(path) if record["step"] <= step]
        files.write_bytes(path, "".join(kept).encode())


def _advance(
    state: Any,
    matcher: Matcher[Any],
    work: Workspace,
    rng: Rng,
    run: _Run,
    progress: Progress | None,
    claim: Callable[[], None],
) -> Any:
    """Step from the state's step to the last, logging, saving, and stopping at a signal.

    The folder is claimed after the first step: a mistake that only shows there leaves it free.
    """
    claimed = False
    saved_at = time.monotonic()
    with signals() as stop:
        while state.step < run.steps:
            state, metrics = matcher.step(state, work, rng)
            if not claimed:
                claim()
                claimed = True
            last = state.step == run.steps
            minutes = (time.monotonic() - saved_at) / 60
            every = run.schedule.checkpoint_steps
            due = bool(every and state.step % every == 0) or minutes >= run.schedule.checkpoint_minutes
            if last or due or stop or state.step % run.schedule.log_steps == 0:
                _log(state.step, metrics, run, progress)
            if run.folder is not None and not last and (due or stop):
                extra = {"seconds": time.monotonic() - run.began}
                checkpoint.save(run.folder / "checkpoints", state.step, state, extra)
                saved_at = time.monotonic()
            if stop and not last:
                where = f"; its state is in {run.folder}" if run.folder else ""
                raise Interrupted(
                    f"stopped by {signal.Signals(stop[0]).name} at step {state.step} of {run.steps}{where}",
                    "Repeat the same command to go on"
                    if run.folder
                    else "Give out=DIR to keep a run's state",
                )
    return state


def _log(step: int, metrics: Metrics, run: _Run, progress: Progress | None) -> None:
    values = {key: float(value) for key, value in metrics.items()}
    if not all(math.isfinite(value) for value in values.values()):
        bad = next(key for key, value in values.items() if not math.isfinite(value))
        raise DDError(
            f"{bad} is {values[bad]} at step {step}: the run diverged",
            "Lower matcher.lr; the last good state stays in checkpoints/",
        )
    if run.folder is not None:
        seconds = round(time.monotonic() - run.began, 3)
        files.append_json_line(run.folder / "metrics.jsonl", {"step": step, "seconds": seconds, **values})
    if progress is not None:
        progress(step, run.steps, values)


def peak_memory(device: torch.device) -> int:
    """Peak bytes: allocated on a CUDA device, else resident in this process since its start."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def as_device(name: str) -> torch.device:
    """The device called auto, cpu or cuda (UsageError when CUDA is asked for and is not there)."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name != "cpu" and (name.partition(":")[0] != "cuda" or not torch.cuda.is_available()):
        raise UsageError(f"device={name}, but PyTorch finds no such device", "Give device=cpu or device=auto")
    return torch.device(name)

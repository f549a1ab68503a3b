"""Recording expert trajectories: one call starts, continues or extends a buffer, and says what it takes."""

import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddengine.errors import DDError, Interrupted, UsageError
from ddengine.locks import writing
from ddengine.nets import NetSpec
from ddengine.ops.memory import free_memory
from ddengine.parallel import job_pool, signals
from ddengine.types import Images
from expert_buffers.asked import Plan, ask
from expert_buffers.estimate import (
    Estimate,
    epochs_left,
    estimate,
    in_bytes,
    in_words,
    source_bytes,
    steps_per_epoch,
)
from expert_buffers.manifest import MANIFEST, write_manifest
from expert_buffers.partial import partial_path
from expert_buffers.recipes import ExpertRecipe
from expert_buffers.store import ExpertBuffer, commit, open_for_writing
from expert_buffers.training import ExpertJob, Session, run_expert
from expert_buffers.writing import new_manifest, same_buffer

SECONDS_BETWEEN_REPORTS = 1.0

Progress = Callable[[int, int, Mapping[str, float]], None]
Notice = Callable[[str], None]


def record(
    source: Images,
    networks: NetSpec | Sequence[NetSpec],
    out: str | Path,
    *,
    count: int = 100,
    epochs: int | None = None,
    max_start_epoch: int = 19,
    expert_epochs: int = 2,
    full_experts: int = 0,
    recipe: str | ExpertRecipe = "mtt",
    seed: int = 0,
    encoding: str = "delta16",
    workers: int = 1,
    device: str = "cpu",
    precision: str = "fp32",
    save_minutes: float | int = 5.0,
    progress: Progress | None = None,
    notice: Notice | None = None,
    origin: Mapping[str, Any] = {},
) -> ExpertBuffer:
    """Train `count` experts on `source`, the fit part alone, and keep every epoch of them in folder `out`.

    Only what a matcher reads is trained: `epochs`, by default the last epoch that a segment starts from and
    the epochs that it spans, or the length of a recipe whose rate falls to zero; the first `full_experts` go
    to the recipe's nominal length. Several networks are dealt round robin. The same call goes on where it was
    cut off; a larger `count` or `epochs` extends the buffer (`count` alone where the rate follows `epochs`),
    and what is longer than asked for is kept. The weights do not depend on `workers` (one thread each; one
    process on a GPU). Raises UsageError, also while another process writes there, and Interrupted with all
    whole epochs kept.
    """
    asked = ask(
        source, networks, count=count, epochs=epochs, max_start_epoch=max_start_epoch,
        expert_epochs=expert_epochs, full_experts=full_experts, recipe=recipe, seed=seed, encoding=encoding,
        workers=workers, device=device, precision=precision, save_minutes=save_minutes, origin=origin,
    )  # fmt: skip
    root = Path(out).expanduser()
    with writing(root, notice):
        manifest = open_for_writing(root, asked.head)
        jobs = asked.plan.jobs(manifest)
        if jobs:
            session = asked.session(root, manifest)
            workers = asked.processes(len(jobs))
            _require_room(session, jobs, workers, notice)
            _run(session, asked.plan, jobs, workers, progress)
        for number in range(count):
            partial_path(root, number).unlink(missing_ok=True)
    return ExpertBuffer(root)


def forecast(
    source: Images, networks: NetSpec | Sequence[NetSpec], out: str | Path, **options: Any
) -> tuple[Estimate, str]:
    """What `record` would take with all of these options, and the work in words; nothing is written.

    Raises UsageError as `record` does.
    """
    asked, root = ask(source, networks, **options), Path(out).expanduser()
    manifest = same_buffer(root, asked.head) if (root / MANIFEST).exists() else new_manifest(asked.head)
    jobs = asked.plan.jobs(manifest)
    if not jobs:
        return Estimate(0.0, source_bytes(asked.source), 0, 0), "nothing is left to record"
    session, workers = asked.session(root, manifest), asked.processes(len(jobs))
    return estimate(session, jobs, workers), _work(session, jobs, workers)


def _require_room(session: Session, jobs: Sequence[ExpertJob], workers: int, notice: Notice | None) -> None:
    """Say what the work will take, and refuse a disk or a memory that cannot hold it (UsageError)."""
    cost = estimate(session, jobs, workers)
    if notice is not None:
        notice(f"{_work(session, jobs, workers)}: about {in_words(cost)}")
    free = shutil.disk_usage(session.root).free
    if free < cost.free_bytes:
        raise UsageError(
            f"the disk of out={session.root} has {in_bytes(free)} free, "
            f"{in_bytes(cost.free_bytes)} are needed",
            "Free some room, choose another out=DIR, or give a smaller count or epochs",
        )
    if (left := free_memory(torch.device(session.device))) < cost.least_bytes:
        raise UsageError(
            f"{workers} experts at a time need {in_bytes(cost.least_bytes)} of memory and more, "
            f"{in_bytes(left)} are free",
            "Give a smaller recipe.batch_size, network.width or workers",
        )


def _work(session: Session, jobs: Sequence[ExpertJob], workers: int) -> str:
    left = [epochs_left(session, job) for job in jobs]
    epochs = f"x {left[0]} epochs" if len(set(left)) == 1 else f"with {sum(left)} epochs in all"
    processes = f"{workers} workers" if workers > 1 else "1 worker"
    return f"{len(jobs)} experts {epochs} of {steps_per_epoch(session)} steps on {processes}"


def _run(
    session: Session,
    plan: Plan,
    jobs: Sequence[ExpertJob],
    workers: int,
    progress: Progress | None,
) -> None:
    """Do the jobs, committing each expert when it is done; Interrupted when a signal came before the last."""
    manifest = write_manifest(session.root, {**session.manifest, "plan": plan.to_dict()})
    left, total = len(jobs), sum(map(plan.target, range(plan.count)))
    failed: DDError | None = None
    if workers > 1:
        _share(session)
    with (
        signals(lambda: session.stop.fill_(1)) as caught,
        job_pool(run_expert, session, workers, ordered=False) as results,
    ):
        found = results(jobs)  # before the thread that reports: processes may then start as copies
        with _reported(session.done, total, progress):
            for number, entry in found:
                if isinstance(entry, DDError):
                    failed = failed or entry
                elif entry is not None:
                    manifest = commit(session.root, manifest, number, entry, plan.to_dict())
                    partial_path(session.root, number).unlink(missing_ok=True)
                    left -= 1
    if failed is not None:
        raise failed
    if left:
        raise Interrupted(
            f"stopped by {signal.Signals(caught[0]).name} after {int(session.done.sum())} of {total} epochs, "
            f"which are in {session.root}",
            "Repeat the same command to go on",
        )


def _share(session: Session) -> None:
    """Put the tensors that processes share into shared memory (DDError where there is too little of it)."""
    try:
        for tensor in (session.source.x, session.source.y, session.done, session.stop):
            tensor.share_memory_()
    except RuntimeError as error:
        raise DDError(f"no shared memory for the data: {error}", "Repeat with workers=1") from error


@contextmanager
def _reported(done: Tensor, total: int, progress: Progress | None) -> Iterator[None]:
    """Inside, a thread reports the epochs done every second; the last report is made at the end."""
    if progress is None:
        yield
        return
    over = threading.Event()

    def report() -> None:
        while not over.wait(SECONDS_BETWEEN_REPORTS):
            progress(int(done.sum()), total, {})

    thread = threading.Thread(target=report, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    progress(int(done.sum()), total, {})

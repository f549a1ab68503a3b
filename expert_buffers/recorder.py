"""Recording expert trajectories: one call starts, continues or extends a buffer, and says what it takes."""

import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from ddengine.errors import DDError, Interrupted, UsageError, require, require_positive
from ddengine.nets import NetSpec, resolve
from ddengine.parallel import job_pool, one_thread, signals
from ddengine.types import Images, as_source
from expert_buffers.estimate import Estimate, epochs_left, estimate, steps_per_epoch
from expert_buffers.manifest import header, write_manifest
from expert_buffers.partial import partial_path
from expert_buffers.recipes import ExpertRecipe, find_recipe
from expert_buffers.store import ENCODINGS, ExpertBuffer, commit, open_for_writing
from expert_buffers.training import ExpertJob, Session, run_expert

PRECISIONS = ("fp32", "bf16")
WHITENED_AT_ONCE = 1000  # images
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
    process on a GPU). Raises UsageError, and Interrupted with all whole epochs kept.
    """
    chosen = find_recipe(recipe).resolved(source.spec.name)
    horizon = max_start_epoch + expert_epochs if epochs is None else epochs
    if chosen.schedule != "constant":
        horizon = chosen.epochs if epochs is None else epochs
        require_positive("epochs", horizon)
        chosen = replace(chosen, epochs=horizon)
    require_positive("max_start_epoch", max_start_epoch, zero=True)
    require_positive("workers", workers)
    require_positive("save_minutes", save_minutes)
    require(encoding, ENCODINGS, "encoding")
    require(precision, PRECISIONS, "precision")
    plan = _Plan(count, horizon, expert_epochs, full_experts, chosen.epochs)
    specs, place, source = (
        _networks(networks, source, count),
        _place(device),
        as_source(source),
    )
    head = header(source.spec, specs, chosen.to_dict() | {"precision": precision}, seed, encoding, origin)
    root = Path(out).expanduser()
    manifest = open_for_writing(root, head)
    jobs = plan.jobs(manifest)
    if jobs:
        session = Session(
            root=root, manifest=manifest, source=_whitened(source), networks=tuple(specs),
            architectures=_architectures(manifest, specs), recipe=chosen, seed=seed, encoding=encoding,
            device=str(place), precision=precision, save_minutes=float(save_minutes),
            done=plan.done(manifest), stop=torch.zeros((), dtype=torch.uint8),
        )  # fmt: skip
        workers = 1 if place.type == "cuda" else min(workers, len(jobs))
        _require_room(session, jobs, workers, notice)
        _run(session, plan, jobs, workers, progress)
    for number in range(count):
        partial_path(root, number).unlink(missing_ok=True)
    return ExpertBuffer(root)


@dataclass(frozen=True)
class _Plan:
    """How many experts, and how far each: what the manifest keeps as `plan`."""

    count: int
    epochs: int
    expert_epochs: int
    full_experts: int
    full_epochs: int

    def __post_init__(self) -> None:
        for key in ("count", "epochs", "expert_epochs"):
            require_positive(key, getattr(self, key))
        require_positive("full_experts", self.full_experts, zero=True)
        if self.full_experts > self.count:
            raise UsageError(
                f"full_experts={self.full_experts} is more than count={self.count}",
                f"Give full_experts={self.count} or less",
            )

    def target(self, number: int) -> int:
        """Epochs that an expert is trained for."""
        return max(self.epochs, self.full_epochs) if number < self.full_experts else self.epochs

    def jobs(self, manifest: Mapping[str, Any]) -> list[ExpertJob]:
        """The experts that the buffer lacks, or has for fewer epochs."""
        wanted = [ExpertJob(i, self.target(i)) for i in range(self.count)]
        return [job for job in wanted if _epochs(manifest, job.number) < job.epochs]

    def done(self, manifest: Mapping[str, Any]) -> Int[Tensor, " r"]:
        """Epochs of each expert that need not be trained."""
        have = [min(max(_epochs(manifest, i), 0), self.target(i)) for i in range(self.count)]
        return torch.tensor(have)

    def to_dict(self) -> dict[str, int]:
        """Plain JSON, with the last epoch that a segment may start from."""
        return asdict(self) | {"max_start_epoch": max(self.epochs - self.expert_epochs, 0)}


def _epochs(manifest: Mapping[str, Any], number: int) -> int:
    """Epochs that the buffer has of an expert, -1 for no expert."""
    entry = manifest["experts"].get(str(number))
    return -1 if entry is None else entry["checkpoints"] - 1


def _networks(networks: NetSpec | Sequence[NetSpec], source: Images, count: int) -> list[NetSpec]:
    given = [networks] if isinstance(networks, NetSpec) else list(networks)
    specs = [resolve(network, source.spec.shape) for network in given]
    if not specs or len(set(specs)) < len(specs):
        raise UsageError(
            f"networks={[spec.name for spec in specs]} is empty or repeats", "Give different networks"
        )
    if count < len(specs):
        raise UsageError(
            f"count={count} is less than the {len(specs)} networks", f"Give count={len(specs)} or more"
        )
    if not len(source):
        raise UsageError("there is no image to train on", "Give a source with at least one image")
    return specs


def _place(device: str) -> torch.device:
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device={device}, but PyTorch finds no such device", "Give device=cpu") from error


def _architectures(manifest: Mapping[str, Any], specs: Sequence[NetSpec]) -> tuple[str, ...]:
    """The manifest's names of the networks."""
    entries = manifest["architectures"].items()
    return tuple(next(name for name, e in entries if e["network"] == spec.to_dict()) for spec in specs)


def _whitened(source: Images) -> Images:
    """The source with its whitening done once, as float model input; any other source as it is."""
    if source.spec.zca is None:
        return source
    with one_thread():
        x = torch.cat(
            [
                source.model_input(slice(start, start + WHITENED_AT_ONCE))
                for start in range(0, len(source), WHITENED_AT_ONCE)
            ]
        )
    return replace(source, x=x, spec=replace(source.spec, zca=None))


def _require_room(session: Session, jobs: Sequence[ExpertJob], workers: int, notice: Notice | None) -> None:
    """Say what the work will take, and refuse a disk that has no room for it (UsageError)."""
    cost = estimate(session, jobs, workers)
    if notice is not None:
        notice(f"{_work(session, jobs, workers)}: about {in_words(cost)}")
    free = shutil.disk_usage(session.root).free
    if free < cost.free_bytes:
        raise UsageError(
            f"the disk of out={session.root} has {_size(free)} free, {_size(cost.free_bytes)} are needed",
            "Free some room, choose another out=DIR, or give a smaller count or epochs",
        )


def _work(session: Session, jobs: Sequence[ExpertJob], workers: int) -> str:
    left = [epochs_left(session, job) for job in jobs]
    epochs = f"x {left[0]} epochs" if len(set(left)) == 1 else f"with {sum(left)} epochs in all"
    processes = f"{workers} workers" if workers > 1 else "1 worker"
    return f"{len(jobs)} experts {epochs} of {steps_per_epoch(session)} steps on {processes}"


def in_words(cost: Estimate) -> str:
    """An estimate for people: "12 min, 0.6 GiB of memory, 12 MB on disk"."""
    seconds = cost.seconds
    time = f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
    time = time if seconds < 5400 else f"{seconds / 3600:.1f} h"
    return f"{time}, {cost.memory_bytes / 2**30:.1f} GiB of memory, {_size(cost.disk_bytes)} on disk"


def _size(count: int) -> str:
    unit, name = (1e9, "GB") if count >= 10**9 else (1e6, "MB") if count >= 10**6 else (1e3, "kB")
    return f"{count / unit:.3g} {name}"


def _run(
    session: Session,
    plan: _Plan,
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
        _reported(session.done, total, progress),
        job_pool(run_expert, session, workers, ordered=False) as results,
    ):
        for number, entry in results(jobs):
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

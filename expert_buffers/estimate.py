"""What a recording will take, before it starts: seconds from timed steps, memory, bytes on disk."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from ddengine.data.disk import HELD, DiskPixels
from ddengine.nets import NetSpec, build, count_parameters
from ddengine.ops.batches import layout, resident
from ddengine.parallel import one_thread
from ddengine.rng import Rng
from ddengine.types import Images
from expert_buffers.manifest import declared_bytes
from expert_buffers.training import SCORED, ExpertJob, Session, initial_state, score, train_epoch

TIMED = 2  # steps at least, after one that warms up
SECONDS = 0.1  # of timing, where that takes more of them
LIBRARIES = 600 << 20  # resident bytes of a process that has imported torch and computed a step: measured
WORKING = 1.5  # peak over saved bytes of a step, for gradients and the workspaces of convolutions: measured
COPIES = 3  # of an expert's rows: old, new, and the bytes of a file as it is written
VECTORS = 6  # weights, gradient, velocity, direction, climb, last row: each as large as the weights


@dataclass(frozen=True)
class Estimate:
    """Seconds until the end; peak bytes of memory, of all processes together or of the GPU; bytes that the
    buffer grows by; bytes that must be free on the disk, unfinished experts included; and bytes of memory
    beyond the data without which no step can be computed.
    """

    seconds: float
    memory_bytes: int
    disk_bytes: int
    free_bytes: int
    least_bytes: int = 0


@dataclass(frozen=True)
class StepCost:
    """Seconds of a step and of scoring an image; bytes that a step saves for its way back, and of weights."""

    seconds: float
    scoring: float
    saved: int
    weights: int

    @property
    def peak(self) -> int:
        """Bytes at the peak of a step."""
        return int(WORKING * self.saved) + VECTORS * self.weights


def estimate(session: Session, jobs: Sequence[ExpertJob], workers: int) -> Estimate:
    """What `jobs` will take on `workers` processes, from a few real steps of each of their networks."""
    networks = {session.network(job.number) for job in jobs}
    with one_thread():
        costs = {network: step_cost(session, network) for network in networks}
    each = [epochs_left(session, job) * _epoch(session, costs[session.network(job.number)]) for job in jobs]
    seconds = max(sum(each) / workers, math.ceil(len(each) / workers) * sum(each) / len(each))
    files = [expert_bytes(session, job.number, job.epochs) for job in jobs]
    grown = sum(files) - sum(expert_bytes(session, job.number, recorded(session, job)) for job in jobs)
    held = max(cost.peak for cost in costs.values()) + COPIES * max(files)
    libraries = 0 if session.device.startswith("cuda") else LIBRARIES
    memory = source_bytes(session.source) + workers * (libraries + held)
    least = workers * max(cost.saved + cost.weights for cost in costs.values())
    return Estimate(seconds, memory, grown, grown + workers * max(files), least)


def source_bytes(source: Images) -> int:
    """Bytes of memory that images take: their pixels, or what is kept of those that lie on disk."""
    whole = source.x.numel() * source.x.itemsize
    return min(whole, HELD) if isinstance(source.x, DiskPixels) else whole


def _epoch(session: Session, cost: StepCost) -> float:
    """Seconds of an epoch: its steps, and the images that its checkpoint is scored on."""
    return steps_per_epoch(session) * cost.seconds + min(SCORED, len(session.source)) * cost.scoring


def step_cost(session: Session, network: NetSpec) -> StepCost:
    """What a step of a throw-away network takes, the first step not timed."""
    place, rng = torch.device(session.device), Rng(session.seed).fold("estimate")
    images = resident(
        session.source.take(torch.arange(len(session.source))[: session.recipe.batch_size]), place
    )
    net = build(network, images.spec.shape, len(images.spec.classes), rng.torch("weights"))
    net = net.to(device=place, memory_format=layout(place)).train()  # type: ignore[call-overload]
    state, saved = initial_state(net), {}

    def note(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        train_epoch(net, state, images, session.recipe, 0, rng, session.precision)
    score(net, state, images)
    seconds = _timed(
        lambda: train_epoch(net, state, images, session.recipe, 0, rng, session.precision), place
    )
    scoring = _timed(lambda: score(net, state, images), place) / len(images)
    return StepCost(seconds, scoring, sum(saved.values()), 4 * count_parameters(net))


def _timed(work: Callable[[], object], place: torch.device) -> float:
    """Mean seconds of TIMED calls or more."""
    began, calls = _now(place), 0
    while calls < TIMED or _now(place) - began < SECONDS:
        work()
        calls += 1
    return (_now(place) - began) / calls


def _now(place: torch.device) -> float:
    if place.type == "cuda":
        torch.cuda.synchronize(place)
    return time.perf_counter()


def in_words(cost: Estimate) -> str:
    """An estimate for people: "12 min, 0.6 GiB of memory, 12 MB on disk"."""
    seconds = cost.seconds
    time = f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
    time = time if seconds < 5400 else f"{seconds / 3600:.1f} h"
    return f"{time}, {cost.memory_bytes / 2**30:.1f} GiB of memory, {in_bytes(cost.disk_bytes)} on disk"


def in_bytes(count: int) -> str:
    """A number of bytes for people: "3.33 GB"."""
    unit, name = (1e9, "GB") if count >= 10**9 else (1e6, "MB") if count >= 10**6 else (1e3, "kB")
    return f"{count / unit:.3g} {name}"


def steps_per_epoch(session: Session) -> int:
    """Steps of one epoch, the last incomplete batch counted."""
    return math.ceil(len(session.source) / session.recipe.batch_size)


def recorded(session: Session, job: ExpertJob) -> int | None:
    """Epochs of an expert that the buffer holds at the start; None for no expert."""
    entry = session.manifest["experts"].get(str(job.number))
    return None if entry is None else entry["checkpoints"] - 1


def epochs_left(session: Session, job: ExpertJob) -> int:
    """Epochs between what the buffer holds and what the job asks for."""
    return job.epochs - (recorded(session, job) or 0)


def expert_bytes(session: Session, number: int, epochs: int | None) -> int:
    """Bytes of the tensors in the file of an expert with so many epochs; 0 for None."""
    if epochs is None:
        return 0
    entry = {
        "architecture": session.architectures[number % len(session.architectures)],
        "checkpoints": epochs + 1,
        "encoding": session.encoding,
        "loss": 0.0,
    }
    return declared_bytes(session.manifest, entry, momentum=session.recipe.momentum > 0)

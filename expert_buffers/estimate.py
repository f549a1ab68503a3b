"""What a recording will take, before it starts: seconds from timed steps, memory, bytes on disk."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from ddengine.nets import NetSpec, build, count_parameters
from ddengine.ops.batches import layout, resident
from ddengine.parallel import one_thread
from ddengine.rng import Rng
from expert_buffers.manifest import declared_bytes
from expert_buffers.training import ExpertJob, Session, initial_state, train_epoch

TIMED = 2  # steps, after one that warms up
LIBRARIES = 600 << 20  # resident bytes of a process that has imported torch and computed a step: measured
WORKING = 1.5  # peak over saved bytes of a step, for gradients and the workspaces of convolutions: measured
COPIES = 3  # of an expert's rows: old, new, and the bytes of a file as it is written
VECTORS = 6  # weights, gradient, velocity, direction, climb, last row: each as large as the weights


@dataclass(frozen=True)
class Estimate:
    """Seconds until the end; peak bytes of memory, of all processes together or of the GPU; bytes that the
    buffer grows by; and bytes that must be free on the disk, unfinished experts included.
    """

    seconds: float
    memory_bytes: int
    disk_bytes: int
    free_bytes: int


def estimate(session: Session, jobs: Sequence[ExpertJob], workers: int) -> Estimate:
    """What `jobs` will take on `workers` processes, from a few real steps of each of their networks."""
    networks = {session.network(job.number) for job in jobs}
    with one_thread():
        costs = {network: step_cost(session, network) for network in networks}
    steps = {job: epochs_left(session, job) * steps_per_epoch(session) for job in jobs}
    each = [steps[job] * costs[session.network(job.number)][0] for job in jobs]
    seconds = max(sum(each) / workers, math.ceil(len(each) / workers) * sum(each) / len(each))
    files = [expert_bytes(session, job.number, job.epochs) for job in jobs]
    grown = sum(files) - sum(expert_bytes(session, job.number, recorded(session, job)) for job in jobs)
    held = max(cost[1] for cost in costs.values()) + COPIES * max(files)
    libraries = 0 if session.device.startswith("cuda") else LIBRARIES
    source = session.source.x.numel() * session.source.x.itemsize
    return Estimate(seconds, source + workers * (libraries + held), grown, grown + workers * max(files))


def step_cost(session: Session, network: NetSpec) -> tuple[float, int]:
    """Seconds and peak bytes of a step of a throw-away network, the first step not timed."""
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
    began = _now(place)
    for _ in range(TIMED):
        train_epoch(net, state, images, session.recipe, 0, rng, session.precision)
    seconds = (_now(place) - began) / TIMED
    return seconds, int(WORKING * sum(saved.values())) + VECTORS * 4 * count_parameters(net)


def _now(place: torch.device) -> float:
    if place.type == "cuda":
        torch.cuda.synchronize(place)
    return time.perf_counter()


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

"""Training one expert epoch by epoch on flat weights: continued at any epoch, it comes to the same bits."""

import json
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from ddengine.errors import ArtefactError, DDError
from ddengine.nets import NetSpec, build, has_batch_norm
from ddengine.ops.batches import augmented, layout, resident, targets_of
from ddengine.rng import Rng
from ddengine.types import Images
from expert_buffers import store
from expert_buffers.manifest import IDENTITY
from expert_buffers.params import ParamSpec
from expert_buffers.partial import load_partial, partial_path, save_partial
from expert_buffers.recipes import (
    ExpertRecipe,
    gradient_penalty,
    gsam_direction,
    loss_scale,
    rate,
    sgd_step,
)
from expert_buffers.trajectory import Recording

SCORED = 1000  # fit images that give every checkpoint's loss and accuracy
SCORED_AT_ONCE = 250


@dataclass(frozen=True, eq=False)
class ExpertState:
    """An expert between two epochs: flat weights, velocity (None before the first step and without momentum)
    and the network's buffers by name, all on one device.
    """

    params: Float[Tensor, " p"]
    velocity: Float[Tensor, " p"] | None
    buffers: dict[str, Tensor]


def initial_state(net: nn.Module) -> ExpertState:
    """The state of a freshly drawn network."""
    weights = ParamSpec.of(net).flatten(dict(net.named_parameters())).detach().clone()
    return ExpertState(weights, None, {name: b.detach().clone() for name, b in net.named_buffers()})


def train_epoch(
    net: nn.Module,
    state: ExpertState,
    images: Images,
    recipe: ExpertRecipe,
    epoch: int,
    rng: Rng,
    precision: str = "fp32",
    stop: Callable[[], bool] = lambda: False,
) -> ExpertState | None:
    """The state one epoch later, None when `stop()` came true before a step.

    `net` lends its form alone; `images` lie on the device of `state`; `recipe` is resolved. Order and
    augmentation are a pure function of (rng, epoch). Batch-norm statistics move with the first pass of a
    step, the augmented batch at the weights themselves. With batch norm a last batch of one image joins the
    one before it. Precision "bf16" is autocast with float32 weights and loss.
    """
    mine, targets = rng.fold("epoch", epoch), targets_of(images)
    buffers = {name: buffer.clone() for name, buffer in state.buffers.items()}
    weights = state.params
    velocity = None if epoch == recipe.lr_drop_epoch else state.velocity  # released: a new optimiser there
    order = torch.randperm(len(images), generator=mine.torch("shuffle")).to(weights.device)
    for number, index in enumerate(_batches(order, recipe.batch_size, has_batch_norm(net))):
        if stop():
            return None
        clean = images.model_input(index)
        x = augmented(clean, recipe.augment, mine.fold("batch", number))
        batch = _Batch(x, clean, targets[index], loss_scale(recipe.loss_ramp, epoch), recipe.penalty)
        gradient = _gradient_of(net, batch, buffers, weights, precision)
        direction = gsam_direction(gradient, weights, recipe.rho, recipe.alpha)
        step = (rate(recipe, epoch), recipe.momentum, recipe.weight_decay)
        weights, velocity = sgd_step(weights, direction, velocity, *step)
    return ExpertState(weights, velocity, buffers)


@dataclass(frozen=True, eq=False)
class _Batch:
    x: Tensor
    clean: Tensor
    targets: Tensor
    scale: float
    penalty: float


def _batches(order: Tensor, size: int, batch_norm: bool) -> list[Tensor]:
    parts = list(order.split(size))
    if batch_norm and len(parts) > 1 and len(parts[-1]) == 1:
        parts[-2:] = [torch.cat(parts[-2:])]
    return parts


def _gradient_of(
    net: nn.Module, batch: _Batch, buffers: Mapping[str, Tensor], weights: Tensor, precision: str
) -> Callable[[Tensor], Tensor]:
    """Flat weights to the flat gradient of a batch's loss; at `weights` themselves `buffers` move."""
    spec, place = ParamSpec.of(net), weights.device

    def logits(at: Tensor, x: Tensor, moving: bool) -> Tensor:
        own = buffers if moving else {name: buffer.clone() for name, buffer in buffers.items()}
        x = x.contiguous(memory_format=layout(place))
        with _autocast(place, precision):
            return functional_call(net, (spec.unflatten(at), own), (x,)).float()

    def gradient(at: Tensor) -> Tensor:
        leaf = at.detach().requires_grad_()
        loss = F.cross_entropy(logits(leaf, batch.x, at is weights), batch.targets) * batch.scale
        if batch.penalty:
            loss = loss + batch.penalty * gradient_penalty(lambda x: logits(leaf, x, False), batch.clean)
        return torch.autograd.grad(loss, leaf)[0]

    return gradient


def _autocast(place: torch.device, precision: str) -> AbstractContextManager[None]:
    return torch.autocast(place.type, torch.bfloat16, enabled=precision == "bf16")


def score(net: nn.Module, state: ExpertState, images: Images) -> tuple[float, float]:
    """Mean cross-entropy and accuracy (0..1) on `images` in eval mode, in float32; the net's mode is kept."""
    training, weights = net.training, ParamSpec.of(net).unflatten(state.params)
    found = []
    net.eval()
    with torch.no_grad():
        for start in range(0, len(images), SCORED_AT_ONCE):
            x = images.model_input(slice(start, start + SCORED_AT_ONCE))
            x = x.contiguous(memory_format=layout(state.params.device))
            found.append(functional_call(net, (weights, state.buffers), (x,)))
    net.train(training)
    logits = torch.cat(found)
    right = (logits.argmax(1) == images.classes).float().mean()
    return F.cross_entropy(logits, targets_of(images)).item(), right.item()


@dataclass(frozen=True, eq=False)
class Session:
    """What all experts of one recording share.

    `source` is on the CPU, `networks` and `recipe` are resolved, `architectures` are the networks' names in
    `manifest`, which is that of the buffer in `root` at the start. `done` receives the epochs of each expert;
    `stop` other than 0 ends the work.
    """

    root: Path
    manifest: dict[str, Any]
    source: Images
    networks: tuple[NetSpec, ...]
    architectures: tuple[str, ...]
    recipe: ExpertRecipe
    seed: int
    encoding: str
    device: str
    precision: str
    save_minutes: float
    done: Tensor
    stop: Tensor

    def rng(self, number: int) -> Rng:
        """The stream of an expert: weights, orders and augmentation hang from it."""
        return Rng(self.seed).fold("expert", number)

    def network(self, number: int) -> NetSpec:
        """Networks are dealt round robin."""
        return self.networks[number % len(self.networks)]

    @property
    def identity(self) -> str:
        """What makes this buffer this one, by which its partial files are known."""
        return json.dumps([self.manifest[key] for key in IDENTITY], sort_keys=True)


@dataclass(frozen=True)
class ExpertJob:
    """Bring expert `number` to `epochs` epochs."""

    number: int
    epochs: int


def run_expert(shared: Session, job: ExpertJob) -> tuple[int, dict[str, Any] | DDError | None]:
    """Train or continue one expert and write its file: its number and entry, or None when it was stopped.

    The epochs done so far are kept in a partial file every `save_minutes`, and when it is stopped. An expert
    that cannot be trained gives its error, and stops the others, which keep what they have.
    """
    try:
        recording = _trained(shared, job)
    except DDError as error:
        if isinstance(error, ArtefactError):
            raise
        shared.stop.fill_(1)
        return job.number, type(error)(f"expert {job.number}: {error.cause}", error.remedy)
    if recording is None:
        return job.number, None
    architecture = shared.architectures[job.number % len(shared.architectures)]
    return job.number, store.save_expert(shared.root, job.number, architecture, recording)


def _trained(shared: Session, job: ExpertJob) -> Recording | None:
    if shared.stop:
        return None
    place, rng = torch.device(shared.device), shared.rng(job.number)
    images = resident(shared.source, place)
    net = build(shared.network(job.number), images.spec.shape, len(images.spec.classes), rng.torch("weights"))
    net = net.to(device=place, memory_format=layout(place)).train()  # type: ignore[call-overload]
    scored = images.take(scored_indices(shared.seed, len(images)))
    recording = kept(shared, job.number)
    if recording is None:
        state = initial_state(net)
        recording = Recording.begin(shared.encoding, *_row(net, state), *score(net, state, scored))
    else:
        state = restored(net, recording)
    saved = time.monotonic()
    shared.done[job.number] = min(recording.epochs, job.epochs)
    while recording.epochs < job.epochs:
        now, stop = recording.epochs, lambda: bool(shared.stop)
        after = train_epoch(net, state, images, shared.recipe, now, rng, shared.precision, stop)
        if after is not None:
            state = after
            recording = recording.append(*_row(net, state), *score(net, state, scored), _resume(state))
            shared.done[job.number] = recording.epochs
        due = after is None or time.monotonic() - saved >= 60 * shared.save_minutes
        if due and recording.epochs < job.epochs:
            save_partial(partial_path(shared.root, job.number), recording, shared.identity)
            saved = time.monotonic()
        if after is None:
            return None
    return recording


def scored_indices(seed: int, images: int) -> Tensor:
    """The fit images that all checkpoints of a buffer are measured on, up to 1,000."""
    return torch.randperm(images, generator=Rng(seed).fold("score").torch("draw"))[:SCORED].sort().values


def _row(net: nn.Module, state: ExpertState) -> tuple[Tensor, Tensor]:
    spec = ParamSpec.of_buffers(net)
    return state.params, spec.flatten({name: state.buffers[name] for name in spec.names})


def _resume(state: ExpertState) -> dict[str, Tensor]:
    momentum = {} if state.velocity is None else {"momentum": state.velocity}
    return {"params": state.params, **momentum}


def restored(net: nn.Module, recording: Recording) -> ExpertState:
    """The state after the last recorded epoch, on the device of `net`."""
    place = next(net.parameters()).device
    fresh = initial_state(net).buffers
    last = ParamSpec.of_buffers(net).unflatten(recording.stats[-1])
    buffers = {name: last[name].to(b).clone() if name in last else b for name, b in fresh.items()}
    velocity = recording.resume.get("momentum")
    weights = recording.resume["params"].to(place)
    return ExpertState(weights, None if velocity is None else velocity.to(place), buffers)


def kept(shared: Session, number: int) -> Recording | None:
    """What there is of an expert: its partial file if that is whole and longer, else what is committed."""
    committed = None
    if str(number) in shared.manifest["experts"]:
        committed = store.load_recording(shared.root, shared.manifest, number)
    partial = load_partial(partial_path(shared.root, number), shared.identity)
    if partial is None or (committed is not None and committed.epochs >= partial.epochs):
        return committed
    return partial

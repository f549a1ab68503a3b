"""What a recording was asked for, checked and resolved: its source, networks, recipe and plan."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from ddengine.errors import UsageError, require, require_positive
from ddengine.nets import NetSpec, resolve
from ddengine.parallel import one_thread
from ddengine.types import Images, as_source
from expert_buffers.manifest import header
from expert_buffers.recipes import ExpertRecipe, find_recipe
from expert_buffers.store import ENCODINGS
from expert_buffers.training import ExpertJob, Session

PRECISIONS = ("fp32", "bf16")
WHITENED_AT_ONCE = 1000  # images


@dataclass(frozen=True)
class Plan:
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


@dataclass(frozen=True, eq=False)
class Asked:
    """A recording as it was asked for, checked."""

    source: Images
    specs: list[NetSpec]
    plan: Plan
    recipe: ExpertRecipe
    head: dict[str, Any]
    seed: int
    encoding: str
    workers: int
    place: torch.device
    precision: str
    save_minutes: float

    def session(self, root: Path, manifest: dict[str, Any]) -> Session:
        """What all experts share, from what there is of the buffer in `root`."""
        return Session(
            root=root, manifest=manifest, source=whitened(self.source), networks=tuple(self.specs),
            architectures=_architectures(manifest, self.specs), recipe=self.recipe, seed=self.seed,
            encoding=self.encoding, device=str(self.place), precision=self.precision,
            save_minutes=self.save_minutes, done=self.plan.done(manifest),
            stop=torch.zeros((), dtype=torch.uint8),
        )  # fmt: skip

    def processes(self, jobs: int) -> int:
        """How many processes work: one on a GPU."""
        return 1 if self.place.type == "cuda" else min(self.workers, jobs)


def ask(
    source: Images,
    networks: NetSpec | Sequence[NetSpec],
    *,
    count: int,
    epochs: int | None,
    max_start_epoch: int,
    expert_epochs: int,
    full_experts: int,
    recipe: str | ExpertRecipe,
    seed: int,
    encoding: str,
    workers: int,
    device: str,
    precision: str,
    save_minutes: float | int,
    origin: Mapping[str, Any],
) -> Asked:
    """What `record` was asked for, after every check that needs no folder (UsageError)."""
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
    plan = Plan(count, horizon, expert_epochs, full_experts, chosen.epochs)
    specs, place, source = (
        _networks(networks, source, count),
        _place(device),
        as_source(source),
    )
    head = header(source.spec, specs, chosen.to_dict() | {"precision": precision}, seed, encoding, origin)
    return Asked(
        source, specs, plan, chosen, head, seed, encoding, workers, place, precision, float(save_minutes)
    )


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


def whitened(source: Images) -> Images:
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

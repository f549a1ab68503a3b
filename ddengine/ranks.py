"""Several processes for one run, as torchrun starts them: who computes which replica, and what they share.

A run has a fixed number of logical replicas, dealt to its processes in order. What the replicas found is
added up in their order, so that the number of processes changes how long a run takes and nothing else.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from ddengine.errors import DDError, UsageError

T = TypeVar("T")
PATIENCE = timedelta(minutes=30)  # for one that is slow; one that died closes its connections at once


class ProcessLostError(DDError):
    """Another process of the run died, left, or does not answer."""


@dataclass(frozen=True)
class Ranks:
    """The processes of a run: this is number `rank` of `world`. One alone talks to nobody."""

    rank: int = 0
    world: int = 1

    @staticmethod
    def here() -> "Ranks":
        """Those of the process group of this process, or that its environment announces, or it alone."""
        if _met():
            return Ranks(dist.get_rank(), dist.get_world_size())
        told = [os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE")]
        announced = "MASTER_ADDR" in os.environ and all(text.isdecimal() for text in told)
        return Ranks(*map(int, told)) if announced else Ranks()

    @property
    def first(self) -> bool:
        """Whether this process owns the run's folder and speaks for all."""
        return self.rank == 0

    def dealt(self, replicas: int) -> range:
        """The replicas that this process computes: as many as any other, side by side."""
        share = replicas // self.world
        return range(self.rank * share, (self.rank + 1) * share)

    def mean(self, parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The mean over all replicas of each tensor, from those of the replicas that this process computed.

        Every part has the same names and shapes. The sum is taken in replica order in every process: equal
        bits in all of them, and for any number of them. The mean of one replica is that replica's.
        """
        if self.world == 1 and len(parts) == 1:
            return dict(parts[0])
        flat = torch.stack([torch.cat([v.detach().reshape(-1) for v in part.values()]) for part in parts])
        rows = self._gathered(flat)
        total = rows[0]
        for row in rows[1:]:
            total = total + row
        sizes = [value.numel() for value in parts[0].values()]
        pieces = zip(parts[0].items(), (total / len(rows)).split(sizes), strict=True)
        return {key: piece.reshape(like.shape).to(like.dtype) for (key, like), piece in pieces}

    def _gathered(self, rows: Float[Tensor, "r s"]) -> Float[Tensor, "n s"]:
        """The rows of all processes, in their order."""
        if self.world == 1:
            return rows
        found = rows.new_empty(self.world * len(rows), rows.shape[1])
        with _talking():
            dist.all_gather_into_tensor(found, rows)
        return found

    def largest(self, number: int) -> int:
        """The largest of the numbers that the processes give; none goes on before all have given theirs."""
        if self.world == 1:
            return number
        told = torch.tensor([number])
        with _talking():
            dist.all_reduce(told, dist.ReduceOp.MAX)
        return int(told)

    def from_first(self, make: Callable[[], T]) -> T:
        """What `make` returns in the first process, in all of them; a DDError that it raises, in all too.

        It is called nowhere else. The value is sent as a pickle: keep it on the CPU.
        """
        if self.world == 1:
            return make()
        sent: list[tuple[T | None, DDError | None] | None] = [_tried(make) if self.first else None]
        with _talking():
            dist.broadcast_object_list(sent, src=0)
        assert sent[0] is not None
        value, error = sent[0]
        if error is not None:
            raise error
        return value  # type: ignore[return-value]

    def one_by_machine(self, make: Callable[[], T]) -> T:
        """What `make` returns, called in one process of each machine before the others: it may download."""
        if self.world == 1:
            return make()
        if local_rank() > 0:
            self.largest(0)
            return make()
        try:
            return make()
        finally:
            self.largest(0)  # after an error too: the others come upon it themselves


def _tried(make: Callable[[], T]) -> tuple[T | None, DDError | None]:
    try:
        return make(), None
    except DDError as error:
        return None, error


def local_rank() -> int:
    """The number of this process on its machine, 0 for one that is alone."""
    told = os.environ.get("LOCAL_RANK", "")
    return int(told) if Ranks.here().world > 1 and told.isdecimal() else 0


@contextmanager
def joined(device: torch.device) -> Iterator[Ranks]:
    """Inside, the processes that torchrun started can talk: by NCCL on GPUs, by gloo on CPUs.

    Alone, and inside another such block or a group that the caller made, nothing is set up. Raises
    ProcessLostError where they do not meet.
    """
    ranks = Ranks.here()
    if _met() or ranks.world == 1:
        yield ranks
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with _talking():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield ranks
    finally:
        dist.destroy_process_group()


def _met() -> bool:
    return dist.is_available() and dist.is_initialized()


@contextmanager
def _talking() -> Iterator[None]:
    """Inside, what gloo, NCCL and their store raise is a ProcessLostError."""
    try:
        yield
    except RuntimeError as error:
        first = str(error).partition("\n")[0]
        said = re.sub(r"^\[.*?\] *", "", first).partition(". ")[0]  # without the line of gloo's source
        raise ProcessLostError(
            f"process {Ranks.here().rank} of this run lost the others: {said[:150]}",
            "Repeat the same command to go on, with any number of processes that divides its replicas",
        ) from error


def check_replicas(replicas: int, ranks: Ranks, shared: bool) -> None:
    """Refuse what cannot be dealt to the processes; `shared` says whether the matcher has replicas at all."""
    if not shared and (replicas > 1 or ranks.world > 1):
        raise UsageError(
            f"this matcher has no replicas that several processes could share (replicas={replicas}, "
            f"{ranks.world} processes)",
            "Leave replicas out and start one process; attention, distribution and trajectory have them",
        )
    if replicas % ranks.world:
        raise UsageError(
            f"replicas={replicas} cannot be dealt to {ranks.world} processes",
            f"Give replicas={ranks.world} or a multiple, from the run's first start on",
        )

"""Segments of expert trajectories: which expert and start epoch an iteration uses, read ahead of time."""

import threading
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from ddengine.errors import UsageError, require, require_positive
from ddengine.nets import NetSpec
from ddengine.rng import Rng
from expert_buffers.store import ExpertBuffer

ORDERS = ("uniform", "sequential")


@dataclass(frozen=True)
class Window:
    """Which start epochs may be drawn: min <= t < U(iteration), as in DATM (Guo et al. 2024, section 3.3).

    U grows linearly from `start` at iteration 0 to `max` at iteration `expand`. `max` None: as far as the
    buffer goes. `start` None: at `max` from the first iteration. UsageError unless 0 <= min < start <= max
    and expand >= 0.
    """

    min: int = 0
    start: int | None = None
    max: int | None = None
    expand: int = 0

    def __post_init__(self) -> None:
        require_positive("window.min", self.min, zero=True)
        require_positive("window.expand", self.expand, zero=True)
        given = [("min", self.min + 1), ("start", self.start), ("max", self.max)]
        bounds = [(name, value) for name, value in given if value is not None]
        for (low, below), (high, above) in pairwise(bounds):
            if below > above:
                rule = "above" if low == "min" else "at least"
                raise UsageError(
                    f"window.{high}={above} with window.{low}={getattr(self, low)}",
                    f"Give a window.{high} {rule} window.{low}",
                )

    def upper(self, iteration: int, limit: int) -> int:
        """U(iteration): one more than the last start epoch, never above `limit`, what the buffer allows."""
        highest = limit if self.max is None else min(self.max, limit)
        if self.start is None or iteration >= self.expand:
            return highest
        return min(self.start + (highest - self.start) * iteration // self.expand, highest)


@dataclass(frozen=True)
class Plan:
    """Which segment each iteration uses, a pure function of (rng, iteration).

    `length` is M, the expert epochs of a segment; `limit` one more than the last start epoch that all of
    `experts` allow. `order` "uniform" draws start epochs from the window, "sequential" sweeps it.
    """

    rng: Rng
    experts: tuple[int, ...]
    window: Window
    length: int
    limit: int
    order: str = "uniform"

    @staticmethod
    def of(
        buffer: ExpertBuffer,
        rng: Rng,
        window: Window,
        length: int,
        order: str = "uniform",
        network: NetSpec | None = None,
    ) -> "Plan":
        """The plan over all experts of `buffer`, or those with `network`.

        UsageError when there is none, or when the window reaches beyond what they were recorded for.
        """
        require(order, ORDERS, "order")
        require_positive("expert_epochs", length)
        experts = range(len(buffer)) if network is None else buffer.matching(network)
        if not experts:
            raise UsageError(
                f"the buffer {buffer.root} holds no expert" + (" with this network" if len(buffer) else ""),
                "Record experts with `ddengine buffer`, or give the network of the buffer",
            )
        epochs = min(buffer.epochs(i) for i in experts)
        _require_recorded(window, length, epochs)
        return Plan(rng, tuple(experts), window, length, epochs - length + 1, order)

    def draw(self, iteration: int) -> tuple[int, int]:
        """(expert, start epoch) of an iteration. Experts come in passes, each in an order of its own."""
        round_, place = divmod(iteration, len(self.experts))
        order = torch.randperm(len(self.experts), generator=self.rng.fold("pass", round_).torch("experts"))
        low, high = self.window.min, self.window.upper(iteration, self.limit)
        if self.order == "sequential":
            epoch = low + iteration % (high - low)
        else:
            generator = self.rng.fold("segment", iteration).torch("epoch")
            epoch = int(torch.randint(low, high, (), generator=generator))
        return self.experts[int(order[place])], epoch


def _require_recorded(window: Window, length: int, epochs: int) -> None:
    """Refuse a window whose segments reach beyond `epochs`."""
    wanted = {"min": window.min + 1, "start": window.start or 0, "max": window.max or 0}
    name = max(wanted, key=wanted.__getitem__)
    needed = wanted[name] - 1 + length
    if needed > epochs:
        raise UsageError(
            f"the buffer holds {epochs} epochs; window.{name}={getattr(window, name)} with "
            f"expert_epochs={length} needs {needed}",
            f"Continue it: the same buffer command with epochs={needed}",
        )


@dataclass(frozen=True, eq=False)
class Segment:
    """A stretch of an expert: its parameters after `epoch` and after each of the next m epochs."""

    expert: int
    epoch: int
    start: Float[Tensor, " p"]
    targets: Float[Tensor, "m p"]


def read_segment(
    buffer: ExpertBuffer, expert: int, epoch: int, length: int, device: torch.device | str
) -> Segment:
    """Read checkpoints epoch..epoch + length to `device`; a GPU gets them from pinned memory, unawaited.

    UsageError for an epoch that was not recorded, ArtefactError for a damaged file.
    """
    rows, _ = buffer.rows(expert, range(epoch, epoch + length + 1))
    if torch.device(device).type == "cuda":
        rows = rows.pin_memory()
    rows = rows.to(device, non_blocking=True)
    return Segment(expert, epoch, rows[0], rows[1:])


class Prefetch:
    """Reads the segments of a plan in a thread, up to `ahead` iterations before they are asked for.

    Nothing is read before the first `get`. Iterations may be asked for in any order.
    """

    def __init__(self, buffer: ExpertBuffer, plan: Plan, device: torch.device | str, ahead: int = 4) -> None:
        require_positive("ahead", ahead)
        self._buffer, self._plan, self._device, self._ahead = buffer, plan, device, ahead
        self._next: int | None = None
        self._ready: dict[int, Segment | Exception] = {}
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="segments", daemon=True)
        self._thread.start()

    def get(self, iteration: int) -> Segment:
        """The segment of an iteration, waiting for it if need be; raises what reading it raised."""
        with self._changed:
            self._aim(iteration)
            self._changed.wait_for(lambda: self._closed or iteration in self._ready)
            if self._closed:
                raise RuntimeError("the prefetch is closed")
            found = self._ready.pop(iteration)
            self._aim(iteration + 1)
        if isinstance(found, Exception):
            raise found
        return found

    def close(self) -> None:
        """Stop the thread and wait until it has ended; a second call does nothing."""
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._changed.notify_all()
        self._thread.join()

    def _aim(self, iteration: int) -> None:
        """Read on from `iteration`, and forget what lies outside the iterations ahead of it."""
        self._next = iteration
        self._ready = {k: v for k, v in self._ready.items() if iteration <= k < iteration + self._ahead}
        self._changed.notify_all()

    def _missing(self) -> int | None:
        """The next iteration to read, None when all that are wanted are there."""
        if self._next is None:
            return None
        wanted = range(self._next, self._next + self._ahead)
        return next((k for k in wanted if k not in self._ready), None)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._missing() is not None)
                iteration = self._missing()
                if self._closed or iteration is None:
                    return
            found = self._fetch(iteration)
            with self._changed:
                if self._next is not None and self._next <= iteration < self._next + self._ahead:
                    self._ready[iteration] = found
                    self._changed.notify_all()

    def _fetch(self, iteration: int) -> Segment | Exception:
        try:
            return read_segment(self._buffer, *self._plan.draw(iteration), self._plan.length, self._device)
        except Exception as error:  # of any kind: it is raised in the thread that asks for the segment
            return error

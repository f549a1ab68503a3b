"""What the options of the pixel matchers have in common: names, checks, and the rate of a step."""

import math
from typing import Any, Protocol, runtime_checkable

from ddengine.errors import UsageError, require, require_positive
from ddengine.ops import dsa
from expert_buffers.segment import Window
from matchers.parametrised import FormOptions
from synth.pixels import CODECS
from synth.starts import STARTS

PUBLISHED_EMBEDDING = 2048  # dimensions summed over in the papers, to which their rates and weights belong
SCHEDULES = ("constant", "cosine", "drop")
SOURCES = ("random", "buffer")
COMPILE = ("auto", "on", "off")
BANK = ("off", "on")


@runtime_checkable
class DescentOptions(Protocol):
    """The options that every pixel matcher has under the same names."""

    @property
    def real_per_class(self) -> int | None: ...
    @property
    def lr(self) -> float: ...
    @property
    def momentum(self) -> float: ...
    @property
    def schedule(self) -> str | None: ...
    @property
    def augment(self) -> str: ...
    @property
    def networks_per_step(self) -> int: ...
    @property
    def chunk(self) -> int: ...
    @property
    def networks(self) -> str: ...
    @property
    def window(self) -> Window: ...
    @property
    def start(self) -> str: ...
    @property
    def codec(self) -> str: ...
    @property
    def synth(self) -> FormOptions: ...
    @property
    def bank(self) -> str: ...
    @property
    def bank_reuse(self) -> int: ...
    @property
    def bank_real(self) -> int | None: ...


def check_options(o: Any) -> None:
    """Refuse values outside their range among the options that the pixel matchers share (UsageError)."""
    whole = ("steps", "real_per_class", "networks_per_step", "chunk", "bank_reuse", "bank_real")
    for key in (*whole, "lr"):
        value = getattr(o, key)
        if value is not None:
            require_positive(f"matcher.{key}", value)
        if key != "lr" and not isinstance(value, int | None):
            raise UsageError(
                f"matcher.{key}={value} is out of range", f"Give a whole number for matcher.{key}"
            )
    require_positive("matcher.momentum", o.momentum, zero=True)
    require(o.start, STARTS, "matcher.start")
    require(o.codec, CODECS, "matcher.codec")
    require(o.networks, SOURCES, "matcher.networks")
    require(o.bank, BANK, "matcher.bank")
    require(getattr(o, "compile", "off"), COMPILE, "matcher.compile")
    if o.schedule is not None:
        require(o.schedule, SCHEDULES, "matcher.schedule")
    if o.augment != "auto":
        dsa.parse(o.augment)


def width_factor(dimensions: int, follow: bool) -> float:
    """2048 / d, the published embedding (ConvNet-3, width 128, 32 px) over this one; 1 without `follow`."""
    return PUBLISHED_EMBEDDING / dimensions if follow else 1.0


def scheduled(lr: float | int, schedule: str, step: int, steps: int) -> float:
    """The rate at `step` of `steps`: constant, cosine to zero, or a tenth after half ("drop": released)."""
    if schedule == "cosine":
        return lr * 0.5 * (1 + math.cos(math.pi * step / steps))
    return float(lr * 0.1 if schedule == "drop" and step >= steps // 2 else lr)

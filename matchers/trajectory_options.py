"""Options of trajectory matching, and what follows from them: which are allowed, when compiling pays."""

import shutil
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from ddengine.errors import UsageError, require, require_positive
from ddengine.ops import dsa
from ddengine.ops.unroll import GRADIENTS, Derivatives
from ddengine.types import Task, label_bytes
from expert_buffers.segment import ORDERS, Window
from matchers import student, teachers
from matchers.descent_options import SCHEDULES
from matchers.parametrised import FormOptions
from matchers.student import InnerOptions
from synth.pixels import CODECS
from synth.starts import STARTS

RATE_BYTES = 4  # a float32 beside the images
LABELS = ("hard", "soft", "learned", "target")
SWITCH = ("auto", "on", "off")
PAYS_FROM = 20_000  # student steps in all: compiling costs a minute of CPU and halves the time of a step


@dataclass(frozen=True)
class TrajectoryOptions:
    """Options of the `trajectory` matcher. Defaults are MTT's for CIFAR-100 at 10 images per class, but for
    `lr`, that of its CIFAR-10 rows (1000 leaves digits at chance), and `clip`, which MTT lacks; what DATM,
    AST, FTD and TESLA add is off.

    `lr`, `lr_labels`, `lr_rate` are the rates of pixels, label logits and the student's rate, each with its
    momentum. `labels`: class numbers, logits of the experts (fixed: "soft", free: "learned"), or TESLA's
    "target", assigned anew from each segment's target. `skip_above` leaves a step out whose loss is larger;
    `clip` bounds gradient norms by so many times their running median (0: no bound). `middle`, `balance`,
    `perturb` are AST's terms, `ema` is FTD's average of the set. `synth` says what is free: pixels, or bases
    and compensators.
    """

    steps: int = 5000
    gradient: str = "adjoint"
    lr: float | int = 100.0
    momentum: float | int = 0.5
    schedule: str = "constant"
    lr_rate: float | int = 1e-5
    labels: str = "hard"
    lr_labels: float | int = 2.0
    labels_momentum: float | int = 0.9
    start: str = "real"
    augment: str = "auto"
    expert_epochs: int = 2
    order: str = "uniform"
    window: Window = Window()
    inner: InnerOptions = InnerOptions()
    skip_above: float | int | None = None
    clip: float | int = 10.0
    middle: str = "off"
    balance: bool = False
    perturb: float | int = 0.0
    ema: float | int = 0.0
    compile: str = "auto"
    codec: str = "uint8"
    synth: FormOptions = FormOptions()

    def __post_init__(self) -> None:
        for key in (
            "steps",
            "expert_epochs",
            "lr",
            "lr_labels",
            *(["skip_above"] if self.skip_above is not None else []),
        ):
            require_positive(f"matcher.{key}", getattr(self, key))
        for key in ("steps", "expert_epochs"):
            if not isinstance(getattr(self, key), int):
                raise UsageError(
                    f"matcher.{key}={getattr(self, key)} is not a whole number", "Give a whole number"
                )
        for key in ("lr_rate", "clip", "perturb", "momentum", "labels_momentum"):
            require_positive(f"matcher.{key}", getattr(self, key), zero=True)
        for key in ("momentum", "labels_momentum", "ema"):
            if not 0 <= getattr(self, key) < 1:
                raise UsageError(f"matcher.{key}={getattr(self, key)} is out of range", "Give 0 <= value < 1")
        allowed = {
            "gradient": GRADIENTS, "labels": LABELS, "start": (*STARTS, *teachers.EXPERT_STARTS),
            "schedule": SCHEDULES, "order": ORDERS, "middle": student.MIDDLES, "compile": SWITCH,
            "codec": CODECS,
        }  # fmt: skip
        for key, values in allowed.items():
            require(getattr(self, key), values, f"matcher.{key}")
        if self.inner.backend == "higher" and self.gradient != "unroll":
            raise UsageError(
                f"matcher.inner.backend=higher with matcher.gradient={self.gradient}",
                "Give matcher.gradient=unroll: higher keeps the graph of all steps",
            )
        if self.inner.backend == "higher" and self.compile == "on":
            raise UsageError(
                "matcher.compile=on with matcher.inner.backend=higher", "Give matcher.compile=auto"
            )
        if self.middle != "off" and self.inner.steps < self.expert_epochs:
            raise UsageError(
                f"matcher.middle={self.middle} with {self.inner.steps} steps for {self.expert_epochs} epochs",
                f"Give matcher.inner.steps of at least {self.expert_epochs}",
            )
        if self.augment != "auto":
            dsa.parse(self.augment)


def compiles(o: TrajectoryOptions, device: torch.device) -> bool:
    """Whether to compile: as told, or where there is a compiler and the run is long enough to gain by it."""
    return o.compile == "on" or (o.compile == "auto" and is_long(o) and has_compiler(device))


def is_long(o: TrajectoryOptions) -> bool:
    """Whether compiled derivatives exist for these options and the run is long enough to gain by them."""
    own = o.inner.backend == "torch" and o.gradient == "adjoint"
    return own and o.steps * o.inner.steps >= PAYS_FROM


def has_compiler(device: torch.device) -> bool:
    """Whether there is something to compile with: a GPU brings its own."""
    return device.type == "cuda" or any(shutil.which(name) for name in ("c++", "g++", "clang++"))


def require_ipc(task: Task, o: TrajectoryOptions) -> None:
    """Refuse a budget in bytes, which counts one class number an image, for labels that are stored soft, and
    one that has no room for the student's rate.
    """
    if o.synth.name == "compensated":
        return  # its plan counts every byte
    c, h, w = task.images.spec.shape
    classes = len(task.images.spec.classes)
    needed = task.ipc * classes * (c * h * w + 8 * c + label_bytes(classes)) + RATE_BYTES
    assert task.budget is not None
    if task.budget.nbytes is not None and needed > task.budget.nbytes:
        raise UsageError(
            f"budget.nbytes={task.budget.nbytes} leaves no room for the student's rate",
            f"Give budget.nbytes={needed}",
        )
    if task.budget.nbytes is not None and o.labels != "hard":
        raise UsageError(
            f"budget.nbytes={task.budget.nbytes} with matcher.labels={o.labels}: bytes are for hard labels",
            "Give ipc=N, or matcher.labels=hard",
        )


def estimate(o: TrajectoryOptions, made: Derivatives, probe: tuple[Tensor, Tensor, Tensor]) -> str:
    """What the whole run will take, from one student step forwards and backwards."""
    began = time.perf_counter()
    with torch.no_grad():
        made.first(*probe)
    float(made.second(probe[0], *probe, True)[0].sum())
    minutes = o.steps * o.inner.steps * (time.perf_counter() - began) / 60
    path = (o.inner.steps + 1) * probe[0].numel() * 4 / 2**20
    return (
        f"{o.steps} steps of {o.inner.steps} student steps: about {minutes:.0f} min, "
        f"{path:.0f} MiB for the student's path"
    )

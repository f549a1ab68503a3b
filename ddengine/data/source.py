"""What a loader is asked for, what it gives, and what `load` makes of it."""

from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from ddengine.data import dataset_root
from ddengine.errors import UsageError
from ddengine.types import DataSpec, Images

WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@dataclass(frozen=True)
class Request:
    """What the user asked for; `root` is None when it was left out.

    `memory` says whether images are to stay on disk: "disk", "ram", or "auto" for where they are too many.
    """

    name: str
    root: Path | None = None
    size: int | None = None
    on_error: str = "raise"
    download: bool = True
    memory: str = "auto"

    def default_root(self) -> Path:
        """The given root, else the default one."""
        return dataset_root() if self.root is None else self.root

    def required_root(self, what: str) -> Path:
        """The given root; UsageError when there is none, since it names the data itself."""
        if self.root is None:
            raise UsageError(f"dataset={self.name} needs a path to {what}", f"Give dataset.root={what}")
        return self.root


@dataclass(frozen=True)
class Part:
    """Pixels and class numbers of one part of a dataset, in any order."""

    x: UInt8[Tensor, "n c h w"]
    y: Int[Tensor, " n"]

    def __len__(self) -> int:
        return len(self.y)

    def take(self, index: Int[Tensor, " m"]) -> "Part":
        """The images at `index`, in that order."""
        return Part(self.x[index], self.y[index])


@dataclass(frozen=True)
class Source:
    """What a loader gives: the official parts of a dataset before any split of ours.

    A part that is None is split off `train` by content hash: first `test_fraction` of each class for the
    test part, then `validation_fraction` of what is left for validation. `mean` and `std` are None where
    they are to be computed from the fit part. Parts with a `fingerprint` are divided, sorted and hashed
    already, since that takes a look at every image.
    """

    classes: tuple[str, ...]
    train: Part
    validation: Part | None = None
    test: Part | None = None
    test_fraction: float = 0.1
    validation_fraction: float = 0.1
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    licence: str = ""
    skipped: int = 0
    notes: tuple[str, ...] = ()
    fingerprint: str = ""


def source_problem(source: Source) -> str | None:
    """What is wrong with the classes or parts of a source, in words; None when nothing is."""
    names = source.classes
    if not isinstance(names, tuple) or not names or not all(isinstance(n, str) and n for n in names):
        return f"gives the classes {names!r}: a tuple of names is needed"
    if len(set(names)) < len(names):
        return f"gives the class '{next(n for n in names if names.count(n) > 1)}' twice"
    shape = None
    for kind in ("train", "validation", "test"):
        part = getattr(source, kind)
        if part is None and kind != "train":
            continue
        if wrong := _part_problem(part, len(names)):
            return f"gives a {kind} part of {wrong}"
        if shape not in (None, tuple(part.x.shape[1:])):
            return f"gives a {kind} part of images {tuple(part.x.shape[1:])}, and a train part of {shape}"
        shape = tuple(part.x.shape[1:])
    return None


def _part_problem(part: object, classes: int) -> str | None:
    if not isinstance(part, Part):
        return f"the type {type(part).__name__}: a ddengine.data.Part is needed"
    x, y = part.x, part.y
    if not isinstance(x, Tensor) or x.dtype != torch.uint8 or x.ndim != 4:
        return f"{_spelled(x)} pixels: a tensor uint8 [n, c, h, w] is needed"
    if not isinstance(y, Tensor) or y.dtype not in WHOLE or y.ndim != 1:
        return f"{_spelled(y)} labels: a tensor of whole numbers [n] is needed"
    if len(x) != len(y):
        return f"{len(x)} images and {len(y)} labels"
    if len(y) and not 0 <= int(y.min()) <= int(y.max()) < classes:
        return f"the labels {int(y.min())} to {int(y.max())}: the {classes} classes have 0 to {classes - 1}"
    return None


def _spelled(value: object) -> str:
    shown = str(value.dtype).removeprefix("torch.") if isinstance(value, Tensor) else type(value).__name__
    return f"{shown} {list(value.shape)}" if isinstance(value, Tensor) else shown


@dataclass(frozen=True)
class Dataset:
    """Class-sorted uint8 parts that share one spec. `skipped` counts unreadable files.

    `notes` are lines for the user. Only `fit` may be learned from, every choice is made on `validation`, and
    `test` is for the last word.
    """

    fit: Images
    validation: Images
    test: Images
    skipped: int = 0
    notes: tuple[str, ...] = ()

    @property
    def spec(self) -> DataSpec:
        """The spec that all three parts share."""
        return self.fit.spec

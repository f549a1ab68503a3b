"""Distilled sets that other tools made: read safely, brought into the dataset's space, and made ours."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Int
from torch import Tensor

from ddengine import files
from ddengine.errors import ArtefactError, UsageError, require, require_positive
from ddengine.types import LABEL_KINDS, DataSpec, Images
from synth.foreign_arrays import read_npz
from synth.foreign_files import Found, read_experiments, read_pair, read_torch, wrong
from synth.foreign_folders import read_folder
from synth.foreign_space import SPACES, model_input
from synth.pixels import Pixels, raw_levels
from synth.store import DistilledSet

FORMATS: dict[str, Callable[[Sequence[Path], DataSpec, int | None], Found]] = {
    "mtt": read_pair,
    "tesla": read_pair,
    "dm": read_experiments,
    "datadam": read_experiments,
    "sre2l": read_folder,
    "imagefolder": read_folder,
    "npz": read_npz,
    "torch": read_torch,
}
WHOLE = ("mtt", "tesla", "dm", "datadam")  # their sets have images of every class
SUMS = 1e-3  # rows of probabilities add up to 1 within this


@dataclass(frozen=True)
class Foreign:
    """A set of another tool in model-input space (float32), and a learned learning rate if it has one.

    `files` are the SHA-256 of what was read, by name; `notes` say what was inferred and what is lost.
    """

    images: Images
    student_lr: float | None
    notes: tuple[str, ...]
    files: Mapping[str, str]


def read_foreign(
    paths: Sequence[Path],
    format: str,
    spec: DataSpec,
    *,
    space: str = "auto",
    lr: float | int | None = None,
    experiment: int | None = None,
) -> Foreign:
    """Read the set in `paths` as one of `spec`, which is that of the dataset it was made from.

    `space` says what the values of images are: "pixels" (uint8, or floats in [0, 1]), "normalised" (by the
    dataset's mean and std) or "zca" (whitened as the spec whitens); "auto" tells from their range. `lr` takes
    the place of a learned rate, `experiment` (from 0) chooses one of a file of several. Raises ArtefactError
    naming the file for what is damaged, hostile or out of range, UsageError for a set of another shape or
    other classes than the spec's, and where the space cannot be told.
    """
    require(format, FORMATS, "format")
    require(space, SPACES, "source.space")
    if lr is not None:
        require_positive("lr", lr)
    try:
        found = FORMATS[format](paths, spec, experiment)
        sums = _sums(found)
    except OSError as error:
        raise ArtefactError(
            f"cannot read {error.filename}: {error.strerror}", "Give files to read"
        ) from error
    path = found.files[0]
    y, y_kind, said = _labels(path, found, len(spec.classes))
    if format in WHOLE and y_kind == "class":
        _require_whole(path, y, spec)
    x, how = model_input(path, found, spec, space)
    if not bool(x.isfinite().all()):
        raise wrong(path, "its images are not finite in model-input space")
    images = Images(x, y, spec, y_kind)
    notes = (*found.notes, *how, *said, *_absent(images), *_rate_notes(found.lr, lr))
    return Foreign(images, found.lr if lr is None else float(lr), notes, sums)


def as_distilled(
    foreign: Foreign, *, network: Mapping[str, Any], origin: Mapping[str, Any], format: str
) -> DistilledSet:
    """The set as one of ours, of free pixels: float32, or uint8 where they are such and labels class numbers.

    Either way nothing is lost.
    `network` and `origin` (how to load the dataset) tell a judge what to use unless a command says more.
    """
    images = foreign.images
    exact = images.y_kind == "class" and raw_levels(images.x, images.spec) is not None
    synth = Pixels(
        images.x,
        images.y,
        images.spec,
        images.y_kind,
        codec="uint8" if exact else "fp32",
        student_lr=foreign.student_lr,
    )
    recipe = {"protocol": "standard-v1", "network": dict(network), "dataset": dict(origin)}
    provenance = {
        "matcher": {"type": f"imported from {format}"},
        "format": format,
        "files": dict(foreign.files),
        "notes": list(foreign.notes),
    }
    return DistilledSet.make(synth, recipe=recipe, provenance=provenance)


def _labels(path: Path, found: Found, k: int) -> tuple[Tensor, str, tuple[str, ...]]:
    """The labels, their kind and what was inferred (ArtefactError for what they cannot be)."""
    y, told = found.y, found.y_kind
    if len(y) != len(found.x):
        raise wrong(path, f"it has {len(found.x)} images and {len(y)} labels")
    if not y.is_floating_point():
        if told not in (None, "class") or not 0 <= int(y.min()) <= int(y.max()) < k:
            raise wrong(path, f"its labels lie in {int(y.min())}..{int(y.max())}, not in 0..{k - 1}")
        return y, "class", ()
    if y.shape[1] != k:
        raise UsageError(
            f"{path} has labels of {y.shape[1]} classes, the dataset has {k}",
            "Give dataset=NAME of the data that the set was made from",
        )
    within = bool(((y >= 0) & (y <= 1)).all())
    if told is None:
        sums = within and bool(((y.sum(1) - 1).abs() < SUMS).all())
        rows = "lie in [0, 1] and add up to 1: probabilities" if sums else "are no probabilities: logits"
        return y, "prob" if sums else "logit", (f"the rows of soft labels {rows}",)
    if told not in LABEL_KINDS[1:] or (told == "prob" and not within):
        raise wrong(path, f"its labels are not of the kind {told[:20]!r} that it tells")
    return y, told, ()


def _require_whole(path: Path, classes: Int[Tensor, " n"], spec: DataSpec) -> None:
    """Refuse a set of fewer classes than the dataset's: it was made from another one."""
    held, k = len(classes.unique()), len(spec.classes)
    if held < k:
        raise UsageError(
            f"{path} has images of {held} classes, '{spec.name}' has {k}",
            "Give dataset=NAME of the data that the set was made from",
        )


def _absent(images: Images) -> tuple[str, ...]:
    empty = [name for name, n in zip(images.spec.classes, images.counts, strict=True) if n == 0]
    return (f"{len(empty)} classes have no image, such as '{empty[0]}'",) if empty else ()


def _rate_notes(stored: float | None, given: float | int | None) -> tuple[str, ...]:
    if given is None:
        return () if stored is None else (f"a learned learning rate of {stored:.6g} comes with the set",)
    instead = "" if stored is None else f", not the {stored:.6g} that comes with it"
    return (f"lr={given} is taken as the set's learned learning rate{instead}",)


def _sums(found: Found) -> dict[str, str]:
    """SHA-256 of what was read, by name; of a folder of images one over the names and sums of its files."""
    root = found.root
    if root is None:
        return {path.name: files.sha256(path) for path in found.files}
    lines = [f"{path.relative_to(root)} {files.sha256(path)}\n" for path in found.files]
    digest = hashlib.sha256("".join(lines).encode(errors="surrogateescape")).hexdigest()
    return {f"{root.name}/, {len(lines)} files": digest}

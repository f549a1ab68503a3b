"""From a dataset's name to its verified, split, class-sorted parts."""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import entry_points
from math import sqrt
from pathlib import Path

import torch
from jaxtyping import UInt8
from torch import Tensor

from ddengine.data import GRAPH_COLLECTIONS, GROUP, names
from ddengine.data.digits import load_digits
from ddengine.data.image_folder import load_image_folder, load_tiny_imagenet
from ddengine.data.npz import load_npz
from ddengine.data.published import load_published
from ddengine.data.source import Dataset, Part, Request, Source
from ddengine.data.split import TEST, VALIDATION, by_class_and_content, split
from ddengine.errors import UsageError, require, require_positive, unknown
from ddengine.types import DataSpec, Images, fingerprint

Loader = Callable[[Request], Source]
FLOOR = 1 / 255  # a constant channel is scaled as if it varied by one grey level
CHUNK = 1 << 22  # pixels counted at a time

DATASETS: dict[str, Loader] = {
    "digits": load_digits,
    "mnist": load_published,
    "fashion_mnist": load_published,
    "svhn": load_published,
    "cifar10": load_published,
    "cifar100": load_published,
    "stl10": load_published,
    "tiny_imagenet": load_tiny_imagenet,
    "image_folder": load_image_folder,
    "npz": load_npz,
}


def find(name: str) -> Loader:
    """The loader called `name`: a built-in one, else one of the entry-point group (UsageError if none)."""
    if name in DATASETS:
        return DATASETS[name]
    if name in GRAPH_COLLECTIONS:
        raise UsageError(
            f"'{name}' is a collection of graph sets, not a set of images",
            f"Load one of its sets: ddengine.data.load_graphs('{name}', NAME)",
        )
    for point in entry_points(group=GROUP):
        if point.name == name:
            try:
                return point.load()
            except (ImportError, AttributeError) as error:
                raise UsageError(
                    f"the plug-in of dataset '{name}' ({point.value}) cannot be imported: {error}",
                    "Repair or reinstall the package that provides it",
                ) from error
    raise unknown("dataset", name, names())


def load(
    name: str,
    *,
    root: str | Path | None = None,
    size: int | None = None,
    preprocessing: str = "standard",
    on_error: str = "raise",
    download: bool = True,
) -> Dataset:
    """Load a dataset by name.

    `root` is a folder (for npz a file), by default `dataset_root()`. `size` scales the short side to that
    many pixels and crops the centre. `preprocessing` is "standard" (mean and std) or "zca"; `on_error`
    says whether an unreadable image file stops the load ("raise") or is left out and counted ("skip").
    `download` lets torchvision fetch what is missing. Raises UsageError for whatever cannot be used.
    """
    loader = find(name)
    require(preprocessing, ("standard", "zca"), "dataset.preprocessing")
    require(on_error, ("raise", "skip"), "dataset.on_error")
    if size is not None:
        require_positive("dataset.size", size)
    path = None if root is None else Path(root).expanduser()
    return assemble(name, loader(Request(name, path, size, on_error, download)), preprocessing)


def assemble(name: str, source: Source, preprocessing: str = "standard") -> Dataset:
    """Split a source, put each part in canonical order, and give them one spec. Raises UsageError."""
    _check_classes(name, source)
    fit, validation, test = (_ordered(part) for part in divide(source))
    _check_parts(name, source, validation, test)
    mean, std, notes = channel_statistics(fit.x)
    if source.mean is not None and source.std is not None:
        mean, std, notes = source.mean, source.std, ()
    parts = (fit, validation, test)
    digests = [fingerprint(part.x, part.y, source.classes) for part in parts]
    spec = DataSpec(
        name=name,
        shape=(fit.x.shape[1], fit.x.shape[2], fit.x.shape[3]),
        classes=source.classes,
        mean=mean,
        std=std,
        fingerprint=hashlib.sha256("".join(digests).encode()).hexdigest(),
        licence=source.licence,
    )
    if preprocessing == "zca":
        spec = _whitened(spec, fit)
    images = [Images(part.x, part.y, spec) for part in parts]
    return Dataset(images[0], images[1], images[2], source.skipped, (*source.notes, *notes))


def divide(source: Source) -> tuple[Part, Part, Part]:
    """Fit, validation and test part; those that the source lacks are split off its train part."""
    fit, validation, test = source.train, source.validation, source.test
    if test is None:
        keep, out = split(fit.x, fit.y, source.test_fraction, TEST)
        fit, test = fit.take(keep), fit.take(out)
    if validation is None:
        keep, out = split(fit.x, fit.y, source.validation_fraction, VALIDATION)
        fit, validation = fit.take(keep), fit.take(out)
    return fit, validation, test


def channel_statistics(
    x: UInt8[Tensor, "n c h w"],
) -> tuple[tuple[float, ...], tuple[float, ...], tuple[str, ...]]:
    """Mean and population std of each channel of pixels in [0, 1], and a note for each constant channel.

    Computed from integer sums, so the order of images does not matter to the last bit.
    """
    level = torch.arange(256)
    means, stds, notes = [], [], []
    for channel in range(x.shape[1]):
        counts = torch.zeros(256, dtype=torch.int64)
        for piece in x[:, channel].split(max(1, CHUNK // x[0, 0].numel())):
            counts += torch.bincount(piece.flatten().int(), minlength=256)
        n, s1, s2 = (int((counts * level**power).sum()) for power in (0, 1, 2))
        std = sqrt(n * s2 - s1 * s1) / n / 255
        if std == 0:
            notes.append(f"channel {channel} is constant over the fit part: its std is set to 1/255")
        means.append(s1 / n / 255)
        stds.append(std or FLOOR)
    return tuple(means), tuple(stds), tuple(notes)


def _ordered(part: Part) -> Part:
    return part.take(by_class_and_content(part.x, part.y))


def _whitened(spec: DataSpec, fit: Part) -> DataSpec:
    from ddengine.ops.whiten import check_dimensions, fit_zca  # kornia takes seconds to import

    check_dimensions(spec.shape)
    return replace(spec, zca=fit_zca(fit.x.float() / 255))


def _check_classes(name: str, source: Source) -> None:
    counts = torch.bincount(source.train.y, minlength=len(source.classes)).tolist()
    empty = [label for label, n in zip(source.classes, counts, strict=False) if n == 0]
    if empty:
        raise UsageError(
            f"class '{empty[0]}' of {name} has no training image ({len(empty)} empty classes)",
            "Add images to that class or remove it",
        )
    if len(counts) < 2:
        raise UsageError(f"{name} has one class, '{source.classes[0]}'", "Give images of two classes or more")


def _check_parts(name: str, source: Source, validation: Part, test: Part) -> None:
    for part, images in (("validation", validation), ("test", test)):
        if len(images) == 0:
            raise UsageError(
                f"{name} has {len(source.train)} training images of {len(source.classes)} classes: "
                f"none is left for the {part} part",
                f"Add images, at least three to a class, or give a {part} part of its own",
            )

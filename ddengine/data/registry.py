"""From a dataset's name to its verified, split, class-sorted parts."""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ddengine import plugins
from ddengine.data import GRAPH_COLLECTIONS, names
from ddengine.data.digits import load_digits
from ddengine.data.image_folder import load_image_folder, load_tiny_imagenet
from ddengine.data.levels import channel_statistics
from ddengine.data.npz import load_npz
from ddengine.data.published import load_published
from ddengine.data.source import Dataset, Part, Request, Source, source_problem
from ddengine.data.split import TEST, VALIDATION, by_class_and_content, split
from ddengine.errors import DDError, UsageError, require, require_positive, unknown
from ddengine.types import DataSpec, Images, fingerprint

Loader = Callable[[Request], Source]
MEMORY = ("auto", "ram", "disk")

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
    """The loader called `name`: a built-in one, else a plug-in's (UsageError if none)."""
    if name in DATASETS:
        return DATASETS[name]
    if name in GRAPH_COLLECTIONS:
        raise UsageError(
            f"'{name}' is a collection of graph sets, not a set of images",
            f"Load one of its sets: ddengine.data.load_graphs('{name}', NAME)",
        )
    plugin = plugins.find("datasets", name)
    if plugin is None:
        raise unknown("dataset", name, names())
    return partial(_asked, plugin, plugin.load(_problem))


def _problem(found: Any) -> str | None:
    return None if callable(found) else f"is a {type(found).__name__}, not a function of a Request"


def _asked(plugin: plugins.Plugin, loader: Loader, request: Request) -> Source:
    """What a plug-in's loader gives; UsageError naming the plug-in where it fails or gives something else."""
    try:
        source = loader(request)
    except DDError:
        raise
    except (Exception, SystemExit) as error:
        raise plugin.refused(f"fails: {plugins.said(error)}") from error
    if not isinstance(source, Source):
        raise plugin.refused(f"gives a {type(source).__name__}, not a ddengine.data.Source")
    if wrong := source_problem(source):
        raise plugin.refused(wrong)
    return source


def load(
    name: str,
    *,
    root: str | Path | None = None,
    size: int | None = None,
    preprocessing: str = "standard",
    on_error: str = "raise",
    download: bool = True,
    memory: str = "auto",
) -> Dataset:
    """Load a dataset by name.

    `root` is a folder (for npz a file), by default `dataset_root()`. `size` scales the short side to that
    many pixels and crops the centre. `preprocessing` is "standard" (mean and std) or "zca"; `on_error`
    says whether an unreadable image file stops the load ("raise") or is left out and counted ("skip").
    `download` lets torchvision fetch what is missing. `memory` is where the images of a folder lie: "ram",
    "disk" (decoded when they are needed, the same parts and bits), or "auto", which is on disk where they
    would take more than a quarter of the free memory. Raises UsageError for whatever cannot be used.
    """
    loader = find(name)
    require(preprocessing, ("standard", "zca"), "dataset.preprocessing")
    require(on_error, ("raise", "skip"), "dataset.on_error")
    require(memory, MEMORY, "dataset.memory")
    if size is not None:
        require_positive("dataset.size", size)
    path = None if root is None else Path(root).expanduser()
    source = loader(Request(name, path, size, on_error, download, memory))
    if memory == "disk" and not source.fingerprint:
        raise UsageError(
            f"dataset={name} cannot stay on disk: it is no folder of image files",
            "Leave dataset.memory out, or give dataset=image_folder",
        )
    return assemble(name, source, preprocessing)


def assemble(name: str, source: Source, preprocessing: str = "standard") -> Dataset:
    """Split a source, put each part in canonical order, and give them one spec. Raises UsageError."""
    if wrong := source_problem(source):
        raise UsageError(f"the source of '{name}' {wrong}", "Give a Source of Parts as its docstring says")
    _check_classes(name, source)
    ready = bool(source.fingerprint)
    fit, validation, test = divide(source) if ready else map(_ordered, divide(source))
    _check_parts(name, source, validation, test)
    if ready and preprocessing == "zca":
        raise UsageError(
            f"dataset.preprocessing=zca needs all {len(fit)} images in memory, and these stay on disk",
            "Give preprocessing=standard, or dataset.memory=ram and a size at which they fit",
        )
    if source.mean is None or source.std is None:
        mean, std, notes = channel_statistics(fit.x)
    else:
        mean, std, notes = source.mean, source.std, ()
    parts = (fit, validation, test)
    spec = DataSpec(
        name=name,
        shape=(fit.x.shape[1], fit.x.shape[2], fit.x.shape[3]),
        classes=source.classes,
        mean=mean,
        std=std,
        fingerprint=source.fingerprint or _together(parts, source.classes),
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


def _together(parts: tuple[Part, ...], classes: tuple[str, ...]) -> str:
    """The hash of the fingerprints of all parts."""
    digests = [fingerprint(part.x, part.y, classes) for part in parts]
    return hashlib.sha256("".join(digests).encode()).hexdigest()


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

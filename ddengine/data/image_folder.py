"""A user's own folder of images, and Tiny-ImageNet, whose archive is nearly one; in memory or on disk."""

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image

from ddengine.data.decode import decode, skipped_notes
from ddengine.data.disk import DiskPixels, Reader
from ddengine.data.index import Index, Listing, find_index
from ddengine.data.levels import statistics_of
from ddengine.data.source import Part, Request, Source
from ddengine.errors import UsageError
from ddengine.ops.memory import available_memory

EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
PARTS = ("train", "val", "test")
LAYOUT = "Make one folder of images for each class, or train/ and test/ (and val/) of such folders"
TINY = "tiny-imagenet-200"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SHARE = 4  # of the free memory that a set may take: reading and ordering it takes up to three times its size
Files = list[tuple[str, int]]
Statistics = tuple[tuple[float, ...], tuple[float, ...]]


def load_image_folder(request: Request) -> Source:
    """Class folders under `root`, or under `root/train`, `root/test` and `root/val`; classes sorted by name.

    Without a test part 10 % of each class are split off for it and 10 % for validation; `val`, where it
    exists, is the validation part and all of `train` is then fit. UsageError names the folder or file.
    """
    root = request.required_root("DIR")
    official = bool(_folders(root)) and (root / "train").is_dir() and bool(_folders(root / "train"))
    top = root / "train" if official else root
    classes = _class_names(top)
    files = {"train": _files(top, classes)}
    _check_filled(top, classes, files["train"])
    if official:
        files |= {part: _part_files(root / part, classes) for part in PARTS[1:] if (root / part).is_dir()}
    other = [folder.name for folder in _folders(root) if official and folder.name not in PARTS]
    notes = (f"folders beside train/, val/ and test/ are not used: {', '.join(other)}",) if other else ()
    return _source(request, root, classes, files, notes)


def load_tiny_imagenet(request: Request) -> Source:
    """Tiny-ImageNet as its archive unpacks: train/<wnid>/images, and val/ (listed in a file) as test part."""
    given = request.default_root()
    root = given if (given / "train").is_dir() else given / TINY
    listing = root / "val" / "val_annotations.txt"
    if not listing.is_file() or not (root / "train").is_dir():
        raise UsageError(
            f"dataset 'tiny_imagenet' is not at {given} (looked for train/ and {listing})",
            f"Unpack {TINY}.zip there, or set dataset.root=DIR to the folder that holds {TINY}",
        )
    classes = _class_names(root / "train")
    number = {name: k for k, name in enumerate(classes)}
    train = [(path, k) for name, k in number.items() for path in _images(root / "train" / name / "images")]
    rows = [line.split("\t") for line in listing.read_text("utf-8").splitlines() if line]
    if any(len(row) < 2 or row[1] not in number for row in rows):
        raise UsageError(f"{listing} names a class that train/ does not have", "Unpack the archive again")
    test = [(str(root / "val" / "images" / row[0]), number[row[1]]) for row in rows]
    colours = IMAGENET_MEAN, IMAGENET_STD
    return _source(request, root, classes, {"train": train, "test": test}, (), colours)


def _source(
    request: Request,
    root: Path,
    classes: tuple[str, ...],
    files: Mapping[str, Files],
    notes: tuple[str, ...],
    colours: Statistics | None = None,
) -> Source:
    """The listed images in memory, or on disk where they are to stay there or are too many.

    `colours` are the mean and std that the set is known for where its images are in colour.
    """
    fractions = (0.1, 0.1 if "test" in files else 1 / 9)  # 1/9 of the 90 % that the test part leaves
    if request.memory == "disk" or (request.memory == "auto" and _too_large(files, request.size)):
        listing = Listing(str(root), classes, files, fractions)
        source = _on_disk(listing, find_index(listing, request.size, request.on_error), request.size, colours)
    else:
        source = _in_memory(request, classes, files, fractions, colours)
    return replace(source, notes=(*notes, *source.notes))


def _too_large(files: Mapping[str, Files], size: int | None) -> bool:
    """Whether the decoded images would take more than a share of the free memory, by the first one's size."""
    count, (first, _) = sum(map(len, files.values())), files["train"][0]
    pixels = (size or 0) ** 2
    if size is None:
        with suppress(Exception), Image.open(first) as image:  # a damaged file is found when all are read
            pixels = image.size[0] * image.size[1]
    return 3 * pixels * count * SHARE > available_memory()


def _in_memory(
    request: Request,
    classes: tuple[str, ...],
    files: Mapping[str, Files],
    fractions: tuple[float, float],
    colours: Statistics | None,
) -> Source:
    """All parts decoded together, so that they agree in channels and size."""
    flat = [(path, label, part) for part, entries in files.items() for path, label in entries]
    x, kept, skipped = decode([path for path, _, _ in flat], request.size, request.on_error)
    parts = {}
    for part in files:
        rows = torch.tensor([row for row, i in enumerate(kept) if flat[i][2] == part], dtype=torch.long)
        labels = torch.tensor([flat[kept[row]][1] for row in rows.tolist()], dtype=torch.long)
        parts[part] = Part(x[rows], labels)
    mean, std = colours if colours is not None and x.shape[1] == 3 else (None, None)
    return Source(
        classes,
        parts["train"],
        parts.get("val"),
        parts.get("test"),
        test_fraction=fractions[0],
        validation_fraction=fractions[1],
        mean=mean,
        std=std,
        skipped=len(flat) - len(kept),
        notes=skipped,
    )


def _on_disk(listing: Listing, index: Index, size: int | None, colours: Statistics | None) -> Source:
    """The parts that an index tells, whose images stay in their files."""
    flat = listing.flat
    labels = torch.tensor([label for _, label, _ in flat])
    reader = Reader([path for path, _, _ in flat], index.shape, size)
    fit, validation, test = (
        Part(DiskPixels(reader, rows.numpy()), labels[rows]) for rows in index.parts.values()
    )
    mean, std, constant = statistics_of(index.levels)
    if colours is not None and index.shape[0] == 3:
        (mean, std), constant = colours, ()
    skipped = skipped_notes([flat[place][0] for place in index.skipped.tolist()])
    count = sum(map(len, index.parts.values()))
    return Source(
        listing.classes,
        fit,
        validation,
        test,
        mean=mean,
        std=std,
        skipped=len(index.skipped),
        notes=(*skipped, *constant, f"{count} images stay on disk and are read when they are needed"),
        fingerprint=index.fingerprint,
    )


def _folders(folder: Path) -> list[Path]:
    try:
        found = [entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
    except OSError as error:
        raise UsageError(
            f"cannot read the image folder {folder}: {error.strerror}",
            "Give an existing folder as dataset.root=DIR",
        ) from error
    return sorted(found)


def _class_names(folder: Path) -> tuple[str, ...]:
    names = tuple(sorted(entry.name for entry in _folders(folder)))
    if not names:
        raise UsageError(f"{folder} holds no class folder", LAYOUT)
    for name in names:
        if not name.isprintable():
            raise UsageError(f"the class folder {name!r} has a name that is not plain text", "Rename it")
    return names


def _images(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return sorted(
                entry.path
                for entry in entries
                if entry.name.lower().endswith(EXTENSIONS)
                and not entry.name.startswith(".")
                and (entry.is_symlink() or entry.is_file())
            )
    except OSError as error:
        raise UsageError(f"cannot read the class folder {folder}: {error.strerror}", LAYOUT) from error


def _files(folder: Path, classes: tuple[str, ...]) -> Files:
    return [(path, label) for label, name in enumerate(classes) for path in _images(folder / name)]


def _part_files(folder: Path, classes: tuple[str, ...]) -> Files:
    """Files of a part other than train: it may lack classes but have none of its own."""
    present = [entry.name for entry in _folders(folder)]
    strange = [name for name in present if name not in classes]
    if strange:
        raise UsageError(
            f"{folder} has a class '{strange[0]}' that train/ does not have ({len(strange)} such classes)",
            f"Add '{strange[0]}' to train/ or remove it from {folder.name}/",
        )
    return [
        (path, label)
        for label, name in enumerate(classes)
        if name in present
        for path in _images(folder / name)
    ]


def _check_filled(folder: Path, classes: tuple[str, ...], files: Files) -> None:
    filled = {label for _, label in files}
    empty = [name for label, name in enumerate(classes) if label not in filled]
    if empty:
        raise UsageError(
            f"the class folder {folder / empty[0]} holds no image ({len(empty)} empty classes)",
            f"Add images ({' '.join(EXTENSIONS)}) to it or remove it",
        )

"""Folders of image files as distilled sets: one folder for each class, named by class or by number."""

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from ddengine.archives import reason_of
from ddengine.data.decode import read_image
from ddengine.data.image_folder import EXTENSIONS
from ddengine.errors import UsageError
from ddengine.types import DataSpec
from synth.foreign_files import Found, wrong

FILES = 1 << 20  # image files in a folder, at most
PIXELS = 1 << 31  # of all of them
NUMBERED = re.compile(r"(?:new|class)?(\d{1,7})")


def read_folder(paths: Sequence[Path], spec: DataSpec, experiment: int | None) -> Found:
    """Class folders of PNG or JPEG files of the spec's size, as SRe2L (new000, new001, ...) and others write.

    A folder is called by its class or, if no class has such a name, by the class's number. Grey files may
    stand for colour ones, not the other way round. Files that are not in a class folder are left out.
    """
    if experiment is not None:
        raise UsageError(f"experiment={experiment} is for dm and datadam", "Leave it out")
    if len(paths) != 1 or not paths[0].is_dir():
        given = ", ".join(map(str, paths)) or "nothing"
        raise UsageError(f"{given} was given", "Give one folder of class folders")
    folders = _class_folders(paths[0], spec)
    files = [(file, label) for folder, label in folders for file in _images(folder)]
    if not 0 < len(files) <= min(FILES, PIXELS // torch.Size(spec.shape).numel()):
        raise UsageError(f"{paths[0]} holds {len(files)} images in its class folders", "Give a distilled set")
    counted = [(folder, label) for folder, label in folders if folder.name != spec.classes[label]]
    notes: tuple[str, ...] = ()
    if counted:
        folder, label = counted[0]
        said = f"{len(counted)} folders are taken by number: {folder.name} is '{spec.classes[label]}'"
        notes = (f"{said}, number {label} in the order of '{spec.name}'",)
    if (paths[0] / "labels.csv").is_file():
        notes = (*notes, "labels.csv is not read: the label of an image is its folder")
    x, y = torch.stack([_read(file, spec) for file, _ in files]), torch.tensor([label for _, label in files])
    return Found(x, y, tuple(file for file, _ in files), notes=notes, root=paths[0])


def _class_folders(root: Path, spec: DataSpec) -> list[tuple[Path, int]]:
    """Class folders with their labels, in label order."""
    found = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    if linked := [p for p in found if p.is_symlink()]:
        raise wrong(linked[0], "it is a link, not a folder")
    numbers = {name: i for i, name in enumerate(spec.classes)}
    labelled = [(p, numbers.get(p.name, _number(p.name))) for p in found]
    for path, label in labelled:
        if label >= len(spec.classes):
            raise UsageError(
                f"{path} is no class of '{spec.name}', which has {len(spec.classes)} classes",
                f"Call the folders by class, as '{spec.classes[0]}', or by number from 0",
            )
    if len({label for _, label in labelled}) < len(labelled):
        raise UsageError(f"{root} has two folders of one class", "Call each by class, or each by number")
    return sorted(labelled, key=lambda pair: pair[1])


def _number(name: str) -> int:
    """The number that a folder is called by; one that no class has for any other name."""
    matched = NUMBERED.fullmatch(name)
    return int(matched[1]) if matched else 1 << 62


def _images(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in EXTENSIONS and p.name[0] != ".")


def _read(path: Path, spec: DataSpec) -> torch.Tensor:
    """One file as uint8 [c h w] of the spec's shape."""
    c, h, w = spec.shape
    if path.is_symlink() or not path.is_file():
        raise wrong(path, "it is not a regular file")
    try:
        with Image.open(path) as image:
            size = image.size
        pixels = torch.from_numpy(read_image(path, None)) if sorted(size) == sorted((h, w)) else None
    except Exception as error:  # Pillow raises errors of any kind for damaged files
        raise wrong(path, reason_of(error)) from error
    if pixels is None or tuple(pixels.shape[1:]) != (h, w) or len(pixels) > c:
        seen = f"{size[0]} x {size[1]} pixels" if pixels is None else f"the shape {list(pixels.shape)}"
        raise UsageError(
            f"{path} is an image of {seen}, '{spec.name}' has {list(spec.shape)} (c, h, w)",
            "Give dataset=NAME and dataset.size=N of the data that the set was made from",
        )
    return pixels.expand(c, h, w)

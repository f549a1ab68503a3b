"""Distilled sets as folders of PNG files: for loaders of image folders, and for Hugging Face's hub."""

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Container, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ddengine import files
from ddengine.errors import UsageError
from ddengine.types import Images
from synth.exported_card import hub_card
from synth.exported_files import Contents, pixels_of

MODES = {1: "L", 3: "RGB"}
NAME_MAX = 100  # bytes of a class folder's name
UNSAFE = re.compile(r'[/\\:*?"<>|]')
# Folders that `datasets` takes for parts of a set wherever they lie.
PARTS = re.compile(
    r"(?<![a-z])(?:train|training|test|testing|eval|evaluation|val|valid|validation|dev)(?![a-z])"
)


def write_image_folder(contents: Contents, folder: Path) -> tuple[str, ...]:
    """<class>/00001.png, classes.json with the order of labels, and labels.csv where labels are soft."""
    images, spec = contents.images, contents.images.spec
    names = folder_names(spec.classes)
    paths, notes = _write_pngs(images, folder, names)
    order = [{"folder": name, "class": own} for name, own in zip(names, spec.classes, strict=True)]
    files.write_bytes(folder / "classes.json", files.json_bytes({"y_kind": images.y_kind, "classes": order}))
    if replaced := [own for name, own in zip(names, spec.classes, strict=True) if name != own]:
        said = f"{len(replaced)} class names are no safe folder names, such as {replaced[0]!r}"
        notes = (*notes, f"{said}: their folders are called by number, see classes.json")
    if sorted(names) != list(names):
        said = "loaders that sort folders by name number the classes otherwise than the set does"
        notes = (*notes, f"{said}: classes.json has its order")
    if not all(images.counts):
        notes = (*notes, f"{images.counts.count(0)} classes without an image have no folder")
    if images.y_kind != "class":
        _write_labels(images, paths, folder / "labels.csv")
        said = "a folder has one class for each image, that of its largest soft label"
        notes = (*notes, f"{said}: the soft labels ({images.y_kind}) are in labels.csv")
    return (*notes, *_lost_rate(contents))


def write_hub(contents: Contents, folder: Path) -> tuple[str, ...]:
    """train/<class>/00001.png and a data card that the hub and `datasets` read.

    Folders sort as labels do, so that the labels that are loaded are the set's own. Where that does not do,
    as labels are soft or a class has no image, train/metadata.jsonl has the columns label and soft_label.
    """
    images, names = contents.images, hub_names(contents.images.spec.classes)
    (folder / "train").mkdir()
    paths, notes = _write_pngs(images, folder / "train", names)
    if images.y_kind != "class" or not all(images.counts):
        files.write_bytes(folder / "train" / "metadata.jsonl", _metadata(images, paths))
    files.write_bytes(folder / "README.md", hub_card(contents, names).encode(errors="replace"))
    if names != list(images.spec.classes):
        notes = (*notes, f"class folders are called as {names[0]!r}, so that their order is that of labels")
    return (*notes, *_lost_rate(contents, " but in the data card"))


def folder_names(classes: Sequence[str]) -> list[str]:
    """A folder name for each class: its own where that is safe on every system, else its number."""
    lowered = Counter(name.casefold() for name in classes)
    return [
        name if _is_safe(name) and lowered[name.casefold()] == 1 else _spare(i, lowered)
        for i, name in enumerate(classes)
    ]


def hub_names(classes: Sequence[str]) -> list[str]:
    """Folder names whose order is that of labels and none of which `datasets` takes for a part of the set."""
    plain = [name if not PARTS.search(name.lower()) else "" for name in folder_names(classes)]
    if plain == list(classes) and sorted(classes) == plain:
        return plain
    width = len(str(len(classes) - 1))
    named = zip(plain, classes, strict=True)
    return [f"{i:0{width}d}" + (f"-{name}" if name == own else "") for i, (name, own) in enumerate(named)]


def _is_safe(name: str) -> bool:
    short = 0 < len(name.encode(errors="replace")) <= NAME_MAX and name.isprintable()
    return short and not UNSAFE.search(name) and name[0] not in ". " and name[-1] not in ". "


def _spare(number: int, taken: Container[str]) -> str:
    """The number as a folder name that no class has."""
    name = str(number)
    while name in taken:
        name = f"0{name}"
    return name


def _write_pngs(images: Images, folder: Path, names: Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
    """Paths of the files below `folder`, one for each image in order, and what PNG loses."""
    c = images.spec.shape[0]
    if c not in MODES:
        raise UsageError(f"images of {c} channels cannot be PNG files", "Export to npz or torch")
    pixels, notes = pixels_of(images)
    for name in {names[label] for label in images.classes.tolist()}:
        (folder / name).mkdir()
    paths = []
    for number, (image, label) in enumerate(zip(pixels.numpy(), images.classes.tolist(), strict=True), 1):
        paths.append(f"{names[label]}/{number:05d}.png")
        shown = image[0] if c == 1 else np.ascontiguousarray(image.transpose(1, 2, 0))
        Image.fromarray(shown, MODES[c]).save(folder / paths[-1], "PNG")
    return paths, notes


def _write_labels(images: Images, paths: Sequence[str], path: Path) -> None:
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["file", *images.spec.classes])
    for file, row in zip(paths, images.y.tolist(), strict=True):
        table.writerow([file, *(f"{value:.9g}" for value in row)])
    files.write_bytes(path, text.getvalue().encode())


def _metadata(images: Images, paths: Sequence[str]) -> bytes:
    """One JSON object on each line: file_name, label and, where labels are soft, soft_label."""
    rows = [
        {"file_name": path, "label": label}
        for path, label in zip(paths, images.classes.tolist(), strict=True)
    ]
    if images.y_kind != "class":
        rows = [{**row, "soft_label": y} for row, y in zip(rows, images.y.tolist(), strict=True)]
    return "".join(f"{json.dumps(row)}\n" for row in rows).encode()


def _lost_rate(contents: Contents, where: str = "") -> tuple[str, ...]:
    if contents.student_lr is None:
        return ()
    return (f"the learned learning rate {contents.student_lr:.6g} has no place in a folder of images{where}",)

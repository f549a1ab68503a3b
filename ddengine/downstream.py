"""What the downstream tasks share: real rows, one space for all images, costs, checks and plain tables."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ddengine.bench import DRAWN_ANEW
from ddengine.composites import Composites
from ddengine.data import Dataset
from ddengine.errors import UsageError, require, require_positive
from ddengine.nets import build
from ddengine.nets.core import NetSpec
from ddengine.rng import Rng
from ddengine.types import DataSpec, Images, label_bytes
from synth.starts import SELECTIONS

ROWS = ("random", "herding", "full")
KNOWN = (*SELECTIONS, "full")


def check_rows(given: Sequence[str], rows: Sequence[str]) -> None:
    """Refuse unknown real rows, rows that repeat, and none at all (UsageError)."""
    for row in rows:
        require(row, KNOWN, "row")
    names = [*given, *rows]
    if not names or len(set(names)) < len(names):
        raise UsageError(f"rows {names} are none or repeat", "Give each row one name of its own")


def check_task(dataset: Dataset, specs: Sequence[NetSpec], **positive: int) -> None:
    """Refuse counts that are not positive, empty parts or classes, and a network that does not fit."""
    for name, value in positive.items():
        require_positive(name, value)
    spec = dataset.spec
    for part, images in (("fit", dataset.fit), ("test", dataset.test)):
        for name, n in zip(spec.classes, images.counts, strict=True):
            if n == 0:
                raise UsageError(
                    f"class '{name}' has no image in the {part} part of '{spec.name}'",
                    "Add images to that class or remove it",
                )
    if not len(dataset.validation):
        raise UsageError(f"the validation part of '{spec.name}' is empty", "Give a dataset with more images")
    for network in specs:
        build(network, spec.shape, len(spec.classes), Rng(0).torch("check"))


def check_set(name: str, images: Images | Composites, spec: DataSpec) -> None:
    """Refuse a set of other images or classes than the dataset's (UsageError)."""
    if (images.spec.shape, images.spec.classes) != (spec.shape, spec.classes):
        raise UsageError(
            f"set '{name}' holds {images.spec.shape} images of {len(images.spec.classes)} classes, "
            f"'{spec.name}' {spec.shape} of {len(spec.classes)}, or their classes differ",
            "Give images in the shape of the dataset, with its classes and their numbers",
        )


def one_space(specs: Sequence[tuple[str, DataSpec]], usual: DataSpec) -> DataSpec:
    """The spec whose model-input space all named sets share, `usual` where there is no set.

    Raises UsageError where the spaces of two sets differ.
    """
    first, found = specs[0] if specs else ("", usual)
    for name, spec in specs:
        if not _same_space(found, spec):
            raise UsageError(
                f"sets '{first}' and '{name}' are normalised differently",
                "Run each beside the real rows by itself",
            )
    return found


def _same_space(a: DataSpec, b: DataSpec) -> bool:
    if (a.mean, a.std, a.preprocessing) != (b.mean, b.std, b.preprocessing):
        return False
    if a.zca is None or b.zca is None or a.zca is b.zca:
        return True
    return torch.equal(a.zca.mean, b.zca.mean) and torch.equal(a.zca.matrix, b.zca.matrix)


def in_space(dataset: Dataset, spec: DataSpec) -> Dataset:
    """The dataset with all parts in the model-input space of `spec`."""
    parts = {name: replace(getattr(dataset, name), spec=spec) for name in ("fit", "validation", "test")}
    return replace(dataset, **parts)


def same_ipc(ipc: int | None, counts: Sequence[int], classes: int, rows: Sequence[str]) -> int:
    """Images per class of the real rows: as given, else those of the first set (`counts` of all sets)."""
    if ipc is not None:
        require_positive("ipc", ipc)
        return ipc
    if not counts and set(rows) != {"full"}:
        raise UsageError("real rows without a set have no size", "Give ipc, or a set to be like")
    return max(1, round(counts[0] / classes)) if counts else 1


def real_picks(
    fit: Images, rows: Sequence[str], ipc: int, draws: int, rng: Rng
) -> Iterator[tuple[tuple[str, int], Tensor | None]]:
    """Indices into `fit` for each of `rows` and each of `draws`; None is all of it.

    Random rows are drawn anew; what is not random is selected once. Raises UsageError for an `ipc` that a
    class does not have.
    """
    for row in rows:
        index = None
        for draw in range(draws):
            if row != "full" and (index is None or row in DRAWN_ANEW):
                index = SELECTIONS[row](fit, ipc, rng.fold(row, draw))
            yield (row, draw), index


def cost(images: Images | Composites, count: int) -> dict[str, int]:
    """Bytes of `count` such images at a byte a value, with class numbers, or soft labels as float32."""
    (c, h, w), k = images.spec.shape, len(images.spec.classes)
    label = label_bytes(k) if images.y_kind == "class" else 4 * k
    pixels, labels = count * c * h * w, count * label
    return {"images": pixels, "labels": labels, "extras": 0, "total": pixels + labels}


def aligned(rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Lines of a plain table: a head, a rule, rows; the first `left` columns are words and align left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return [lines[0], "  ".join("-" * width for width in widths), *lines[1:]]


def percent(fraction: float) -> str:
    """A fraction as percent, to a tenth."""
    return f"{100 * fraction:.1f}"

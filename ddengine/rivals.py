"""The rows that a distilled set is judged beside: which real images they hold, their labels and bytes."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ddengine.bench import (
    DRAWN_ANEW,
    HARD,
    PLAIN,
    RANDOM_PLAIN,
    SAME_LABELS,
    SUBJECT,
    VARIANTS,
    Key,
    tensors_of,
)
from ddengine.composites import Composites
from ddengine.errors import ArtefactError, UsageError
from ddengine.ops.kd import soft_labels
from ddengine.rng import Rng
from ddengine.types import Images, label_bytes
from synth.labels import decode_labels, encode_labels, label_codec, label_row_bytes
from synth.starts import SELECTIONS, random_total

ROWS = ("random", "random_bytes", "herding", "kmeans", "full")
KNOWN = (*SELECTIONS, "random_bytes", SAME_LABELS, "full", *VARIANTS)


@runtime_checkable
class Judged(Protocol):
    """All that the judge sees of a distilled set: what is stored, what its manifest says, and its images.

    A set may also have `composites()`: Composites to train on in place of the decoded images, or None.
    """

    @property
    def tensors(self) -> Mapping[str, Tensor]: ...

    @property
    def manifest(self) -> Mapping[str, Any]: ...

    @property
    def nbytes(self) -> Mapping[str, int]: ...

    def decode(self) -> Images: ...


def training_images(distilled: Judged) -> Images | Composites:
    """What networks train on, on the CPU: a set's composites where it has some, else its decoded images.

    Raises UsageError for a set of graphs.
    """
    found = getattr(distilled, "composites", lambda: None)()
    found = distilled.decode() if found is None else found
    if not isinstance(found, Images | Composites):
        raise UsageError("this set holds graphs, not images", "Give a distilled set of images")
    tensors: dict[str, Any] = {name: tensor.detach().cpu() for name, tensor in tensors_of(found).items()}
    return replace(found, **tensors)


def usual_rows(labels: str, teachers: bool, augmented: bool = False) -> tuple[str, ...]:
    """The rows that a set with such labels is judged beside, given its teachers or not.

    Where networks train on `augmented` images, two more train without, for the augmentation-robust score.
    """
    soft = ((SAME_LABELS,) if teachers else ()) + (HARD,) if labels != "hard" else ()
    return (*ROWS, *soft, *((PLAIN, RANDOM_PLAIN) if augmented else ()))


def label_mode(manifest: Mapping[str, Any]) -> str:
    """How the labels of a set come: what its manifest says, else by their kind (ArtefactError otherwise)."""
    kind = manifest.get("y_kind", "class")
    stored = "hard" if kind == "class" else "static"
    found = (manifest.get("recipe") or {}).get("labels", stored)
    if found not in (stored, "dynamic"):
        raise ArtefactError(
            f"the set's manifest has recipe.labels={found}, and its labels are of the kind {kind}",
            "Make the set again with this version of ddengine",
        )
    return found


def count_for_bytes(nbytes: int, fit: Images, label: int | None = None) -> int:
    """Real uint8 images that fit in `nbytes` at c*h*w bytes and `label` bytes each: at least 1, at most all.

    Without `label` each has a class number.
    """
    c, h, w = fit.spec.shape
    label = label_bytes(len(fit.spec.classes)) if label is None else label
    return min(max(nbytes // (c * h * w + label), 1), len(fit))


def label_cost(row: str, labels: str, distilled: Judged, classes: int) -> tuple[int, int]:
    """Bytes of one label of a row beside a set with such `labels`, and of the teachers that it must store.

    Logits are stored as the set stores its own.
    """
    if row != SAME_LABELS or labels == "hard":
        return label_bytes(classes), 0
    if labels == "static":
        return label_row_bytes(classes, _codec(distilled, classes)), 0
    stored = [tensor for name, tensor in distilled.tensors.items() if name.startswith("teachers.")]
    return label_bytes(classes), sum(tensor.numel() * tensor.element_size() for tensor in stored)


def _codec(distilled: Judged, classes: int) -> str:
    return label_codec(distilled.tensors, classes)


def real_bytes(fit: Images, count: int, label: int, teachers: int = 0) -> dict[str, int]:
    """Bytes by part of `count` real images stored as uint8 with `label` bytes each, and of `teachers`."""
    c, h, w = fit.spec.shape
    images, labels = count * c * h * w, count * label
    return {"images": images, "labels": labels, "extras": teachers, "total": images + labels + teachers}


def draw(
    distilled: Judged, fit: Images, rows: Sequence[str], labels: str, images: int, seeds: int, rng: Rng
) -> Iterator[tuple[Key, Tensor]]:
    """Indices into `fit` for each of `rows`: one draw for all networks, or one for each and for the trials.

    `images` is how many the set trains on; its budget's images per class come before it. Raises UsageError
    where a class has fewer images than a row takes.
    """
    classes = len(fit.spec.classes)
    ipc = _ipc(distilled.manifest, images, classes)
    for row in dict.fromkeys(VARIANTS.get(row, row) for row in rows):
        if row == SUBJECT:
            continue
        label, teachers = label_cost(row, labels, distilled, classes)
        count = count_for_bytes(distilled.nbytes["total"] - teachers, fit, label)
        for index in (None, *range(seeds)) if row in DRAWN_ANEW else (None,):
            here = rng.fold(row, "trial" if index is None else index)
            if row in ("random_bytes", SAME_LABELS):
                yield (row, index), random_total(fit, count, here)
            elif row != "full":
                yield (row, index), SELECTIONS[row](fit, ipc, here)


def label_picks(
    fit: Images, picks: Mapping[Key, Tensor], teachers: Sequence[nn.Module], device: str, distilled: Judged
) -> dict[Key, Tensor]:
    """The teachers' mean logits of the picks that are labelled as the set is, as its own are stored.

    Each image is asked about once.
    """
    mine = {key: pick for key, pick in picks.items() if key[0] == SAME_LABELS}
    if not mine:
        return {}
    asked = torch.cat(list(mine.values())).unique()
    classes = len(fit.spec.classes)
    stored = encode_labels(soft_labels(teachers, fit.take(asked), device), _codec(distilled, classes))
    logits = decode_labels(stored, classes)
    return {key: logits[torch.searchsorted(asked, pick)] for key, pick in mine.items()}


def _ipc(manifest: Mapping[str, Any], images: int, classes: int) -> int:
    """Images per class of the rivals with as many images: the budget's, else those that the set holds."""
    ipc = (manifest.get("budget") or {}).get("ipc")
    if isinstance(ipc, int | float) and not isinstance(ipc, bool):
        return max(1, round(ipc))
    return max(1, round(int(manifest.get("count", images)) / classes))

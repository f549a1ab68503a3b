"""The stored forms of synthetic sets, by the kind that a manifest names, and what their items are."""

from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor

from synth.compensated import Compensated
from synth.forest import Forest
from synth.graph_subset import GraphSubset
from synth.pixels import Pixels
from synth.subset import Subset

Form = Pixels | Subset | Compensated | Forest | GraphSubset

FORMS: dict[str, type[Any]] = {
    "pixels": Pixels,
    "subset": Subset,
    "compensated": Compensated,
    "forest": Forest,
    "graphs": GraphSubset,
}
ITEMS = {
    "pixels": "pixels images",
    "subset": "subset images",
    "compensated": "composites of {bases} bases",
    "forest": "forest items",
    "graphs": "graphs",
}


def stored_count(tensors: Mapping[str, Tensor], kind: str) -> int:
    """Training items that the stored tensors of a set stand for."""
    return Compensated.stored_count(tensors) if kind == Compensated.kind else len(tensors["labels"])


def items_text(tensors: Mapping[str, Tensor], kind: str) -> str:
    """What the items of a set of this kind are called."""
    return ITEMS[kind].format(bases=len(tensors.get("images", ())))


def images_per_class(synth: Form, provenance: Mapping[str, Any]) -> int | None:
    """Items of each class, None where classes have unequal numbers.

    For composites the nominal IPC of the run, else the uint8 images of a class whose bytes hold all that is
    stored but for teachers.
    """
    if isinstance(synth, Compensated):
        nominal = (provenance.get("budget") or {}).get("ipc")
        if type(nominal) is int:
            return nominal
        stored = synth.nbytes["total"] - synth.teacher_bytes
        return -(-stored // (len(synth.spec.classes) * prod(synth.spec.shape)))
    counts = torch.bincount(synth.decode().classes.cpu(), minlength=len(synth.spec.classes)).tolist()
    return counts[0] if counts[0] and len(set(counts)) == 1 else None

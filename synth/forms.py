"""The stored forms of synthetic sets, by the kind that a manifest names, and what their items are."""

from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor

from synth.compensated import Compensated
from synth.factored import Factored
from synth.forest import Forest
from synth.graph_subset import GraphSubset
from synth.pixels import Pixels
from synth.subset import Subset

Form = Pixels | Factored | Subset | Compensated | Forest | GraphSubset

FORMS: dict[str, type[Any]] = {
    "pixels": Pixels,
    "factored": Factored,
    "subset": Subset,
    "compensated": Compensated,
    "forest": Forest,
    "graphs": GraphSubset,
}
ITEMS = {
    "pixels": "pixels images",
    "factored": "images in the cells of {images}",
    "subset": "subset images",
    "compensated": "composites of {images} bases",
    "forest": "forest items",
    "graphs": "graphs",
}


def own_fields(synth: Form) -> dict[str, Any]:
    """The fields of a manifest that only sets of this kind have."""
    return {"factor": synth.factor} if isinstance(synth, Factored) else {}


def tensors_problem(tensors: Mapping[str, Tensor], fields: Mapping[str, Any], spec: Any) -> str | None:
    """The first thing that is wrong with the stored tensors of a set with these manifest fields."""
    form, own = FORMS[fields["kind"]], {key: fields[key] for key in ("factor",) if key in fields}
    return form.problem(tensors, fields["y_kind"], spec, **own)


def stored_count(tensors: Mapping[str, Tensor], fields: Mapping[str, Any]) -> int:
    """Training items that the stored tensors of a set with these manifest fields stand for."""
    if fields["kind"] == Compensated.kind:
        return Compensated.stored_count(tensors)
    if fields["kind"] == Factored.kind:
        return len(tensors["images"]) * fields["factor"] ** 2
    return len(tensors["labels"])


def items_text(tensors: Mapping[str, Tensor], kind: str) -> str:
    """What the items of a set of this kind are called."""
    return ITEMS[kind].format(images=len(tensors.get("images", ())))


def images_per_class(synth: Form, provenance: Mapping[str, Any]) -> int | None:
    """Items of each class, None where classes have unequal numbers.

    For composites the nominal IPC of the run, else the uint8 images of a class whose bytes hold all that is
    stored but for teachers; for grids the stored images, as many for each class on average.
    """
    if isinstance(synth, Factored):
        return -(-len(synth.images) // len(synth.spec.classes))
    if isinstance(synth, Compensated):
        nominal = (provenance.get("budget") or {}).get("ipc")
        if type(nominal) is int:
            return nominal
        stored = synth.nbytes["total"] - synth.teacher_bytes
        return -(-stored // (len(synth.spec.classes) * prod(synth.spec.shape)))
    counts = torch.bincount(synth.decode().classes.cpu(), minlength=len(synth.spec.classes)).tolist()
    return counts[0] if counts[0] and len(set(counts)) == 1 else None

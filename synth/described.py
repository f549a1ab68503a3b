"""What a stored set means: its spec as manifest fields and, for whitenings and codebooks, as tensors."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ddengine.graphs import GraphSpec
from ddengine.types import DataSpec, Whitening
from synth.schema import declare

ZCA = ("zca.mean", "zca.matrix", "zca.inverse")
CODEBOOK = "codebook"


def dataset_fields(spec: DataSpec | GraphSpec) -> dict[str, Any]:
    """The manifest's "dataset": all that a spec says, but for what lies in tensors."""
    return _graph_fields(spec) if isinstance(spec, GraphSpec) else _image_fields(spec)


def spec_of(dataset: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> DataSpec | GraphSpec:
    """The spec from its fields and its tensors, both of which were checked."""
    return _image_spec(dataset, tensors) if "shape" in dataset else _graph_spec(dataset, tensors)


def pack_whitening(spec: DataSpec | GraphSpec) -> dict[str, Tensor]:
    """The whitening of images as stored tensors; none where there is none."""
    if isinstance(spec, GraphSpec) or spec.zca is None:
        return {}
    parts = (spec.zca.mean, spec.zca.matrix, spec.zca.inverse)
    return {name: part.detach().cpu().float().clone() for name, part in zip(ZCA, parts, strict=True)}


def pack_codebooks(spec: GraphSpec) -> dict[str, Tensor]:
    """The values that codes of graphs stand for, one tensor [codes d] for each column that has them."""
    return {
        f"{CODEBOOK}.{side}.{column}": table.detach().cpu().to(torch.float32, copy=True).contiguous()
        for side, tables in (("node", spec.node_values), ("edge", spec.edge_values))
        for column, table in enumerate(tables)
        if table is not None
    }


def with_stored_codebooks(spec: GraphSpec) -> GraphSpec:
    """The spec with its values as a file gives them back."""
    return _with_tables(spec, pack_codebooks(spec))


def form_tensors(tensors: Mapping[str, Tensor], dataset: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of the form alone, without those of the spec."""
    images = "shape" in dataset
    return {
        name: tensor
        for name, tensor in tensors.items()
        if not (name in ZCA if images else name.startswith(f"{CODEBOOK}."))
    }


def spec_problem(tensors: Mapping[str, Tensor], dataset: Mapping[str, Any]) -> str | None:
    """The first thing that is wrong with the stored tensors of a spec, in words; None when nothing is."""
    if "shape" not in dataset:
        return _codebook_problem(tensors, dataset)
    if set(ZCA) & set(tensors) != (set(ZCA) if dataset["preprocessing"] == "zca" else set()):
        return "whitening tensors and declared preprocessing disagree"
    d = math.prod(dataset["shape"])
    for name, shape in zip(ZCA, ([d], [d, d], [d, d]), strict=True):
        part = tensors.get(name)
        right = {"dtype": "float32", "shape": shape}
        if part is not None and (declare(part) != right or not bool(part.isfinite().all())):
            return f"{name} is not finite float32 {shape}"
    return None


def _codebook_problem(tensors: Mapping[str, Tensor], dataset: Mapping[str, Any]) -> str | None:
    sizes = {
        f"{CODEBOOK}.{side}.{column}": size
        for side in ("node", "edge")
        for column, size in enumerate(dataset[f"{side}_sizes"])
    }
    for name, table in tensors.items():
        if not name.startswith(f"{CODEBOOK}."):
            continue
        if name not in sizes:
            return f"{name} stands for no column of the labels"
        finite = table.dtype == torch.float32 and bool(table.isfinite().all())
        if not finite or table.ndim != 2 or len(table) != sizes[name] or table.shape[1] == 0:
            return f"{name} is not one row of finite float32 numbers for each of {sizes[name]} codes"
    return None


def _image_fields(spec: DataSpec) -> dict[str, Any]:
    return {
        "name": spec.name,
        "shape": list(spec.shape),
        "classes": list(spec.classes),
        "mean": [float(v) for v in spec.mean],
        "std": [float(v) for v in spec.std],
        "preprocessing": spec.preprocessing,
        "fingerprint": spec.fingerprint,
        "licence": spec.licence,
    }


def _image_spec(dataset: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> DataSpec:
    c, h, w = dataset["shape"]
    return DataSpec(
        name=dataset["name"],
        shape=(c, h, w),
        classes=tuple(dataset["classes"]),
        mean=tuple(dataset["mean"]),
        std=tuple(dataset["std"]),
        fingerprint=dataset["fingerprint"],
        licence=dataset["licence"],
        zca=Whitening(*(tensors[name] for name in ZCA)) if dataset["preprocessing"] == "zca" else None,
    )


def _graph_fields(spec: GraphSpec) -> dict[str, Any]:
    return {
        "name": spec.name,
        "classes": list(spec.classes),
        "node_sizes": list(spec.node_sizes),
        "edge_sizes": list(spec.edge_sizes),
        "discretised": spec.discretised,
        "codes_from": spec.codes_from,
        "fingerprint": spec.fingerprint,
        "licence": spec.licence,
    }


def _graph_spec(dataset: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> GraphSpec:
    spec = GraphSpec(
        name=dataset["name"],
        classes=tuple(dataset["classes"]),
        node_sizes=tuple(dataset["node_sizes"]),
        edge_sizes=tuple(dataset["edge_sizes"]),
        discretised=dataset["discretised"],
        codes_from=dataset["codes_from"],
        fingerprint=dataset["fingerprint"],
        licence=dataset["licence"],
    )
    return _with_tables(spec, tensors)


def _with_tables(spec: GraphSpec, tensors: Mapping[str, Tensor]) -> GraphSpec:
    tables = {
        side: tuple(tensors.get(f"{CODEBOOK}.{side}.{column}") for column in range(len(sizes)))
        for side, sizes in (("node", spec.node_sizes), ("edge", spec.edge_sizes))
    }
    known = {side: found if any(t is not None for t in found) else () for side, found in tables.items()}
    return replace(spec, node_values=known["node"], edge_values=known["edge"])

"""Sets of computation trees as a synthetic set: the colours that the items use, each stored once."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ddengine.errors import UsageError, require
from ddengine.graphs import GraphSpec
from ddengine.ops.dag import ColorDAG, Level, Trees, closed, take, trees_problem
from ddengine.types import label_bytes
from synth.described import pack_codebooks, with_stored_codebooks
from synth.narrow import integers_problem, lengths_problem, narrow
from synth.pixels import LABEL_DTYPES, LEVELS, labels_problem, names_problem
from synth.schema import packed_bytes

HOPS_MAX = 64
ALL_ONES = ("trees.times", "items.sizes", "items.count")  # left out of a file where nothing but ones
NEEDED = {"trees.x", "trees.sizes", "labels"}
VECTORS = (
    "trees.degree", "trees.sizes", "trees.own", "trees.entries", "trees.child", "trees.times",
    "items.sizes", "items.color", "items.count",
)  # fmt: skip


@dataclass(frozen=True)
class Forest:
    """Weighted items, each a multiset of computation trees, over the DAG of the trees that they use.

    Made by `Forest.of`, which keeps no colour that no item needs and rounds labels and weights as they are
    stored, so that `decode` gives the same before saving and after loading. Soft labels are held as stored;
    `decode` makes their rows sum to 1.
    """

    kind: ClassVar[str] = "forest"

    trees: Trees

    @staticmethod
    def of(trees: Trees) -> "Forest":
        """The items of `trees` over the colours and edge labels that they use (CPU).

        Raises UsageError for trees that break a rule of `Trees` or have more than 64 hops.
        """
        found = trees_problem(trees) if len(trees) else "there is no item"
        if found is None:
            trees = closed(take(trees, torch.arange(len(trees))))
            trees = replace(trees, y=_normalised(trees), spec=with_stored_codebooks(trees.spec))
            packed = Forest(trees)._packed()
            found = Forest.problem(packed, trees.y_kind, trees.spec)
        if found is not None:
            raise UsageError(
                f"these trees make no forest: {found}", "Give trees as ddengine.ops.dag.Trees says"
            )
        return Forest.unpack(packed, {"y_kind": trees.y_kind}, trees.spec)

    @property
    def spec(self) -> GraphSpec:
        """What the graphs mean that the trees were taken from."""
        return self.trees.spec

    @property
    def y_kind(self) -> str:
        """What labels are: "class" or "prob"."""
        return self.trees.y_kind

    def params(self) -> dict[str, Tensor]:
        """The free tensors: none."""
        return {}

    def replace(self, params: Mapping[str, Tensor]) -> "Forest":
        """The set itself (UsageError for any tensor, since none is free)."""
        for name in params:
            require(name, self.params(), "free tensor")
        return self

    def decode(self, indices: Int[Tensor, " n"] | None = None) -> Trees:
        """The items (all, or at `indices`); the DAG keeps the trees of all."""
        trees = self.trees if indices is None else take(self.trees, indices)
        return replace(trees, y=_normalised(trees))

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes of what `pack` gives, by part: images (none), trees, labels, extras, total."""
        return packed_bytes(self.pack(), self.kind)

    def pack(self) -> dict[str, Tensor]:
        """The stored tensors (CPU), whole numbers as narrow as they fit.

        The numbers of entries stand in place of row pointers and all levels above 0 in one tensor. What is
        empty is left out, and so are multiplicities, counts, item sizes and weights that are all 1, an edge
        label that all entries share, and the colours of items of which the i-th is the i-th tree.
        """
        return self._packed() | pack_codebooks(self.spec)

    def _packed(self) -> dict[str, Tensor]:
        stored = _trees_of(self.trees.dag) | _items_of(self.trees)
        for name in ALL_ONES:
            if bool((stored[name] == 1).all()):
                del stored[name]
        if not bool(stored["trees.edge"].any()):
            del stored["trees.edge"]
        if "items.sizes" not in stored and torch.equal(stored["items.color"], torch.arange(len(self.trees))):
            del stored["items.color"]
        packed = {name: narrow(values) for name, values in stored.items() if values.numel()}
        return packed | _pack_labels(self.trees)

    @staticmethod
    def unpack(tensors: Mapping[str, Tensor], fields: Mapping[str, Any], spec: GraphSpec) -> "Forest":
        """The set from its stored tensors and its manifest fields (of which `y_kind` is read)."""
        t, y_kind = _restored(tensors, spec), fields["y_kind"]
        items, labels = len(t["items.sizes"]), tensors["labels"]
        trees = Trees(
            dag=ColorDAG(t["trees.x"], t.get("trees.degree"), t["trees.edges"], _levels(t)),
            item=torch.arange(items).repeat_interleave(t["items.sizes"]),
            color=t["items.color"],
            count=t["items.count"],
            y=labels.long() if y_kind == "class" else _probabilities(labels),
            weight=tensors["weights"].float() if "weights" in tensors else torch.ones(items),
            spec=spec,
            y_kind=y_kind,
        )
        return Forest(trees)

    @staticmethod
    def problem(tensors: Mapping[str, Tensor], y_kind: str, spec: GraphSpec) -> str | None:
        """The first thing that is wrong with stored tensors (without codebooks), in words; else None."""
        columns = _columns(spec)
        return (
            (None if y_kind in ("class", "prob") else f"a forest has class or prob labels, not {y_kind!r}")
            or names_problem(tensors, NEEDED, {*columns, "weights"} - NEEDED)
            or integers_problem(tensors, columns)
            or _layout_problem(_restored(tensors, spec))
            or _labels_problem(tensors, y_kind, spec)
            or trees_problem(Forest.unpack(tensors, {"y_kind": y_kind}, spec).trees)
        )


def _columns(spec: GraphSpec) -> dict[str, int | None]:
    """The whole numbers of a stored forest: None for a vector, the columns of a table."""
    plain = {**dict.fromkeys(VECTORS), "trees.x": len(spec.node_sizes)}
    return {**plain, "trees.edge": None, "trees.edges": len(spec.edge_sizes)} if spec.edge_sizes else plain


def _normalised(trees: Trees) -> Tensor:
    return trees.y if trees.y_kind == "class" else trees.y / trees.y.sum(1, keepdim=True)


def _trees_of(dag: ColorDAG) -> dict[str, Tensor]:
    """The DAG as named tensors, all levels above 0 one after the other."""
    per_color = {"own": [level.own for level in dag.levels]}
    per_color["entries"] = [torch.bincount(level.row, minlength=len(level.own)) for level in dag.levels]
    per_entry = {name: [getattr(level, name) for level in dag.levels] for name in ("child", "times", "edge")}
    nothing = torch.zeros(0, dtype=torch.int64)
    joined = {f"trees.{name}": torch.cat([nothing, *held]) for name, held in (per_color | per_entry).items()}
    degree = {} if dag.degree is None else {"trees.degree": dag.degree}
    whole = {"trees.x": dag.x, "trees.sizes": torch.tensor(dag.sizes), "trees.edges": dag.edge_attr}
    return whole | degree | joined


def _items_of(trees: Trees) -> dict[str, Tensor]:
    sizes = torch.bincount(trees.item, minlength=len(trees))
    return {"items.sizes": sizes, "items.color": trees.color, "items.count": trees.count}


def _pack_labels(trees: Trees) -> dict[str, Tensor]:
    """Labels, and weights as float16 where that loses no range.

    Probabilities are numbers of 255ths, of which the last class has what the others leave.
    """
    if trees.y_kind == "class":
        dtype = LABEL_DTYPES[label_bytes(len(trees.spec.classes))]
        packed = {"labels": trees.y.detach().cpu().to(dtype, copy=True)}
    else:
        packed = {"labels": _levels_of(trees.y.detach().cpu().double())[:, :-1].to(torch.uint8)}
    half = torch.finfo(torch.float16)
    weight = trees.weight.detach().cpu()
    in_range = bool(((weight >= half.smallest_normal) & (weight <= half.max)).all())
    weight = weight.to(torch.float16 if in_range else torch.float32, copy=True)
    return packed if bool((weight == 1).all()) else {**packed, "weights": weight}


def _levels_of(y: Tensor) -> Tensor:
    """Rows of probabilities [m k] as whole numbers that add up to 255, by largest remainders."""
    shares = y / y.sum(1, keepdim=True) * LEVELS
    levels = shares.floor()
    order = (levels - shares).argsort(dim=1, stable=True).argsort(dim=1, stable=True)
    return (levels + (order < LEVELS - levels.sum(1, keepdim=True))).long()


def as_stored(y: Float[Tensor, "m k"]) -> Float[Tensor, "m k"]:
    """Probabilities [m k] as a forest stores them: rounded to 255ths, each row of sum 1."""
    return _probabilities(_levels_of(y.detach().cpu().double())[:, :-1])


def _probabilities(labels: Tensor) -> Tensor:
    """Rows of probabilities [m k] from stored levels [m k-1]."""
    levels = labels.float()
    return torch.cat([levels, LEVELS - levels.sum(1, keepdim=True)], 1) / LEVELS


def _restored(tensors: Mapping[str, Tensor], spec: GraphSpec) -> dict[str, Tensor]:
    """All whole numbers as int64, with what was left out of the file."""
    columns, nothing = len(spec.edge_sizes), torch.zeros(0, dtype=torch.int64)
    held = {name: t.long() for name, t in tensors.items() if name.startswith(("trees.", "items."))}
    entries, items = len(held.get("trees.child", nothing)), sum(tensors["labels"].shape[:1])
    distinct = len(held["items.color"]) if "items.color" in held else items
    left_out = {
        **dict.fromkeys(("trees.own", "trees.entries", "trees.child"), nothing),
        "trees.times": torch.ones(entries, dtype=torch.int64),
        "trees.edge": torch.zeros(entries, dtype=torch.int64),
        "trees.edges": torch.zeros((0 if columns else min(entries, 1), columns), dtype=torch.int64),
        "items.color": torch.arange(items),
        "items.sizes": torch.ones(distinct, dtype=torch.int64),
        "items.count": torch.ones(distinct, dtype=torch.int64),
    }
    return left_out | held


def _levels(t: Mapping[str, Tensor]) -> tuple[Level, ...]:
    """The levels above 0 from tensors whose lengths agree."""
    sizes = t["trees.sizes"][1:].tolist()
    entries = t["trees.entries"].split(sizes) if sizes else ()
    each = [int(part.sum()) for part in entries]
    own = t["trees.own"].split(sizes) if sizes else ()
    per_entry = [t[f"trees.{name}"].split(each) if sizes else () for name in ("child", "edge", "times")]
    rows = [torch.arange(len(part)).repeat_interleave(part) for part in entries]
    return tuple(Level(*parts) for parts in zip(own, rows, *per_entry, strict=True))


def _layout_problem(t: Mapping[str, Tensor]) -> str | None:
    """What does not fit together in the lengths of tensors, and whether the colours of items ascend."""
    sizes, entries, item_sizes = t["trees.sizes"], t["trees.entries"], t["items.sizes"]
    if len(sizes) > HOPS_MAX + 1 or int(sizes.min()) < 1:
        return f"trees.sizes is not a number above 0 for each of at most {HOPS_MAX + 1} levels"
    if not len(item_sizes):
        return "there is no item"
    above, r, z = int(sizes[1:].sum()), len(t["trees.child"]), len(t["items.color"])
    first = dict.fromkeys(("trees.x", "trees.degree"), int(sizes[0]))
    second = dict.fromkeys(("trees.own", "trees.entries"), above)
    if wrong := lengths_problem(t, first | second | {"trees.times": r, "trees.edge": r, "items.count": z}):
        return wrong
    if int(entries.sum()) != r:
        return f"trees.entries add up to {int(entries.sum())}, but trees.child has {r}"
    if int(item_sizes.min()) < 1 or int(item_sizes.sum()) != z:
        return f"items.sizes are not numbers above 0 that add up to the {z} of items.color"
    same = torch.arange(len(item_sizes)).repeat_interleave(item_sizes).diff() == 0
    falls = bool((t["items.color"].diff()[same] <= 0).any())
    return "items.color does not ascend inside an item" if falls else None


def _labels_problem(tensors: Mapping[str, Tensor], y_kind: str, spec: GraphSpec) -> str | None:
    labels, weights = tensors["labels"], tensors.get("weights")
    items = len(_restored(tensors, spec)["items.sizes"])
    if weights is not None and (
        weights.dtype not in (torch.float16, torch.float32) or tuple(weights.shape) != (items,)
    ):
        return f"weights are {weights.dtype} {list(weights.shape)}, not {items} float numbers"
    classes = len(spec.classes)
    if y_kind == "class":
        return labels_problem(labels, items, y_kind, classes)
    if classes < 2:
        return "soft labels of one class say nothing"
    if labels.dtype != torch.uint8 or tuple(labels.shape) != (items, classes - 1):
        return f"labels are {labels.dtype} {list(labels.shape)}, not uint8 {[items, classes - 1]}"
    return "labels add up to more than 1" if int(labels.long().sum(1).max()) > LEVELS else None

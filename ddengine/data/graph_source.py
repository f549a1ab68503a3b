"""From a collection and a name to graphs of label codes in a fit, a validation and a test part."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ddengine.data import dataset_root
from ddengine.data.discretise import Discretised
from ddengine.data.discretise import discretise as discretise_attributes
from ddengine.data.graph_split import Parts, content, fingerprint, hashed_parts, sorted_parts
from ddengine.data.ogb import read_ogb
from ddengine.data.raw_graphs import RawGraphs, check_columns, check_made_columns
from ddengine.data.tu import read_tu
from ddengine.errors import UsageError, require, require_positive, unknown
from ddengine.graphs import DISCRETISED, Graphs, GraphSpec

Reader = Callable[[Path, str, bool], RawGraphs]
MOST_DEGREES = 100  # larger in-degrees share one code where degrees are the labels

GRAPHS: dict[str, Reader] = {"tu": read_tu, "ogb": read_ogb}


@dataclass(frozen=True)
class GraphDataset:
    """Class-sorted parts that share one spec; `notes` are lines for the user.

    Only `fit` may be learned from, every choice is made on `validation`, and `test` is for the last word.
    """

    fit: Graphs
    validation: Graphs
    test: Graphs
    notes: tuple[str, ...] = ()

    @property
    def spec(self) -> GraphSpec:
        """The spec that all three parts share."""
        return self.fit.spec


def load_graphs(
    collection: str,
    name: str,
    *,
    root: str | Path | None = None,
    discretise: str | None = None,
    bins: int = 8,
    split: int = 0,
    download: bool = True,
) -> GraphDataset:
    """Load the set `name` of a collection, "tu" or "ogb", from files below `root` (else `dataset_root()`).

    Continuous attributes are refused unless `discretise` says how up to `bins` codes are made of them:
    "quantile", "kmeans", or "none", which leaves them out. `split` numbers the hashed 80/10/10 splits; an
    official split is the only one of its set. `download` lets torch_geometric fetch a TU set that is not
    there. Raises UsageError for whatever cannot be used.
    """
    if collection not in GRAPHS:
        raise unknown("graph collection", collection, GRAPHS)
    if not name or Path(name).name != name:
        raise UsageError(f"'{name}' is no name of a graph set", "Give dataset.name=NAME, such as MUTAG")
    path = dataset_root() if root is None else Path(root).expanduser()
    _check_options(discretise, bins, split)
    return assemble_graphs(
        GRAPHS[collection](path, name, download), discretise=discretise, bins=bins, split=split
    )


def assemble_graphs(
    raw: RawGraphs, *, discretise: str | None = None, bins: int = 8, split: int = 0
) -> GraphDataset:
    """Clean what a reader gave, divide it, and make codes of it that all parts share. Raises UsageError."""
    _check_options(discretise, bins, split)
    _check_classes(raw.name, raw.classes)
    raw, notes = cleaned(raw)
    raw, left_out = _chosen(raw, discretise)
    check_made_columns(raw, discretise)
    graphs = coded(_as_labels(raw))
    parts, print_of_data = _identified(graphs, _parts(graphs, raw, split), split)
    absent = len(graphs) - sum(len(part) for part in parts)
    if absent:
        notes += (f"{absent} of {len(graphs)} graphs are in no part of the official split: left out",)
    if raw.node_attributes is not None or raw.edge_attributes is not None:
        graphs, made = _discretised(raw, parts[0], str(discretise), bins)
        notes += made
    if graphs.spec.codes_from == "degree":
        notes += _degree_notes(raw)
    return _divided(graphs, parts, print_of_data, (*left_out, *notes))


def split_graphs(graphs: Graphs, split: int = 0) -> GraphDataset:
    """Your own graphs, such as those of `from_pyg`, divided 80/10/10 by their content, with a fingerprint.

    Parts and fingerprint are those of a loaded set of the same graphs; `split` numbers the splits. Self-loops
    stay. Raises UsageError for one class, a class too small for three parts, and too many label columns.
    """
    spec = graphs.spec
    require_positive("split", split, zero=True)
    _check_classes(spec.name, spec.classes)
    check_columns(spec.name, len(spec.node_sizes), len(spec.edge_sizes))
    return _divided(graphs, *_identified(graphs, hashed_parts(graphs, split), split))


def cleaned(raw: RawGraphs) -> tuple[RawGraphs, tuple[str, ...]]:
    """The graphs without self-loops, and notes on these and on repeated, one-way and missing edges.

    Layers that want a self-loop add their own; a repeated edge is a message that arrives several times.
    """
    source, target = raw.edge_index
    keep = source != target
    loops, notes = int((~keep).sum()), list(raw.notes)
    if loops:
        notes.append(f"{loops} self-loops are left out: layers that need one at each node add it")
        raw = replace(
            raw,
            edge_index=raw.edge_index[:, keep],
            edge_labels=None if raw.edge_labels is None else raw.edge_labels[keep],
            edge_attributes=None if raw.edge_attributes is None else raw.edge_attributes[keep],
        )
        source, target = raw.edge_index
    if not len(source):
        notes.append("no graph has an edge")
        raw = replace(raw, edge_labels=None, edge_attributes=None)
    n = len(raw.batch)
    there, back = (source * n + target).sort().values, (target * n + source).sort().values
    repeated = int((there.diff() == 0).sum())
    if repeated:
        notes.append(f"{repeated} edges repeat one before them and are kept, as messages that arrive again")
    if not torch.equal(there, back):
        notes.append("some edges run one way only: messages follow them from the first node to the second")
    return replace(raw, notes=()), tuple(notes)


def coded(
    raw: RawGraphs, nodes: Discretised | None = None, edges: Discretised | None = None, method: str = "none"
) -> Graphs:
    """Graphs whose codes are dense in every column: the labels of `raw`, then what attributes have become.

    Nodes with neither have their in-degree as label, those above 100 one for all. `method` says how `nodes`
    and `edges` were made.
    """
    labels, degrees = raw.node_labels, raw.node_labels is None and nodes is None
    if degrees:
        in_degree = torch.bincount(raw.edge_index[1], minlength=len(raw.batch))
        labels = in_degree.clamp(max=MOST_DEGREES + 1)[:, None]
    x, node_sizes, node_values = _columns(len(raw.batch), labels, nodes)
    attr, edge_sizes, edge_values = _columns(raw.edge_index.shape[1], raw.edge_labels, edges)
    spec = GraphSpec(
        raw.name, raw.classes, node_sizes, edge_sizes, node_values, edge_values,
        discretised=method, codes_from="degree" if degrees else "labels", licence=raw.licence,
    )  # fmt: skip
    return Graphs(x, raw.edge_index, attr, raw.batch, raw.y, spec)


def _columns(
    n: int, labels: Tensor | None, made: Discretised | None
) -> tuple[Tensor, tuple[int, ...], tuple[Tensor | None, ...]]:
    """Codes, their number and their values, of label columns (which have no values) and then of `made`."""
    dense = [] if labels is None else [column.unique(return_inverse=True) for column in labels.T]
    codes = [torch.zeros(n, 0, dtype=torch.long), *(codes[:, None] for _, codes in dense)]
    sizes, values = tuple(len(found) for found, _ in dense), (None,) * len(dense)
    if made is None:
        return torch.cat(codes, 1), sizes, values
    return torch.cat([*codes, made.codes], 1), (*sizes, *made.sizes), (*values, *made.values)


def _as_labels(raw: RawGraphs) -> RawGraphs:
    """Attributes as label columns, one for each distinct value, which tell graphs apart before any fit."""

    def joined(labels: Tensor | None, attributes: Tensor | None) -> Tensor | None:
        if attributes is None:
            return labels
        ids = torch.stack([column.unique(return_inverse=True)[1] for column in attributes.T], 1)
        return ids if labels is None else torch.cat([labels, ids], 1)

    return replace(
        raw,
        node_labels=joined(raw.node_labels, raw.node_attributes),
        edge_labels=joined(raw.edge_labels, raw.edge_attributes),
    )


def _discretised(raw: RawGraphs, fit: Tensor, method: str, bins: int) -> tuple[Graphs, tuple[str, ...]]:
    """Graphs whose attributes are codes fitted to the graphs at `fit`, and a note on what that loses."""
    inside = torch.zeros(len(raw.y), dtype=torch.bool)
    inside[fit] = True
    made, notes = {}, []
    for kind, attributes, of in (
        ("node", raw.node_attributes, raw.batch),
        ("edge", raw.edge_attributes, raw.batch[raw.edge_index[1]]),
    ):
        if attributes is not None:
            made[kind] = found = discretise_attributes(attributes, inside[of], method, bins)
            width, codes = attributes.shape[1], sum(found.sizes)
            notes.append(
                f"{width} continuous {kind} attributes became {codes} codes by {method}, "
                f"which lose {found.lost:.1%} of their variance on the fit part"
            )
    return coded(raw, made.get("node"), made.get("edge"), method), tuple(notes)


def _identified(graphs: Graphs, parts: Sequence[Tensor], split: int) -> tuple[Parts, str]:
    """The parts sorted by class and content, and the fingerprint; refuses a part that lacks a class."""
    keys = content(graphs)
    parts = sorted_parts(keys, graphs.y, parts)
    _check_parts(graphs, parts)
    return parts, fingerprint(keys, graphs, parts, split)


def _divided(graphs: Graphs, parts: Parts, print_of_data: str, notes: tuple[str, ...] = ()) -> GraphDataset:
    graphs = replace(graphs, spec=replace(graphs.spec, fingerprint=print_of_data))
    fit, validation, test = (graphs.take(part) for part in parts)
    return GraphDataset(fit, validation, test, notes)


def _degree_notes(raw: RawGraphs) -> tuple[str, ...]:
    over = int((torch.bincount(raw.edge_index[1]) > MOST_DEGREES).sum())
    note = "nodes have no labels: their in-degree is their label"
    clipped = f"in-degrees above {MOST_DEGREES} share one label: {over} of {len(raw.batch)} nodes"
    return (note, clipped) if over else (note,)


def _chosen(raw: RawGraphs, method: str | None) -> tuple[RawGraphs, tuple[str, ...]]:
    """`raw` without attributes where these are to be left out; refuses them where nothing is said of them."""
    found = {k: v.shape[1] for k in ("node", "edge") if (v := getattr(raw, f"{k}_attributes")) is not None}
    counts = " and ".join(f"{count} continuous {kind} attributes" for kind, count in found.items())
    if not found:
        return raw, () if method in (None, "none") else (
            f"nothing to discretise: {raw.name} has labels only",
        )
    if method is None:
        raise UsageError(
            f"{raw.name} has {counts}, and computation trees compare labels, not real values",
            "Give dataset.discretise=quantile or kmeans, or none to leave them out",
        )
    if method == "none":
        return replace(raw, node_attributes=None, edge_attributes=None), (f"{counts} are left out",)
    return raw, ()


def _parts(graphs: Graphs, raw: RawGraphs, split: int) -> Sequence[Tensor]:
    if raw.parts is None:
        return hashed_parts(graphs, split)
    if split:
        raise UsageError(
            f"split={split}: {raw.name} has an official split, the only one that results compare on",
            "Give split=0",
        )
    return raw.parts


def _check_options(discretise: str | None, bins: int, split: int) -> None:
    if discretise is not None:
        require(discretise, DISCRETISED, "dataset.discretise")
    if bins < 2:
        raise UsageError(f"dataset.bins={bins} is out of range", "Give two bins or more")
    require_positive("dataset.split", split, zero=True)


def _check_classes(name: str, classes: tuple[str, ...]) -> None:
    if len(classes) < 2:
        raise UsageError(f"{name} has one class, '{classes[0]}'", "Give graphs of two classes or more")


def _check_parts(graphs: Graphs, parts: Sequence[Tensor]) -> None:
    for part, index in zip(("fit", "validation", "test"), parts, strict=True):
        counts = torch.bincount(graphs.y[index], minlength=len(graphs.spec.classes)).tolist()
        empty = [label for label, n in zip(graphs.spec.classes, counts, strict=True) if n == 0]
        if empty:
            raise UsageError(
                f"class '{empty[0]}' of {graphs.spec.name} has no graph in the {part} part",
                "Add graphs to that class, or remove it",
            )

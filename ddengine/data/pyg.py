"""To and from torch_geometric's `Data` objects, whose names our graphs share."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ddengine.data.graph_source import cleaned, coded
from ddengine.data.raw_graphs import RawGraphs, check_made_columns
from ddengine.errors import UsageError
from ddengine.graphs import Graphs, GraphSpec

UNITS = {"x": "node", "edge_attr": "edge"}


def from_pyg(data: Iterable[Any], name: str = "pyg", spec: GraphSpec | None = None) -> Graphs:
    """Graphs from a torch_geometric dataset or a list of `Data`, with one integer class `y` each.

    `x` and `edge_attr` hold integer labels [n] or [n f], or one-hot floats [n f]; nodes without `x` have
    their in-degree as label. A graph without edges needs no `edge_attr`. Self-loops are left out. Labels
    become dense codes shared by all graphs of `data`: convert the parts of a set together, or give the `spec`
    whose codes they are already. Raises UsageError for continuous or mixed features, too many label columns
    and whatever does not fit together.
    """
    graphs = list(data)
    if not graphs:
        raise UsageError(f"{name} holds no graph", "Give torch_geometric Data objects, one for each graph")
    sizes = torch.tensor([_node_count(i, graph) for i, graph in enumerate(graphs)])
    edges = [_edges(i, graph, int(n)) for i, (graph, n) in enumerate(zip(graphs, sizes, strict=True))]
    counts = torch.tensor([part.shape[1] for part in edges])
    starts = torch.repeat_interleave(sizes.cumsum(0) - sizes, counts)
    y = torch.cat([_class(i, graph) for i, graph in enumerate(graphs)])
    labels = y.unique()
    raw = RawGraphs(
        name,
        torch.cat(edges, 1) + starts,
        torch.repeat_interleave(torch.arange(len(graphs)), sizes),
        torch.searchsorted(labels, y),
        tuple(str(label) for label in labels.tolist()),
        _labels(graphs, "x", sizes),
        edge_labels=_labels(graphs, "edge_attr", counts),
    )
    check_made_columns(raw)
    raw, _ = cleaned(raw)
    return coded(raw) if spec is None else _as_they_are(raw, y, spec)


def to_pyg(graphs: Graphs) -> list[Any]:
    """One torch_geometric `Data` for each graph: codes `x` [n f] and `edge_attr` [e q], class `y` [1].

    `graphs.spec.features(data.x)` is what a network sees. `edge_attr` is None where edges have no labels.
    Raises UsageError with the line that installs torch_geometric where it is missing.
    """
    try:
        from torch_geometric.data import Data
    except ImportError as error:
        raise UsageError(
            "to_pyg needs torch_geometric, which is not installed",
            'Install it: pip install "ddengine[graph]"',
        ) from error
    order = graphs.batch[graphs.edge_index[1]].argsort(stable=True)
    nodes, edges = graphs.nodes.tolist(), graphs.edges.tolist()
    starts = graphs.nodes.cumsum(0) - graphs.nodes
    ends = graphs.edge_index[:, order].split(edges, 1)
    attr = graphs.edge_attr[order].split(edges)
    return [
        Data(
            x=x,
            edge_index=ends[i] - starts[i],
            edge_attr=attr[i] if graphs.spec.edge_sizes else None,
            y=graphs.y[i : i + 1],
        )
        for i, x in enumerate(graphs.x.split(nodes))
    ]


def _as_they_are(raw: RawGraphs, y: Tensor, spec: GraphSpec) -> Graphs:
    """Graphs whose labels are the codes of `spec` and whose `y` its class numbers; `Graphs` checks them."""
    if raw.node_labels is None:
        raise UsageError(f"{raw.name} has no node labels to be codes of the given spec", "Give x, or no spec")
    edges = raw.edge_labels
    if edges is None:
        count = raw.edge_index.shape[1]
        edges = torch.zeros(count, 0 if count else len(spec.edge_sizes), dtype=torch.long)
    return Graphs(raw.node_labels, raw.edge_index, edges, raw.batch, y, spec)


def _node_count(i: int, graph: Any) -> int:
    count = graph.num_nodes
    if not count:
        raise UsageError(f"graph {i} has no node", "Leave it out, or give it x or num_nodes")
    return int(count)


def _edges(i: int, graph: Any, n: int) -> Tensor:
    edges = graph.edge_index
    if edges is None:
        return torch.zeros(2, 0, dtype=torch.long)
    if edges.ndim != 2 or len(edges) != 2 or (edges.numel() and not 0 <= edges.min() <= edges.max() < n):
        raise UsageError(
            f"graph {i}: edge_index {tuple(edges.shape)} does not join its nodes 0..{n - 1}",
            "Give edge_index [2, e] of the graph's own nodes",
        )
    return edges.cpu().long()


def _class(i: int, graph: Any) -> Tensor:
    y = None if graph.y is None else torch.as_tensor(graph.y)
    if y is None or y.numel() != 1 or y.is_floating_point():
        shown = "no y" if y is None else f"y of type {y.dtype} and shape {tuple(y.shape)}"
        raise UsageError(f"graph {i} has {shown}", "Give each graph one integer class number as y")
    return y.cpu().reshape(1).long()


def _labels(graphs: Sequence[Any], key: str, counts: Tensor) -> Tensor | None:
    """All rows of `key` as integer labels; None where no graph has it for a node or an edge."""
    found, first = _filled([getattr(graph, key) for graph in graphs], counts.tolist())
    if all(rows is None for rows in found):
        return None
    shapes = [None if rows is None else (rows.ndim, *rows.shape[1:], rows.dtype) for rows in found]
    other = next((i for i, shape in enumerate(shapes) if shape != shapes[first]), None)
    if other is not None or found[first].ndim not in (1, 2):
        at = first if other is None else other
        raise UsageError(
            f"graph {at}: {key} has another shape or type than graph {first}'s, or not one or two axes",
            f"Give every graph {key} as [n], or as [n, f] of one width and type",
        )
    short = next((i for i, (rows, n) in enumerate(zip(found, counts, strict=True)) if len(rows) != n), None)
    if short is not None:
        raise UsageError(
            f"graph {short}: {key} has {len(found[short])} rows for {counts[short]} {UNITS[key]}s",
            f"Give {key} one row for each {UNITS[key]}",
        )
    rows = torch.cat(found).cpu()
    return _codes(rows, key) if rows.is_floating_point() else rows.long().reshape(len(rows), -1)


def _filled(found: list[Any], counts: list[int]) -> tuple[list[Any], int]:
    """`found`, with no rows of the common width and type where nothing is to label; the first with any."""
    first = next((i for i, n in enumerate(counts) if n), 0)
    like = found[first] if counts[first] else None
    blank = None if like is None else like.new_zeros((0, *like.shape[1:]))
    bare = [not n and (rows is None or rows.shape[:1] == (0,)) for rows, n in zip(found, counts, strict=True)]
    return [blank if none else rows for rows, none in zip(found, bare, strict=True)], first


def _codes(rows: Tensor, key: str) -> Tensor:
    """The place of the one in each row of one-hot floats."""
    if rows.ndim == 1 or not bool(((rows == 0) | (rows == 1)).all() and (rows.sum(1) == 1).all()):
        raise UsageError(
            f"{key} holds floats that are not one-hot, and computation trees compare labels, not real values",
            f"Give integer labels as {key}: put values into bins first (ddengine.data.discretise does)",
        )
    return rows.argmax(1, keepdim=True)

"""Labelled graphs as flat tensors under torch_geometric's names, and what their labels mean.

Letters: g graphs, n nodes, e directed edges, f node label columns, q edge label columns, k classes.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import one_hot

from ddengine.errors import UsageError, require

DISCRETISED = ("none", "quantile", "kmeans")


@dataclass(frozen=True)
class GraphSpec:
    """What graphs mean: class names in label order, and the codes of each column of node and edge labels.

    Column i of the node labels holds codes 0..node_sizes[i] - 1. A network sees a column one-hot, or through
    `node_values[i]`, a table [codes, d] of the values that the codes of a continuous column stand for
    (`discretised` says how they were made); likewise for edges. `codes_from` names what the labels are:
    "labels" that the data has, "degree" where it has none.
    """

    name: str
    classes: tuple[str, ...]
    node_sizes: tuple[int, ...]
    edge_sizes: tuple[int, ...] = ()
    node_values: tuple[Tensor | None, ...] = ()
    edge_values: tuple[Tensor | None, ...] = ()
    discretised: str = "none"
    codes_from: str = "labels"
    fingerprint: str = ""
    licence: str = ""

    def __post_init__(self) -> None:
        require(self.discretised, DISCRETISED, "discretised")
        require(self.codes_from, ("labels", "degree"), "codes_from")
        if not self.node_sizes or min((*self.node_sizes, *self.edge_sizes)) < 1:
            raise UsageError(
                f"node label columns of sizes {self.node_sizes}, edge label columns of {self.edge_sizes}",
                "Give one node label column or more, each of one code or more",
            )
        for sizes, values in ((self.node_sizes, self.node_values), (self.edge_sizes, self.edge_values)):
            if values and [None if v is None else len(v) for v in values] != [
                None if v is None else size for v, size in zip(values, sizes, strict=False)
            ]:
                raise UsageError("a table of values does not have one row for each code", "Give [codes, d]")

    @property
    def width(self) -> int:
        """Numbers of a node's feature vector."""
        return _width(self.node_sizes, self.node_values)

    @property
    def edge_width(self) -> int:
        """Numbers of an edge's feature vector; 0 where edges have no labels."""
        return _width(self.edge_sizes, self.edge_values)

    def features(self, x: Int[Tensor, "n f"]) -> Float[Tensor, "n width"]:
        """Node codes as a network sees them, float32: one-hot columns and values side by side."""
        return _features(x, self.node_sizes, self.node_values)

    def edge_features(self, attr: Int[Tensor, "e q"]) -> Float[Tensor, "e width"]:
        """Edge codes as a network sees them, float32."""
        return _features(attr, self.edge_sizes, self.edge_values)

    @property
    def preprocessing(self) -> str:
        """How continuous attributes became codes: "none", "quantile" or "kmeans"."""
        return self.discretised


def _width(sizes: Sequence[int], values: Sequence[Tensor | None]) -> int:
    return sum(
        size if v is None else v.shape[1] for size, v in zip(sizes, _padded(sizes, values), strict=True)
    )


def _padded(sizes: Sequence[int], values: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    return values or (None,) * len(sizes)


def _features(codes: Tensor, sizes: Sequence[int], values: Sequence[Tensor | None]) -> Tensor:
    columns = [
        one_hot(codes[:, i], size).float() if table is None else table.to(codes.device)[codes[:, i]].float()
        for i, (size, table) in enumerate(zip(sizes, _padded(sizes, values), strict=True))
    ]
    return torch.cat([codes.new_zeros((len(codes), 0), dtype=torch.float32), *columns], dim=1)


@dataclass(frozen=True)
class Graphs:
    """A collection of labelled graphs. Messages run from `edge_index[0]` to `edge_index[1]`.

    An undirected edge is listed both ways. `batch` says which graph a node belongs to and does not decrease;
    the nodes of a graph lie side by side, an edge stays inside its graph, and a graph has one node or more.
    """

    x: Int[Tensor, "n f"]
    edge_index: Int[Tensor, "2 e"]
    edge_attr: Int[Tensor, "e q"]
    batch: Int[Tensor, " n"]
    y: Int[Tensor, " g"]
    spec: GraphSpec

    def __post_init__(self) -> None:
        problem = graphs_problem(self)
        if problem is not None:
            raise UsageError(
                f"these are not graphs: {problem}", "Give tensors as ddengine.graphs.Graphs says"
            )

    def __len__(self) -> int:
        return len(self.y)

    @property
    def classes(self) -> Int[Tensor, " g"]:
        """The class number of each graph."""
        return self.y

    @property
    def counts(self) -> list[int]:
        """Graphs in each class, in label order."""
        return torch.bincount(self.y.cpu(), minlength=len(self.spec.classes)).tolist()

    @property
    def nodes(self) -> Int[Tensor, " g"]:
        """Nodes of each graph."""
        return torch.bincount(self.batch, minlength=len(self.y))

    @property
    def edges(self) -> Int[Tensor, " g"]:
        """Directed edges of each graph."""
        return torch.bincount(self.batch[self.edge_index[1]], minlength=len(self.y))

    @property
    def degree(self) -> Int[Tensor, " n"]:
        """Messages that each node receives."""
        return torch.bincount(self.edge_index[1], minlength=len(self.x))

    def take(self, index: Int[Tensor, " m"]) -> "Graphs":
        """The graphs at `index`, in that order; one may be taken several times."""
        index = index.to(self.y.device)
        nodes, node_of = _ranges(self.nodes, index)
        by_graph = self.batch[self.edge_index[1]].argsort(stable=True)
        listed, edge_of = _ranges(self.edges, index)
        edges = by_graph[listed]
        starts, places = _starts(self.nodes)[index], _starts(self.nodes[index])
        moved = self.edge_index[:, edges] + (places - starts)[edge_of]
        return replace(
            self,
            x=self.x[nodes],
            edge_index=moved,
            edge_attr=self.edge_attr[edges],
            batch=node_of,
            y=self.y[index],
        )

    def sorted_by_class(self) -> "Graphs":
        """The same graphs with equal classes side by side, order inside a class kept."""
        order = self.y.argsort(stable=True)
        return self if torch.equal(order, torch.arange(len(order), device=order.device)) else self.take(order)

    def to(self, device: torch.device | str) -> "Graphs":
        """The same graphs on `device`."""
        parts = ("x", "edge_index", "edge_attr", "batch", "y")
        return replace(self, **{name: getattr(self, name).to(device) for name in parts})


def joined(parts: Sequence[Graphs]) -> Graphs:
    """All graphs of `parts`, one part after the other; the spec is the first one's."""
    nodes = [0, *torch.tensor([len(part.x) for part in parts]).cumsum(0).tolist()]
    graphs = [0, *torch.tensor([len(part) for part in parts]).cumsum(0).tolist()]
    return Graphs(
        x=torch.cat([part.x for part in parts]),
        edge_index=torch.cat([part.edge_index + start for part, start in zip(parts, nodes, strict=False)], 1),
        edge_attr=torch.cat([part.edge_attr for part in parts]),
        batch=torch.cat([part.batch + start for part, start in zip(parts, graphs, strict=False)]),
        y=torch.cat([part.y for part in parts]),
        spec=parts[0].spec,
    )


def graphs_problem(graphs: Graphs) -> str | None:
    """The first rule of `Graphs` that is broken, in words; None when none is."""
    spec, n, e = graphs.spec, len(graphs.x), graphs.edge_index.shape[1]
    columns, given = (
        (len(spec.node_sizes), len(spec.edge_sizes)),
        (graphs.x.shape[1], graphs.edge_attr.shape[1]),
    )
    if len(graphs.batch) != n or len(graphs.edge_attr) != e or given != columns:
        return (
            f"{n} nodes and {e} edges do not fit batch and edge_attr, or columns {given} the spec's {columns}"
        )
    return (
        _edges_problem(graphs, n)
        or _labels_problem(graphs)
        or _codes_problem("node", graphs.x, spec.node_sizes)
        or _codes_problem("edge", graphs.edge_attr, spec.edge_sizes)
    )


def _edges_problem(graphs: Graphs, n: int) -> str | None:
    if (
        graphs.edge_index.numel()
        and not 0 <= int(graphs.edge_index.min()) <= int(graphs.edge_index.max()) < n
    ):
        return f"an edge ends outside the nodes 0..{n - 1}"
    if bool((graphs.batch[graphs.edge_index[0]] != graphs.batch[graphs.edge_index[1]]).any()):
        return "an edge joins two graphs"
    return None


def _labels_problem(graphs: Graphs) -> str | None:
    if len(graphs.batch) and (bool((graphs.batch.diff() < 0).any()) or int(graphs.batch[0]) < 0):
        return "batch decreases"
    if not torch.equal(graphs.batch.unique(), torch.arange(len(graphs.y), device=graphs.batch.device)):
        return f"batch does not give each of {len(graphs.y)} graphs a node"
    if len(graphs.y) and not 0 <= int(graphs.y.min()) <= int(graphs.y.max()) < len(graphs.spec.classes):
        return f"class labels outside 0..{len(graphs.spec.classes) - 1}"
    return None


def _codes_problem(kind: str, codes: Tensor, sizes: Sequence[int]) -> str | None:
    for column, size in enumerate(sizes):
        if len(codes) and not 0 <= int(codes[:, column].min()) <= int(codes[:, column].max()) < size:
            return f"{kind} label column {column} holds codes outside 0..{size - 1}"
    return None


def graph_fingerprint(graphs: Graphs) -> str:
    """SHA-256 over class names, labels, codes and edges as they are listed."""
    digest = hashlib.sha256("\0".join(graphs.spec.classes).encode())
    for tensor in (graphs.y, graphs.x, graphs.edge_index, graphs.edge_attr, graphs.batch):
        digest.update(str(tuple(tensor.shape)).encode())
        digest.update(tensor.to(torch.int64).contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()


def as_graph_source(graphs: Graphs) -> Graphs:
    """The graphs sorted by class, with a fingerprint of their content where their maker gave none."""
    graphs = graphs.sorted_by_class()
    if graphs.spec.fingerprint:
        return graphs
    return replace(graphs, spec=replace(graphs.spec, fingerprint=graph_fingerprint(graphs)))


def _starts(sizes: Tensor) -> Tensor:
    return sizes.cumsum(0) - sizes


def _ranges(sizes: Tensor, index: Tensor) -> tuple[Tensor, Any]:
    """Positions of the members of the groups at `index`, and the place in `index` of each."""
    chosen = sizes[index]
    of = torch.repeat_interleave(torch.arange(len(index), device=index.device), chosen)
    inside = torch.arange(len(of), device=index.device) - _starts(chosen)[of]
    return _starts(sizes)[index][of] + inside, of

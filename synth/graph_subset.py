"""Real graphs as a synthetic set: nothing is free, every node and edge is kept."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Int
from torch import Tensor

from ddengine.errors import UsageError, require
from ddengine.graphs import Graphs, GraphSpec
from ddengine.ops.dag import trees_of
from ddengine.types import label_bytes
from synth.described import pack_codebooks, with_stored_codebooks
from synth.forest import Forest
from synth.narrow import integers_problem, lengths_problem, narrow
from synth.pixels import LABEL_DTYPES, labels_problem, names_problem
from synth.schema import packed_bytes

NEEDED = {"graphs.nodes", "graphs.x", "labels"}


@dataclass(frozen=True)
class GraphSubset:
    """Copies of real graphs. Made by `GraphSubset.of`, which lists edges by their ends, then their labels."""

    kind: ClassVar[str] = "graphs"
    y_kind: ClassVar[str] = "class"

    graphs: Graphs

    @staticmethod
    def of(graphs: Graphs) -> "GraphSubset":
        """The graphs with their edges in canonical order (CPU; UsageError where there is no graph)."""
        if not len(graphs):
            raise UsageError("a set of no graphs", "Give one graph or more")
        wide = {name: getattr(graphs, name).long() for name in ("x", "edge_index", "edge_attr", "batch", "y")}
        graphs = replace(graphs, **wide, spec=with_stored_codebooks(graphs.spec)).to("cpu")
        return GraphSubset(_canonical(graphs))

    @property
    def spec(self) -> GraphSpec:
        """What the graphs mean."""
        return self.graphs.spec

    def params(self) -> dict[str, Tensor]:
        """The free tensors: none."""
        return {}

    def replace(self, params: Mapping[str, Tensor]) -> "GraphSubset":
        """The set itself (UsageError for any tensor, since none is free)."""
        for name in params:
            require(name, self.params(), "free tensor")
        return self

    def decode(self, indices: Int[Tensor, " n"] | None = None) -> Graphs:
        """The graphs (all, or at `indices`)."""
        return self.graphs if indices is None else self.graphs.take(indices)

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes of what `pack` gives, by part: images (none), trees (the graphs), labels, extras, total."""
        return packed_bytes(self.pack(), self.kind)

    def pack(self) -> dict[str, Tensor]:
        """The stored tensors (CPU), whole numbers as narrow as they fit, what is empty left out.

        Ends of edges are places in their graph. Where each edge is there both ways, "graphs.edges" lists it
        once, with the smaller end first; else "graphs.arcs" lists every direction, source first.
        """
        graphs = self.graphs
        name, kept = ("edges", _forward(graphs)) if _symmetric(graphs) else ("arcs", slice(None))
        ends, of = graphs.edge_index[:, kept], graphs.batch[graphs.edge_index[0, kept]]
        stored = {
            "graphs.nodes": graphs.nodes,
            "graphs.x": graphs.x,
            f"graphs.{name}": ends - _starts(graphs.nodes)[of],
            "graphs.labels": graphs.edge_attr[kept],
        }
        if len(of):
            stored["graphs.edges_per"] = torch.bincount(of, minlength=len(graphs))
        packed = {name: narrow(values) for name, values in stored.items() if values.numel()}
        labels = graphs.y.to(LABEL_DTYPES[label_bytes(len(self.spec.classes))], copy=True)
        return packed | {"labels": labels} | pack_codebooks(self.spec)

    @staticmethod
    def unpack(tensors: Mapping[str, Tensor], fields: Mapping[str, Any], spec: GraphSpec) -> "GraphSubset":
        """The set from its stored tensors; no manifest field is needed."""
        nodes, ends, per, labels = _restored(tensors, spec)
        of = torch.arange(len(nodes)).repeat_interleave(per)
        ends = ends + _starts(nodes)[of]
        if "graphs.arcs" not in tensors:
            backward = ends[0] != ends[1]
            ends = torch.cat([ends, ends[:, backward].flip(0)], 1)
            labels = torch.cat([labels, labels[backward]])
        batch = torch.arange(len(nodes)).repeat_interleave(nodes)
        y = tensors["labels"].long()
        return GraphSubset(_canonical(Graphs(tensors["graphs.x"].long(), ends, labels, batch, y, spec)))

    @staticmethod
    def problem(tensors: Mapping[str, Tensor], y_kind: str, spec: GraphSpec) -> str | None:
        """The first thing that is wrong with stored tensors (without codebooks), in words; else None."""
        columns = _columns(tensors, spec)
        wrong = (
            (None if y_kind == "class" else f"real graphs have class labels, not {y_kind!r}")
            or names_problem(tensors, NEEDED, set(columns) - NEEDED)
            or integers_problem(tensors, columns)
            or _layout_problem(tensors, spec)
            or labels_problem(tensors["labels"], len(tensors["graphs.nodes"]), y_kind, len(spec.classes))
        )
        if wrong is not None:
            return wrong
        try:
            GraphSubset.unpack(tensors, {}, spec)
        except UsageError as error:
            return error.cause
        return None


def stored_graphs(graphs: Graphs, hops: int, degree: bool) -> Forest | GraphSubset:
    """Real graphs in the form of fewer bytes: as they are, or as their trees of `hops` levels.

    `degree` tells degrees apart in the trees, as GCN needs. Of equal bytes the graphs are kept as they are,
    since they suit networks of any depth.
    """
    trees, whole = Forest.of(trees_of(graphs, hops, degree=degree)), GraphSubset.of(graphs)
    return trees if trees.nbytes["total"] < whole.nbytes["total"] else whole


def _starts(sizes: Tensor) -> Tensor:
    return sizes.cumsum(0) - sizes


def _order(keys: Sequence[Tensor]) -> Tensor:
    """The order that sorts by the first key, then by the second, and so on."""
    order = torch.arange(len(keys[0]))
    for key in reversed(keys):
        order = order[key[order].argsort(stable=True)]
    return order


def _canonical(graphs: Graphs) -> Graphs:
    """The same graphs with edges sorted by source, target and label."""
    order = _order([*graphs.edge_index, *graphs.edge_attr.T])
    return replace(graphs, edge_index=graphs.edge_index[:, order], edge_attr=graphs.edge_attr[order])


def _forward(graphs: Graphs) -> Tensor:
    return graphs.edge_index[0] <= graphs.edge_index[1]


def _symmetric(graphs: Graphs) -> bool:
    """Whether every edge of these canonical graphs is there both ways, with one label and as often."""
    turned = _canonical(replace(graphs, edge_index=graphs.edge_index.flip(0)))
    same = torch.equal(turned.edge_index, graphs.edge_index)
    return same and torch.equal(turned.edge_attr, graphs.edge_attr)


def _columns(tensors: Mapping[str, Tensor], spec: GraphSpec) -> dict[str, int | None]:
    """The whole numbers of stored graphs, with edges listed once or both ways: None for a vector."""
    name = "graphs.arcs" if "graphs.arcs" in tensors else "graphs.edges"
    ends = tensors[name].shape[-1] if name in tensors and tensors[name].ndim else 1
    columns = {"graphs.nodes": None, "graphs.x": len(spec.node_sizes), "graphs.edges_per": None, name: ends}
    return {**columns, "graphs.labels": len(spec.edge_sizes)} if spec.edge_sizes else columns


def _restored(tensors: Mapping[str, Tensor], spec: GraphSpec) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Nodes of each graph, the stored ends, stored edges of each graph and their labels, as int64."""
    nodes, nothing = tensors["graphs.nodes"].long(), torch.zeros((2, 0), dtype=torch.int64)
    ends = tensors.get("graphs.arcs", tensors.get("graphs.edges", nothing)).long()
    per = tensors.get("graphs.edges_per", torch.zeros_like(nodes)).long()
    labels = tensors.get("graphs.labels", ends.new_zeros((0 if spec.edge_sizes else ends.shape[1], 0)))
    return nodes, ends, per, labels.long().reshape(len(labels), len(spec.edge_sizes))


def _layout_problem(tensors: Mapping[str, Tensor], spec: GraphSpec) -> str | None:
    """What does not fit together in the lengths of tensors, and ends of edges outside their graph."""
    listed = tensors.get("graphs.arcs", tensors.get("graphs.edges"))
    if listed is not None and len(listed) != 2:
        return f"edges are listed in {len(listed)} rows, not in 2"
    nodes, ends, per, labels = _restored(tensors, spec)
    lengths = {"graphs.x": int(nodes.sum()), "graphs.edges_per": len(nodes), "graphs.labels": ends.shape[1]}
    if wrong := lengths_problem(tensors, lengths):
        return wrong
    if int(per.sum()) != ends.shape[1] or len(labels) != ends.shape[1]:
        return f"edges of each graph add up to {int(per.sum())}: {ends.shape[1]} ends, {len(labels)} labels"
    if bool((ends >= nodes.repeat_interleave(per)).any()):
        return "an edge ends outside the nodes of its graph"
    falls = "graphs.edges" in tensors and bool((ends[0] > ends[1]).any())
    return "graphs.edges lists an edge with its larger end first" if falls else None

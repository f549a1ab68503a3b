"""The colour DAG: all computation trees of a collection of graphs, each distinct one stored once.

A level-l colour has a pointer to its own colour one level below and one sparse row of (child colour, edge
label, multiplicity). Whatever a message-passing network of l layers computes at a node is a function of the
node's level-l colour, so it is computed once for each colour (Gupta et al., Mirage, ICLR 2024; lifting and
exact compression: arXiv 2007.06567, 2304.14793).
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.sparse import csr_array
from torch import Tensor

from ddengine.errors import UsageError, require_positive
from ddengine.graphs import Graphs, GraphSpec
from ddengine.ops.refinement import as_codes, color_refinement, row_ids


@dataclass(frozen=True)
class Level:
    """One level above the first: c colours, r entries sorted by `row`.

    Entry i says that colour `row[i]` receives `times[i]` >= 1 messages from nodes of the colour `child[i]`
    one level below, over edges with row `edge[i]` of the DAG's table of edge labels. `own[c]` is the colour
    that nodes of colour c have one level below.
    """

    own: Int[Tensor, " c"]
    row: Int[Tensor, " r"]
    child: Int[Tensor, " r"]
    edge: Int[Tensor, " r"]
    times: Int[Tensor, " r"]


@dataclass(frozen=True)
class ColorDAG:
    """Colours of levels 0..hops. `x` are the node codes of level 0, `edge_attr` the distinct edge labels.

    `degree` [c0] is there when the first colours tell degrees apart, as the symmetric norm of GCN needs.
    """

    x: Int[Tensor, "c f"]
    degree: Int[Tensor, " c"] | None
    edge_attr: Int[Tensor, "t q"]
    levels: tuple[Level, ...]

    @property
    def hops(self) -> int:
        """Levels above the first: the most layers that a network may have."""
        return len(self.levels)

    @property
    def sizes(self) -> list[int]:
        """Colours of each level."""
        return [len(self.x), *(len(level.own) for level in self.levels)]


@dataclass(frozen=True)
class Trees:
    """Items, each a multiset of top-level colours of a DAG: what networks train on and are scored on.

    Entry i (sorted by `item`) says that item `item[i]` has `count[i]` > 0 nodes of colour `color[i]`. `y`
    holds class numbers [m] (`y_kind` "class") or probabilities [m k] ("prob"); `weight` [m] > 0 is an item's
    weight in a training loss.
    """

    dag: ColorDAG
    item: Int[Tensor, " z"]
    color: Int[Tensor, " z"]
    count: Int[Tensor, " z"]
    y: Int[Tensor, " m"] | Float[Tensor, "m k"]
    weight: Float[Tensor, " m"]
    spec: GraphSpec
    y_kind: str = "class"

    def __len__(self) -> int:
        return len(self.y)

    @property
    def classes(self) -> Int[Tensor, " m"]:
        """Hard class of each item: the label, or the largest soft label."""
        return self.y if self.y_kind == "class" else self.y.argmax(1)


def trees_of(graphs: Graphs, hops: int, *, degree: bool = False, check: bool = False) -> Trees:
    """The graphs as items over one DAG of their trees of `hops` levels: counts of nodes, y, weights of one.

    `degree` tells in-degrees apart at level 0; `check` verifies the colours exactly. Tensors are on the CPU.
    Raises UsageError for negative hops.
    """
    ends = as_codes(graphs.edge_index)
    coloring = color_refinement(graphs.x, ends, graphs.edge_attr, hops=hops, degree=degree, check=check)
    degrees = as_codes(graphs.degree)[coloring.representatives[0]] if degree else None
    table, labels = _edge_table(as_codes(graphs.edge_attr))
    pairs = zip(coloring.colors, coloring.colors[1:], coloring.representatives[1:], strict=False)
    levels = [
        _level(below[nodes], _received(nodes, ends[1], len(colors)), below[ends[0]], labels)
        for below, colors, nodes in pairs
    ]
    dag = _dag(as_codes(graphs.x)[coloring.representatives[0]], degrees, table, levels)
    return _items(dag, graphs, coloring.colors[-1])


def node_trees(graphs: Graphs, hops: int, *, degree: bool = False) -> Trees:
    """The same items with every node as a colour of its own at every level: the computation node by node.

    Raises UsageError for negative hops.
    """
    require_positive("hops", hops, zero=True)
    nodes, ends = np.arange(len(graphs.x)), as_codes(graphs.edge_index)
    table, labels = _edge_table(as_codes(graphs.edge_attr))
    level = _level(nodes, ends[1], ends[0], labels)
    dag = _dag(as_codes(graphs.x), as_codes(graphs.degree) if degree else None, table, [level] * hops)
    return _items(dag, graphs, nodes)


def take(trees: Trees, index: Int[Tensor, " s"]) -> Trees:
    """The items at `index`, in that order; one may be taken several times. The DAG stays as it is."""
    index = index.cpu()
    found = _matrix(trees, np.int64)[index.numpy()]
    return replace(trees, **_entries(found), y=trees.y[index], weight=trees.weight[index])


def closed(trees: Trees) -> Trees:
    """The same items over the colours and edge labels that they use, renumbered in their old order."""
    dag = trees.dag
    used = _used(dag, trees.color)
    rows = [mask[level.row] for level, mask in zip(dag.levels, used[1:], strict=True)]
    edges = torch.zeros(len(dag.edge_attr), dtype=torch.bool)
    for level, kept in zip(dag.levels, rows, strict=True):
        edges[level.edge[kept]] = True
    ids, edge_ids = [mask.cumsum(0) - 1 for mask in used], edges.cumsum(0) - 1
    levels = tuple(
        Level(
            own=ids[i][level.own[used[i + 1]]],
            row=ids[i + 1][level.row[kept]],
            child=ids[i][level.child[kept]],
            edge=edge_ids[level.edge[kept]],
            times=level.times[kept],
        )
        for i, (level, kept) in enumerate(zip(dag.levels, rows, strict=True))
    )
    degree = None if dag.degree is None else dag.degree[used[0]]
    dag = ColorDAG(dag.x[used[0]], degree, dag.edge_attr[edges], levels)
    return replace(trees, dag=dag, color=ids[-1][trees.color])


def lowered(trees: Trees, level: int) -> Trees:
    """The same items with trees cut to `level` levels, counts of colours that become one added.

    Raises UsageError for a level that the DAG does not have.
    """
    if not 0 <= level <= trees.dag.hops:
        raise UsageError(
            f"level {level} of a DAG with levels 0..{trees.dag.hops}", f"Give a level in 0..{trees.dag.hops}"
        )
    color = trees.color
    for above in reversed(trees.dag.levels[level:]):
        color = above.own[color]
    cut = replace(trees, dag=replace(trees.dag, levels=trees.dag.levels[:level]), color=color)
    return replace(cut, **_entries(_matrix(cut, np.int64)))


def histogram(trees: Trees) -> csr_array:
    """How often each item has each colour of the top level: float64 [m, colours]."""
    return _matrix(trees, np.float64)


def level_counts(trees: Trees) -> tuple[Int[Tensor, " _"], ...]:
    """For each level the nodes of each of its colours, over all items."""
    top = torch.zeros(trees.dag.sizes[-1], dtype=torch.int64).index_add(0, trees.color, trees.count)
    counts = [top]
    for level, size in zip(reversed(trees.dag.levels), trees.dag.sizes[-2::-1], strict=True):
        counts.append(torch.zeros(size, dtype=torch.int64).index_add(0, level.own, counts[-1]))
    return tuple(reversed(counts))


def dag_problem(dag: ColorDAG) -> str | None:
    """The first rule of `ColorDAG` that is broken, in words; None when none is."""
    if dag.degree is not None and (len(dag.degree) != len(dag.x) or bool((dag.degree < 0).any())):
        return "degree does not give each first colour a number >= 0"
    degree = dag.degree
    for number, (level, below) in enumerate(zip(dag.levels, dag.sizes, strict=False), start=1):
        problem = _level_problem(level, below, len(dag.edge_attr))
        if problem is not None:
            return f"level {number}: {problem}"
        if degree is not None:
            degree = degree[level.own]
            received = torch.zeros_like(degree).index_add(0, level.row, level.times)
            if not torch.equal(received, degree):
                return f"level {number}: a colour's messages are not as many as its degree"
    return None


def trees_problem(trees: Trees) -> str | None:
    """The first rule of `Trees` or of its DAG that is broken, in words; None when none is."""
    items, sizes = len(trees.y), trees.dag.sizes
    if not len(trees.item) == len(trees.color) == len(trees.count):
        return "item, color and count differ in length"
    if not _in_range(trees.item, items) or bool((trees.item.diff() < 0).any()):
        return f"item decreases or leaves 0..{items - 1}"
    if not _in_range(trees.color, sizes[-1]):
        return f"a colour of an item is outside 0..{sizes[-1] - 1}"
    if bool((trees.count < 1).any()):
        return "a count is below 1"
    if len(trees.item.unique()) != items:
        return "an item has no node"
    return dag_problem(trees.dag) or _labels_problem(trees)


def _edge_table(attr: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct rows of edge codes in sorted order and the row of each edge; one empty row without columns."""
    if not attr.shape[1]:
        return np.zeros((1, 0), np.int64), np.zeros(len(attr), np.int64)
    ids, firsts = row_ids(attr)
    order = np.lexsort(attr[firsts].T[::-1])
    return attr[firsts][order], np.argsort(order)[ids]


def _received(nodes: np.ndarray, target: np.ndarray, n: int) -> np.ndarray:
    """For each edge the place in `nodes` of the node that it ends at, or -1."""
    place = np.full(n, -1)
    place[nodes] = np.arange(len(nodes))
    return place[target]


def _level(own: np.ndarray, row: np.ndarray, child: np.ndarray, edge: np.ndarray) -> Level:
    """The level of these messages, those with row -1 left out, equal ones counted."""
    kept = row >= 0
    children, edges = int(child.max(initial=0)) + 1, int(edge.max(initial=0)) + 1
    keys, times = np.unique((row[kept] * children + child[kept]) * edges + edge[kept], return_counts=True)
    pairs, edge = np.divmod(keys, edges)
    return Level(*map(torch.from_numpy, (own, *np.divmod(pairs, children), edge, times)))


def _dag(x: np.ndarray, degree: np.ndarray | None, table: np.ndarray, levels: list[Level]) -> ColorDAG:
    numbers = None if degree is None else torch.from_numpy(degree)
    return ColorDAG(torch.from_numpy(x), numbers, torch.from_numpy(table), tuple(levels))


def _items(dag: ColorDAG, graphs: Graphs, color: np.ndarray) -> Trees:
    """One item for each graph, of the colours of its nodes."""
    colors, ones = torch.from_numpy(color), torch.ones(len(color), dtype=torch.int64)
    trees = Trees(dag, graphs.batch.cpu(), colors, ones, graphs.y.cpu(), torch.ones(len(graphs)), graphs.spec)
    return replace(trees, **_entries(_matrix(trees, np.int64)))


def _matrix(trees: Trees, dtype: type) -> csr_array:
    where = (trees.item.numpy(), trees.color.numpy())
    return csr_array((trees.count.numpy().astype(dtype), where), shape=(len(trees), trees.dag.sizes[-1]))


def _entries(counts: csr_array) -> dict[str, Any]:
    """The fields item, color and count that a matrix of counts [items, colours] stands for."""
    item = np.repeat(np.arange(counts.shape[0]), np.diff(counts.indptr))
    found = {"item": item, "color": counts.indices, "count": counts.data}
    return {name: torch.from_numpy(values.astype(np.int64)) for name, values in found.items()}


def _used(dag: ColorDAG, color: Tensor) -> list[Tensor]:
    """For each level which colours these top-level ones need."""
    used = [torch.zeros(size, dtype=torch.bool) for size in dag.sizes]
    used[-1][color] = True
    for i, level in reversed(list(enumerate(dag.levels))):
        used[i][level.own[used[i + 1]]] = True
        used[i][level.child[used[i + 1][level.row]]] = True
    return used


def _in_range(values: Tensor, size: int) -> bool:
    return not len(values) or 0 <= int(values.min()) <= int(values.max()) < size


def _sums_to_one(y: Tensor) -> bool:
    return bool(((y.double().sum(1) - 1).abs() < 1e-3).all())  # soft labels may be stored in 16 bits


def _level_problem(level: Level, below: int, edges: int) -> str | None:
    if not len(level.row) == len(level.child) == len(level.edge) == len(level.times):
        return "row, child, edge and times differ in length"
    if not _in_range(level.row, len(level.own)) or bool((level.row.diff() < 0).any()):
        return f"row decreases or leaves 0..{len(level.own) - 1}"
    for name, values, size in (
        ("own", level.own, below), ("child", level.child, below), ("edge", level.edge, edges)
    ):  # fmt: skip
        if not _in_range(values, size):
            return f"{name} is outside 0..{size - 1}"
    return "times is below 1 somewhere" if bool((level.times < 1).any()) else None


def _labels_problem(trees: Trees) -> str | None:
    """What is wrong with y, weights and codes beside the spec."""
    spec, y, classes = trees.spec, trees.y, len(trees.spec.classes)
    if len(trees.weight) != len(y) or not bool(((trees.weight > 0) & trees.weight.isfinite()).all()):
        return "weight does not give each item a finite number > 0"
    if trees.y_kind == "class" and not (y.ndim == 1 and _in_range(y, classes)):
        return f"class labels outside 0..{classes - 1}"
    if trees.y_kind == "prob" and not (
        y.shape[1:] == (classes,) and bool((y >= 0).all()) and _sums_to_one(y)
    ):
        return f"labels are not probabilities of {classes} classes"
    for kind, codes, sizes in (
        ("node", trees.dag.x, spec.node_sizes), ("edge", trees.dag.edge_attr, spec.edge_sizes)
    ):  # fmt: skip
        if codes.shape[1:] != (len(sizes),) or bool(((codes < 0) | (codes >= torch.tensor(sizes))).any()):
            return f"{kind} codes do not fit columns of sizes {sizes}"
    return None

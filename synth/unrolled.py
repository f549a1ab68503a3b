"""Computation trees written out: each item of a colour DAG as an explicit forest of rooted trees.

An unrolled tree is the breadth-first unrolling of message passing around one node (Gupta et al., Mirage,
ICLR 2024, arXiv 2310.09486): what a network of at most `hops` layers computes at its root is what it computes
at the node. The symmetric norm of GCN is the exception: it reads degrees, and a leaf has lost its own.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from ddengine.errors import UsageError, require_positive
from ddengine.ops.dag import ColorDAG, Level, Trees, closed, take

if TYPE_CHECKING:
    from torch_geometric.data import Data

LIMIT = 100_000  # nodes: some 5 MB of tensors; a set of dense graphs unrolls to 10^9 nodes at four hops
SAID_EXACTLY = 10**15  # larger counts are named by their order of magnitude


@dataclass(frozen=True)
class Unrolled:
    """Explicit trees. `edge_index` runs from child to parent, the way of the messages.

    `root` marks the roots and `depth` is the distance from them (0..hops). `batch` is the place of a node's
    item among the items that were unrolled and does not decrease; inside an item, depth does not decrease.
    """

    x: Int[Tensor, "n f"]
    edge_index: Int[Tensor, "2 e"]
    edge_attr: Int[Tensor, "e q"]
    root: Bool[Tensor, " n"]
    depth: Int[Tensor, " n"]
    batch: Int[Tensor, " n"]


def unroll_trees(trees: Trees, items: Int[Tensor, " i"] | None = None, *, limit: int = LIMIT) -> Unrolled:
    """The trees of the items at `items` (all by default, in that order), each as often as it is counted.

    Raises UsageError when they have more than `limit` nodes in all, before anything is built, and for an item
    that is not in 0..m - 1.
    """
    require_positive("limit", limit)
    trees = closed(trees if items is None else _taken(trees, items))
    _require_few(trees, limit)
    color, batch = (part.repeat_interleave(trees.count) for part in (trees.color, trees.item))
    return _grow(trees.dag, color, batch)


def to_pyg(trees: Trees, *, limit: int = LIMIT) -> "list[Data]":
    """Each item as a `torch_geometric.data.Data` of x, edge_index, edge_attr, y, root and weight (CPU).

    `x` and `edge_attr` hold codes, int64; `root` is the mask of the rows to pool. `y` is [1], or [1 k] for
    probabilities, and `weight` [1], so that batches stack them. Raises UsageError as `unroll_trees` does, and
    when torch_geometric is missing.
    """
    data = _torch_geometric()
    forest = unroll_trees(trees, limit=limit)
    nodes = torch.bincount(forest.batch, minlength=len(trees)).tolist()
    edges = torch.bincount(forest.batch[forest.edge_index[1]], minlength=len(trees)).tolist()
    starts = torch.tensor([0, *nodes]).cumsum(0)[:-1].tolist()
    columns = (
        forest.x.split(nodes),
        forest.root.split(nodes),
        forest.edge_index.split(edges, 1),
        forest.edge_attr.split(edges),
    )
    return [
        data.Data(x, index - start, attr, y=trees.y[[i]], root=root, weight=trees.weight[[i]])
        for i, (start, x, root, index, attr) in enumerate(zip(starts, *columns, strict=True))
    ]


def _torch_geometric() -> Any:
    try:
        from torch_geometric import data
    except ImportError as error:
        raise UsageError(
            f"torch_geometric cannot be imported: {error}", 'Run: pip install "ddengine[graph]"'
        ) from error
    return data


def subtree_sizes(dag: ColorDAG, *, merged: bool = False) -> list[np.ndarray]:
    """Nodes of the unrolled tree of each colour, level by level from 0: exact Python integers.

    With `merged`, equal children under one parent count once, as when they are drawn with a multiplicity.
    """
    sizes = [np.ones(len(dag.x), object)]
    for level in dag.levels:
        found = np.ones(len(level.own), object)
        row, child, times = (part.numpy() for part in (level.row, level.child, level.times))
        below = sizes[-1][child]
        np.add.at(found, row, below if merged else below * times)
        sizes.append(found)
    return sizes


def _taken(trees: Trees, items: Tensor) -> Trees:
    if len(items) and not 0 <= int(items.min()) <= int(items.max()) < len(trees):
        raise UsageError(
            f"items {items.tolist()[:10]} are not all in 0..{len(trees) - 1}", "Name items of the set"
        )
    return take(trees, items)


def _require_few(trees: Trees, limit: int) -> None:
    sizes = subtree_sizes(trees.dag)[-1][trees.color.numpy()]
    total = int((sizes * trees.count.numpy()).sum())
    if total > limit:
        said = str(total) if total < SAID_EXACTLY else f"about 10^{math.floor(math.log10(total))}"
        raise UsageError(
            f"these trees unroll to {said} nodes, more than limit={limit}",
            "Unroll fewer items or fewer hops, or raise limit",
        )


def _grow(dag: ColorDAG, color: Tensor, batch: Tensor) -> Unrolled:
    """The trees of the top-level colours `color`, grown from the roots down, then sorted by item."""
    first = first_colors(dag)
    rows, batches, edges, parents = [first[-1][color]], [batch], [color[:0]], [color[:0]]
    start = 0
    for below, level in zip(reversed(first[:-1]), reversed(dag.levels), strict=True):
        color, edge, parent = _children(level, color)
        rows.append(below[color])
        batches.append(batches[-1][parent])
        edges.append(edge)
        parents.append(start + parent)
        start += len(rows[-2])
    depth = torch.arange(len(rows))
    depth = depth.repeat_interleave(torch.tensor([len(row) for row in rows]))
    return _sorted(dag, torch.cat(rows), torch.cat(edges), torch.cat(parents), depth, torch.cat(batches))


def first_colors(dag: ColorDAG) -> list[Tensor]:
    """The level-0 colour of each colour, level by level."""
    first = [torch.arange(len(dag.x))]
    for level in dag.levels:
        first.append(first[-1][level.own])
    return first


def _children(level: Level, color: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Colour, edge label and parent (its place in `color`) of each child, equal children one by one."""
    entries = torch.bincount(level.row, minlength=len(level.own))
    starts, many = (entries.cumsum(0) - entries)[color], entries[color]
    parent = torch.arange(len(color)).repeat_interleave(many)
    entry = torch.arange(len(parent)) + (starts - many.cumsum(0) + many)[parent]
    entry, parent = (part.repeat_interleave(level.times[entry]) for part in (entry, parent))
    return level.child[entry], level.edge[entry], parent


def _sorted(
    dag: ColorDAG, rows: Tensor, edges: Tensor, parents: Tensor, depth: Tensor, batch: Tensor
) -> Unrolled:
    """The nodes by item, and by depth inside an item; each but a root has one edge, to its parent."""
    order = batch.argsort(stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    below = order[depth[order] > 0]
    of_edge = below - (len(order) - len(edges))  # roots come first in the order of growth
    return Unrolled(
        x=dag.x[rows[order]],
        edge_index=torch.stack([place[below], place[parents[of_edge]]]),
        edge_attr=dag.edge_attr[edges[of_edge]],
        root=depth[order] == 0,
        depth=depth[order],
        batch=batch[order],
    )

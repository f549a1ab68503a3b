"""Drawings of computation trees and of small graphs, as coordinates: nothing is rendered here."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from scipy.sparse import coo_array, csgraph

from ddengine.graphs import Graphs
from ddengine.ops.dag import ColorDAG, Trees
from synth.unrolled import first_colors, subtree_sizes

TREES_MAX = 4  # of an item
TREE_NODES, BRANCHES = 40, 10  # a larger tree is cut to its root and the most frequent children
GRAPH_NODES = 60  # a larger graph is only counted
# Pairs of eigenvectors: one start crosses edges in 12 of 94 graphs of MUTAG, five in 4, these in none.
STARTS = ((1, 2), (1, 3), (2, 3), (1, 4), (2, 4), (3, 4), (1, 5), (2, 5), (1, 6))
ROUNDS = 60  # of stress majorisation: molecules of 60 nodes have settled by then
TREE_CELL, GRAPH_CELL = (236, 170), (176, 176)  # pixels
GAP, HEAD = 8, 32
STAGGER = 20  # pixels between leaves, below which texts under them take two lines
TIMES_SIZE = 8  # of the text that says how often a branch is there: it may lie on a line
INK, SOFT = "#1b1c1e", "#63666b"

Number = float | int
Mark = tuple[Number, Number, str, int, str, str]  # x, y, text, size, colour, side ("left", "center", "right")
Box = tuple[Number, Number, Number, Number]  # x, y, width, height


@dataclass(frozen=True)
class Sketch:
    """What is drawn: nodes (x, y, code), lines (x, y, x, y), texts and boxes; pixels right and down."""

    nodes: Float[np.ndarray, "v 3"]
    lines: Float[np.ndarray, "w 4"]
    marks: tuple[Mark, ...] = ()
    boxes: tuple[Box, ...] = ()

    def moved(self, dx: Number, dy: Number) -> "Sketch":
        """The same, `dx` further to the right and `dy` further down."""
        return Sketch(
            self.nodes + np.array([dx, dy, 0]),
            self.lines + np.array([dx, dy, dx, dy]),
            tuple((mark[0] + dx, mark[1] + dy, *mark[2:]) for mark in self.marks),
            tuple((x + dx, y + dy, w, h) for x, y, w, h in self.boxes),
        )


def joined(parts: Sequence[Sketch]) -> Sketch:
    """All of `parts` in one."""
    return Sketch(
        np.concatenate([np.empty((0, 3)), *(part.nodes for part in parts)]),
        np.concatenate([np.empty((0, 4)), *(part.lines for part in parts)]),
        tuple(mark for part in parts for mark in part.marks),
        tuple(box for part in parts for box in part.boxes),
    )


def texts(*marks: Mark, boxes: tuple[Box, ...] = ()) -> Sketch:
    """A sketch of texts, on boxes."""
    return Sketch(np.empty((0, 3)), np.empty((0, 4)), marks, boxes)


def number(many: Any, one: str, several: str = "") -> str:
    """A count with its noun."""
    return f"{int(many):,} {one if int(many) == 1 else several or one + 's'}"


def _head(title: str, said: str, cell: tuple[int, int]) -> Sketch:
    marks: tuple[Mark, Mark] = (8.0, 10.0, title, 11, INK, "left"), (8.0, 24.0, said, 9, SOFT, "left")
    return texts(*marks, boxes=((0, 0, *cell),))


@dataclass(frozen=True)
class _Rows:
    """A colour DAG level by level: code and drawn size of each colour, and the rows of its children."""

    code: list[np.ndarray]
    size: list[np.ndarray]
    starts: list[np.ndarray]
    entries: list[np.ndarray]  # [r 3]: child, edge, times

    def branches(self, level: int, color: int) -> list[tuple[int, int]]:
        """(child, times) for each row of a colour above level 0, in the order of codes."""
        low, high = self.starts[level - 1][color : color + 2]
        rows, code = self.entries[level - 1][low:high].tolist(), self.code[level - 1]
        rows.sort(key=lambda row: (code[row[0]], row[1], -row[2], row[0]))
        return [(child, times) for child, _, times in rows]


def _rows(dag: ColorDAG, codes: np.ndarray) -> _Rows:
    return _Rows(
        [codes[first.numpy()] for first in first_colors(dag)],
        subtree_sizes(dag, merged=True),
        [np.searchsorted(level.row.numpy(), np.arange(len(level.own) + 1)) for level in dag.levels],
        [np.stack([level.child, level.edge, level.times], 1) for level in dag.levels],
    )


def tree_cells(trees: Trees, codes: Int[np.ndarray, " c"], names: Sequence[int]) -> Iterator[Sketch]:
    """A box for each item: its most frequent trees, roots on top, equal branches drawn once.

    `codes` says what is drawn for each level-0 colour, `names` are the numbers that the items are called by.
    """
    rows, uneven = _rows(trees.dag, codes), len(trees.weight.unique()) > 1
    item, color, count = (part.numpy() for part in (trees.item, trees.color, trees.count))
    for i, name in enumerate(names):
        inside = slice(*np.searchsorted(item, [i, i + 1]))
        order = np.lexsort((color[inside], -count[inside]))
        shown = list(zip(color[inside][order].tolist(), count[inside][order].tolist(), strict=True))
        title = f"item {name}, weight {float(trees.weight[i]):.3g}" if uneven else f"item {name}"
        said = f"{number(count[inside].sum(), 'tree')}, {len(shown):,} distinct"
        if trees.y_kind == "prob":
            said = f"label {100 * float(trees.y[i].max()):.0f} %, {said}"
        yield joined([_head(title, said, TREE_CELL), *_side_by_side(rows, shown)])


def _side_by_side(rows: _Rows, shown: list[tuple[int, int]]) -> Iterator[Sketch]:
    """The first of `shown` (colour, count), as many as are legible, over the width of a cell."""
    width, height = TREE_CELL[0] - 2 * GAP, TREE_CELL[1] - HEAD - 58
    grown = [_grown(rows, color) for color, _ in shown[:TREES_MAX]]
    leaves = [max(2.2, nodes[:, 0].max() + 1.6) for nodes in grown]
    fits = max(1, sum(total * 12 <= width for total in np.cumsum(leaves)))
    across = min(24.0, width / sum(leaves[:fits]))
    deep = max(nodes[:, 1].max() for nodes in grown[:fits])
    down = min(38.0, height / max(1, deep))
    top = HEAD + 14 + (height - down * deep) / 2
    x = GAP + (width - across * sum(leaves[:fits])) / 2
    for nodes, wide, (color, count) in zip(grown[:fits], leaves, shown, strict=False):
        middle = x + across * wide / 2
        cut = rows.size[-1][color] > TREE_NODES
        left = middle - across * nodes[:, 0].max() / 2
        yield _tree(nodes, across, down, cut).moved(left, top)
        yield texts((middle, top + down * deep + 38, _times(count), 11, INK, "center"))
        x += across * wide


def _times(many: Number) -> str:
    return f"\N{MULTIPLICATION SIGN}{many:,.0f}"


def _grown(rows: _Rows, color: int) -> np.ndarray:
    """The nodes of a top-level colour's tree, parents first: x in leaves, depth, code, parent, times."""
    nodes: list[list[Number]] = []
    top = len(rows.starts)
    cut = rows.size[top][color] > TREE_NODES
    _grow(rows, top, color, top - 1 if cut else 0, nodes, (0, -1, 1))
    return np.array(nodes, float)


def _grow(
    rows: _Rows, level: int, color: int, last: int, nodes: list[list[Number]], place: tuple[int, int, int]
) -> None:
    """Append a subtree down to level `last`; `place` is (depth, parent, times) of its root."""
    depth, parent, times = place
    me = len(nodes)
    nodes.append([-1, depth, int(rows.code[level][color]), parent, times])
    branches = rows.branches(level, color) if level > last else []
    if len(branches) > BRANCHES and rows.size[level][color] > TREE_NODES:
        branches = sorted(sorted(branches, key=lambda branch: -branch[1])[:BRANCHES], key=branches.index)
    for child, many in branches:
        _grow(rows, level - 1, child, last, nodes, (depth + 1, me, many))
    xs = [node[0] for node in nodes if node[3] == me]
    nodes[me][0] = (xs[0] + xs[-1]) / 2 if xs else int(max(node[0] for node in nodes)) + 1


def _tree(nodes: np.ndarray, across: Number, down: Number, cut: bool) -> Sketch:
    """A grown tree in pixels, its first leaf at the left edge and its root at the top."""
    x, y = nodes[:, 0] * across, nodes[:, 1] * down
    child = np.flatnonzero(nodes[:, 3] >= 0)
    parent = nodes[child, 3].astype(int)
    lines = np.stack([x[parent], y[parent], x[child], y[child]], 1)
    many = child[nodes[child, 4] > 1]
    odd = (nodes[:, 1] == nodes[:, 1].max()) & (nodes[:, 0] % 2 == 1) & (across < STAGGER)
    below = y + 12 + 9 * odd
    marks: list[Mark] = [
        (float(x[i]), float(below[i]), _times(nodes[i, 4]), TIMES_SIZE, SOFT, "center") for i in many
    ]
    if cut:
        marks.append((float(x.max() / 2), float(y.max() + 24), "…", 14, INK, "center"))
    return Sketch(np.stack([x, y, nodes[:, 2]], 1), lines, tuple(marks))


def graph_cells(graphs: Graphs, codes: Int[np.ndarray, " n"], names: Sequence[int]) -> Iterator[Sketch]:
    """A box for each graph; `codes` says what is drawn for each node, `names` number the graphs."""
    pairs = np.unique(np.sort(graphs.edge_index.cpu().numpy().T, 1), axis=0)
    pairs = pairs[pairs[:, 0] < pairs[:, 1]]
    starts = np.concatenate([[0], graphs.nodes.cpu().numpy().cumsum()])
    for name, low, high in zip(names, starts, starts[1:], strict=False):
        inside = pairs[(pairs[:, 0] >= low) & (pairs[:, 0] < high)] - low
        said = f"{number(high - low, 'node')}, {number(len(inside), 'edge')}"
        yield joined([_head(f"graph {name}", said, GRAPH_CELL), _graph(codes[low:high], inside)])


def _graph(codes: np.ndarray, pairs: np.ndarray) -> Sketch:
    width, height = GRAPH_CELL[0], GRAPH_CELL[1] - HEAD
    if len(codes) > GRAPH_NODES:
        return texts((width / 2, HEAD + height / 2, f"{len(codes):,} nodes", 13, SOFT, "center"))
    at = spring_layout(len(codes), pairs)
    span = np.ptp(at, axis=0)
    scale = min(36.0, (width - 3 * GAP) / max(span[0], 1e-9), (height - 3 * GAP) / max(span[1], 1e-9))
    at = (at - (at.max(0) + at.min(0)) / 2) * scale + [width / 2, HEAD + height / 2 - 2]
    return Sketch(np.column_stack([at, codes]), at[pairs].reshape(-1, 4))


def spring_layout(n: int, pairs: Int[np.ndarray, "e 2"]) -> Float[np.ndarray, "n 2"]:
    """Places of `n` nodes in the plane, an edge about 1 long, wider than high; the same for the same graph.

    Springs of path length between all pairs (Kamada and Kawai 1989), relaxed by stress majorisation (Gansner,
    Koren, North 2004, eq. 7) from pairs of the lowest Laplacian eigenvectors of the same springs; the least
    stress is kept. `pairs` are undirected.
    """
    ideal = _ideal_distances(n, pairs)
    stiff = np.divide(1, ideal**2, out=np.zeros_like(ideal), where=ideal > 0)
    laplacian = np.diag(stiff.sum(1)) - stiff
    low = np.linalg.eigh(laplacian)[1] * ideal.max()
    starts = [low[:, [a, b]] for a, b in STARTS if b < n] or [np.zeros((n, 2))]
    angle = np.arange(n) * 2.4  # a spiral by the golden angle parts the nodes that symmetry puts together
    spiral = 0.05 * np.sqrt(np.arange(n) / n)[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1)
    at, inverse = np.stack(starts) + spiral, np.linalg.pinv(laplacian)
    wanted = stiff * ideal
    for _ in range(ROUNDS):
        pull = wanted / np.maximum(_apart(at), 1e-9)
        at = inverse @ (pull.sum(2)[:, :, None] * at - pull @ at)
    at = at[(stiff * (_apart(at) - ideal) ** 2).sum((1, 2)).argmin()]
    at = (at - at.mean(0)) @ np.linalg.svd(at - at.mean(0))[2].T
    return at * np.where(at[np.abs(at).argmax(0), [0, 1]] < 0, -1, 1)


def _apart(at: np.ndarray) -> np.ndarray:
    """Distances [s n n] between the places [s n 2] of each of s layouts."""
    x, y = (at[:, :, None, i] - at[:, None, :, i] for i in (0, 1))
    return np.sqrt(x * x + y * y)


def _ideal_distances(n: int, pairs: np.ndarray) -> np.ndarray:
    """Path lengths; between components, half the diameter of each and a gap."""
    edges = coo_array((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), shape=(n, n)).tocsr()
    paths = csgraph.shortest_path(edges, directed=False, unweighted=True)
    reach = np.where(np.isfinite(paths), paths, 0).max(1)
    part = csgraph.connected_components(edges, directed=False)[1]
    radius = np.array([reach[part == p].max() / 2 for p in range(part.max() + 1)])[part]
    return np.where(np.isfinite(paths), paths, radius[:, None] + radius[None] + 1.2)

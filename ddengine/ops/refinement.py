"""Colour refinement (1-dimensional Weisfeiler-Leman): nodes of one colour have isomorphic computation trees.

Level 0 is a node's row of codes, with its in-degree where asked; level l is the level-0 colour and the
multiset of (edge label, level l-1 colour of the sender) over the messages that arrive. Colours are classes of
64-bit hashes, which cost O(edges) memory and no loop over nodes. Equal trees always hash equal;
`check` proves that equal hashes are equal trees (after Shervashidze et al., JMLR 2011, who sort strings).
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64, Integer, UInt64
from torch import Tensor

from ddengine.errors import DDError, UsageError, require_positive
from ddengine.graphs import Graphs

SALTS = 8  # tried before a checked refinement gives up; one fails with odds of about levels * n^2 / 2^65
NODE, EDGE, GRAPH = 0x243F6A8885A308D3, 0x13198A2E03707344, 0xA4093822299F31D0  # digits of pi
WORD, SAFE = 2**64 - 1, 2**62
Codes = np.ndarray | Tensor


@dataclass(frozen=True)
class Coloring:
    """Colours of n nodes at levels 0..hops: dense ids in order of first occurrence.

    `representatives[l]` are the first nodes of the level-l colours. `hashes` are the nodes' hashes at the top
    level: they depend on codes, tree and salt alone, not on numbering or on what else is in the collection
    (a checked refinement that met a collision has taken the next salt).
    """

    colors: tuple[Int64[np.ndarray, " n"], ...]
    representatives: tuple[Int64[np.ndarray, " _"], ...]
    hashes: UInt64[np.ndarray, " n"]

    @property
    def sizes(self) -> list[int]:
        """Colours of each level."""
        return [len(nodes) for nodes in self.representatives]


@dataclass(frozen=True)
class _Messages:
    """Edges sorted by target: those of node v stand at pointer[v]..pointer[v + 1]."""

    source: np.ndarray
    pointer: np.ndarray
    labels: np.ndarray

    @property
    def degree(self) -> np.ndarray:
        return np.diff(self.pointer)


def mix(values: UInt64[np.ndarray, "*s"], salt: int) -> UInt64[np.ndarray, "*s"]:
    """A bijection of 64-bit words that scatters them: the finaliser of SplitMix64 (Steele et al., 2014)."""
    z = values + np.uint64((salt + 1) * 0x9E3779B97F4A7C15 & WORD)
    z ^= z >> np.uint64(30)
    z *= np.uint64(0xBF58476D1CE4E5B9)
    z ^= z >> np.uint64(27)
    z *= np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return z


def color_refinement(
    x: Integer[Codes, "n f"],
    edge_index: Integer[Codes, "2 e"],
    edge_attr: Integer[Codes, "e q"] | None = None,
    *,
    hops: int,
    degree: bool = False,
    check: bool = False,
    salt: int = 0,
) -> Coloring:
    """The colours of all nodes at levels 0..hops; messages run from `edge_index[0]` to `edge_index[1]`.

    Codes are any integers. `degree` puts the in-degree into level 0. `check` compares every node with the
    representative of its colour, row by row, and repeats with another salt where two trees share a hash.
    Raises UsageError for negative hops, edges that end outside the nodes and shapes that do not fit; DDError
    where 8 salts in a row collide.
    """
    rows, ends = as_codes(x), as_codes(edge_index)
    labels = np.zeros((ends.shape[-1], 0), np.int64) if edge_attr is None else as_codes(edge_attr)
    _refuse(rows, ends, labels, hops)
    messages = _messages(ends, labels, len(rows))
    if degree:
        rows = np.column_stack([rows, messages.degree])
    for shift in range(SALTS if check else 1):
        coloring = _refine(rows, messages, hops, salt + shift)
        if not check or _is_exact(coloring, messages):
            return coloring
    raise DDError(
        f"different trees of {len(rows)} nodes share a hash under each of {SALTS} salts from {salt}",
        "Report this with your data; salt=N starts elsewhere",
    )


def graph_hashes(graphs: Graphs, hops: int = 3, salt: int = 0) -> UInt64[np.ndarray, " g"]:
    """A hash of each graph: of the multiset of its nodes' trees of `hops` levels, labels included, y not.

    It ignores the numbering of nodes and the order of edges, and is the same in whatever collection a graph
    stands. Unequal graphs share one where refinement cannot tell them apart, and with odds of 2^-64.
    """
    nodes = color_refinement(graphs.x, graphs.edge_index, graphs.edge_attr, hops=hops, salt=salt).hashes
    sums = _segment_sums(mix(nodes ^ np.uint64(GRAPH), salt), _pointer(as_codes(graphs.nodes)))
    return mix(sums, salt)


def row_ids(rows: Int64[np.ndarray, "n f"]) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " c"]]:
    """Which rows are equal, exactly: dense ids in order of first occurrence, and the first row of each id."""
    keys, radix = np.zeros(len(rows), np.int64), 1
    for column in rows.T:
        low, high = int(column.min(initial=0)), int(column.max(initial=0))
        if radix * (high - low + 1) > SAFE:
            keys, column = _dense(keys)[0], _dense(column)[0]  # at most n values each
            radix, low, high = len(rows), 0, len(rows)
        keys = keys * (high - low + 1) + (column - low)
        radix *= high - low + 1
    return _dense(keys)


def as_codes(values: Integer[Codes, "*s"]) -> Int64[np.ndarray, "*s"]:
    """Integers of a tensor or an array as an int64 array on the CPU. Raises UsageError for other numbers."""
    found = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    if found.dtype.kind not in "iu":
        raise UsageError(
            f"codes of type {found.dtype} are no integers", "Give integers; discretise values first"
        )
    return found.astype(np.int64, copy=False)


def _refuse(rows: np.ndarray, ends: np.ndarray, labels: np.ndarray, hops: int) -> None:
    require_positive("hops", hops, zero=True)
    n = len(rows)
    if rows.ndim != 2 or ends.ndim != 2 or len(ends) != 2 or labels.ndim != 2 or len(labels) != ends.shape[1]:
        raise UsageError(
            f"x {rows.shape}, edge_index {ends.shape} and edge_attr {labels.shape} do not fit",
            "Give codes [n, f], ends [2, e] and edge codes [e, q]",
        )
    if ends.size and not 0 <= ends.min() <= ends.max() < n:
        raise UsageError(
            f"edges end at nodes {ends.min()}..{ends.max()}, but there are {n} nodes",
            f"Give ends in 0..{n - 1}",
        )


def _messages(ends: np.ndarray, labels: np.ndarray, n: int) -> _Messages:
    order = np.argsort(ends[1])
    return _Messages(ends[0][order], _pointer(np.bincount(ends[1], minlength=n)), labels[order])


def _pointer(sizes: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(sizes)])


def _refine(rows: np.ndarray, messages: _Messages, hops: int, salt: int) -> Coloring:
    first = hashes = _row_hashes(rows, NODE, salt)
    labels = _row_hashes(messages.labels, EDGE, salt)
    levels = [row_ids(rows)]
    for _ in range(hops):
        sent = mix(hashes[messages.source] ^ labels, salt)
        hashes = mix(np.uint64(3) * first + _segment_sums(sent, messages.pointer), salt)
        levels.append(_dense(hashes))
    return Coloring(tuple(ids for ids, _ in levels), tuple(nodes for _, nodes in levels), hashes)


def _row_hashes(rows: np.ndarray, start: int, salt: int) -> np.ndarray:
    """Hashes of rows of codes; nodes and edges start apart, so that their equal codes differ."""
    found = np.full(len(rows), start, np.uint64)
    for column in rows.T:
        found = mix(found + column.astype(np.uint64), salt)
    return found


def _segment_sums(values: np.ndarray, pointer: np.ndarray) -> np.ndarray:
    """Sums modulo 2^64 of each segment: differences of one running sum, whose wrap-around cancels."""
    running = np.zeros(len(values) + 1, np.uint64)
    np.cumsum(values, out=running[1:])
    return running[pointer[1:]] - running[pointer[:-1]]


def _dense(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ids of equal values in order of first occurrence, and the place of each id's first one."""
    order = np.argsort(values)
    ranked = values[order]
    new = np.r_[np.ones(min(len(values), 1), bool), ranked[1:] != ranked[:-1]]
    first = np.minimum.reduceat(order, np.flatnonzero(new))
    by_first = np.argsort(first)
    rank, ids = np.empty_like(first), np.empty_like(order)
    rank[by_first] = np.arange(len(first))
    ids[order] = rank[np.cumsum(new) - 1]
    return ids, first[by_first]


def _is_exact(coloring: Coloring, messages: _Messages) -> bool:
    """Whether each node has its representative's first colour and multiset of messages, level by level."""
    labels, kinds = row_ids(messages.labels)
    base, degree, pointer = coloring.colors[0], messages.degree, messages.pointer
    target = np.repeat(np.arange(len(base)), degree)
    for below, colors, nodes in zip(
        coloring.colors, coloring.colors[1:], coloring.representatives[1:], strict=False
    ):
        twin = nodes[colors]
        if (base[twin] != base).any() or (degree[twin] != degree).any():
            return False
        keys = below[messages.source] * len(kinds) + labels
        keys = keys[np.lexsort((keys, target))]
        if (keys[(pointer[:-1][twin] - pointer[:-1])[target] + np.arange(len(keys))] != keys).any():
            return False
    return True

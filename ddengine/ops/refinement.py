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
ODD = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio
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


def mix(values: UInt64[np.ndarray, "*s"], salt: int) -> UInt64[np.ndarray, "*s"]:
    """A bijection of 64-bit words that scatters them: the finaliser of SplitMix64 (Steele et al., 2014)."""
    z = values + np.uint64((salt + 1) * ODD & WORD)
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
    if degree:
        rows = np.column_stack([rows, np.bincount(ends[1], minlength=len(rows))])
    for shift in range(SALTS if check else 1):
        coloring = _refine(rows, ends, labels, hops, salt + shift)
        if not check or _is_exact(coloring, ends, labels):
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
    sums = _sums(mix(nodes ^ np.uint64(GRAPH), salt), as_codes(graphs.batch), len(graphs))
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


def _refine(rows: np.ndarray, ends: np.ndarray, labels: np.ndarray, hops: int, salt: int) -> Coloring:
    source, target = ends
    levels = [row_ids(rows)]
    colors, nodes = levels[0]
    hashes = _row_hashes(rows[nodes], NODE, salt).take(colors)
    edges = _row_hashes(labels[:1] if (labels == labels[:1]).all() else labels, EDGE, salt)
    thrice = 3 * hashes
    for _ in range(hops):
        if len(edges) == 1:  # a node sends the same over all edges, and there are fewer nodes to mix
            sent = mix(hashes ^ edges, salt).take(source)
        else:
            sent = mix(hashes.take(source) ^ edges, salt)
        hashes = mix(thrice + _sums(sent, target, len(rows)), salt)
        levels.append(_dense(hashes))
    return Coloring(tuple(ids for ids, _ in levels), tuple(nodes for _, nodes in levels), hashes)


def _row_hashes(rows: np.ndarray, start: int, salt: int) -> np.ndarray:
    """Hashes of rows of codes; nodes and edges start apart, so that their equal codes differ."""
    found = np.full(len(rows), start, np.uint64)
    for column in rows.T:
        found = mix(found + column.view(np.uint64), salt)
    return found


def _sums(values: np.ndarray, index: np.ndarray, size: int) -> np.ndarray:
    """Sums modulo 2^64 of the values of each index."""
    sums = np.zeros(size, np.uint64)
    np.add.at(sums, index, values)
    return sums


def _dense(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ids of equal values in order of first occurrence, and the place of each id's first one.

    Rounds of a hash table: all places write themselves into their value's slot, the first one last, so that
    it stays. Those that find another value there try again with another hash.
    """
    words, bits = values.view(np.uint64), len(values).bit_length() + 1
    first, slots = np.empty(len(words), np.int64), np.empty(1 << bits, np.int64)
    left, factor = np.arange(len(words))[::-1].copy(), ODD
    while len(left):
        keys = words.take(left)
        slot = (keys * np.uint64(factor) >> (64 - bits)).view(np.int64)
        slots[slot] = left
        first[left] = found = slots.take(slot)
        left, factor = left[words.take(found) != keys], factor * ODD & WORD
    nodes = np.flatnonzero(first == np.arange(len(first)))
    rank = np.empty_like(first)
    rank[nodes] = np.arange(len(nodes))
    return rank.take(first), nodes


def _is_exact(coloring: Coloring, ends: np.ndarray, labels: np.ndarray) -> bool:
    """Whether each node has its representative's first colour and multiset of messages, level by level."""
    base, (source, target) = coloring.colors[0], ends
    labels, kinds = row_ids(labels)
    degree = np.bincount(target, minlength=len(base))
    start, ordered = np.cumsum(degree) - degree, np.repeat(np.arange(len(base)), degree)
    for below, colors, nodes in zip(
        coloring.colors, coloring.colors[1:], coloring.representatives[1:], strict=False
    ):
        twin = nodes[colors]
        if (base[twin] != base).any() or (degree[twin] != degree).any():
            return False
        keys, _ = _dense(below[source] * len(kinds) + labels)
        keys = np.sort(target * len(keys) + keys) - ordered * len(keys)
        if (keys[(start[twin] - start)[ordered] + np.arange(len(keys))] != keys).any():
            return False
    return True

"""Frequent itemsets, exact: all of them, the closed ones or the maximal ones, with their supports.

Each item is one row of bits over the transactions; a search goes depth first by AND and bit count (Eclat:
Zaki, "Scalable Algorithms for Association Mining", 2000). Closed sets are walked by prefix-preserving
closure, which meets each once and keeps no table of those met (LCM: Uno et al., "LCM ver. 2", FIMI 2004).
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from itertools import chain, islice
from math import ceil, isfinite
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Int, Shaped, UInt, UInt64
from numpy import ndarray
from scipy import sparse

from ddengine.errors import UsageError, require, require_positive

LIMIT = 100_000
WORD = 64  # bits
Transactions: TypeAlias = Sequence[Collection[int]] | sparse.sparray | sparse.spmatrix


@dataclass(frozen=True)
class Itemset:
    """One item or more, ascending, and the number of transactions that hold them all."""

    items: tuple[int, ...]
    support: int


def mine(
    transactions: Transactions, support: int, *, kind: str = "closed", limit: int = LIMIT
) -> list[Itemset]:
    """The itemsets that occur in `support` >= 1 or more transactions: highest support first.

    `transactions` are collections of item numbers, or a sparse matrix [transactions, items] whose entries
    other than 0 mark items. `kind` is "all", "closed" (no superset has the same support) or "maximal" (no
    superset occurs often enough). Equal supports: the larger set first, then the smaller item numbers. Raises
    UsageError for more than `limit` sets, a support below 1 or an unknown kind.
    """
    require(kind, WALKS, "itemsets")
    require_positive("support", support)
    require_positive("limit", limit)
    found = list(islice(_itemsets(transactions, support, kind), limit + 1))
    if len(found) > limit:
        rarer = list(WALKS)[list(WALKS).index(kind) + 1 :]
        raise UsageError(
            f"support={support} gives more {kind} itemsets than the limit of {limit}",
            " or ".join(["Raise the support", *(f"give itemsets={name}" for name in rarer)]),
        )
    return sorted(found, key=_place)


def top(transactions: Transactions, count: int, kind: str = "closed", *, limit: int = LIMIT) -> list[Itemset]:
    """The first `count` itemsets at the highest support at which there are so many, in the order of `mine`.

    Where no support gives so many, all there are. Raises UsageError where `mine` does at that support.
    """
    require(kind, WALKS, "itemsets")
    require_positive("count", count)
    support = _highest(transactions, count, "closed" if kind == "maximal" else kind)
    while kind == "maximal" and support >= 1 and not _reaches(transactions, support, kind, count):
        support -= 1  # the number of maximal sets does not grow steadily as the support falls
    return mine(transactions, max(support, 1), kind=kind, limit=limit)[:count]


def absolute_support(support: float | int, transactions: int) -> int:
    """The number of transactions that `support` means: a whole number >= 1, or a fraction in (0, 1) of all.

    A fraction of them is rounded up, to 1 at least. Raises UsageError for other numbers.
    """
    if isfinite(support) and support >= 1 and support == int(support):
        return int(support)
    if not 0 < support < 1:
        raise UsageError(
            f"support={support} is neither a number of graphs nor a fraction of them",
            "Give a whole number from 1 on, or a fraction between 0 and 1",
        )
    return max(1, ceil(Fraction(str(support)) * transactions))  # as it is written: .1 of 30 is 3


def _place(found: Itemset) -> tuple[int, int, tuple[int, ...]]:
    return -found.support, -len(found.items), found.items


def _highest(transactions: Transactions, count: int, kind: str) -> int:
    """The highest support with `count` sets of a kind that only grows as the support falls; 0 for none."""
    low, high = 0, _entries(transactions)[2]
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if _reaches(transactions, middle, kind, count) else (low, middle - 1)
    return low


def _reaches(transactions: Transactions, support: int, kind: str, count: int) -> bool:
    return sum(1 for _ in islice(_itemsets(transactions, support, kind), count)) == count


def _itemsets(transactions: Transactions, support: int, kind: str) -> Iterator[Itemset]:
    items, rows = _frequent(transactions, support)
    return WALKS[kind](items, rows, support)


def _frequent(
    transactions: Transactions, support: int
) -> tuple[Int[ndarray, " f"], UInt64[ndarray, "f words"]]:
    """The items of enough support, ascending, each with its bits over the transactions."""
    where, item, many = _entries(transactions)
    items, of, listed = np.unique(item, return_inverse=True, return_counts=True)
    keep = listed >= support  # a transaction may list an item twice: the bits decide below
    number = np.cumsum(keep) - 1
    where, of = where[keep[of]], number[of[keep[of]]]
    words = -(-many // WORD)
    bits = np.zeros(int(keep.sum()) * words, dtype=np.uint64)
    np.bitwise_or.at(bits, of * words + where // WORD, np.uint64(1) << (where % WORD).astype(np.uint64))
    rows = bits.reshape(int(keep.sum()), words)
    enough = _supports(rows) >= support
    return items[keep][enough], rows[enough]


def _entries(transactions: Transactions) -> tuple[Int[ndarray, " z"], Int[ndarray, " z"], int]:
    """Transaction and item of each entry, and the number of transactions."""
    if isinstance(transactions, Sequence):
        sizes = [len(transaction) for transaction in transactions]
        item = np.fromiter(chain.from_iterable(transactions), dtype=np.int64, count=sum(sizes))
        return np.repeat(np.arange(len(sizes)), sizes), item, len(sizes)
    entries = transactions.tocoo()
    there = entries.data != 0
    return entries.row[there].astype(np.int64), entries.col[there].astype(np.int64), entries.shape[0]


def _all_sets(items: Int[ndarray, " f"], rows: UInt64[ndarray, "f words"], support: int) -> Iterator[Itemset]:
    """Eclat: each set is met once, as its prefix and one later item."""
    for item, number in zip(items.tolist(), _supports(rows).tolist(), strict=True):
        yield Itemset((item,), number)
    stack: list[tuple[Any, ...]] = [((), items, rows, i) for i in reversed(range(len(items)))]
    while stack:
        prefix, items, rows, i = stack.pop()
        prefix += (int(items[i]),)
        later, bits = items[i + 1 :], rows[i + 1 :] & rows[i]
        supports = _supports(bits)
        enough = supports >= support
        later, bits, supports = later[enough], bits[enough], supports[enough]
        yield from (
            Itemset((*prefix, item), number)
            for item, number in zip(later.tolist(), supports.tolist(), strict=True)
        )
        stack += [(prefix, later, bits, j) for j in reversed(range(len(later) - 1))]


def _closed_sets(
    items: Int[ndarray, " f"], rows: UInt64[ndarray, "f words"], support: int, maximal: bool = False
) -> Iterator[Itemset]:
    """The closed sets; with `maximal` those alone that no further frequent item fits, other branches cut.

    Items of equal rows are one group, rare groups first. `live` are the groups outside a set that are
    frequent with it. A set is met from group `i` only if its closure adds no group before `i`, so once in
    all; what is met below it lies within `inside` and the live groups after `i`.
    """
    if not len(items):
        return
    rows, members = _groups(items, rows)
    cover = _Cover(len(rows))
    everything, none = np.full(rows.shape[1], ~np.uint64(0)), np.empty(0, dtype=np.int64)
    stack = [(everything, none, np.arange(len(rows)), i) for i in reversed(range(len(rows)))]
    while stack:
        bits, inside, live, i = stack.pop()
        bits = bits & rows[i]
        counts = _supports(rows[live] & bits)
        size = int(_supports(bits[None])[0])
        new = live[counts == size]
        if new[0] != i:
            continue
        inside, live = np.concatenate([inside, new]), live[(counts >= support) & (counts < size)]
        below = live[live > i]
        if maximal and cover.holds([*inside.tolist(), *below.tolist()]):
            continue
        if not maximal or not len(live):
            cover.add(inside.tolist() if maximal else [])
            yield Itemset(tuple(sorted(chain.from_iterable(members[j] for j in inside))), size)
        stack += [(bits, inside, live, j) for j in reversed(below.tolist())]


def _maximal_sets(
    items: Int[ndarray, " f"], rows: UInt64[ndarray, "f words"], support: int
) -> Iterator[Itemset]:
    return _closed_sets(items, rows, support, maximal=True)


class _Cover:
    """Sets found so far: for each group the bits of those that hold it."""

    def __init__(self, groups: int) -> None:
        self.holders, self.found = [0] * groups, 0

    def add(self, groups: list[int]) -> None:
        for group in groups:
            self.holders[group] |= 1 << self.found
        self.found += 1

    def holds(self, groups: list[int]) -> bool:
        """Whether one of the sets holds all of `groups`."""
        held = -1
        for group in groups:
            held &= self.holders[group]
            if not held:
                return False
        return True


def _groups(
    items: Int[ndarray, " f"], rows: UInt64[ndarray, "f words"]
) -> tuple[UInt64[ndarray, "d words"], list[list[int]]]:
    """The distinct rows by ascending support, and the items of each."""
    rows, of = np.unique(rows, axis=0, return_inverse=True)
    rank = _supports(rows).argsort(kind="stable")
    of = of.reshape(-1)
    members = np.split(items[of.argsort(kind="stable")], np.bincount(of, minlength=len(rows)).cumsum()[:-1])
    return rows[rank], [members[j].tolist() for j in rank]


def _supports(rows: UInt64[ndarray, "f words"]) -> Int[ndarray, " f"]:
    """Set bits of each row."""
    counts = np.bitwise_count(rows) if hasattr(np, "bitwise_count") else _table_counts(rows)
    return counts.sum(1, dtype=np.int64)


def _table_counts(rows: UInt64[ndarray, "f words"]) -> Shaped[ndarray, "f parts"]:
    """Set bits of each 16-bit part, for numpy before 2."""
    return _bit_counts()[np.ascontiguousarray(rows).view(np.uint16)]


@cache
def _bit_counts() -> UInt[ndarray, " 65536"]:
    return np.array([number.bit_count() for number in range(1 << 16)], dtype=np.uint8)


WALKS: dict[str, Callable[..., Iterator[Itemset]]] = {
    "all": _all_sets,
    "closed": _closed_sets,
    "maximal": _maximal_sets,
}

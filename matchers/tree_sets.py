"""Frequent sets of computation trees as training items (Gupta et al., Mirage, ICLR 2024)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from ddengine.ops.dag import Trees, histogram
from matchers.itemsets import Itemset


@dataclass(frozen=True)
class Mined:
    """Itemsets of one class as flat tensors: `colors` of all sets in a row, `sizes` and `support` of each."""

    colors: Int[Tensor, " z"]
    sizes: Int[Tensor, " m"]
    support: Int[Tensor, " m"]

    @staticmethod
    def of(itemsets: Sequence[Itemset]) -> "Mined":
        """The same sets, in the same order."""
        colors = [color for found in itemsets for color in found.items]
        return Mined(
            torch.tensor(colors, dtype=torch.int64),
            torch.tensor([len(found.items) for found in itemsets], dtype=torch.int64),
            torch.tensor([found.support for found in itemsets], dtype=torch.int64),
        )

    @property
    def sets(self) -> list[tuple[int, ...]]:
        """Each set's colours."""
        return [tuple(part.tolist()) for part in self.colors.split(self.sizes.tolist())]

    def keep(self, mask: Sequence[bool]) -> "Mined":
        """The sets for which `mask` is true."""
        kept = torch.tensor(mask, dtype=torch.bool)
        return Mined(self.colors[kept.repeat_interleave(self.sizes)], self.sizes[kept], self.support[kept])


def without_common(mined: Sequence[Mined]) -> list[Mined]:
    """The sets of each class that are frequent in no other class.

    A set is frequent where it is a part of a set that was mined, whichever kind of sets that was.
    """
    held = [_holders(found) for found in mined]
    return [
        found.keep([not any(_is_held(s, held[j]) for j in range(len(mined)) if j != i) for s in found.sets])
        for i, found in enumerate(mined)
    ]


def item_trees(trees: Trees, mined: Sequence[Mined], *, counts: str, weighting: str) -> Trees:
    """One item for each set, class by class: its colours, its class, its weight.

    `counts` "binary" takes each colour once; "mean" as often as it occurs on average (rounded) in the graphs
    of the class that have the whole set. `weighting` "support" weighs a set by its support, "none" by one.
    """
    sizes = torch.cat([found.sizes for found in mined])
    y = torch.arange(len(mined)).repeat_interleave(torch.tensor([len(found.sizes) for found in mined]))
    times = torch.ones(int(sizes.sum()), dtype=torch.int64)
    if counts == "mean":
        times = torch.cat([_mean_counts(trees, found, c) for c, found in enumerate(mined)])
    weight = torch.cat([found.support for found in mined]).float()
    return Trees(
        dag=trees.dag,
        item=torch.arange(len(y)).repeat_interleave(sizes),
        color=torch.cat([found.colors for found in mined]),
        count=times,
        y=y,
        weight=weight if weighting == "support" else torch.ones(len(y)),
        spec=trees.spec,
    )


def scaled(items: Trees, balance: bool) -> Trees:
    """The items with weights of mean 1; with `balance` all classes that occur have the same sum of weights.

    Weights that differ by rounding alone are equal.
    """
    weight = items.weight
    if balance:
        weight = weight / torch.zeros(len(items.spec.classes)).index_add_(0, items.y, weight)[items.y]
    weight = weight / weight.mean()
    even = bool(((weight - 1).abs() < 1e-6).all())
    return replace(items, weight=torch.ones_like(weight) if even else weight)


def _holders(mined: Mined) -> dict[int, int]:
    """For each colour the bits of the sets that hold it."""
    found: dict[int, int] = {}
    for i, colors in enumerate(mined.sets):
        for color in colors:
            found[color] = found.get(color, 0) | 1 << i
    return found


def _is_held(colors: Sequence[int], holders: Mapping[int, int]) -> bool:
    """Whether one set holds all of `colors`."""
    held = -1
    for color in colors:
        held &= holders.get(color, 0)
    return bool(held)


def _mean_counts(trees: Trees, mined: Mined, c: int) -> Int[Tensor, " z"]:
    """How often each colour of each set occurs in the graphs of class `c` that have the set: rounded mean."""
    counts = histogram(trees)[trees.y.numpy() == c]
    found = [np.zeros(0)]
    for colors in mined.sets:
        columns = counts[:, list(colors)].toarray()
        have = (columns > 0).all(1)
        found.append(np.maximum(np.rint(columns[have].mean(0)), 1))
    return torch.from_numpy(np.concatenate(found).astype(np.int64))

"""Frequent sets of computation trees as training items (Gupta et al., Mirage, ICLR 2024)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
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
    """The sets of each class that are frequent in no other class."""
    sets = [found.sets for found in mined]
    others = [{s for j, theirs in enumerate(sets) if j != i for s in theirs} for i in range(len(sets))]
    return [
        found.keep([s not in other for s in mine])
        for found, mine, other in zip(mined, sets, others, strict=True)
    ]


def item_trees(trees: Trees, mined: Sequence[Mined], *, counts: str, weighting: str, balance: bool) -> Trees:
    """One item for each set, class by class: its colours, its class, its weight.

    `counts` "binary" takes each colour once; "mean" as often as it occurs on average (rounded) in the graphs
    of the class that have the whole set. `weighting` "support" weighs a set by its support, and `balance`
    gives all classes the same sum of weights.
    """
    sizes = torch.cat([found.sizes for found in mined])
    y = torch.arange(len(mined)).repeat_interleave(torch.tensor([len(found.sizes) for found in mined]))
    times = torch.ones(int(sizes.sum()), dtype=torch.int64)
    if counts == "mean":
        times = torch.cat([_mean_counts(trees, found, c) for c, found in enumerate(mined)])
    weight = torch.cat([found.support for found in mined]).float() if weighting == "support" else None
    weight = torch.ones(len(y)) if weight is None else weight
    if balance:
        weight = weight / torch.zeros(len(mined)).index_add_(0, y, weight)[y]
    return Trees(
        dag=trees.dag,
        item=torch.arange(len(y)).repeat_interleave(sizes),
        color=torch.cat([found.colors for found in mined]),
        count=times,
        y=y,
        weight=_scaled(weight),
        spec=trees.spec,
    )


def _scaled(weight: Float[Tensor, " m"]) -> Float[Tensor, " m"]:
    """Weights of mean 1; those that differ by rounding alone are equal."""
    weight = weight / weight.mean()
    return torch.ones_like(weight) if bool(((weight - 1).abs() < 1e-6).all()) else weight


def _mean_counts(trees: Trees, mined: Mined, c: int) -> Int[Tensor, " z"]:
    """How often each colour of each set occurs in the graphs of class `c` that have the set: rounded mean."""
    counts = histogram(trees)[trees.y.numpy() == c]
    found = [np.zeros(0)]
    for colors in mined.sets:
        columns = counts[:, list(colors)].toarray()
        have = (columns > 0).all(1)
        found.append(np.maximum(np.rint(columns[have].mean(0)), 1))
    return torch.from_numpy(np.concatenate(found).astype(np.int64))

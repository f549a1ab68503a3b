"""Rankings of the real graphs of each class: any prefix of a ranking is the selection of that size.

Graph j stands at z_j = sqrt of its colour counts, so that the squared length of z_j is its number of nodes
and z_i . z_j the Bhattacharyya kernel of two histograms. Only sparse products are formed: O(limit * nonzeros)
for a class. Distances that differ by rounding alone are equal: the graph of the lowest index is taken.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float64, Int
from numpy import ndarray
from scipy import sparse
from torch import Tensor

from ddengine.errors import UsageError, require_positive
from ddengine.rng import Rng

TIE = 1e-11  # of the largest term: far above the rounding of float64, far below two unequal histograms

Ranking = Callable[[sparse.csr_array, Int[Tensor, " g"], int, Rng], list[Tensor]]


def random(
    histogram: sparse.csr_array, y: Int[Tensor, " g"], limit: int, rng: Rng
) -> list[Int[Tensor, " _"]]:
    """For each class, up to `limit` of its graphs in random order."""
    require_positive("limit", limit)
    return [
        graphs[torch.randperm(len(graphs), generator=rng.fold(c).torch("order"))[:limit]]
        for c, graphs in enumerate(_classes(y))
    ]


def herding(
    histogram: sparse.csr_array, y: Int[Tensor, " g"], limit: int, rng: Rng
) -> list[Int[Tensor, " _"]]:
    """Greedy herding (Welling, ICML 2009): each graph brings the sum of those chosen nearest to its target.

    The target of t graphs is t times the class mean of z. Deterministic: `rng` is not used. `histogram`
    [g, colours] holds counts, `y` class numbers; a list of graphs for each class, at most `limit` long.
    """
    return _ranked(_herd, histogram, y, limit)


def kcenter(
    histogram: sparse.csr_array, y: Int[Tensor, " g"], limit: int, rng: Rng
) -> list[Int[Tensor, " _"]]:
    """Greedy k-centre (Gonzalez, 1985): the graph nearest the class mean, then always the farthest.

    Deterministic: `rng` is not used. Takes and gives what `herding` does.
    """
    return _ranked(_spread, histogram, y, limit)


GRAPH_SELECTIONS: dict[str, Ranking] = {"random": random, "herding": herding, "kcenter": kcenter}


def per_class(rankings: Sequence[Int[Tensor, " _"]], count: int) -> Int[Tensor, " m"]:
    """The first `count` graphs of each ranking, class by class. Raises UsageError when a class has fewer."""
    require_positive("count", count)
    fewest = min(map(len, rankings))
    if fewest < count:
        raise UsageError(
            f"{count} graphs of each class, but class {[*map(len, rankings)].index(fewest)} has {fewest}",
            f"Give at most {fewest}" if fewest else "Give graphs of every class",
        )
    return _prefixes(rankings, [count] * len(rankings))


def within_bytes(
    rankings: Sequence[Int[Tensor, " _"]],
    nbytes: int,
    size: Callable[[Tensor], int],
    what: str = "one graph of each class",
) -> Int[Tensor, " m"]:
    """The first graphs of each ranking that fit in `nbytes`, class by class; a class's stay a prefix.

    Graphs are added in turn, one of each class; a class drops out when its next does not fit or there is
    none. So the selection is balanced until the bytes or a class run out. `size` gives the bytes of a
    selection and does not fall as graphs are added; it is called O(classes * log graphs) times. Raises
    UsageError when `what`, the first of each ranking, does not fit or a class has none.
    """
    least = size(per_class(rankings, 1))
    if least > nbytes:
        raise UsageError(
            f"{what} takes {least} bytes, and nbytes={nbytes}",
            f"Give {least} bytes or more",
        )
    taken, active = [1] * len(rankings), list(range(len(rankings)))

    def fits(more: dict[int, int]) -> bool:
        wider = [n + more.get(c, 0) for c, n in enumerate(taken)]
        enough = all(n <= len(ranking) for n, ranking in zip(wider, rankings, strict=True))
        return enough and size(_prefixes(rankings, wider)) <= nbytes

    while active:
        rounds = _most(lambda n: fits(dict.fromkeys(active, n)))
        taken = [n + rounds * (c in active) for c, n in enumerate(taken)]
        for c in list(active):
            if fits({c: 1}):
                taken[c] += 1
            else:
                active.remove(c)
    return _prefixes(rankings, taken)


def _most(fits: Callable[[int], bool]) -> int:
    """The largest number that fits, when all below it do and 0 does: by doubling, then halving."""
    step = 1
    while fits(step):
        step *= 2
    low, high = step // 2, step
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _prefixes(rankings: Sequence[Tensor], taken: Sequence[int]) -> Tensor:
    return torch.cat([ranking[:n] for ranking, n in zip(rankings, taken, strict=True)])


def _classes(y: Int[Tensor, " g"]) -> list[Int[Tensor, " _"]]:
    """The graphs of each class, ascending."""
    y = y.cpu()
    return [(y == c).nonzero().flatten() for c in range(int(y.max()) + 1 if len(y) else 0)]


def _ranked(
    greedy: Callable[[sparse.csr_array, int], list[int]],
    histogram: sparse.csr_array,
    y: Int[Tensor, " g"],
    limit: int,
) -> list[Int[Tensor, " _"]]:
    """`greedy` in each class."""
    require_positive("limit", limit)
    assert histogram.shape[0] == len(y), "one row of counts for each graph"
    z = sparse.csr_array(histogram, dtype=np.float64).sqrt()
    return [
        graphs[greedy(z[graphs.numpy()], min(limit, len(graphs)))] if len(graphs) else graphs
        for graphs in _classes(y)
    ]


def _herd(z: sparse.csr_array, count: int) -> list[int]:
    """Step t takes argmin |s + z_j - t mean|^2, which is |z_j|^2 + 2 z_j . (s - t mean) and a constant.

    s is the sum of those chosen before.
    """
    length, toward = _square_lengths(z), z @ _mean(z)
    chosen: list[int] = []
    shared = np.zeros(len(length))
    for t in range(1, count + 1):
        score = length + 2 * (shared - t * toward)
        score[chosen] = np.inf
        chosen.append(_least(score, TIE * t * length.max()))
        shared += _products(z, chosen[-1])
    return chosen


def _spread(z: sparse.csr_array, count: int) -> list[int]:
    """Squared distances |z_i|^2 + |z_j|^2 - 2 z_i . z_j to the nearest graph chosen so far."""
    length = _square_lengths(z)
    chosen, tie = [_least(length - 2 * (z @ _mean(z)), TIE * length.max())], TIE * length.max()
    near = np.full(len(length), np.inf)
    while len(chosen) < count:
        last = chosen[-1]
        near = np.minimum(near, length + length[last] - 2 * _products(z, last))
        near[chosen] = -np.inf
        chosen.append(_least(-near, tie))
    return chosen


def _least(values: Float64[ndarray, " g"], tie: float) -> int:
    """The lowest index whose value is least, or above it by `tie` at most."""
    return int(np.flatnonzero(values <= values.min() + tie)[0])


def _products(z: sparse.csr_array, j: int) -> Float64[ndarray, " g"]:
    """z_i . z_j for all i."""
    return z @ z[[j]].toarray().ravel()


def _mean(z: sparse.csr_array) -> Float64[ndarray, " colours"]:
    return np.asarray(z.mean(0)).ravel()


def _square_lengths(z: sparse.csr_array) -> Float64[ndarray, " g"]:
    return np.asarray(z.multiply(z).sum(1)).ravel()

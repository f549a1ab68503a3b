"""How near images lie to real ones: nearest neighbours among members and a control of equal size.

A distance is the root mean square over pixels in [0, 1] (L2 per pixel). Members are images that a set may
have learned from, controls are held-out images of the same classes; where a set favours neither, an image is
nearer to a member than to any control half of the time.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from scipy import stats
from torch import Tensor

from ddengine.rng import Rng

COPY = 1 / 255 / 2  # half a grey level: an image nearer than this is a copy
CELLS = 2**22  # numbers of float64 that one block of distances, or of real pixels, may have
QUANTILES = {"min": 0.0, "q05": 0.05, "q25": 0.25, "median": 0.5, "q75": 0.75, "q95": 0.95, "max": 1.0}
Draw = tuple[Tensor, Tensor]  # indices of members and of controls


def grey(x: UInt8[Tensor, "n ..."]) -> Float[Tensor, "n d"]:
    """Real images as rows of float64 pixels in [0, 1]; the division is float32's, as in a decoded set."""
    return (x.flatten(1).float() / 255).double()


def nearest(
    queries: Float[Tensor, "m d"], pool: UInt8[Tensor, "n ..."], groups: Sequence[Tensor]
) -> tuple[Float[Tensor, "g m"], Int[Tensor, "g m"]]:
    """The distance of each query (float64 pixels) to the nearest image of each group, and which it is.

    Groups are indices into the pool, none empty. Neighbours are found by |q|^2 + |x|^2 - 2 qx in float64,
    their distance is then taken from the difference itself, so that a copy is at 0. Memory is bounded by
    CELLS, whatever the sizes.
    """
    blocks = queries.split(max(1, CELLS // len(pool)))
    found = [_nearest(block, pool, groups) for block in blocks]
    return torch.cat([distance for distance, _ in found], 1), torch.cat([index for _, index in found], 1)


def _nearest(queries: Tensor, pool: Tensor, groups: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    parts = pool.split(max(1, CELLS // queries.shape[1]))
    squares = torch.cat([_squares(queries, grey(part)) for part in parts], 1)
    found = [group[squares[:, group].argmin(1)] for group in groups]
    distances = [(queries - grey(pool[index])).square().mean(1).sqrt() for index in found]
    return torch.stack(distances), torch.stack(found)


def _squares(q: Tensor, x: Tensor) -> Tensor:
    return q.square().sum(1)[:, None] + x.square().sum(1) - 2 * q @ x.T


def equal_draw(
    members: Int[Tensor, " n"], controls: Int[Tensor, " h"], present: Sequence[int], rng: Rng
) -> Draw:
    """Random indices of as many members as controls, given by their classes, of each class in `present`.

    Of each class as many as the smaller of the two has.
    """
    chosen: tuple[list[Tensor], list[Tensor]] = ([], [])
    for c in present:
        mine = [(labels.cpu() == c).nonzero().squeeze(1) for labels in (members, controls)]
        count = min(map(len, mine))
        for side, places, name in zip(chosen, mine, ("members", "controls"), strict=True):
            order = torch.randperm(len(places), generator=rng.fold(c).torch(name))
            side.append(places[order[:count]])
    return torch.cat(chosen[0]), torch.cat(chosen[1])


def compare(
    queries: Float[Tensor, "m d"],
    fit: UInt8[Tensor, "n ..."],
    held: UInt8[Tensor, "h ..."],
    draws: Sequence[Draw],
) -> dict[str, Any]:
    """One row of the audit, as plain JSON values: `queries` beside all of `fit` and beside each of `draws`.

    `copies` are nearer than COPY to an image of the whole fit part. All else is the mean over draws; an
    image at one distance from both counts as not nearer. Images that share their nearest real one are no
    independent witnesses: the binomial test against 1/2 and the Clopper-Pearson interval are of `effective`
    images with the same share (see `effective_count`).
    """
    everything = torch.arange(len(fit), device=fit.device)
    groups = [everything, *(m.to(fit.device) for m, _ in draws)]
    (whole, *near), (_, *who) = (found.unbind() for found in nearest(queries, fit, groups))
    members = torch.stack(near)
    controls, others = nearest(queries, held, [c.to(held.device) for _, c in draws])
    nearer = members < controls
    share = nearer.double().mean().item()
    places = torch.where(nearer, torch.stack(who), len(fit) + others)
    effective = max(1, round(sum(map(effective_count, places)) / len(draws)))
    return {
        "images": len(queries),
        "copies": int((whole < COPY).sum()),
        "pool": len(draws[0][0]),
        "distance": {
            "fit": _quantiles(whole[None]),
            "members": _quantiles(members),
            "control": _quantiles(controls),
        },
        "nearer": {
            "share": share,
            "counts": nearer.sum(1).tolist(),
            "effective": effective,
            "ci95": list(clopper_pearson(share * effective, effective)),
            "p_value": float(stats.binomtest(int(share * effective + 0.5), effective, 0.5).pvalue),
        },
    }


def effective_count(nearest_places: Int[Tensor, " m"]) -> float:
    """How many independent images m images are worth, of which n_j share the nearest real image j.

    m^2 / sum n_j^2, Kish's design effect for clusters (1965): in 1..m, m where none share. In many dimensions
    a few real images are nearest to many; a binomial test of m images then finds a difference where there is
    none more often than it says: a fifth of the time at 5 %, for 200 images of uniform noise in 272
    dimensions beside 200 and 200.
    """
    sizes = nearest_places.unique(return_counts=True)[1].double()
    return len(nearest_places) ** 2 / sizes.square().sum().item()


def _quantiles(distances: Float[Tensor, "g m"]) -> dict[str, float]:
    """Quantiles over images, mean over draws."""
    found = np.quantile(distances.cpu().numpy(), list(QUANTILES.values()), axis=1).mean(1)
    return dict(zip(QUANTILES, found.tolist(), strict=True))


def clopper_pearson(count: float | int, total: int, level: float = 0.95) -> tuple[float, float]:
    """The exact binomial interval of a share (Clopper and Pearson, 1934), 0 <= count <= total.

    A count that is a mean, and no whole number, has the interval of the same beta quantiles.
    """
    tail = (1 - level) / 2
    low = float(stats.beta.ppf(tail, count, total - count + 1)) if count > 0 else 0.0
    high = float(stats.beta.ppf(1 - tail, count + 1, total - count)) if count < total else 1.0
    return low, high

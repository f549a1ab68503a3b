"""Codes for continuous attributes: computation trees compare labels, so real values must become some.

Everything is fitted on the fit part alone, and depends on its values, not on their order.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from threadpoolctl import threadpool_limits
from torch import Tensor

from ddengine.errors import UsageError, require
from ddengine.rng import Rng

METHODS = ("quantile", "kmeans")
STARTS = 4  # of k-means; the best of them is kept
PIECE = 1 << 16  # rows compared with the centroids at a time


@dataclass(frozen=True)
class Discretised:
    """Code columns and, for each, a table [codes, d] of the standardised values that its codes stand for.

    `lost` is the fraction of the fit part's variance that the tables do not explain, in [0, 1].
    """

    codes: Int[Tensor, "n c"]
    values: tuple[Float[Tensor, "_ _"], ...]
    lost: float

    @property
    def sizes(self) -> tuple[int, ...]:
        """Codes of each column."""
        return tuple(len(table) for table in self.values)


def discretise(
    attributes: Float[Tensor, "n a"], fit: Bool[Tensor, " n"], method: str, bins: int = 8
) -> Discretised:
    """Attributes as codes: "quantile" makes a column of up to `bins` codes of each, "kmeans" one of all.

    `fit` marks the rows that bins, centroids, mean and std come from; every code has one of them or more.
    Attributes are standardised first, a constant one to 0. Raises UsageError for an unknown method, fewer
    than two bins, and no rows to fit to.
    """
    require(method, METHODS, "dataset.discretise")
    if bins < 2:
        raise UsageError(f"dataset.bins={bins} is out of range", "Give two bins or more")
    if not fit.any():
        raise UsageError("no row of attributes lies in the fit part", "Give a fit part with rows of its own")
    x, mask = attributes.double().numpy(), fit.numpy()
    x = _standardised(x, x[mask])
    codes, values = _quantile(x, mask, bins) if method == "quantile" else _kmeans(x, mask, bins)
    decoded = np.concatenate([table[codes[mask, i]] for i, table in enumerate(values)], axis=1)
    total = np.square(x[mask]).sum()
    lost = float(np.square(x[mask] - decoded).sum() / total) if total else 0.0
    return Discretised(torch.from_numpy(codes), tuple(torch.from_numpy(v).float() for v in values), lost)


def _standardised(x: np.ndarray, fit: np.ndarray) -> np.ndarray:
    ordered = np.sort(fit, axis=0)  # sums then do not depend on the order of rows
    mean, std = ordered.mean(0), ordered.std(0)
    constant = (ordered[0] == ordered[-1]) | (std == 0)  # squares of the least numbers are 0
    return np.where(constant, 0.0, (x - mean) / np.where(constant, 1.0, std))


def _quantile(x: np.ndarray, mask: np.ndarray, bins: int) -> tuple[np.ndarray, list[np.ndarray]]:
    columns = [_bins(column, np.sort(column[mask]), bins) for column in x.T]
    return np.stack([codes for codes, _ in columns], axis=1), [table for _, table in columns]


def _bins(column: np.ndarray, fit: np.ndarray, bins: int) -> tuple[np.ndarray, np.ndarray]:
    """Bins that end at values of `fit` (sorted) and include them, so that none is empty there."""
    distinct = np.unique(fit)
    inner = np.linspace(0, 1, bins + 1)[1:-1]
    ends = distinct if len(distinct) <= bins else np.unique(np.quantile(fit, inner, method="inverted_cdf"))
    ends = ends[ends < fit[-1]]
    of_fit = np.searchsorted(ends, fit)
    means = np.bincount(of_fit, weights=fit) / np.bincount(of_fit)
    return np.searchsorted(ends, column), means[:, None]


def _kmeans(x: np.ndarray, mask: np.ndarray, bins: int) -> tuple[np.ndarray, list[np.ndarray]]:
    from sklearn.cluster import KMeans  # takes a second to import

    rows = x[mask]
    rows = rows[np.lexsort(rows.T)]
    clusters = min(bins, len(np.unique(rows, axis=0)))
    seed = Rng(0).fold("discretise").integer("kmeans") % 2**32
    with threadpool_limits(limits=1):  # threads would add in any order
        fitted = KMeans(clusters, n_init=STARTS, tol=0, random_state=seed).fit(rows)
    centres = fitted.cluster_centers_
    centres = centres[np.unique(_nearest(rows, centres))]
    centres = centres[np.lexsort(centres.T)]
    return _nearest(x, centres)[:, None], [centres]


def _nearest(x: np.ndarray, centres: np.ndarray) -> np.ndarray:
    pieces = np.array_split(x, len(x) // PIECE + 1)
    return np.concatenate([np.square(p[:, None] - centres[None]).sum(2).argmin(1) for p in pieces])

"""Scores that need no graph network: the number of nodes, and logistic regression on colour histograms.

They stand beside every result, for a data set that they solve shows nothing of trees or networks.
"""

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from ddengine.data.graph_source import GraphDataset
from ddengine.graph_train import METRICS, accuracy
from ddengine.graphs import Graphs, joined
from ddengine.ops.dag import histogram, lowered, trees_of
from ddengine.tables import Row

SIMPLE = ("size_only", "wl_logistic")
INVERSE_PENALTIES = (0.01, 0.1, 1.0, 10.0)  # validation accuracy chooses
Matrix = Any  # dense or sparse [g, d]


def simple_rows(
    names: Sequence[str], dataset: GraphDataset, hops: int, nbytes: Callable[[Graphs], Mapping[str, int]]
) -> list[Row]:
    """Rows of `size_only` and of `wl_logistic` at each level 0..hops, fitted on the whole fit part.

    `wl_logistic` sees square roots of how often each colour occurs in a graph (Weisfeiler-Lehman histogram);
    colours that the fit part lacks are unknown to it.
    """
    found = []
    if "size_only" in names:
        sizes = [
            np.log(part.nodes.numpy()[:, None]) for part in (dataset.fit, dataset.validation, dataset.test)
        ]
        scale = max(float(sizes[0].std()), 1e-12)
        found += _fitted("size_only", "logistic", [s / scale for s in sizes], dataset, nbytes)
    if "wl_logistic" in names:
        for level, parts in enumerate(_histograms(dataset, hops)):
            found += _fitted("wl_logistic", f"logistic, level {level}", parts, dataset, nbytes)
    return found


def _histograms(dataset: GraphDataset, hops: int) -> Iterator[list[Matrix]]:
    """Square roots of the colour counts of fit, validation and test graphs, level by level."""
    parts = (dataset.fit, dataset.validation, dataset.test)
    trees = trees_of(joined(parts), hops)
    ends = np.cumsum([0, *(len(part) for part in parts)])
    for level in range(hops + 1):
        counts = histogram(lowered(trees, level)).sqrt()
        known = np.flatnonzero(np.asarray(counts[: ends[1]].sum(0)).ravel())
        yield [counts[a:b][:, known] for a, b in pairwise(ends)]


def _fitted(
    name: str,
    label: str,
    parts: Sequence[Matrix],
    dataset: GraphDataset,
    nbytes: Callable[[Graphs], Mapping[str, int]],
) -> list[Row]:
    began = time.perf_counter()
    models = [_model(parts[0], dataset.fit, c) for c in INVERSE_PENALTIES]
    valid = [accuracy(model.predict_proba(parts[1]), dataset.validation.y) for model in models]
    best = int(np.argmax(valid))
    test = models[best].predict_proba(parts[2])
    seconds = round(time.perf_counter() - began, 3)
    trials = tuple({"c": c, "validation": v} for c, v in zip(INVERSE_PENALTIES, valid, strict=True))
    return [
        Row(
            name=name,
            network=label,
            metric=metric,
            values=(score(test, dataset.test.y),),
            steps=0,
            nbytes=dict(nbytes(dataset.fit)),
            lr=None,
            trials=trials,
            train_seconds=seconds,
            count=len(dataset.fit),
            ipc=round(len(dataset.fit) / len(dataset.spec.classes), 2),
            network_spec={"name": "logistic", "c": INVERSE_PENALTIES[best]},
        )
        for metric, score in METRICS.items()
    ]


def _model(x: Matrix, fit: Graphs, c: float) -> LogisticRegression:
    model = LogisticRegression(C=c, max_iter=1000, class_weight="balanced")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return model.fit(x, fit.y.numpy())

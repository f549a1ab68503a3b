"""What each computation tree says of the class: an additive model of graphs, its trees as a training set.

A network with mean pooling and a linear readout scores a graph by the mean of its nodes' scores, and the
score of a node is a function of its tree. So a set of single trees with the right scores as soft labels
teaches all that such a network can say. The scores are those of a logistic regression on how often each
colour of each level occurs (Weisfeiler-Lehman subtree features, Shervashidze et al., JMLR 2011; own method).
"""

import warnings
from collections.abc import Sequence

import numpy as np
import scipy.sparse as sp
import torch
from jaxtyping import Float, Int
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits
from torch import Tensor

from ddengine.errors import UsageError, require_positive
from ddengine.ops.dag import Trees, closed, histogram, lowered

PENALTIES = (1.0, 10.0, 100.0, 1000.0)  # inverse strengths that cross-validation chooses from
FOLDS = 3
SPREAD = 0.5  # mean |score - mean of the classes' scores|: two classes then differ by 1, far from saturation


def tree_frequency(trees: Trees) -> Float[Tensor, " c"]:
    """How much of a class's nodes each top-level colour is, on average over the classes; the sum is 1."""
    counts = histogram(trees)
    y, classes = trees.classes.numpy(), len(trees.spec.classes)
    found = np.zeros(counts.shape[1])
    for c in range(classes):
        members = np.asarray(counts[y == c].sum(0)).ravel()
        found += members / max(members.sum(), 1) / classes
    return torch.from_numpy(found)


def tree_scores(trees: Trees, folds: int = FOLDS) -> tuple[Float[Tensor, "c k"], float]:
    """Scores (logits) of each top-level colour for each class, and the model's accuracy on left-out graphs.

    The score of a graph is the mean of its nodes' scores, to which each level of a node's colour adds; rare
    trees thus have the scores of the shallower trees in them. The penalty is the one with the best mean
    accuracy on `folds` parts, each left out once. Deterministic. Scores of a colour have mean 0; their scale
    is `SPREAD`, for only their ratios matter. Raises UsageError for one class alone, and for a class with
    fewer graphs than `folds`.
    """
    _refuse_few(trees, folds)
    x, y = _frequencies(trees), trees.classes.numpy()
    part = np.empty(len(y), int)
    for c in np.unique(y):
        part[y == c] = np.arange((y == c).sum()) % folds
    right = [
        np.mean([(_model(x[part != i], y[part != i], c).predict(x[part == i]) == y[part == i]).mean()
                 for i in range(folds)])
        for c in PENALTIES
    ]  # fmt: skip
    best = int(np.argmax(right))
    model = _model(x, y, PENALTIES[best])
    scores = _added_up(trees, model.coef_) + model.intercept_
    if len(model.classes_) == 2:
        scores = np.concatenate([-scores / 2, scores / 2], axis=1)
    full = np.zeros((len(scores), len(trees.spec.classes)))
    full[:, model.classes_] = scores - scores.mean(1, keepdims=True)
    scale = np.average(np.abs(full).mean(1), weights=tree_frequency(trees).numpy())
    return torch.from_numpy(full * SPREAD / max(scale, 1e-12)), float(right[best])


def graph_labels(trees: Trees) -> Float[Tensor, "g k"]:
    """Soft labels of the graphs by the same model: the softmax of the mean of their nodes' scores."""
    counts = histogram(trees)
    nodes = np.asarray(counts.sum(1)).ravel()
    return torch.from_numpy((counts @ tree_scores(trees)[0].numpy()) / nodes[:, None]).softmax(1).float()


def evidence_set(
    trees: Trees,
    scores: Float[Tensor, "c k"],
    frequency: Float[Tensor, " c"],
    chosen: Int[Tensor, " m"],
    weighted: bool = True,
) -> Trees:
    """The training set of the colours at `chosen`: one item each, labelled by the softmax of its scores.

    Its weight is its frequency (mean 1) where `weighted`. Colours that no item needs are dropped.
    """
    color = chosen.sort().values
    weight = frequency[color].float() / frequency[color].float().mean()
    made = Trees(
        dag=trees.dag,
        item=torch.arange(len(color)),
        color=color,
        count=torch.ones(len(color), dtype=torch.int64),
        y=scores[color].softmax(1).float(),
        weight=weight if weighted else torch.ones(len(color)),
        spec=trees.spec,
        y_kind="prob",
    )
    return closed(made)


def _refuse_few(trees: Trees, folds: int) -> None:
    require_positive("folds", folds)
    classes = trees.spec.classes
    counts = torch.bincount(trees.classes, minlength=len(classes)).tolist()
    fewest = min(counts)
    if len(classes) < 2 or fewest < folds:
        raise UsageError(
            f"{len(classes)} classes, '{classes[counts.index(fewest)]}' with {fewest} graphs: what trees say "
            f"is learned from two classes or more, of {folds} graphs each at least",
            "Give more graphs, or choose real ones with matcher=tree_herding",
        )


def _levels(trees: Trees) -> Sequence[Trees]:
    return [lowered(trees, level) for level in range(trees.dag.hops + 1)]


def _frequencies(trees: Trees) -> sp.csr_array:
    """Share of each colour of each level in a graph's nodes, level by level side by side."""
    counts = [histogram(level) for level in _levels(trees)]
    nodes = np.asarray(counts[0].sum(1)).ravel()
    return sp.csr_array(sp.diags_array(1 / nodes) @ sp.hstack(counts))


def _added_up(trees: Trees, weights: Float[np.ndarray, "r w"]) -> Float[np.ndarray, "c r"]:
    """For each top-level colour the sum of the weights of its colours at all levels."""
    ends = np.cumsum([0, *trees.dag.sizes])
    found = weights[:, : ends[1]].T
    for number, level in enumerate(trees.dag.levels, 1):
        found = found[level.own.numpy()] + weights[:, ends[number] : ends[number + 1]].T
    return found


def _model(x: sp.csr_array, y: np.ndarray, c: float) -> LogisticRegression:
    model = LogisticRegression(C=c, max_iter=1000, class_weight="balanced")
    with warnings.catch_warnings(), threadpool_limits(1):
        warnings.simplefilter("ignore", ConvergenceWarning)
        return model.fit(x, y)

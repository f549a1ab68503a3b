"""Scores of a distilled set from mean accuracies: label- and augmentation-robust, in fractions.

Source: DD-Ranking (Li et al., arXiv 2505.13300). Its released code puts percentage points into the
exponentials; here every accuracy is a fraction, so that both robust scores lie in [0, 1].
"""

import math
from collections.abc import Iterable, Mapping
from statistics import fmean
from typing import Any, Protocol, runtime_checkable

from ddengine.errors import UsageError

WEIGHT, GAMMA = 0.5, 0.5  # DD-Ranking's own: both halves of a score count alike
SUBJECT = "distilled"
ROLES = {  # the rows that can play a part, the preferred first
    "subject": (SUBJECT,),
    "full": ("full_converged", "full"),
    "hard": ("distilled_hard", SUBJECT),
    "rival": ("random_same_labels", "random", "random_bytes"),
    "random": ("random",),
    "subject_plain": ("distilled_plain",),
    "random_plain": ("random_plain",),
}
NEEDS = {
    "hlr": ("full", "hard"),
    "ior": ("subject", "rival"),
    "lrs": ("full", "hard", "subject", "rival"),
    "ars": ("subject", "random", "subject_plain", "random_plain"),
}


@runtime_checkable
class Scored(Protocol):
    """A row of a table, as far as a score sees it."""

    @property
    def name(self) -> str:
        """Which training set."""

    @property
    def network(self) -> str:
        """The label of the network that was trained on it."""

    @property
    def metric(self) -> str:
        """What `values` measure: "accuracy" or another."""

    @property
    def values(self) -> tuple[float, ...]:
        """One test score for each seed, fractions."""


def hlr(full: float | int, hard: float | int) -> float | int:
    """Hard-label recovery: what a set trained on with hard labels lacks of full data, in [-1, 1]."""
    return full - hard


def ior(subject: float | int, rival: float | int) -> float | int:
    """Improvement over random: what a set gains on random images under its own recipe, in [-1, 1]."""
    return subject - rival


def label_robust(ior: float | int, hlr: float | int, weight: float | int = WEIGHT) -> float:
    """LRS in [0, 1] of alpha = weight IOR - (1 - weight) HLR; alpha = 0 gives 0.2689.

    Raises UsageError for a weight outside [0, 1] or differences that are no fractions.
    """
    return _rescaled(_blend(ior, -hlr, weight))


def augmentation_robust(
    with_augmentation: float | int, without: float | int, gamma: float | int = GAMMA
) -> float:
    """ARS in [0, 1] of beta = gamma `with_augmentation` + (1 - gamma) `without`.

    Both are the accuracy of the set less that of random images, trained with and without augmentation.
    Raises UsageError for a gamma outside [0, 1] or differences that are no fractions.
    """
    return _rescaled(_blend(with_augmentation, without, gamma))


def _blend(first: float | int, second: float | int, weight: float | int) -> float:
    if not 0 <= weight <= 1:
        raise UsageError(f"weight {weight} of a score is out of range", "Give 0 <= weight <= 1")
    return float(weight * first + (1 - weight) * second)


def _rescaled(exponent: float) -> float:
    """[-1, 1] onto [0, 1] by (e^x - e^-1) / (e - e^-1)."""
    if not -1 <= exponent <= 1:
        raise UsageError(f"exponent {exponent:g} of a score is outside -1..1", "Give accuracies as fractions")
    low, high = math.exp(-1), math.exp(1)
    return (math.exp(exponent) - low) / (high - low)


def _fraction(row: str, accuracy: float | int) -> float | int:
    if not 0 <= accuracy <= 1:
        raise UsageError(f"accuracy {accuracy:g} of row '{row}' is outside 0..1", "Give it as a fraction")
    return accuracy


def scores_of(means: Mapping[str, float | int], soft: bool = False) -> dict[str, Any]:
    """HLR, IOR, LRS and ARS of one network's mean accuracies (fractions) by row; None where a row is missing.

    ROLES says which rows are read; with `soft` labels the set's own row cannot stand for hard ones.
    "components" has the row and the accuracy of each role that is filled, both weights, alpha and beta (None
    where unknown), and under "missing", for each score that is None, what it lacks: "a or b" where either row
    would do. Raises UsageError for accuracies that are no fractions.
    """
    roles = ROLES | ({"hard": ROLES["hard"][:1]} if soft else {})
    rows = {role: next((row for row in roles[role] if row in means), None) for role in roles}
    used = {role: row for role, row in rows.items() if row is not None}
    mean = {role: _fraction(row, means[row]) for role, row in used.items()}
    lacks = {
        score: [" or ".join(roles[role]) for role in NEEDS[score] if role not in used] for score in NEEDS
    }
    lost = hlr(mean["full"], mean["hard"]) if not lacks["hlr"] else None
    gain = ior(mean["subject"], mean["rival"]) if not lacks["ior"] else None
    scores: dict[str, Any] = {"hlr": lost, "ior": gain, "lrs": None, "ars": None}
    parts: dict[str, Any] = {"rows": used, "accuracies": mean, "weight": WEIGHT, "gamma": GAMMA}
    parts |= {"alpha": None, "beta": None, "missing": {score: lack for score, lack in lacks.items() if lack}}
    if lost is not None and gain is not None:
        parts["alpha"], scores["lrs"] = _blend(gain, -lost, WEIGHT), label_robust(gain, lost)
    if not lacks["ars"]:
        gains = mean["subject"] - mean["random"], mean["subject_plain"] - mean["random_plain"]
        parts["beta"], scores["ars"] = _blend(*gains, GAMMA), augmentation_robust(*gains)
    return scores | {"components": parts}


def table_scores(rows: Iterable[Scored], soft: bool = False) -> dict[str, Any]:
    """The scores of a table's first network that has the distilled set, with its label as "network".

    "networks" holds `scores_of` each such network by its label. Only rows of metric "accuracy" count; {}
    where none of them is the distilled set's.
    """
    means: dict[str, dict[str, float]] = {}
    for row in rows:
        if row.metric == "accuracy":
            means.setdefault(row.network, {})[row.name] = fmean(row.values)
    networks = {label: scores_of(of, soft) for label, of in means.items() if SUBJECT in of}
    if not networks:
        return {}
    first = next(iter(networks))
    return networks[first] | {"network": first, "networks": networks}

"""What `ddengine.nas` reports: ranks of architectures beside a reference, the table, and its plain text."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.stats import rankdata

from ddengine.bench import Record
from ddengine.downstream import aligned, percent
from ddengine.nets.core import NetSpec
from ddengine.rng import Rng
from ddengine.train import Recipe

FEWEST = 5  # architectures below which a correlation has no interval, and a top part no correlation
DRAWS = 2000
INTERVAL = f"percentile bootstrap over architectures, {DRAWS} draws"
TOP = 5  # the top part is one in so many, rounded up: 20 %


def rank_correlation(a: Sequence[float | int], b: Sequence[float | int]) -> float | None:
    """Spearman's rank correlation, ties at their mean rank; None where either side has one value only."""
    found = float(_correlations(np.array([a], dtype=float), np.array([b], dtype=float))[0])
    return None if np.isnan(found) else found


def _correlations(a: Float[np.ndarray, "s n"], b: Float[np.ndarray, "s n"]) -> Float[np.ndarray, " s"]:
    """Pearson's correlation of the ranks of each pair of rows, clipped to [-1, 1]; NaN where undefined."""
    x, y = (ranks - ranks.mean(1, keepdims=True) for ranks in (rankdata(a, axis=1), rankdata(b, axis=1)))
    scale = np.sqrt((x**2).sum(1) * (y**2).sum(1))
    defined = scale > 0
    found = (x * y).sum(1) / np.where(defined, scale, 1)
    return np.where(defined, found.clip(-1, 1), np.nan)


def correlation_interval(
    a: Sequence[float | int], b: Sequence[float | int], rng: Rng
) -> tuple[float, float] | None:
    """A 95 % interval of the rank correlation: what the architectures' choice leaves open, no more.

    Percentiles over 2,000 draws of architectures with replacement, those without a correlation left out.
    None below 5 architectures, or where the correlation itself is not defined.
    """
    if len(a) < FEWEST or rank_correlation(a, b) is None:
        return None
    drawn = rng.numpy("bootstrap").integers(len(a), size=(DRAWS, len(a)))
    found = _correlations(np.asarray(a, dtype=float)[drawn], np.asarray(b, dtype=float)[drawn])
    low, high = np.nanpercentile(found, [2.5, 97.5])
    return float(low), float(high)


def ranking(scores: Sequence[float | int]) -> list[int]:
    """Numbers of the architectures from the best score to the worst; equals in the order of the space."""
    return sorted(range(len(scores)), key=lambda i: -scores[i])


@dataclass(frozen=True)
class Scored:
    """All architectures on one set: `values[architecture][seed]` as fractions, at the rate of each.

    They are validation accuracies, in the reference test accuracies. `seconds` is the sum over all networks
    that were trained for it, `steps` those of each.
    """

    name: str
    values: tuple[tuple[float, ...], ...]
    lrs: tuple[float, ...]
    steps: int
    count: int
    nbytes: Mapping[str, int]
    seconds: float

    @property
    def means(self) -> list[float]:
        """The score of each architecture: the mean over its seeds."""
        return [fmean(values) for values in self.values]


@dataclass(frozen=True)
class NasTable:
    """What `nas` found: how each row ranks the architectures beside `reference`."""

    dataset: str
    architectures: tuple[str, ...]
    space: tuple[NetSpec, ...]
    reference: Scored
    rows: tuple[Scored, ...]
    recipe: Recipe
    reference_recipe: Recipe
    seed: int

    def to_json(self) -> Record:
        """The table as plain JSON values: fractions, no NaN; what is not defined is null."""
        nets = [
            {"name": name, "network_spec": net.to_dict()}
            for name, net in zip(self.architectures, self.space, strict=True)
        ]
        truth = self.reference.means
        reference = _scored(self.reference) | {"best": max(truth), "mean": fmean(truth)}
        head = {"task": "nas", "dataset": self.dataset, "architectures": nets, "reference": reference}
        recipes = {"recipe": self.recipe.to_dict(), "reference_recipe": self.reference_recipe.to_dict()}
        rows = {"rows": [self._row(row) for row in self.rows]}
        return head | rows | {"interval": INTERVAL} | recipes | {"seed": self.seed}

    def _row(self, row: Scored) -> Record:
        mine, truth, rng = row.means, self.reference.means, Rng(self.seed).fold("nas")
        order = ranking(mine)
        top = order[: -(-len(order) // TOP)]
        pairs = [(mine[i], truth[i]) for i in top]
        within = rank_correlation(*zip(*pairs, strict=True)) if len(top) >= FEWEST else None
        interval = correlation_interval(mine, truth, rng)
        ranks = {"correlation": rank_correlation(mine, truth), "ci95": interval and list(interval)}
        part = {"top_correlation": within, "top_count": len(top)}
        pick = {"pick": self.architectures[order[0]], "pick_test": truth[order[0]]}
        return _scored(row) | ranks | part | pick | {"regret": max(truth) - truth[order[0]]}


def _scored(row: Scored) -> Record:
    found = asdict(row)
    values = {"values": [list(values) for values in row.values], "lrs": list(row.lrs), "means": row.means}
    return (
        {key: value for key, value in found.items() if key != "nbytes"} | values | {"bytes": dict(row.nbytes)}
    )


def table_text(table: Mapping[str, Any]) -> str:
    """The table of `NasTable.to_json` as aligned plain text."""
    reference, count = table["reference"], len(table["architectures"])
    head = ("set", "picks", "rank corr.", "95 % interval", "top 20 %", "test %", "regret", "seconds", "bytes")
    names = [net["name"] for net in table["architectures"]]
    truth = names[max(range(count), key=lambda i: reference["means"][i])]
    last = ("reference", truth, "1.00", "-", "-", percent(reference["best"]), "0.0", *_spent(reference))
    lines = aligned([head, *map(_cells, table["rows"]), last], left=2)
    title = f"{table['dataset']}, {count} architectures ranked, seed {table['seed']}"
    chance = percent(reference["best"] - reference["mean"])
    notes = [
        f"ranked on validation after {table['recipe']['steps']} steps, test % and regret (points) after "
        f"{table['reference_recipe']['steps']} on all the data",
        f"a pick at random has a regret of {chance} points on average",
        f"intervals: {table['interval']}",
    ]
    return "\n".join([title, "", *lines, "", *notes]) + "\n"


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        row["name"],
        row["pick"],
        _two(row["correlation"]),
        "-" if row["ci95"] is None else " to ".join(map(_two, row["ci95"])),
        _two(row["top_correlation"]),
        percent(row["pick_test"]),
        percent(row["regret"]),
        *_spent(row),
    )


def _spent(row: Mapping[str, Any]) -> tuple[str, str]:
    return f"{row['seconds']:.0f}", f"{row['bytes']['total']:,}"


def _two(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"

"""What `ddengine.continual` reports: rows, the table, and its plain text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from statistics import fmean
from typing import Any

from ddengine.bench import Record
from ddengine.downstream import aligned, percent
from ddengine.nets.core import NetSpec
from ddengine.tables import spread
from ddengine.train import Recipe

Group = tuple[int, ...]
RIVAL = "random"


@dataclass(frozen=True)
class ContinualRow:
    """One memory: test scores `values[stage][order][network]` as fractions, and what they cost.

    `counts` are the images of the memory at each stage, `nbytes` those of the last one's; `trials` is empty
    where the recipe has one rate; `train_seconds` is the sum over all networks.
    """

    name: str
    values: tuple[tuple[tuple[float, ...], ...], ...]
    counts: tuple[int, ...]
    lr: float
    trials: tuple[Record, ...]
    nbytes: Mapping[str, int]
    train_seconds: float

    def averages(self) -> list[float]:
        """The accuracy of each order: the mean over its stages and networks."""
        return [fmean(chain(*stages)) for stages in zip(*self.values, strict=True)]

    def to_json(self, seen: Sequence[int]) -> Record:
        """The row as plain JSON values; `seen` classes at each stage."""
        scores = [_scores(stage) for stage in self.values]
        size = ({"classes": k, "count": n} for k, n in zip(seen, self.counts, strict=True))
        stages = [head | score for head, score in zip(size, scores, strict=True)]
        over = {"average": _spelled(self.averages()), "final": scores[-1]}
        choice = {"lr": self.lr, "trials": [dict(trial) for trial in self.trials]}
        spent = {"bytes": dict(self.nbytes), "train_seconds": self.train_seconds}
        return {"name": self.name, "metric": "accuracy", "stages": stages} | over | choice | spent


def _spelled(values: Sequence[float]) -> Record:
    mean, std, ci95 = spread(values)
    return {"mean": mean, "std": std, "ci95": ci95 and list(ci95), "n": len(values), "values": list(values)}


def _scores(orders: Sequence[Sequence[float]]) -> Record:
    """Statistics over orders, each the mean of its networks, which are no independent draws; all values."""
    return _spelled([fmean(networks) for networks in orders]) | {"values": list(chain(*orders))}


@dataclass(frozen=True)
class ContinualTable:
    """What `continual` found; `groups[order][stage]` are the classes that came."""

    dataset: str
    groups: tuple[tuple[Group, ...], ...]
    networks: int
    network: NetSpec
    rows: tuple[ContinualRow, ...]
    recipe: Recipe
    seed: int

    def to_json(self) -> Record:
        """The table as plain JSON values: fractions, no NaN; `n` counts orders, the independent draws."""
        sizes = [len(group) for group in self.groups[0]]
        seen = [sum(sizes[: stage + 1]) for stage in range(len(sizes))]
        head = {"task": "continual", "dataset": self.dataset, "steps": len(sizes), "orders": len(self.groups)}
        setting = {"networks": self.networks, "network": self.network.to_dict()}
        rows = {"rows": [row.to_json(seen) for row in self.rows]}
        groups = [[list(group) for group in order] for order in self.groups]
        return head | setting | rows | {"recipe": self.recipe.to_dict(), "seed": self.seed, "groups": groups}


def table_text(table: Mapping[str, Any]) -> str:
    """The table of `ContinualTable.to_json` as aligned plain text: accuracy in percent at each stage."""
    rows, steps = table["rows"], table["recipe"]["steps"]
    seen = [str(stage["classes"]) for stage in rows[0]["stages"]]
    head = ("memory", *seen, "average %", "95 % interval", "lr", "images", "bytes")
    lines = aligned([head, *map(_cells, rows)])
    orders = f"{table['orders']} class orders, {table['networks']} networks each, {steps} optimiser steps"
    title = f"{table['dataset']}, continual learning in {table['steps']} steps, seed {table['seed']}"
    about = [title, f"accuracy % after so many classes, mean of {orders}"]
    return "\n".join([*about, "", *lines, "", *verdicts(table)]).rstrip() + "\n"


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    mean, std, ci95 = (row["average"][key] for key in ("mean", "std", "ci95"))
    return (
        row["name"],
        *(percent(stage["mean"]) for stage in row["stages"]),
        percent(mean) + ("" if std is None else f" ± {percent(std)}"),
        "-" if ci95 is None else " to ".join(map(percent, ci95)),
        f"{row['lr']:.3g}",
        f"{row['stages'][-1]['count']:,}",
        f"{row['bytes']['total']:,}",
    )


def verdicts(table: Mapping[str, Any]) -> list[str]:
    """A sentence for each row on its difference from random in the average, paired by order."""
    rows = {row["name"]: row["average"]["values"] for row in table["rows"]}
    rival = rows.pop(RIVAL, None)
    return [] if rival is None else [_verdict(name, values, rival) for name, values in rows.items()]


def _verdict(name: str, values: Sequence[float], rival: Sequence[float]) -> str:
    mean, _, ci95 = spread([mine - theirs for mine, theirs in zip(values, rival, strict=True)])
    side = f"{name} is {percent(abs(mean))} points {'above' if mean >= 0 else 'below'} {RIVAL}"
    if ci95 is None:
        return f"{side}: no interval, one order"
    shown = "a difference" if ci95[0] > 0 or ci95[1] < 0 else "no difference shown"
    return f"{side}: {shown}, 95 % interval {' to '.join(map(percent, ci95))}, paired by order"

"""Two evaluations against one another: differences paired over networks that start and train alike.

Network i of a root seed has the same initial weights and draws of batches whatever set it is trained on, so
that the differences of equal networks vary less than the accuracies do.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ddengine.errors import UsageError, one_line
from ddengine.grids import ABSENT, MIB, Cell, Grid, literal, number, percent, word
from ddengine.report import METRICS, PARTS, SUBJECT, metric_of, selected, title
from ddengine.tables import spread

Record = dict[str, Any]
PUBLISHED = "paper/"  # protocols whose choices on the test part are the publication's own


@dataclass(frozen=True)
class Comparison:
    """One network and metric of two tables: `a` and `b` are the scores of equal networks, as fractions.

    `cost` has what each side took: pairs of plain numbers, None where that is not known.
    """

    network: str
    metric: str
    a: tuple[float, ...]
    b: tuple[float, ...]
    cost: Mapping[str, tuple[float | int | None, float | int | None]]

    @property
    def values(self) -> tuple[float, ...]:
        """The paired differences, A minus B."""
        return tuple(mine - theirs for mine, theirs in zip(self.a, self.b, strict=True))

    @property
    def verdict(self) -> str:
        """Which is above by how many points, or that Student's 95 % interval of the mean covers 0."""
        mean, _, ci95 = spread(self.values)
        if ci95 is None or ci95[0] <= 0 <= ci95[1]:
            return "no difference shown"
        above, below = ("A", "B") if mean > 0 else ("B", "A")
        return f"{above} above {below} by {100 * abs(mean):.1f} points"

    def to_json(self) -> Record:
        """The comparison as plain JSON values: means, the interval of the mean difference, the verdict."""
        mean, std, ci95 = spread(self.values)
        means = {"a": math.fsum(self.a) / len(self.a), "b": math.fsum(self.b) / len(self.b)}
        found = {"network": self.network, "metric": self.metric, **means, "difference": mean, "std": std}
        paired = {"ci95": ci95 and list(ci95), "n": len(self.a), "values": list(self.values)}
        cost = {name: {"a": mine, "b": theirs} for name, (mine, theirs) in self.cost.items()}
        return {**found, **paired, "verdict": self.verdict, "cost": cost}


def compare(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Comparison]:
    """Row "distilled" of two tables (as `Table.to_json` gives them) for each network and metric of both.

    Raises UsageError for tables of other datasets (by name or by fingerprint), protocols, root seeds, recipes
    or numbers of networks, for networks of one name that are built differently, for rows whose networks were
    selected from more, which makes no pairs, for weights chosen on the test part by another protocol than a
    publication's, and where the tables have no network in common.
    """
    _check_settings(a, b)
    mine, theirs = (_subjects(table, name) for table, name in ((a, "A"), (b, "B")))
    shared = [key for key in mine if key in theirs]
    if not shared:
        named = (", ".join(f"{metric} of {network}" for network, metric in rows) for rows in (mine, theirs))
        raise _refused("A has {} and B has {}".format(*named), "with the same networks")
    return [_compared(key, mine[key], theirs[key], a, b) for key in shared]


def _refused(cause: str, remedy: str) -> UsageError:
    return UsageError(f"these evaluations cannot be compared: {cause}", f"Evaluate both {remedy}")


def _check_settings(a: Mapping[str, Any], b: Mapping[str, Any]) -> None:
    for key, name in (("dataset", "dataset"), ("protocol", "protocol"), ("seed", "root seed")):
        if a[key] != b[key]:
            raise _refused(f"{name} {a[key]} in A and {b[key]} in B", f"with the same {name}")
    prints = [table.get("fingerprint") for table in (a, b)]
    if None not in prints and prints[0] != prints[1]:
        found = " and ".join(f"{str(value)[:12]} in {side}" for value, side in zip(prints, "AB", strict=True))
        raise _refused(f"{a['dataset']} has the fingerprint {found}", "on the same data")
    mine, theirs = (table.get("protocol_spec") for table in (a, b))
    other = _first_difference(mine, theirs, "protocol") if mine and theirs else None
    other = other or _first_difference(a["recipe"], b["recipe"], "recipe")
    if other is not None:
        raise _refused(other, "with the same protocol and recipe")
    if any(selected(table) for table in (a, b)) and not str(a["protocol"]).startswith(PUBLISHED):
        raise _refused(f"protocol {a['protocol']} chooses on the test part", "by one that does not")


def _first_difference(a: Mapping[str, Any], b: Mapping[str, Any], path: str) -> str | None:
    """The first key on which two tables differ, with both values; None where they are equal."""
    absent = "absent"
    for key in dict.fromkeys([*a, *b]):
        where = f"{path}.{key}"
        mine, theirs = a.get(key, absent), b.get(key, absent)
        if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
            if (inner := _first_difference(mine, theirs, where)) is not None:
                return inner
        elif mine != theirs:
            return f"{where} is {mine} in A and {theirs} in B"
    return None


def _subjects(table: Mapping[str, Any], name: str) -> dict[tuple[str, str], Mapping[str, Any]]:
    """Rows "distilled" by network and metric, all of whose networks are reported."""
    rows = [row for row in table["rows"] if row["name"] == SUBJECT]
    if not rows:
        raise _refused(f"{name} has no row '{SUBJECT}'", "again")
    for row in rows:
        trained = table.get("seeds", len(row["values"]))
        if trained != len(row["values"]) or not trained:
            raise _refused(
                f"{name} reports {len(row['values'])} of {trained} networks of {row['network']}, which "
                "makes no pairs",
                "by a protocol that reports every network",
            )
    return {(row["network"], metric_of(row)): row for row in rows}


def _compared(
    key: tuple[str, str],
    mine: Mapping[str, Any],
    theirs: Mapping[str, Any],
    a: Mapping[str, Any],
    b: Mapping[str, Any],
) -> Comparison:
    network, metric = key
    if len(mine["values"]) != len(theirs["values"]):
        raise _refused(
            f"{len(mine['values'])} networks of {network} in A and {len(theirs['values'])} in B",
            "with the same seeds=N",
        )
    built = _first_difference(mine["network_spec"], theirs["network_spec"], network)
    if built is not None:
        option = built.removeprefix(f"{network}.").partition(" ")[0]
        raise _refused(built, f"with the same networks, such as network.{option}=VALUE")
    return Comparison(
        network, metric, tuple(mine["values"]), tuple(theirs["values"]), _cost(mine, theirs, a, b)
    )


def _cost(*sides: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What is known of the costs of both rows: bytes by part, their distillation, their networks."""
    mine, theirs, a, b = sides
    found = {f"{part}_bytes": (mine["bytes"].get(part), theirs["bytes"].get(part)) for part in PARTS}
    before, after = (table.get("cost") or {} for table in (a, b))
    found["distil_seconds"] = (_amount(before.get("seconds")), _amount(after.get("seconds")))
    memory = "peak_memory_bytes"
    found[memory] = (_amount(before.get(memory)), _amount(after.get(memory)))
    found["train_seconds"] = (_amount(mine.get("train_seconds")), _amount(theirs.get("train_seconds")))
    return {name: pair for name, pair in found.items() if pair != (None, None)}


def _amount(value: Any) -> float | int | None:
    return value if type(value) in (int, float) and math.isfinite(value) else None


@dataclass(frozen=True)
class Pair:
    """Two runs as a report compares them: their paths, their setting in one line, what was found.

    `refused` says why they cannot be compared; there are no comparisons then.
    """

    a: str
    b: str
    setting: str = ""
    comparisons: tuple[Comparison, ...] = ()
    refused: str | None = None

    def to_json(self) -> Record:
        """The pair as plain JSON values."""
        found = [comparison.to_json() for comparison in self.comparisons]
        return {
            "a": self.a,
            "b": self.b,
            "setting": self.setting,
            "comparisons": found,
            "refused": self.refused,
        }

    @property
    def said(self) -> str:
        """The setting and how its networks are paired, or why there are no pairs."""
        return self.refused or f"{self.setting}: row {SUBJECT}, paired over networks that start alike"

    def verdicts(self) -> list[str]:
        """One sentence for each network and metric."""
        several = len({found.metric for found in self.comparisons}) > 1
        return [
            f"{found.network}{f', {found.metric}' * several}: {found.verdict}" for found in self.comparisons
        ]

    def _lines(self) -> list[str]:
        return [f"A: {self.a}", f"B: {self.b}", self.said, *self.verdicts()]

    def text(self) -> str:
        """The pair as plain text."""
        tables = [grid.text() for grid in grids(self.comparisons)]
        return "\n\n".join(["\n".join(map(one_line, self._lines())), *tables]) + "\n"

    def markdown(self) -> str:
        """The pair as Markdown."""
        notes = [f"- {literal(line)}" for line in self._lines()]
        tables = [grid.markdown() for grid in grids(self.comparisons)]
        return "\n\n".join(["## A against B", "\n".join(notes), *tables]) + "\n"


def pair_of(runs: Sequence[Mapping[str, Any]], *, required: bool = False) -> Pair | None:
    """Two runs (what `Run.shown` gives for each) against one another; None where there are not two tables.

    With `required` what cannot be compared is a UsageError instead, and so are not two runs.
    """
    if required and len(runs) != 2:
        raise UsageError(f"a comparison takes two runs, not {len(runs)}", "Write: report --compare A B")
    for run in runs if required else ():
        if run["table"] is None:
            alone = run.get("commands", {}).get("distill", "") is None
            kept = " out=DIR, then compare that DIR" if alone else ""
            raise UsageError(
                f"{run['path']} is not evaluated", f"Write: ddengine evaluate {run['path']}{kept}"
            )
    if len(runs) != 2 or any(run["table"] is None for run in runs):
        return None
    (a, b), (mine, theirs) = ([run[key] for run in runs] for key in ("path", "table"))
    try:
        return Pair(a, b, title(mine), tuple(compare(mine, theirs)))
    except UsageError as error:
        if required:
            raise
        return Pair(a, b, refused=error.cause)


def grids(comparisons: Sequence[Comparison]) -> list[Grid]:
    """The differences in points with their intervals, then bytes and costs side by side; none of nothing."""
    if not comparisons:
        return []
    head = ("network", "metric", "A %", "B %", "A - B, points", "95 % interval", "n", "each pair")
    found = [comparison.to_json() for comparison in comparisons]
    differences = Grid(head, tuple(map(_difference, found)), 2)
    costs = tuple(
        (word(comparison.network), *_cost_cells(name, pair))
        for comparison in comparisons
        for name, pair in comparison.cost.items()
    )
    return [differences, Grid(("network", "cost", "A", "B"), costs, 2)]


def _difference(found: Mapping[str, Any]) -> tuple[Cell, ...]:
    metric = METRICS.get(found["metric"], found["metric"])
    interval = ABSENT
    if found["ci95"]:
        interval = (" to ".join(_points(end) for end in found["ci95"]), found["ci95"][0])
    means = percent(found["a"]), percent(found["b"]), (_points(found["difference"]), found["difference"])
    each = " ".join(map(_points, found["values"])), found["difference"]
    return word(found["network"]), word(metric), *means, interval, number(found["n"], "d"), each


def _points(fraction: float | int) -> str:
    return f"{100 * fraction:+.1f}"


def _cost_cells(name: str, pair: Sequence[float | int | None]) -> tuple[Cell, ...]:
    if name == "peak_memory_bytes":
        return word("peak memory, MiB"), *(number(value, ",.1f", MIB) for value in pair)
    spelled = ",.1f" if name.endswith("seconds") else ",d"
    return word(name.replace("_", " ")), *(number(value, spelled) for value in pair)

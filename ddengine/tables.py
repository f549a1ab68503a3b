"""What the judge reports: rows, the table, and the statistics of a row; `to_json` is the `--json` object."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any, Protocol, runtime_checkable

from scipy import stats

from ddengine.bench import Record
from ddengine.nets.core import NetSpec

PROTOCOL = "standard-v1"


def spread(values: Sequence[float]) -> tuple[float, float | None, tuple[float, float] | None]:
    """Mean, standard deviation (ddof 1) and Student's 95 % interval of the mean: one value has none."""
    mean = fmean(values)
    if len(values) < 2:
        return mean, None, None
    std = stdev(values)
    half = float(stats.t.ppf(0.975, len(values) - 1)) * std / len(values) ** 0.5
    return mean, std, (mean - half, mean + half)


def label_networks(networks: Sequence[NetSpec]) -> list[str]:
    """A name for each network: its own, with the options given where two networks share a name."""
    shared = Counter(net.name for net in networks)
    return [_spelled(net) if shared[net.name] > 1 else net.name for net in networks]


def _spelled(net: NetSpec) -> str:
    given = [f"{key}={value}" for key, value in net.to_dict().items() if key != "name" and value is not None]
    return f"{net.name}({', '.join(given)})" if given else net.name


def measures_of(finals: Sequence[Record]) -> Record:
    """Means over networks of calibration error, worst class, each class, and accuracies under corruptions."""
    if not finals or "ece" not in finals[0]:
        return {}
    each = [record["per_class"] for record in finals]
    found: Record = {
        "ece": fmean(record["ece"] for record in finals),
        "worst_class": fmean(min(v for v in values if v is not None) for values in each),
        "per_class": [None if values[0] is None else fmean(values) for values in zip(*each, strict=True)],
    }
    if "robust" in finals[0]:
        names = finals[0]["robust"]
        found["robust"] = {name: fmean(record["robust"][name] for record in finals) for name in names}
    return found


def cost_of(manifest: Mapping[str, Any]) -> Record:
    """What distillation cost, from the set's provenance; None where that is not recorded."""
    provenance = manifest.get("provenance") or {}
    return {name: provenance.get(name) for name in ("seconds", "steps", "peak_memory_bytes", "device")}


@runtime_checkable
class Counted(Protocol):
    """A part of a dataset, as far as its size goes."""

    @property
    def counts(self) -> list[int]: ...


def sizes_of(
    classes: Sequence[str], fit: Counted, validation: Counted, test: Counted
) -> tuple[Record, tuple[str, ...]]:
    """How many examples each part has, and the names of the classes that the test part has none of."""
    parts = {"fit": sum(fit.counts), "validation": sum(validation.counts), "test": sum(test.counts)}
    untested = (name for name, count in zip(classes, test.counts, strict=True) if not count)
    return parts, tuple(untested)


@runtime_checkable
class Spelled(Protocol):
    """A recipe, as far as a table shows it."""

    def to_dict(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Row:
    """One training set under one network: test scores of fresh networks and what they cost.

    `values` are fractions, one for each seed; `trials` the validation accuracy at each rate; `nbytes` the
    bytes of images, labels and extras; `train_seconds` the sum over all networks of the row. `measures` are
    what else is known of its networks, as means over them (`measures_of`).
    """

    name: str
    network: str
    values: tuple[float, ...]
    steps: int
    nbytes: Mapping[str, int]
    lr: float | None
    trials: tuple[Record, ...]
    train_seconds: float
    count: int
    ipc: float
    network_spec: Record
    seen_by_matcher: bool | None = None
    metric: str = "accuracy"
    measures: Record = field(default_factory=dict)

    def to_json(self) -> Record:
        """The row as plain JSON values, statistics included."""
        mean, std, ci95 = spread(self.values)
        head = {"name": self.name, "network": self.network, "metric": self.metric, "mean": mean, "std": std}
        body = {"n": len(self.values), "ci95": ci95 and list(ci95), "values": list(self.values)}
        cost = {"steps": self.steps, "bytes": dict(self.nbytes), "train_seconds": self.train_seconds}
        choice = {"lr": self.lr, "trials": [dict(trial) for trial in self.trials]}
        size = {"count": self.count, "ipc": int(self.ipc) if self.ipc == int(self.ipc) else self.ipc}
        net = {"network_spec": self.network_spec, "seen_by_matcher": self.seen_by_matcher}
        return head | body | cost | choice | size | net | dict(self.measures)


@dataclass(frozen=True)
class Table:
    """What `evaluate` found: rows in the order of networks, then of training sets."""

    dataset: str
    rows: tuple[Row, ...]
    recipe: Spelled
    seed: int
    cost: Record
    source_matches: bool | None
    scores: Record = field(default_factory=dict)
    protocol: str = PROTOCOL
    seeds: int | None = None  # networks of each kind, where not all of them are reported
    protocol_spec: Record = field(default_factory=dict)
    fingerprint: str = ""  # of the dataset
    command: str = ""  # that made it, as it was typed
    parts: Record = field(default_factory=dict)  # examples in the fit, validation and test part
    untested: tuple[str, ...] = ()  # classes of which the test part has none

    def to_json(self) -> Record:
        """The object that `evaluate --json` prints: plain JSON values, fractions, no NaN."""
        rows = [row.to_json() for row in self.rows]
        head = {"protocol": self.protocol, "dataset": self.dataset, "rows": rows, "scores": dict(self.scores)}
        setting = {"recipe": self.recipe.to_dict(), "seed": self.seed, "cost": self.cost}
        trained = {} if self.seeds is None else {"seeds": self.seeds}
        spec = {"protocol_spec": dict(self.protocol_spec)} if self.protocol_spec else {}
        data: Record = {"source_matches": self.source_matches}
        data |= {"fingerprint": self.fingerprint} if self.fingerprint else {}
        data |= {"parts": dict(self.parts)} if self.parts else {}
        data |= {"untested": list(self.untested)} if self.untested else {}
        typed = {"command": self.command} if self.command else {}
        return head | setting | trained | data | spec | typed

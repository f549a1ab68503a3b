"""Results for people, from plain JSON: the table of `evaluate --json`, a run with its settings and curves."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ddengine.errors import one_line

HEAD = ("set", "network", "accuracy %", "95 % interval", "n", "lr", "steps", "bytes")
METRICS = {"accuracy": "accuracy", "roc_auc": "ROC-AUC"}
RIVALS = ("random", "random_bytes")  # the first that a table has is what the set is compared with
LEFT = 2  # columns of words; the others are numbers and align right
SHOWN = 20  # class names of a run that are listed


def table_text(table: Mapping[str, Any]) -> str:
    """The table as aligned plain text for each metric: a title, one line per row, the verdict."""
    return "\n".join(map(_text, by_metric(table)))


def _text(table: Mapping[str, Any]) -> str:
    rows = [head(table), *cells(table)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD))]
    lines = ["  ".join(_padded(row, widths)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join([title(table), "", *lines, "", *verdicts(table)]).rstrip() + "\n"


def table_markdown(table: Mapping[str, Any]) -> str:
    """The table as Markdown for each metric, with a title above and the verdict below as a list."""
    return "\n".join(map(_markdown, by_metric(table)))


def _markdown(table: Mapping[str, Any]) -> str:
    rule = [":--"] * LEFT + ["--:"] * (len(HEAD) - LEFT)
    lines = [_markdown_row(row) for row in (head(table), rule, *cells(table))]
    notes = [f"- {_literal(verdict)}" for verdict in verdicts(table)]
    return "\n".join([f"**{_literal(title(table))}**", "", *lines, "", *notes]).rstrip() + "\n"


def by_metric(table: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The table once for each metric that its rows have, with the rows of that metric."""
    metrics = dict.fromkeys(_metric(row) for row in table["rows"])
    return [{**table, "rows": [r for r in table["rows"] if _metric(r) == name]} for name in metrics]


def head(table: Mapping[str, Any]) -> tuple[str, ...]:
    """The heads of the columns of a table of one metric."""
    name = _metric(table["rows"][0])
    return (*HEAD[:LEFT], f"{METRICS.get(name, name)} %", *HEAD[LEFT + 1 :])


def _metric(row: Mapping[str, Any]) -> str:
    return str(row.get("metric", "accuracy"))


def run_markdown(run: Mapping[str, Any]) -> str:
    """A run as Markdown: its settings, the table of its last evaluation, both ends of each curve."""
    about = [("setting", "value"), (":--", ":--"), *settings(run)]
    ends = [("metric", "first", "last"), (":--", "--:", "--:"), *curve_ends(run["curves"])]
    table = table_markdown(run["table"]) if run["table"] else f"{_literal(not_evaluated(run))}\n"
    parts = [f"## {_literal(run['path'])}", "", *map(_markdown_row, about), "", table]
    return "\n".join(parts + [_markdown_row(row) for row in ends if run["curves"]]).rstrip() + "\n"


def not_evaluated(run: Mapping[str, Any]) -> str:
    """What stands in place of the table of a run that has none."""
    if run["set"] is None:
        return "not finished: repeat its distill command"
    return f"not evaluated yet: {shlex.join(['ddengine', 'evaluate', run['path']])}"


def curve_ends(curves: Mapping[str, Sequence[Sequence[float | int]]]) -> list[tuple[str, ...]]:
    """Metric, first and last value with its step, for each curve."""
    ends = {metric: (points[0], points[-1]) for metric, points in curves.items()}
    return [
        (metric, *(f"{value:.4g} (step {step})" for step, value in pair)) for metric, pair in ends.items()
    ]


def settings(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What was distilled and how: pairs of a name and a line; what only a finished run has may be absent."""
    identity, made = run["run"], run["set"]
    dataset, matcher = identity["dataset"], identity["matcher"]
    shape, kind = "x".join(map(str, dataset["shape"])), dataset.get("kind", "images")
    shape = f"images of {shape}" if kind == "images" else f"graphs of {shape} node label codes"
    options = {key: value for key, value in matcher.items() if key not in ("type", "options", "network")}
    network = matcher.get("network") if made is None else made["recipe"].get("network")
    found = [
        ("dataset", f"{dataset['name']}, {shape}, {dataset.get('preprocessing', '?')}"),
        ("classes", "" if made is None else _some(made["dataset"]["classes"])),
        ("matcher", matcher["type"]),
        ("options", _pairs({**options, **(matcher.get("options") or {})})),
        ("network", _pairs(network)),
        ("budget", _pairs(identity["budget"])),
        ("experts", _pairs(identity.get("experts"))),
        ("seed", f"{identity.get('seed', '?')}, precision {identity.get('precision', '?')}"),
        *([] if made is None else _costs(made)),
    ]
    return [(name, str(text)) for name, text in found if text]


def _costs(made: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    how, budget = made["provenance"], made["budget"]
    parts = [part for part in ("images", "trees", "labels", "extras", "total") if part in budget]
    what = "items" if "trees" in budget else "images"
    yield "size", f"{made['count']} {what} ({made['kind']}, labels: {made['y_kind']})"
    yield "bytes", ", ".join(f"{part} {budget[part]:,}" for part in parts)
    yield "cost", ", ".join(f"{key} {how.get(key, '?')}" for key in ("steps", "seconds", "peak_memory_bytes"))
    yield "made on", f"{how.get('device', '?')}, threads {how.get('threads', '?')}"
    yield "versions", _pairs(how.get("versions"))


def _pairs(values: Any, path: str = "") -> str:
    """`key value, ...` of a table and the tables in it, without what is None."""
    if not isinstance(values, Mapping):
        return ""
    found = (
        _pairs(value, f"{path}{key}.") if isinstance(value, Mapping) else f"{path}{key} {_spelled(value)}"
        for key, value in values.items()
        if value is not None
    )
    return ", ".join(text for text in found if text)


def _spelled(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{len(names)}: {', '.join(names[:SHOWN])}{more}"


def _markdown_row(row: Sequence[str]) -> str:
    return "| " + " | ".join(_literal(cell).replace("|", "\\|") for cell in row) + " |"


def _literal(text: str) -> str:
    """Text from a file on one line, with nothing in it that Markdown takes for HTML."""
    return one_line(text).replace("<", "&lt;")


def title(table: Mapping[str, Any]) -> str:
    """Dataset, protocol and root seed in one line."""
    seed = f", seed {table['seed']}" if "seed" in table else ""
    return f"{table['dataset']}, {table['protocol']}{seed}"


def verdicts(table: Mapping[str, Any], subject: str = "distilled") -> list[str]:
    """One sentence per network: how far `subject` is from random, and whether their intervals are apart."""
    by_key = {(row["network"], row["name"]): row for row in table["rows"]}
    rival = next((name for name in RIVALS for row in table["rows"] if row["name"] == name), RIVALS[0])
    networks = dict.fromkeys(row["network"] for row in table["rows"])
    pairs = [(net, by_key.get((net, subject)), by_key.get((net, rival))) for net in networks]
    return [_verdict(net, mine, theirs) for net, mine, theirs in pairs if mine and theirs]


def _verdict(network: str, mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    points = 100 * (mine["mean"] - theirs["mean"])
    side = f"{abs(points):.1f} points {'above' if points >= 0 else 'below'}"
    return f"{mine['name']} is {side} {theirs['name']} on {network}: {_apart(mine['ci95'], theirs['ci95'])}"


def _apart(a: Sequence[float] | None, b: Sequence[float] | None) -> str:
    if a is None or b is None:
        return "no intervals, one network each"
    return "95 % intervals apart" if a[0] > b[1] or b[0] > a[1] else "95 % intervals overlap"


def cells(table: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The table's rows as texts, in the columns of HEAD."""
    return [
        (
            row["name"],
            row["network"],
            _percent(row["mean"]) + ("" if row["std"] is None else f" ± {_percent(row['std'])}"),
            "-" if row["ci95"] is None else " to ".join(_percent(end) for end in row["ci95"]),
            str(row["n"]),
            "-" if row.get("lr") is None else f"{row['lr']:.3g}",
            str(row["steps"]),
            f"{row['bytes']['total']:,}",
        )
        for row in table["rows"]
    ]


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f}"


def _padded(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    return [
        cell.ljust(width) if column < LEFT else cell.rjust(width)
        for column, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]

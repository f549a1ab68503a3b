"""Results for people, from plain JSON: the table of `evaluate --json`, a run with its settings and curves."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ddengine.errors import one_line
from ddengine.grids import ABSENT, MIB, Cell, Grid, literal, markdown_row, number, percent, word

HEAD = ("set", "network", "accuracy %", "95 % interval", "n", "lr", "steps", "bytes")
METRICS = {"accuracy": "accuracy", "roc_auc": "ROC-AUC"}
RIVALS = ("random", "random_bytes")  # the first that a table has is what the set is compared with
SUBJECT = "distilled"
LEFT = 2  # columns of words; the others are numbers and align right
SCORES = ("hlr", "ior", "lrs", "ars")
SHOWN = 20  # class names of a run that are listed
PARTS = ("images", "trees", "labels", "extras", "total")


def table_text(table: Mapping[str, Any]) -> str:
    """The table as aligned plain text for each metric: a title, one line per row, the verdict; its scores."""
    parts = []
    for found in by_metric(table):
        head, said = one_line(title(found)), map(one_line, notes(found))
        parts.append("\n".join([head, "", results(found).text(), "", *said]).rstrip())
    parts += [f"{one_line(name)}\n\n{grid.text()}" for name, grid in beside(table)]
    return "\n\n".join(parts) + "\n"


def table_markdown(table: Mapping[str, Any]) -> str:
    """The table as Markdown for each metric, title above, verdict below as a list; then its scores."""
    parts = []
    for found in by_metric(table):
        said = [f"- {literal(note)}" for note in notes(found)]
        lines = [f"**{literal(title(found))}**", "", results(found).markdown(), "", *said]
        parts.append("\n".join(lines).rstrip())
    parts += [f"**{literal(name)}**\n\n{grid.markdown()}" for name, grid in beside(table)]
    return "\n\n".join(parts) + "\n"


def by_metric(table: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The table once for each metric that its rows have, with the rows of that metric."""
    metrics = dict.fromkeys(metric_of(row) for row in table["rows"])
    return [{**table, "rows": [r for r in table["rows"] if metric_of(r) == name]} for name in metrics]


def metric_of(row: Mapping[str, Any]) -> str:
    """What the values of a row measure."""
    return str(row.get("metric", "accuracy"))


def results(table: Mapping[str, Any]) -> Grid:
    """The rows of a table of one metric in the columns of HEAD."""
    name = metric_of(table["rows"][0])
    head = (*HEAD[:LEFT], f"{METRICS.get(name, name)} %", *HEAD[LEFT + 1 :])
    return Grid(head, tuple(map(_result, table["rows"])), LEFT)


def _result(row: Mapping[str, Any]) -> tuple[Cell, ...]:
    mean, interval = percent(row["mean"])[0], ABSENT
    mean += "" if row["std"] is None else f" ± {percent(row['std'])[0]}"
    if row["ci95"] is not None:
        interval = (" to ".join(percent(end)[0] for end in row["ci95"]), row["ci95"][0])
    counts = number(row["n"], "d"), number(row.get("lr"), ".3g"), number(row["steps"], "d")
    total = number(row["bytes"]["total"])
    return word(row["name"]), word(row["network"]), (mean, row["mean"]), interval, *counts, total


def beside(table: Mapping[str, Any]) -> Iterator[tuple[str, Grid]]:
    """What a table may have beside its rows, each with a name: scores, their components, further measures."""
    scored = scores(table)
    if scored is not None:
        yield "scores (fractions)", scored
    parts = components(table)
    if scored is not None and parts is not None:
        yield f"components of the scores on {table['scores'].get('network', '?')} (fractions)", parts
    more = measures(table)
    if more is not None:
        yield "calibration, worst class and robustness (%)", more


def scores(table: Mapping[str, Any]) -> Grid | None:
    """HLR, IOR, LRS and ARS as fractions, one row a network; None where there are none."""
    found = table.get("scores") or {}
    networks = found.get("networks") or ({found.get("network", "?"): found} if found else {})
    rows = tuple(
        (word(label), *(number(values.get(name), ".3f") for name in SCORES))
        for label, values in networks.items()
        if any(values.get(name) is not None for name in SCORES)
    )
    return Grid(("network", *(name.upper() for name in SCORES)), rows) if rows else None


def components(table: Mapping[str, Any]) -> Grid | None:
    """What the scores of their network were computed from, and what those lack that are not there."""
    parts = (table.get("scores") or {}).get("components") or {}
    means, rows, missing = (_mapping(parts.get(key)) for key in ("accuracies", "rows", "missing"))
    found = [(word(role), word(rows.get(role, "-")), number(mean, ".3f")) for role, mean in means.items()]
    found += [(word(key), word("-"), number(value, ".3f")) for key, value in parts.items() if _number(value)]
    for score, lack in missing.items():
        needed = ", ".join(map(str, lack)) if isinstance(lack, list) else str(lack)
        found.append((word(f"{score.upper()} lacks"), word(needed), ABSENT))
    return Grid(("component", "row", "value"), tuple(found), LEFT) if found else None


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _number(value: Any) -> bool:
    return type(value) in (int, float)


def _leaves(values: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Names and values of a table and the tables in it, without what is None."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{path}{key}.")
        elif value is not None:
            yield f"{path}{key}", value


def measures(table: Mapping[str, Any]) -> Grid | None:
    """Calibration error, worst class and accuracy under corruptions in percent; None where there are none."""
    rows = [row for row in table["rows"] if _measured(row)]
    kinds = [key for key in ("ece", "worst_class") if any(row.get(key) is not None for row in rows)]
    names = list(dict.fromkeys(name for row in rows for name in row.get("robust") or {}))
    if not kinds and not names:
        return None
    head = ("set", "network", *({"ece": "ECE", "worst_class": "worst class"}[key] for key in kinds), *names)
    return Grid(head, tuple(_measure(row, kinds, names) for row in rows), LEFT)


def _measure(row: Mapping[str, Any], kinds: Sequence[str], names: Sequence[str]) -> tuple[Cell, ...]:
    found, robust = (percent(row.get(key)) for key in kinds), row.get("robust") or {}
    return word(row["name"]), word(row["network"]), *found, *(percent(robust.get(name)) for name in names)


def _measured(row: Mapping[str, Any]) -> bool:
    return bool(row.get("robust")) or any(row.get(key) is not None for key in ("ece", "worst_class"))


def by_class(table: Mapping[str, Any], names: Sequence[str] = (), subject: str = SUBJECT) -> Grid | None:
    """Accuracy of each class in percent for the rows of `subject`, a column for each network; None if untold.

    Classes have their numbers for names where `names` are not as many.
    """
    rows = [row for row in table["rows"] if row["name"] == subject and row.get("per_class")]
    if not rows:
        return None
    count = max(len(row["per_class"]) for row in rows)
    labels = list(names) if len(names) == count else [f"class {number}" for number in range(count)]
    lines = tuple(
        (word(label), *(percent((*row["per_class"], *[None] * count)[c]) for row in rows))
        for c, label in enumerate(labels)
    )
    return Grid(("class", *(f"{row['network']} %" for row in rows)), lines)


def costs(run: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What each training set of a run costs: bytes by part; seconds and peak memory of its distillation, and
    seconds of training all networks of its row, None where that is unknown or was not done.
    """
    made = run["set"]
    how = {} if made is None else made["provenance"]
    distilled = {"distil_seconds": how.get("seconds"), "peak_memory_bytes": how.get("peak_memory_bytes")}
    if run["table"] is None:
        alone = {"name": SUBJECT, "network": None, "bytes": {} if made is None else _parts(made["budget"])}
        return [] if made is None else [{**alone, **distilled, "train_seconds": None}]
    found = []
    for row in run["table"]["rows"]:
        before = distilled if row["name"] == SUBJECT else dict.fromkeys(distilled)
        head = {"name": row["name"], "network": row["network"], "bytes": _parts(row["bytes"])}
        found.append({**head, **before, "train_seconds": row.get("train_seconds")})
    return found


def _parts(nbytes: Mapping[str, int]) -> dict[str, int]:
    return {part: nbytes[part] for part in PARTS if part in nbytes}


def cost_grid(found: Sequence[Mapping[str, Any]]) -> Grid:
    """What `costs` gives as a table."""
    parts = [part for part in PARTS if any(part in cost["bytes"] for cost in found)]
    units = [f"{part} bytes" for part in parts]
    head = ("set", "network", *units, "distil s", "peak MiB", "train s")
    return Grid(head, tuple(_cost(cost, parts) for cost in found), LEFT)


def _cost(cost: Mapping[str, Any], parts: Sequence[str]) -> tuple[Cell, ...]:
    sizes = (number(cost["bytes"].get(part)) for part in parts)
    seconds, trained = (number(cost[key], ",.1f") for key in ("distil_seconds", "train_seconds"))
    memory = number(cost["peak_memory_bytes"], ",.1f", MIB)
    return word(cost["name"]), word(cost["network"] or "-"), *sizes, seconds, memory, trained


def run_markdown(run: Mapping[str, Any]) -> str:
    """A run as Markdown: its settings, the table of its last evaluation, costs, both ends of each curve."""
    about = [("setting", "value"), (":--", ":--"), *settings(run)]
    ends = [("metric", "first", "last"), (":--", "--:", "--:"), *curve_ends(run["curves"])]
    table = table_markdown(run["table"]) if run["table"] else f"{literal(not_evaluated(run))}\n"
    spent = costs(run)
    cost = ["**cost**", "", cost_grid(spent).markdown(), ""] if spent else []
    parts = [f"## {literal(run['path'])}", "", *map(markdown_row, about), "", table, *cost]
    return "\n".join(parts + [markdown_row(row) for row in ends if run["curves"]]).rstrip() + "\n"


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
    if shape:
        shape = f"images of {shape}" if kind == "images" else f"graphs of {shape} node label codes"
    options = {key: value for key, value in matcher.items() if key not in ("type", "options", "network")}
    network = matcher.get("network") if made is None else made["recipe"].get("network")
    found = [
        ("dataset", ", ".join(filter(None, [dataset["name"], shape, dataset.get("preprocessing", "")]))),
        ("classes", "" if made is None else _some(made["dataset"]["classes"])),
        ("matcher", matcher["type"]),
        ("options", _pairs({**options, **(matcher.get("options") or {})})),
        ("network", _pairs(network)),
        ("budget", _pairs(identity["budget"])),
        ("experts", _pairs(identity.get("experts"))),
        (
            "seed",
            f"{identity['seed']}, precision {identity.get('precision', '?')}" if "seed" in identity else "",
        ),
        *([] if made is None else _made(made)),
    ]
    return [(name, str(text)) for name, text in found if text]


def _made(made: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    how, what = made["provenance"], "items" if "trees" in made["budget"] else "images"
    yield "size", f"{made['count']} {what} ({made['kind']}, labels: {made['y_kind']})"
    yield "bytes", ", ".join(f"{part} {size:,}" for part, size in _parts(made["budget"]).items())
    if "steps" in how:
        done = f"{how['steps']} steps on {how.get('device', '?')}, threads {how.get('threads', '?')}"
        yield "made in", done
    yield "versions", _pairs(how.get("versions"))


def _pairs(values: Any) -> str:
    """`key value, ...` of a table and the tables in it, without what is None."""
    if not isinstance(values, Mapping):
        return ""
    return ", ".join(f"{key} {_spelled(value)}" for key, value in _leaves(values))


def _spelled(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{len(names)}: {', '.join(names[:SHOWN])}{more}"


def title(table: Mapping[str, Any]) -> str:
    """Dataset, protocol and root seed in one line, and whether weights were chosen on the test part."""
    seed = f", seed {table['seed']}" if "seed" in table else ""
    chosen = ", weights chosen on the test part" if selected(table) else ""
    return f"{table['dataset']}, {table['protocol']}{seed}{chosen}"


def selected(table: Mapping[str, Any]) -> bool:
    """Whether the scored weights of a table are those that are best on the test part."""
    return (table.get("protocol_spec") or {}).get("select") == "best on test"


def notes(table: Mapping[str, Any]) -> list[str]:
    """Lines below a table: its verdicts, on how many examples it rests, and what makes it say less."""
    parts, untested = _mapping(table.get("parts")), table.get("untested") or ()
    found = verdicts(table)
    if parts:
        sizes = ", ".join(f"{name} {size:,}" for name, size in parts.items())
        found.append(f"examples: {sizes}")
    if untested:
        named = ", ".join(f"'{name}'" for name in untested[:SHOWN])
        found.append(f"warning: the test part has no example of {named}: scores are of the other classes")
    return found


def verdicts(table: Mapping[str, Any], subject: str = SUBJECT) -> list[str]:
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

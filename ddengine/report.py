"""Tables for people from the object that `evaluate --json` prints: plain text, Markdown, a verdict."""

from collections.abc import Mapping, Sequence
from typing import Any

HEAD = ("set", "network", "accuracy %", "95 % interval", "n", "lr", "steps", "bytes")
LEFT = 2  # columns of words; the others are numbers and align right


def table_text(table: Mapping[str, Any]) -> str:
    """The table as aligned plain text, one line per row, with a title above and the verdict below."""
    rows = [HEAD, *_cells(table)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD))]
    lines = ["  ".join(_padded(row, widths)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join([title(table), "", *lines, "", *verdicts(table)]).rstrip() + "\n"


def table_markdown(table: Mapping[str, Any]) -> str:
    """The table as Markdown, with a title above and the verdict below as a list."""
    rule = [":--"] * LEFT + ["--:"] * (len(HEAD) - LEFT)
    lines = ["| " + " | ".join(row) + " |" for row in (HEAD, rule, *_cells(table))]
    notes = [f"- {verdict}" for verdict in verdicts(table)]
    return "\n".join([f"**{title(table)}**", "", *lines, "", *notes]).rstrip() + "\n"


def title(table: Mapping[str, Any]) -> str:
    """Dataset, protocol and root seed in one line."""
    seed = f", seed {table['seed']}" if "seed" in table else ""
    return f"{table['dataset']}, {table['protocol']}{seed}"


def verdicts(table: Mapping[str, Any], subject: str = "distilled", rival: str = "random") -> list[str]:
    """One sentence per network: how far `subject` is from `rival`, and whether their intervals are apart."""
    by_key = {(row["network"], row["name"]): row for row in table["rows"]}
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


def _cells(table: Mapping[str, Any]) -> list[tuple[str, ...]]:
    return [
        (
            row["name"],
            row["network"],
            _percent(row["mean"]) + ("" if row["std"] is None else f" ± {_percent(row['std'])}"),
            "-" if row["ci95"] is None else " to ".join(_percent(end) for end in row["ci95"]),
            str(row["n"]),
            f"{row['lr']:.3g}" if "lr" in row else "-",
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

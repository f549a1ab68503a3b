"""A privacy audit for people, from plain JSON: text with its verdicts, and the section of a data card."""

from collections.abc import Mapping, Sequence
from typing import Any

from ddengine.errors import one_line

Table = tuple[tuple[str, ...], list[tuple[str, ...]]]
NEAR = ("set", "images", "copies", "to a member", "to held-out", "nearer %", "95 % interval", "p")
LEAK = ("trained on", "attacked", "AUC", "TPR % at 1 % FPR", "95 % interval", "advantage", "accuracy %")
NAMES = {
    "random": "random real",
    "random_own": "random real, own images",
    "full": "full data",
    "held_out": "held-out real",
    "teachers": "stored teachers",
}
CHANCE, FPR = 0.5, 0.01  # shares where nothing leaks: nearer to a member; members found


def audit_text(audit: Mapping[str, Any]) -> str:
    """The audit as aligned plain text: a title, the verdicts, two tables, and that no guarantee is given."""
    title = one_line(f"{audit['dataset']}, privacy audit, seed {audit['seed']}")
    near, leak = _near(audit), _leak(audit)
    about = [_about_near(audit), *_aligned(near), "", _about_leak(audit), *_aligned(leak)]
    return "\n".join([title, "", *verdicts(audit), "", *about, "", one_line(audit["note"])]) + "\n"


def card_lines(audit: Mapping[str, Any]) -> list[str]:
    """The audit as Markdown lines of a data card, its heading first, with no markup from the file."""
    found = [f"- {_literal(verdict)}" for verdict in verdicts(audit)]
    near, leak = _markdown(_near(audit)), _markdown(_leak(audit))
    about = [_literal(_about_near(audit)), "", *near, "", _literal(_about_leak(audit)), "", *leak]
    return ["## Privacy audit", "", *found, "", *about, "", _literal(audit["note"])]


def verdicts(audit: Mapping[str, Any]) -> list[str]:
    """One sentence each: copies, nearness and membership of the set; whether the members are its source."""
    near, leak = _by_name(audit["neighbours"]["rows"]), _by_name(audit["membership"]["rows"])
    mine, real, tpr = near["distilled"], near["random"], leak["distilled"]["tpr"]
    found = [
        f"{mine['copies']} of {mine['images']} images are copies of training images "
        f"(random real: {real['copies']} of {real['images']})",
        f"{_percent(mine['nearer']['share'])} % are nearer to a member than to any held-out image "
        f"(random real: {_percent(real['nearer']['share'])} %): {_beside(mine['nearer']['ci95'], CHANCE)}",
        f"networks trained on the set: {_percent(tpr['mean'])} % of members are found at 1 % FPR "
        f"(random real, own images: {_percent(leak['random_own']['tpr']['mean'])} %): "
        f"{_beside(tpr['ci95'], FPR)}",
    ]
    if audit["source_matches"] is False:
        found.append("this is not the data that the set was made from: its members may be none of the set's")
    return found


def _literal(text: str) -> str:
    """Text from a file on one line, with nothing in it that Markdown takes for HTML or for a new cell."""
    return one_line(text).replace("<", "&lt;").replace("|", "\\|")


def _by_name(rows: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    return {row["name"]: row for row in rows}


def _beside(interval: Sequence[float], chance: float) -> str:
    if interval[0] <= chance <= interval[1]:
        return f"no difference from chance shown, 95 % interval {_interval(interval)}"
    side = "more" if interval[0] > chance else "less"
    return f"{side} than by chance, 95 % interval {_interval(interval)}"


def _about_near(audit: Mapping[str, Any]) -> str:
    rows, draws = audit["neighbours"]["rows"], audit["neighbours"]["draws"]
    return (
        f"Distance to the nearest image (median; RMS of pixels in [0, 1]), beside {rows[0]['pool']} of "
        f"{audit['sizes']['fit']} training images and as many held-out ones, mean of {draws} draws:"
    )


def _about_leak(audit: Mapping[str, Any]) -> str:
    part, row = audit["membership"], audit["membership"]["rows"][0]
    return (
        f"Membership by the loss of {row['networks']} {part['network']['name']} networks of "
        f"{part['recipe']['steps']} steps, beside {row['non_members']} held-out images:"
    )


def _near(audit: Mapping[str, Any]) -> Table:
    return NEAR, [
        (
            _name(row),
            str(row["images"]),
            str(row["copies"]),
            *(f"{row['distance'][side]['median']:.4f}" for side in ("members", "control")),
            _percent(row["nearer"]["share"]),
            _interval(row["nearer"]["ci95"]),
            f"{row['nearer']['p_value']:.2g}",
        )
        for row in audit["neighbours"]["rows"]
    ]


def _leak(audit: Mapping[str, Any]) -> Table:
    return LEAK, [
        (
            _name(row),
            str(row["members"]),
            f"{row['auc']['mean']:.3f}",
            _percent(row["tpr"]["mean"]),
            _interval(row["tpr"]["ci95"]),
            f"{row['advantage']['mean']:.3f}",
            " / ".join(_percent(row["accuracy"][side]) for side in ("members", "non_members")),
        )
        for row in audit["membership"]["rows"]
    ]


def _name(row: Mapping[str, Any]) -> str:
    return NAMES.get(row["name"], one_line(row["name"]))


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f}"


def _interval(ends: Sequence[float]) -> str:
    return " to ".join(map(_percent, ends))


def _aligned(table: Table) -> list[str]:
    """The table's lines under a rule; the first column is of words, the others align right."""
    rows = [table[0], *table[1]]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
        ).rstrip()
        for row in rows
    ]
    return [lines[0], "  ".join("-" * width for width in widths), *lines[1:]]


def _markdown(table: Table) -> list[str]:
    rule = [":--"] + ["--:"] * (len(table[0]) - 1)
    rows = [list(table[0]), rule, *([_literal(cell) for cell in row] for row in table[1])]
    return ["| " + " | ".join(row) + " |" for row in rows]

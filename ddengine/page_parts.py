"""Parts of a report's page: texts, sortable tables, bars with intervals, learning curves.

All that comes from a run's files is escaped; `text` is the only way of such a string into the page.
"""

import html
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ddengine.errors import one_line
from ddengine.grids import Grid
from ddengine.page_style import COLOURS
from ddengine.report import SUBJECT, curve_ends

Number = float | int
WIDTH, HEIGHT = 340, 190  # of a plot, in its own units
PLOT = (58, 12, 328, 160)  # left, top, right and bottom of its axes


def text(value: object) -> str:
    """`value` as HTML that shows it on one line and nothing else, in an attribute too."""
    return html.escape(one_line(value))


def sortable(grid: Grid, *, heat: bool = False) -> str:
    """A table whose heads sort it; with `heat` its fractions have a bar behind them."""
    sides = [""] * grid.words + [' class="right"'] * (len(grid.head) - grid.words)
    heads = (
        f'<th{side} scope="col"><button type="button">{text(name)}</button></th>'
        for name, side in _zip(grid.head, sides)
    )
    lines = [f'<div class="scroll"><table><thead><tr>{"".join(heads)}</tr></thead><tbody>']
    for row in grid.rows:
        found = []
        for column, ((shown, key), side) in enumerate(_zip(row, sides)):
            side = _heat(key) if heat and column >= grid.words else side
            found.append(f'<td{side} data-key="{text(key)}">{text(shown)}</td>')
        lines.append(f"<tr>{''.join(found)}</tr>")
    return "\n".join([*lines, "</tbody></table></div>"])


def _heat(key: Any) -> str:
    return f' class="right heat" style="--part:{percent(key):.1f}%"'


def bars(table: Mapping[str, Any], shown: Grid) -> str:
    """A bar for each row of a table of one metric, with its interval; `shown` has what is said beside it."""
    several = len({row["network"] for row in table["rows"]}) > 1
    lines = []
    for row, cells in _zip(table["rows"], shown.rows):
        name = f"{row['name']}, {row['network']}" if several else row["name"]
        subject = " subject" if row["name"] == SUBJECT else ""
        bar = f'<div class="bar{subject}" style="width:{percent(row["mean"]):.2f}%"></div>'
        if row["ci95"]:
            low, high = map(percent, row["ci95"])
            bar += f'<div class="interval" style="left:{low:.2f}%;width:{high - low:.2f}%"></div>'
        lines.append(f'<span>{text(name)}</span><div class="track">{bar}</div>')
        lines.append(f'<span class="right">{text(cells[shown.words][0])}</span>')
    return f'<div class="bars">{"".join(lines)}</div>'


def percent(fraction: Number) -> Number:
    """A fraction in percent, inside 0 to 100."""
    return 100 * min(max(fraction, 0), 1)


def _zip(*columns: Any) -> Any:
    return zip(*columns, strict=True)


def plots(runs: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The learning curves of all runs, one plot for each metric."""
    metrics = dict.fromkeys(metric for run in runs for metric in run["curves"])
    if not metrics:
        return
    yield "<section><h2>Learning curves</h2>"
    if len(runs) > 1:
        keys = "".join(_legend(number, run["path"]) for number, run in enumerate(runs))
        yield f'<p class="long">{keys}</p>'
    yield '<div class="plots">'
    for metric in metrics:
        yield _plot(
            metric, {n: run["curves"][metric] for n, run in enumerate(runs) if metric in run["curves"]}
        )
    yield "</div></section>"


def _legend(number: int, label: str) -> str:
    sample = f'<svg viewBox="0 0 24 10" aria-hidden="true"><path d="M0 5H24" {_stroke(number)}/></svg>'
    return f'<span class="key">{sample}{text(label)}</span>'


def _stroke(number: int) -> str:
    dashes = f' stroke-dasharray="{2 + 4 * (number // COLOURS)} 3"' if number >= COLOURS else ""
    return f'class="curve" stroke="var(--s{number % COLOURS})"{dashes}'


def _plot(metric: str, curves: Mapping[int, Sequence[Sequence[Number]]]) -> str:
    """One small plot of `metric`: a polyline for each run, axes, and their ends as labels."""
    points = [point for curve in curves.values() for point in curve]
    ends = [(min(column), max(column)) for column in _zip(*points)]
    left, top, right, bottom = PLOT
    lines = [f'<path class="axis" d="M{left} {top}V{bottom}H{right}"/>', *_labels(*ends)]
    for number, curve in curves.items():
        places = [_place(point, ends) for point in curve]
        drawn = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        x, y = places[-1]
        lines.append(f'<polyline {_stroke(number)} points="{drawn}"/>')
        lines.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="var(--s{number % COLOURS})"/>')
    last = ((number, curve_ends({metric: curve})[0]) for number, curve in curves.items())
    keys = "".join(_legend(number, f"{a.split(' ')[0]} to {b}") for number, (_, a, b) in last)
    box = f'viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{text(metric)} by step"'
    caption = f"<figcaption><strong>{text(metric)}</strong>{keys}</figcaption>"
    return f"<figure>{caption}<svg {box}>{''.join(lines)}</svg></figure>"


def _labels(steps: tuple[Number, Number], values: tuple[Number, Number]) -> Iterator[str]:
    left, top, right, bottom = PLOT
    for y, value in ((top, values[1]), (bottom, values[0])):
        yield f'<text x="{left - 6}" y="{y + 4}" text-anchor="end">{value:.4g}</text>'
    for x, said, anchor in ((left, f"step {steps[0]}", "start"), (right, str(steps[1]), "end")):
        yield f'<text x="{x}" y="{bottom + 18}" text-anchor="{anchor}">{said}</text>'


def _place(point: Sequence[Number], ends: Sequence[tuple[Number, Number]]) -> tuple[Number, Number]:
    """Where a point lies in the plot; what does not vary lies in the middle."""
    across, up = (
        (value - low) / (high - low) if high > low else 0.5 for value, (low, high) in _zip(point, ends)
    )
    left, top, right, bottom = PLOT
    return left + across * (right - left), bottom - up * (bottom - top)

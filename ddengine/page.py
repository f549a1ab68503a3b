"""One HTML file that shows runs, from their plain JSON: it asks for nothing from anywhere else.

All that comes from a run's files is escaped; `text` is the only way of such a string into the page.
"""

import html
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ddengine.errors import one_line
from ddengine.report import (
    HEAD,
    LEFT,
    by_metric,
    cells,
    curve_ends,
    head,
    not_evaluated,
    settings,
    title,
    verdicts,
)

Number = float | int
COLOURS = 6  # of runs in one plot; further runs repeat them with dashes
WIDTH, HEIGHT = 340, 190  # of a plot, in its own units
PLOT = (58, 12, 328, 160)  # left, top, right and bottom of its axes
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
STYLE = """
:root { color-scheme: light dark; --paper: #fcfcfb; --ink: #1b1c1e; --soft: #63666b; --line: #dcdddf;
  --fill: #f1f2f3; --rival: #9aa0a8; --s0: #2a6fd6; --s1: #d1580b; --s2: #14875b; --s3: #a03ab0;
  --s4: #8f6f00; --s5: #c22a54; }
@media (prefers-color-scheme: dark) { :root { --paper: #17181a; --ink: #e8e9eb; --soft: #a2a6ac;
  --line: #3a3d41; --fill: #222427; --rival: #767c85; --s0: #6ea8ff; --s1: #ff9a57; --s2: #4fc796;
  --s3: #d98ae6; --s4: #d8b843; --s5: #ff85a3; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 62rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; }
h1, h2, h3 { line-height: 1.25; overflow-wrap: anywhere; }
h2 { margin-top: 2.5rem; border-top: 1px solid var(--line); padding-top: 1rem; }
h3 { margin: 1.5rem 0 .5rem; font-size: 1rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; margin: 0; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
figure { margin: 0; }
figcaption { font-size: .875rem; overflow-wrap: anywhere; }
figcaption strong { margin-right: .5rem; }
.key { white-space: nowrap; margin-right: .75rem; }
.long .key { display: block; white-space: normal; }
.key svg { width: 1.5rem; height: .6rem; margin-right: .35rem; }
.picture img { max-width: 100%; height: auto; background: #fff; }
.scroll, pre { overflow-x: auto; }
pre { padding: .75rem; background: var(--fill); border-radius: .25rem; font-size: .8125rem; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .75rem .3rem 0; border-bottom: 1px solid var(--line); white-space: nowrap;
  text-align: left; }
.right { text-align: right; }
th button { all: unset; cursor: pointer; font-weight: 600; }
th button:focus-visible { outline: 2px solid var(--s0); }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
.bars { display: grid; grid-template-columns: fit-content(40%) minmax(4rem, 1fr) max-content;
  gap: .35rem .75rem; align-items: center; font-size: .875rem; font-variant-numeric: tabular-nums; }
.bars span { overflow-wrap: anywhere; }
.track { position: relative; height: 1rem; background: var(--fill); }
.bar, .interval { position: absolute; }
.bar { inset: 0 auto 0 0; background: var(--rival); }
.subject { background: var(--s0); }
.interval { top: 25%; height: 50%; border: solid var(--ink); border-width: 0 1.5px; }
.interval::after { content: ""; position: absolute; inset: calc(50% - .75px) 0 auto; height: 1.5px;
  background: var(--ink); }
.plots { display: grid; gap: 1.5rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr)); }
.bars + .scroll { margin-top: 2rem; }
figure > svg { width: 100%; height: auto; }
svg text { fill: var(--soft); font-size: 11px; }
.axis { stroke: var(--line); fill: none; }
.curve { fill: none; stroke-width: 1.75; stroke-linejoin: round; }
@media (max-width: 30rem) { dl { display: block; } dd { margin-bottom: .35rem; } }
"""
SCRIPT = """
for (const button of document.querySelectorAll("th button")) button.onclick = () => {
  const head = button.parentNode, body = head.closest("table").tBodies[0];
  const up = head.getAttribute("aria-sort") !== "ascending";
  for (const other of head.parentNode.children) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  const key = row => row.cells[head.cellIndex].dataset.key;
  const order = (a, b) => key(a) - key(b) || key(a).localeCompare(key(b));
  body.append(...[...body.rows].sort((a, b) => up ? order(a, b) : order(b, a)));
};
"""


def page(runs: Sequence[Mapping[str, Any]]) -> str:
    """The HTML document of `runs` (what `Run.shown` gives for each): one section each, then their curves."""
    name = f"ddengine report: {', '.join(run['path'] for run in runs)}"
    head = [
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{text(name)}</title><style>{STYLE}</style></head><body>",
        "<h1>Dataset distillation report</h1>",
    ]
    body = [line for run in runs for line in _section(run)]
    return "\n".join([*head, *body, *_plots(runs), f"<script>{SCRIPT}</script></body></html>"]) + "\n"


def text(value: object) -> str:
    """`value` as HTML that shows it on one line and nothing else, in an attribute too."""
    return html.escape(one_line(value))


def _section(run: Mapping[str, Any]) -> Iterator[str]:
    yield f"<section><h2>{text(run['path'])}</h2>"
    pairs = (f"<dt>{text(name)}</dt><dd>{text(value)}</dd>" for name, value in settings(run))
    yield f"<dl>{''.join(pairs)}</dl>"
    if run["preview"]:
        what = {"forest": "trees", "graphs": "graphs"}.get(run["set"]["kind"], "images")
        alt = f"the distilled {what}, one row a class: {', '.join(run['set']['dataset']['classes'][:20])}"
        yield f'<h3>The distilled {what}</h3><figure class="picture">'
        yield f'<img alt="{text(alt)}" src="data:image/png;base64,{text(run["preview"])}"></figure>'
    yield "<h3>Evaluation</h3>"
    if run["table"]:
        yield f"<p>{text(title(run['table']))}</p>"
        for table in by_metric(run["table"]):
            yield from _evaluation(table)
    else:
        yield f"<p>{text(not_evaluated(run))}</p>"
    yield "<h3>Commands</h3>"
    absent = "made from Python or by the demo: no command line says this"
    for name in ("distill", "evaluate"):
        if name == "distill" or run["table"]:
            yield f"<pre><code>{text(run['commands'][name] or f'# {name}: {absent}')}</code></pre>"
    yield "</section>"


def _evaluation(table: Mapping[str, Any]) -> Iterator[str]:
    sides, names = [""] * LEFT + [' class="right"'] * (len(HEAD) - LEFT), head(table)
    heads = (f'<th{side} scope="col"><button>{text(name)}</button></th>' for name, side in _zip(names, sides))
    yield f'<div class="scroll"><table><thead><tr>{"".join(heads)}</tr></thead><tbody>'
    for row, shown in _zip(table["rows"], cells(table)):
        found = (
            f'<td{side} data-key="{text(key)}">{text(cell)}</td>'
            for key, cell, side in _zip(_keys(row), shown, sides)
        )
        yield f"<tr>{''.join(found)}</tr>"
    yield "</tbody></table></div>"
    yield "".join(f"<p>{text(verdict)}</p>" for verdict in verdicts(table))
    metric = names[LEFT].removesuffix(" %")
    said = f"{metric[0].upper()}{metric[1:]}, 0 to 100 %, with 95 % intervals of the mean"
    yield f"<h3>{text(said)}</h3>{_bars(table)}"


def _zip(*columns: Any) -> Any:
    return zip(*columns, strict=True)


def _keys(row: Mapping[str, Any]) -> list[Any]:
    """What the columns of HEAD are sorted by."""
    interval = row["ci95"][0] if row["ci95"] else -1
    rate = -1 if row.get("lr") is None else row["lr"]
    numbers = [row["mean"], interval, row["n"], rate, row["steps"], row["bytes"]["total"]]
    return [row["name"], row["network"], *numbers]


def _bars(table: Mapping[str, Any]) -> str:
    several = len({row["network"] for row in table["rows"]}) > 1
    lines = []
    for row, shown in _zip(table["rows"], cells(table)):
        name = f"{row['name']}, {row['network']}" if several else row["name"]
        subject = " subject" if row["name"] == "distilled" else ""
        bar = f'<div class="bar{subject}" style="width:{_percent(row["mean"]):.2f}%"></div>'
        if row["ci95"]:
            low, high = map(_percent, row["ci95"])
            bar += f'<div class="interval" style="left:{low:.2f}%;width:{high - low:.2f}%"></div>'
        lines.append(f'<span>{text(name)}</span><div class="track">{bar}</div>')
        lines.append(f'<span class="right">{text(shown[2])}</span>')
    return f'<div class="bars">{"".join(lines)}</div>'


def _percent(fraction: Number) -> Number:
    return 100 * min(max(fraction, 0), 1)


def _plots(runs: Sequence[Mapping[str, Any]]) -> Iterator[str]:
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

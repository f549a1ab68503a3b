"""One HTML file that shows runs, from their plain JSON: it asks for nothing from anywhere else."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ddengine.compare import Pair, grids
from ddengine.page_parts import bars, plots, sortable, text
from ddengine.page_sheet import dialog, sheet
from ddengine.page_style import POLICY, SHEET, SORT, STYLE
from ddengine.report import (
    LEFT,
    beside,
    by_class,
    by_metric,
    cost_grid,
    costs,
    not_evaluated,
    notes,
    results,
    settings,
    title,
)

SCORES_SAID = (
    "HLR: accuracy of full data less that of the set, both with hard labels. IOR: accuracy of the set less "
    "that of random images, under the set's recipe. LRS and ARS, from 0 to 1: how much of its accuracy a set "
    "owes to neither soft labels nor augmentation."
)


def page(runs: Sequence[Mapping[str, Any]], pair: Pair | None = None) -> str:
    """The HTML document of `runs` (what `Run.shown` gives for each): one section each, then their curves.

    A `pair` of them comes first.
    """
    name = f"ddengine report: {', '.join(run['path'] for run in runs)}"
    head = [
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{text(name)}</title><style>{STYLE}</style></head><body>",
        "<main><h1>Dataset distillation report</h1>",
    ]
    body = [line for run in runs for line in _section(run)]
    end = [f"</main>{dialog(runs)}", f"<script>{SORT}{SHEET}</script></body></html>\n"]
    return "\n".join([*head, *_compared(pair), *body, *plots(runs), *end])


def _compared(pair: Pair | None) -> Iterator[str]:
    if pair is None:
        return
    yield "<section><h2>A against B</h2>"
    yield f"<dl><dt>A</dt><dd>{text(pair.a)}</dd><dt>B</dt><dd>{text(pair.b)}</dd></dl>"
    yield f"<p>{text(pair.said)}</p>"
    yield "".join(f"<p><strong>{text(line)}</strong></p>" for line in pair.verdicts())
    for name, grid in zip(("Differences", "Bytes and cost"), grids(pair.comparisons), strict=False):
        yield f"<h3>{name}</h3>{sortable(grid)}"
    yield "</section>"


def _section(run: Mapping[str, Any]) -> Iterator[str]:
    yield f"<section><h2>{text(run['path'])}</h2>"
    pairs = (f"<dt>{text(name)}</dt><dd>{text(value)}</dd>" for name, value in settings(run))
    yield f"<dl>{''.join(pairs)}</dl>"
    yield from sheet(run)
    yield "<h3>Evaluation</h3>"
    if run["table"]:
        yield from _evaluation(run)
    else:
        yield f"<p>{text(not_evaluated(run))}</p>"
    spent = costs(run)
    if spent:
        yield f"<h3>Bytes and cost</h3>{sortable(cost_grid(spent))}"
    yield from _commands(run)
    if run["card"] is not None:
        lines = "\n".join(map(text, run["card"].splitlines()))
        yield f'<details><summary>Data card</summary><pre class="card" tabindex="0">{lines}</pre></details>'
    yield "</section>"


def _commands(run: Mapping[str, Any]) -> Iterator[str]:
    yield "<h3>Commands</h3>"
    absent = "made from Python or by the demo: no command line says this"
    for name in ("distill", "evaluate"):
        if name == "distill" or run["table"]:
            yield f"<pre><code>{text(run['commands'][name] or f'# {name}: {absent}')}</code></pre>"


def _evaluation(run: Mapping[str, Any]) -> Iterator[str]:
    yield f"<p>{text(title(run['table']))}</p>"
    for table in by_metric(run["table"]):
        shown = results(table)
        yield sortable(shown)
        yield "".join(f"<p>{text(verdict)}</p>" for verdict in notes(table))
        metric = shown.head[LEFT].removesuffix(" %")
        said = f"{metric[:1].upper()}{metric[1:]}, 0 to 100 %, with 95 % intervals of the mean"
        yield f"<h3>{text(said)}</h3>{bars(table, shown)}"
    for name, grid in beside(run["table"]):
        said = text(name[:1].upper() + name[1:])
        if name.startswith("components"):
            yield f"<details><summary>{said}</summary>{sortable(grid)}</details>"
            continue
        yield f"<h3>{said}</h3>{sortable(grid)}"
        if name.startswith("scores"):
            yield f'<p class="note">{text(SCORES_SAID)}</p>'
    classes = by_class(run["table"], run["set"]["dataset"]["classes"] if run["set"] else ())
    if classes is not None:
        yield f"<h3>Accuracy of each class, distilled</h3>{sortable(classes, heat=True)}"

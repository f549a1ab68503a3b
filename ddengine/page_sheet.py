"""The pictures of a report's page: the images of a set by class, which open enlarged, or its preview."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ddengine.page_parts import text

TALL = 20  # classes beyond which the sheet scrolls in itself


def sheet(run: Mapping[str, Any]) -> Iterator[str]:
    """The pictures of a run (what `Run.shown` gives), nothing of one that has no set."""
    if run["set"] is None:
        return
    kind = run["set"]["kind"]
    what = {"forest": "trees", "graphs": "graphs"}.get(kind, "images")
    yield f"<h3>The distilled {what}</h3>"
    if run["sheet"]:
        yield from _tiles(run["sheet"], kind == "compensated")
    if run["preview"]:
        yield from _preview(run, what)
    elif not run["sheet"]:
        yield "<p>No picture: it is larger than this page has room for. See distilled/preview.png.</p>"


def _preview(run: Mapping[str, Any], what: str) -> Iterator[str]:
    """The stored picture, folded away under a sheet of tiles."""
    names = ", ".join(run["set"]["dataset"]["classes"][:20])
    said = f"the distilled {what}, one row a class"
    if run["sheet"]:
        said = "bases by class, and what compensators add to some of them"
        yield f"<details><summary>{said[0].upper()}{said[1:]}</summary>"
    yield f'<figure class="picture"><img alt="{text(said)}: {text(names)}" '
    yield f'src="data:image/png;base64,{text(run["preview"])}"></figure>'
    if run["sheet"]:
        yield "</details>"


def _tiles(found: Mapping[str, Any], composed: bool) -> Iterator[str]:
    rows = [row for row in found["rows"] if row["tiles"]]
    shown, total = sum(len(row["tiles"]) for row in rows), sum(row["total"] for row in found["rows"])
    what = "Bases and their sums with compensators" if composed else "Images"
    note = f"{what} by class: {shown:,} shown" + (f", {total - shown:,} more" if total > shown else "")
    soft = any(tile["shares"] for row in rows for tile in row["tiles"])
    note += ". Click one, or press Enter, to enlarge it; arrow keys move on."
    note += " Under it stand the likeliest classes of its label, of logits their softmax." if soft else ""
    yield f'<p class="note">{note}</p>'
    yield '<label class="zoom">Zoom <input type="range" min="1" max="4" step="0.5" value="1"></label>'
    width, height = found["size"]
    tall = ' tall" tabindex="0" role="region" aria-label="images by class' if len(rows) > TALL else ""
    yield f'<div class="sheet{tall}" style="--tile:{width:d}px">'
    for row in rows:
        more = row["total"] - len(row["tiles"])
        left = f" <small>{more:,} more</small>" if more else ""
        tiles = "".join(_tile(row["label"], tile, (width, height)) for tile in row["tiles"])
        yield f'<div class="row" role="group" aria-label="class {text(row["label"])}">'
        yield f'<p>{text(row["label"])}{left}</p><div class="tiles">{tiles}</div></div>'
    left_out = len(found["rows"]) - len(rows)
    yield f"</div>{f'<p>{left_out:,} classes are not shown.</p>' if left_out else ''}"


def _tile(label: str, tile: Mapping[str, Any], size: tuple[int, int]) -> str:
    shares = f' data-shares="{text(json.dumps(tile["shares"]))}"' if tile["shares"] else ""
    picture = (
        f'<img alt="{text(label)}, {text(tile["name"])}" width="{size[0]:d}" height="{size[1]:d}" '
        f'src="data:image/png;base64,{text(tile["png"])}">'
    )
    return f'<button type="button" class="tile" data-name="{text(tile["name"])}"{shares}>{picture}</button>'


def dialog(runs: Sequence[Mapping[str, Any]]) -> str:
    """Where a tile opens enlarged; nothing where no run has tiles."""
    if not any(run["sheet"] for run in runs):
        return ""
    return (
        '<dialog aria-labelledby="enlarged"><h2 id="enlarged"></h2><p></p><figure></figure>'
        '<div class="bars"></div><form method="dialog"><button>Close</button></form></dialog>'
    )

"""The picture of a set of graphs or of computation trees: a PNG with one row per class."""

import io
import textwrap
from collections import Counter
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from jaxtyping import Int
from PIL import Image

from ddengine import files
from ddengine.graphs import Graphs, GraphSpec
from ddengine.ops.dag import Trees, closed, take
from synth.sketches import (
    GAP,
    GRAPH_CELL,
    INK,
    SOFT,
    TIMES_SIZE,
    TREE_CELL,
    Mark,
    Sketch,
    graph_cells,
    joined,
    number,
    texts,
    tree_cells,
)

CLASSES_MAX, ITEMS_MAX = 8, 6  # rows, and items in a row
LABEL, TITLE, LINE, WIDTH_MIN = 132, 34, 20, 560  # pixels
PAPER, CELL, EDGE = "#ffffff", "#f6f6f4", "#8b9096"
# Okabe and Ito's colours, which colour-blind readers tell apart, first as circles and then as squares.
COLORS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9")
STYLES = tuple((color, marker) for marker in "os" for color in COLORS)
OTHER, OTHER_STYLE = -1, ("#ffffff", "D")
AREA = {"o": 62, "s": 52, "D": 34}  # square pixels that look alike
FONT = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")  # ships with matplotlib


def tree_sheet(decoded: Trees | Graphs, path: Path) -> None:
    """Write a PNG of up to 6 items of each of up to 8 classes: those of largest weight, the first of equals.

    An item of `Trees` is shown by its most frequent trees, a graph by a layout in which distances resemble
    path lengths. Colours stand for node codes. The same set gives the same bytes. Raises UsageError where
    `path` cannot be written.
    """
    chosen = _chosen(decoded)
    cells, names = _cells(decoded, [i for row in chosen for i in row])
    sketch, (width, height) = _laid_out(decoded, [[cells.pop(0) for _ in row] for row in chosen])
    styles = _styles(sketch.nodes[:, 2].astype(int))
    legend, deep = _legend(styles, names, decoded.spec, width)
    buffer = io.BytesIO()
    _render(joined([sketch, legend.moved(0, height)]), styles, (width, height + deep)).save(buffer, "PNG")
    files.write_bytes(Path(path), buffer.getvalue())


def _chosen(decoded: Trees | Graphs) -> list[list[int]]:
    """The items shown of each class shown."""
    classes = decoded.classes.cpu().numpy()
    weight = decoded.weight.numpy() if isinstance(decoded, Trees) else np.ones(len(classes))
    order = np.argsort(-weight, kind="stable")
    shown = range(min(len(decoded.spec.classes), CLASSES_MAX))
    return [order[classes[order] == c][:ITEMS_MAX].tolist() for c in shown]


def _cells(decoded: Trees | Graphs, items: list[int]) -> tuple[list[Sketch], list[str]]:
    """A box for each of the items, and what its codes of nodes are called."""
    index = torch.tensor(items, dtype=torch.int64)
    if isinstance(decoded, Trees):
        trees = closed(take(decoded, index))
        rows, codes = _distinct(trees.dag.x.numpy())
        return list(tree_cells(trees, codes, items)), rows
    graphs = decoded.take(index)
    rows, codes = _distinct(graphs.x.cpu().numpy())
    return list(graph_cells(graphs, codes, items)), rows


def _distinct(x: Int[np.ndarray, "n f"]) -> tuple[list[str], Int[np.ndarray, " n"]]:
    """The distinct rows as text, and the place of each row among them."""
    rows, codes = np.unique(x, axis=0, return_inverse=True)
    return [",".join(map(str, row)) for row in rows.tolist()], codes.reshape(-1)


def _laid_out(decoded: Trees | Graphs, cells: list[list[Sketch]]) -> tuple[Sketch, tuple[int, int]]:
    """Title, rows and what is left out, and the (width, height) of all that."""
    spec, many = decoded.spec, np.bincount(decoded.classes.cpu().numpy(), minlength=len(decoded.spec.classes))
    wide, high = TREE_CELL if isinstance(decoded, Trees) else GRAPH_CELL
    parts, y = [texts((GAP, TITLE / 2, _title(decoded), 14, INK, "left"))], TITLE
    for c, row in enumerate(cells):
        parts.append(_label(spec.classes[c], int(many[c])).moved(LABEL, y + high / 2))
        parts += [cell.moved(LABEL + GAP + place * (wide + GAP), y) for place, cell in enumerate(row)]
        y += high + GAP
    if left_out := len(spec.classes) - len(cells):
        said = number(left_out, "more class is not shown", "more classes are not shown")
        parts.append(texts((GAP, y + LINE / 2, said, 11, INK, "left")))
        y += LINE
    return joined(parts), (max(WIDTH_MIN, LABEL + GAP + max(map(len, cells)) * (wide + GAP)), y)


def _title(decoded: Trees | Graphs) -> str:
    hops = f"{number(decoded.dag.hops, 'hop')}, " if isinstance(decoded, Trees) else ""
    what = "computation trees of " + hops if hops else "graphs, "
    sizes = f"{number(len(decoded), 'item')}, {number(len(decoded.spec.classes), 'class', 'classes')}"
    return f"{_drawable(decoded.spec.name, 32)}: {what}{sizes}"


def _label(name: str, items: int) -> Sketch:
    """Name and size of a class, right-aligned at the origin; a wide name is set smaller."""
    lines = textwrap.wrap(_drawable(name, 48), 17)
    size = max(5, min(12, int(12 * (LABEL - GAP) / max(_width(line, 12) for line in lines))))
    below: list[Mark] = [(0.0, 16.0 * i, line, size, INK, "right") for i, line in enumerate(lines)]
    said = number(items, "item")
    return texts(*below, (0.0, 16.0 * len(lines), said, 10, SOFT, "right")).moved(0, -8.0 * len(lines))


def _styles(drawn: Int[np.ndarray, " v"]) -> dict[int, tuple[str, str]]:
    """Colour and marker of the codes drawn most often."""
    often = sorted(Counter(drawn.tolist()).items(), key=lambda pair: (-pair[1], pair[0]))
    found = {code: style for (code, _), style in zip(often, STYLES, strict=False)}
    return found | ({OTHER: OTHER_STYLE} if len(often) > len(found) else {})


def _legend(
    styles: dict[int, tuple[str, str]], names: list[str], spec: GraphSpec, width: int
) -> tuple[Sketch, int]:
    """What the colours mean, in as many lines as the width asks for, and their height."""
    what = "degrees:" if spec.codes_from == "degree" else "node codes:"
    first = GAP + _width(what, 11) + 16
    parts, x, y = [texts((GAP, LINE / 2, what, 11, INK, "left"))] if styles else [], first, LINE / 2
    for code in styles:
        name = "other" if code == OTHER else names[code]
        name = name if len(name) <= 24 else name[:23] + "…"
        if x > first and x + 12 + _width(name, 11) > width:
            x, y = first, y + LINE
        sample = Sketch(np.array([[x, y, code]], float), np.empty((0, 4)))
        parts += [sample, texts((x + 9, y, name, 11, INK, "left"))]
        x += 32 + _width(name, 11)
    return joined(parts), int(y + LINE / 2 + 6) if styles else 0


def _drawable(text: str, longest: int) -> str:
    """`text` on one line, cut, with a box for each character that the font lacks."""
    known = _font(12)
    shown = "".join(c if c.isprintable() else " " for c in text.encode(errors="replace").decode())
    shown = "".join(c if known.get_char_index(ord(c)) else "□" for c in shown).strip() or "?"
    return shown if len(shown) <= longest else shown[: longest - 1] + "…"


def _width(text: str, size: int) -> float:
    font = _font(size)
    font.set_text(text)
    return font.get_width_height()[0] / 64


def _font(size: int) -> Any:
    from matplotlib.font_manager import get_font

    font = get_font(str(FONT))
    font.set_size(size, 72)
    return font


def _render(sketch: Sketch, styles: dict[int, tuple[str, str]], size: tuple[int, int]) -> Image.Image:
    from matplotlib import style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with style.context("default"):  # a user's matplotlibrc does not change the picture
        figure = Figure((size[0] / 72, size[1] / 72), dpi=72, facecolor=PAPER)
        canvas = FigureCanvasAgg(figure)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(0, size[0]), ylim=(size[1], 0))
        axes.axis("off")
        _draw(axes, sketch, styles)
        canvas.draw()
        return Image.fromarray(np.asarray(canvas.buffer_rgba())[:, :, :3].copy())


def _draw(axes: Any, sketch: Sketch, styles: dict[int, tuple[str, str]]) -> None:
    from matplotlib.collections import LineCollection
    from matplotlib.font_manager import FontProperties
    from matplotlib.patches import Rectangle

    for x, y, width, height in sketch.boxes:
        axes.add_patch(Rectangle((x, y), width, height, facecolor=CELL, linewidth=0))
    axes.add_collection(LineCollection(sketch.lines.reshape(-1, 2, 2), colors=EDGE, linewidths=1.2, zorder=1))
    codes = sketch.nodes[:, 2].astype(int)
    codes = np.where(np.isin(codes, list(styles)), codes, OTHER)
    for code, (color, marker) in styles.items():
        x, y = sketch.nodes[codes == code, :2].T
        axes.scatter(x, y, AREA[marker], color, marker=marker, linewidths=0.7, edgecolors=INK, zorder=2)
    for x, y, text, size, color, side in sketch.marks:
        look = {"font": FontProperties(fname=FONT, size=size), "color": color, "zorder": 3}
        back = {"facecolor": CELL, "linewidth": 0, "pad": 0} if size == TIMES_SIZE else None
        axes.text(x, y, text, ha=side, va="center_baseline", parse_math=False, bbox=back, **look)

"""The contact sheet of a compensated set: its bases by class, and sums of some with compensators."""

import io
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from PIL import Image, ImageDraw
from torch import Tensor

from ddengine import files
from ddengine.composites import in_pixels
from ddengine.types import Images
from synth.compensated import Compensated
from synth.sheet import (
    CLASSES_MAX,
    FONT_SIZE,
    GAP,
    INK,
    LABEL_WIDTH,
    PAPER,
    draw_sheet,
    pictures,
    printable,
    text_font,
    tile_size,
    to_pixels,
    wrap,
)  # fmt: skip

BASES_OF_CLASS = 10  # as many as a contact sheet of many classes has room for
GROUPS_SHOWN, BASES_SHOWN, COMPENSATORS_SHOWN = 3, 4, 8
MARGIN = 4 * GAP


@dataclass(frozen=True)
class Table:
    """One addition table: `top` above the columns, and rows led by a name."""

    title: str
    top: list[Image.Image]
    rows: list[tuple[str, list[Image.Image]]]


def composite_sheet(synth: Compensated, path: str | Path) -> None:
    """Write a PNG: bases in rows by class, and for some groups what their compensators add to some bases.

    Compensators are drawn around mid-grey, which is zero, amplified as their title says. Each table shows a
    row of compensators, and under them some bases and their sums with these.
    """
    bases = draw_sheet(_taken(synth, _shown(synth.classes)))
    tables = [_draw(_table(synth, g)) for g in _groups(synth)]
    buffer = io.BytesIO()
    _stack([bases, *tables]).save(buffer, "PNG")
    files.write_bytes(Path(path), buffer.getvalue())


def _shown(classes: Tensor) -> Tensor:
    """The bases that a contact sheet has room for, so that no others are decoded."""
    kept = [(classes == c).nonzero().squeeze(1)[:BASES_OF_CLASS] for c in classes.unique()[:CLASSES_MAX]]
    return torch.cat(kept).sort().values


def _groups(synth: Compensated) -> list[int]:
    """The first groups that have both bases and compensators."""
    return synth.group.unique().tolist()[:GROUPS_SHOWN] if synth.compensators.shape[1] else []


def _taken(synth: Compensated, indices: Tensor) -> Images:
    """Composites with the class of their base, whatever their soft labels say."""
    classes = synth.classes[indices % len(synth.bases)]
    return Images(synth.composites().model_input(indices).detach(), classes, synth.spec)


def _table(synth: Compensated, g: int) -> Table:
    size, m = tile_size(synth.spec), min(synth.compensators.shape[1], COMPENSATORS_SHOWN)
    u = added_pixels(synth)[g, :m]
    gain = 0.5 / max(float(torch.quantile(u.abs().flatten(), 0.995)), 1e-3)
    more = f" ({synth.compensators.shape[1] - m} more)" if synth.compensators.shape[1] > m else ""
    title = f"group {g + 1} of {len(synth.compensators)}: compensators x {gain:.2g}, grey is 0{more}"
    shown = (u * gain + 0.5).clamp(0, 1)
    shown = shown if shown.shape[1] in (1, 3) else shown.mean(1, keepdim=True)
    top = pictures((shown * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous(), size)
    rows = []
    for i in _spread((synth.group == g).nonzero().squeeze(1)):
        indices = torch.arange(m + 1) * len(synth.bases) + i
        name = synth.spec.classes[int(synth.classes[i])]
        rows.append((printable(name), pictures(to_pixels(_taken(synth, indices)), size)))
    return Table(title, top, rows)


def added_pixels(synth: Compensated) -> Float[Tensor, "g m c h w"]:
    """Compensators in units of pixels in [0, 1]: what they add to an image once it is brought back."""
    u = synth.compensators.detach().cpu().float()
    return u if synth.real else in_pixels(u.flatten(0, 1), synth.spec).reshape(u.shape)


def _spread(members: Tensor) -> list[int]:
    """Up to four of the bases, from first to last."""
    count = min(BASES_SHOWN, len(members))
    return members[torch.linspace(0, len(members) - 1, count).round().long()].tolist()


def _draw(table: Table) -> Image.Image:
    font, (width, height) = text_font(), table.top[0].size
    line = FONT_SIZE + 2 * GAP
    step = max(height, FONT_SIZE + 3) + GAP
    left = LABEL_WIDTH + 2 * GAP
    across = left + (len(table.top) + 1) * (width + MARGIN)
    across = max(across, int(font.getlength(table.title)) + 2 * GAP)
    picture = Image.new("RGB", (across, 2 * line + (len(table.rows) + 1) * step), PAPER)
    draw = ImageDraw.Draw(picture)
    draw.text((GAP, GAP), table.title, INK, font)
    x = [left + place * (width + MARGIN) for place in range(len(table.top) + 1)]
    draw.text((x[0] + width / 2, line + height / 2), "+", INK, font, anchor="mm")
    for place, tile in enumerate(table.top, 1):
        picture.paste(tile, (x[place], line))
    y = line + step + GAP
    draw.line([(left, y - GAP), (x[-1] + width, y - GAP)], INK)
    for name, tiles in table.rows:
        text = "\n".join(wrap(name, font, LABEL_WIDTH, max(1, height // (FONT_SIZE + 3))))
        draw.multiline_text(
            (LABEL_WIDTH + GAP, y + height / 2), text, INK, font, anchor="rm", align="right", spacing=2
        )
        for place, tile in enumerate(tiles):
            picture.paste(tile, (x[place], y))
        y += step
    return picture


def _stack(parts: list[Image.Image]) -> Image.Image:
    """The pictures below one another."""
    sheet = Image.new("RGB", (max(p.width for p in parts), sum(p.height + MARGIN for p in parts)), PAPER)
    y = 0
    for part in parts:
        sheet.paste(part, (0, y))
        y += part.height + MARGIN
    return sheet

"""The contact sheet of a set of images: a PNG with one row per class."""

import io
import math
from pathlib import Path

import matplotlib
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ddengine import files
from ddengine.errors import require_positive
from ddengine.types import DataSpec, Images

TILE_MIN, TILE_MAX = 48, 128  # pixels: small images are enlarged to at least, large ones reduced to at most
ROWS = 25  # classes in one column of the sheet
CLASSES_MAX = 100  # further classes are not drawn, and the sheet says so
LABEL_WIDTH, FONT_SIZE, GAP = 132, 13, 4
PAPER, INK = "white", "black"


def contact_sheet(images: Images, path: str | Path, per_class: int = 10, scale: int | None = None) -> None:
    """Write a PNG of up to `per_class` images of each class, in rows led by the class name.

    Pixels are brought back through the spec and clamped to [0, 1] for display alone. `scale` repeats each
    pixel that many times; by default small images are enlarged and large ones reduced to legible tiles.
    One channel is grey, three are RGB, any other number is shown as its mean. Beyond 25 classes the rows go
    on in a second column, and beyond 100 they are counted but not drawn.
    """
    buffer = io.BytesIO()
    draw_sheet(images, per_class, scale).save(buffer, "PNG")
    files.write_bytes(Path(path), buffer.getvalue())


def draw_sheet(images: Images, per_class: int = 10, scale: int | None = None) -> Image.Image:
    """The picture that `contact_sheet` writes."""
    require_positive("per_class", per_class)
    if scale is not None:
        require_positive("scale", scale)
    shown = [_tiles(images, c, per_class, scale) for c in range(min(len(images.spec.classes), CLASSES_MAX))]
    return _lay_out(shown, images.spec.classes, tile_size(images.spec, scale))


def tile_size(spec: DataSpec, scale: int | None = None) -> tuple[int, int]:
    """(width, height) of one tile."""
    h, w = spec.shape[1:]
    factor = float(scale or max(1, math.ceil(TILE_MIN / min(h, w))))
    if scale is None and max(h, w) * factor > TILE_MAX:
        factor = TILE_MAX / max(h, w)
    return max(1, round(w * factor)), max(1, round(h * factor))


def _tiles(images: Images, c: int, per_class: int, scale: int | None) -> list[Image.Image]:
    chosen = images.take((images.classes == c).nonzero().squeeze(1)[:per_class])
    return pictures(to_pixels(chosen), tile_size(images.spec, scale))


def pictures(pixels: UInt8[Tensor, "n h w c"], size: tuple[int, int]) -> list[Image.Image]:
    """Images of 1 or 3 channels as pictures of `size` (width, height)."""
    (h, w), (width, height) = pixels.shape[1:3], size
    how = Image.Resampling.BOX if width < w or height < h else Image.Resampling.NEAREST
    drawn = [Image.fromarray(p if p.shape[2] == 3 else p[:, :, 0]) for p in pixels.numpy()]
    return [picture.convert("RGB").resize(size, how) for picture in drawn]


def to_pixels(images: Images) -> UInt8[Tensor, "n h w c"]:
    """Displayable uint8 images of 1 or 3 channels (CPU).

    An image whose pixels leave [0, 1] is squeezed: its range from the 1st to the 99th percentile, 0 and 1
    included, becomes black to white; images inside [0, 1] are shown as they are.
    """
    x: Float[Tensor, "n c h w"] = images.x.detach().cpu().float()
    x = x / 255 if images.x.dtype == torch.uint8 else images.spec.denormalise(x)
    x = x if x.shape[1] in (1, 3) else x.mean(1, keepdim=True)
    x = x.nan_to_num(0.0)
    if len(x):
        low, high = torch.quantile(x.flatten(1), torch.tensor([0.01, 0.99]), dim=1)[:, :, None, None, None]
        low, high = low.clamp(max=0), high.clamp(min=1)
        x = (x - low) / (high - low)
    shown = x.clamp(0, 1)
    return (shown * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def text_font() -> ImageFont.FreeTypeFont:
    """Matplotlib's DejaVu Sans, which covers Latin, Greek, Cyrillic and more than Pillow's own font does."""
    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), FONT_SIZE)


def _lay_out(rows: list[list[Image.Image]], classes: tuple[str, ...], tile: tuple[int, int]) -> Image.Image:
    font = text_font()
    height = max(tile[1], FONT_SIZE + 3) + GAP
    label = min(LABEL_WIDTH, max(math.ceil(font.getlength(printable(n))) for n in classes[: len(rows)]))
    width = label + 3 * GAP + max(map(len, rows)) * (tile[0] + GAP)
    columns, left_out = math.ceil(len(rows) / ROWS), len(classes) - len(rows)
    deep = math.ceil(len(rows) / columns)
    foot = FONT_SIZE + 2 * GAP if left_out else 0
    across = max(columns * width + GAP, 240 if foot else 0)
    sheet = Image.new("RGB", (across, deep * height + GAP + foot), PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, row in enumerate(rows):
        x, y = number // deep * width + GAP, number % deep * height + GAP
        lines = wrap(printable(classes[number]), font, label, max(1, height // (FONT_SIZE + 3)))
        top = y + (height - GAP) / 2
        text = "\n".join(lines)
        draw.multiline_text((x + label, top), text, INK, font, anchor="rm", align="right", spacing=2)
        for place, image in enumerate(row):
            sheet.paste(image, (x + label + GAP + place * (tile[0] + GAP), y))
    if left_out:
        draw.text((GAP, deep * height + GAP), f"{left_out} more classes are not shown", INK, font)
    return sheet


def printable(name: str) -> str:
    """The name on one line, without what cannot be drawn."""
    text = name.encode(errors="replace").decode()
    return "".join(c if c.isprintable() else " " for c in text).strip() or "?"


def wrap(text: str, font: ImageFont.FreeTypeFont, width: int, lines: int) -> list[str]:
    """`text` in at most `lines` pieces no wider than `width`, broken after a separator where one is near."""
    pieces: list[str] = []
    while text and len(pieces) < lines:
        fits = _fitting(text, font, width)
        if fits < len(text) and len(pieces) == lines - 1:
            return [*pieces, text[: max(1, fits - 1)].rstrip() + "…"]
        if fits < len(text):
            fits = max([i + 1 for i, c in enumerate(text[:fits]) if c in " _-/,"], default=fits)
        pieces.append(text[:fits].strip())
        text = text[fits:].strip()
    return pieces


def _fitting(text: str, font: ImageFont.FreeTypeFont, width: int) -> int:
    """How many leading characters of `text` fit into `width` (at least one)."""
    fits = 1
    while fits < len(text) and font.getlength(text[: fits + 1]) <= width:
        fits += 1
    return fits

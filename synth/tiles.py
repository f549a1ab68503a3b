"""Images of a synthetic set one by one, class by class, as small PNG files for a page."""

import io
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from ddengine.composites import Composites
from ddengine.types import Images
from synth.compensated import Compensated
from synth.factored import Factored
from synth.forms import Form
from synth.sheet import TILE_MAX, to_pixels

COUNT_MAX = 1000  # tiles of one set, whatever their size
OVERHEAD = 400  # bytes of a tile beside its pixels: the PNG's own and what surrounds it in a page
LIKELIEST = 5  # classes of a soft label that are told


@dataclass(frozen=True)
class Tile:
    """One image: its name within its class, a PNG, and the likeliest classes of its label with their shares.

    A hard label has no shares. The PNG has the image's own pixels, or 128 on the longer side if it has more.
    """

    name: str
    png: bytes
    shares: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class TileRow:
    """The first tiles of the `total` images of one class."""

    label: str
    total: int
    tiles: tuple[Tile, ...]


def tile_rows(synth: Form, room: int) -> tuple[TileRow, ...]:
    """A row for each class, with as many images of each as `room` bytes in base64 hold, at most 1,000 in all.

    A class may have none. Of a compensated set these are its composites, each base before its sums, and only
    those that are shown are computed; of grids their cells, image by image. A set of trees or graphs has no
    rows.
    """
    images = synth.composites() if isinstance(synth, Compensated) else synth.decode()
    if not isinstance(images, Images | Composites):
        return ()
    members, names = _members(synth, images), images.spec.classes
    c, h, w = images.spec.shape
    each = 4 * (min(h, TILE_MAX) * min(w, TILE_MAX) * (3 if c == 3 else 1) + OVERHEAD) // 3
    fits = min(COUNT_MAX, room // each)
    shown = [index[: max(1, fits // len(names))] for index in members]
    shown = [index if number < fits else index[:0] for number, index in enumerate(shown)]
    tiles = _tiles(synth, images, torch.cat(shown))
    return tuple(
        TileRow(name, len(index), tuple(next(tiles) for _ in range(len(kept))))
        for name, index, kept in zip(names, members, shown, strict=True)
    )


def _members(synth: Form, images: Images | Composites) -> list[Int[Tensor, " n"]]:
    """Images of each class in the order in which they are shown; a composite has the class of its base."""
    k = len(images.spec.classes)
    if not isinstance(synth, Compensated):
        found = [(images.classes == c).nonzero().squeeze(1) for c in range(k)]
        return [_by_image(index, synth) for index in found] if isinstance(synth, Factored) else found
    b = len(synth.bases)
    variants = torch.arange(len(images) // b) * b
    return [((synth.classes == c).nonzero() + variants).flatten() for c in range(k)]


def _by_image(index: Int[Tensor, " n"], synth: Factored) -> Int[Tensor, " n"]:
    """Cells of grids in the order of the stored images."""
    return index[(index % len(synth.images)).argsort(stable=True)]


def _tiles(synth: Form, images: Images | Composites, index: Int[Tensor, " n"]) -> Iterator[Tile]:
    x, y = images.model_input(index).detach(), images.y[index].detach()
    pixels = to_pixels(Images(x, torch.zeros(len(x), dtype=torch.int64), images.spec))
    shares = [()] * len(x) if images.y_kind == "class" else _shares(y.float(), images)
    told = isinstance(synth, Compensated | Factored)
    places = index.tolist() if told else _numbers(images.classes[index])
    for place, picture, share in zip(places, pixels.numpy(), shares, strict=True):
        yield Tile(_name(synth, place), _png(picture), tuple(share))


def _numbers(classes: Int[Tensor, " n"]) -> list[int]:
    """The number of each image within its class, from one."""
    return [int((classes[: i + 1] == c).sum()) for i, c in enumerate(classes)]


def _name(synth: Form, place: int) -> str:
    if isinstance(synth, Factored):
        cell, image = divmod(place, len(synth.images))
        return f"stored image {image + 1}, cell {cell + 1} of {synth.factor**2}"
    if not isinstance(synth, Compensated):
        return f"image {place}"
    variant, base = divmod(place, len(synth.bases))
    number = int((synth.classes[: base + 1] == synth.classes[base]).sum())
    return f"base {number}" + (f" with compensator {variant}" if variant else "")


def _shares(y: Float[Tensor, "n k"], images: Images | Composites) -> list[list[tuple[str, float]]]:
    """The likeliest classes of each label; logits by their softmax at temperature 1."""
    shares = y.softmax(1) if images.y_kind == "logit" else y
    best = shares.topk(min(LIKELIEST, y.shape[1]))
    names = images.spec.classes
    return [
        [(names[c], round(share, 4)) for share, c in zip(*pair, strict=True)]
        for pair in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]


def _png(pixels: np.ndarray) -> bytes:
    picture = Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[:, :, 0])
    if max(picture.size) > TILE_MAX:
        picture.thumbnail((TILE_MAX, TILE_MAX), Image.Resampling.BOX)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()

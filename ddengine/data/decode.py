"""Image files and tensors to uint8 pixels of one size; Pillow scales both, for equal results everywhere."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageOps
from torch import Tensor

from ddengine.errors import UsageError

GREY = ("1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "I;16N")
NAMED = 5  # skipped files that a note names


def fit_square(image: Image.Image, size: int) -> Image.Image:
    """Scale the short side to `size` (antialiased bicubic) and crop the centre square."""
    if image.size == (size, size):
        return image
    return ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)


def resize(x: UInt8[Tensor, "n c h w"], size: int | None) -> UInt8[Tensor, "n c s t"]:
    """The same scaling and cropping for a tensor, channel by channel; size None changes nothing."""
    n, c, h, w = x.shape
    if size is None or (h, w) == (size, size):
        return x
    out = np.empty((n * c, size, size), dtype=np.uint8)
    for target, plane in zip(out, x.reshape(n * c, h, w).numpy(), strict=True):
        target[:] = np.asarray(fit_square(Image.fromarray(plane), size))
    return torch.from_numpy(out).reshape(n, c, size, size)


def read_image(path: Path | str, size: int | None) -> np.ndarray:
    """One file as uint8 [c h w], c = 1 for grey modes, else 3: the first frame, upright by its EXIF tag.

    Transparency is dropped and 16-bit grey is scaled to 8 bits. Raises whatever Pillow raises, also for
    images beyond Pillow's limit of pixels.
    """
    with Image.open(path) as opened:
        image = ImageOps.exif_transpose(opened)
        if image.mode == "F":
            raise ValueError("its pixels are floats without a fixed range")
        if image.mode.startswith("I"):
            wide = np.asarray(image).astype(np.int64).clip(0, 65535)
            image = Image.fromarray(((wide * 255 + 32767) // 65535).astype(np.uint8))
        image = image.convert("L" if image.mode in GREY else "RGB")
        pixels = np.array(image if size is None else fit_square(image, size))
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def attempt(path: Path | str, size: int | None) -> np.ndarray | str:
    """What `read_image` gives, or in one line why it gives nothing."""
    try:
        return read_image(path, size)
    except Exception as error:
        line = (
            (str(error).splitlines() or [""])[0]
            .replace(repr(path), "the file")
            .replace(repr(str(path)), "the file")
        )
        return line or type(error).__name__


def decode(
    paths: Sequence[Path | str], size: int | None, on_error: str
) -> tuple[UInt8[Tensor, "n c h w"], list[int], tuple[str, ...]]:
    """Read files in threads: pixels, the indices of the files that they come from, notes on skipped files.

    All images are grey if every file is, else all are RGB. Raises UsageError for an unreadable file
    (unless `on_error` is "skip"), for a set without a readable file and for mixed sizes without `size`.
    """
    images: list[np.ndarray] = []
    kept: list[int] = []
    failed: list[Path | str] = []
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        for index, result in enumerate(pool.map(partial(attempt, size=size), paths)):
            if isinstance(result, np.ndarray):
                if images:
                    check_size(result, paths[index], images[0], paths[kept[0]])
                images.append(result)
                kept.append(index)
            elif on_error == "skip":
                failed.append(paths[index])
            else:
                raise unreadable(paths[index], result)
    finally:
        pool.shutdown(cancel_futures=True)
    if not images:
        raise none_readable(len(paths))
    return stacked(images), kept, skipped_notes(failed)


def unreadable(path: Path | str, reason: str) -> UsageError:
    """The error for a file that is no image."""
    return UsageError(
        f"cannot read the image {path}: {reason}",
        "Replace or remove that file, or set dataset.on_error=skip to leave such files out",
    )


def none_readable(count: int) -> UsageError:
    """The error for `count` files of which none is an image."""
    return UsageError(f"none of the {count} image files can be read", "Check that they are images")


def check_size(image: np.ndarray, path: Path | str, before: np.ndarray, first: Path | str) -> None:
    """Refuse an image of another height and width than the one `before` it, which is at `first`."""
    if image.shape[1:] != before.shape[1:]:
        (h, w), (height, width) = image.shape[1:], before.shape[1:]
        raise UsageError(
            f"images of several sizes: {path} is {w}x{h} and {first} is {width}x{height} pixels",
            "Set dataset.size=N to scale them all to N x N pixels",
        )


def stacked(images: Sequence[np.ndarray]) -> UInt8[Tensor, "n c h w"]:
    """Images of one size as one tensor; grey ones among RGB become RGB."""
    channels = max(image.shape[0] for image in images)
    out = np.empty((len(images), channels, *images[0].shape[1:]), dtype=np.uint8)
    for target, image in zip(out, images, strict=True):
        target[:] = image
    return torch.from_numpy(out)


def skipped_notes(failed: Sequence[Path | str]) -> tuple[str, ...]:
    """A line on the files that were left out; nothing where there are none."""
    if not failed:
        return ()
    more = ", ..." if len(failed) > NAMED else ""
    return (f"{len(failed)} unreadable files were skipped: {', '.join(map(str, failed[:NAMED]))}{more}",)

"""The contact sheet."""

import numpy as np
import pytest
import torch
from PIL import Image

from ddengine.errors import UsageError
from ddengine.types import DataSpec, Images, Whitening
from synth.sheet import contact_sheet, to_pixels


def images_of(shape, k, each, names=None) -> Images:
    spec = DataSpec("s", shape, tuple(names or map(str, range(k))), (0.5,) * shape[0], (0.25,) * shape[0])
    x = torch.randn((k * each, *shape), generator=torch.Generator().manual_seed(1)) * 3
    return Images(x, torch.arange(k).repeat_interleave(each), spec)


def read(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def contains(sheet, tile) -> bool:
    """Whether `tile` lies somewhere in the sheet, pixel for pixel."""
    h, w = tile.shape[:2]
    spots = np.argwhere((sheet[: 1 - h or None, : 1 - w or None] == tile[0, 0]).all(2))
    return any((sheet[y : y + h, x : x + w] == tile).all() for y, x in spots)


def test_every_digit_shown_is_its_real_picture_enlarged(digits, tmp_path):
    contact_sheet(digits, tmp_path / "sheet.png", per_class=3, scale=4)
    sheet = read(tmp_path / "sheet.png")
    for c in (0, 4, 9):
        first = int((digits.y == c).nonzero()[0])
        for picture in digits.x[first : first + 3, 0].numpy():
            assert contains(sheet, np.kron(picture, np.ones((4, 4), np.uint8))[:, :, None].repeat(3, 2))


def test_small_images_get_tiles_of_at_least_32_pixels(tmp_path):
    images = images_of((1, 5, 3), 2, 1)
    contact_sheet(images, tmp_path / "a.png")
    tile = to_pixels(images)[0].numpy().repeat(16, 0).repeat(16, 1).repeat(3, 2)
    assert min(tile.shape[:2]) >= 32 and contains(read(tmp_path / "a.png"), tile)


def test_images_that_leave_the_pixel_range_are_squeezed_for_display_alone():
    images = images_of((3, 5, 7), 2, 3)
    kept = images.x.clone()
    wide = images.x.numpy() * 0.25 + 0.5
    expected = []
    for one in wide:
        low, high = min(np.quantile(one, 0.01), 0), max(np.quantile(one, 0.99), 1)
        expected.append(np.clip((one - low) / (high - low), 0, 1).transpose(1, 2, 0) * 255)
    assert wide.max() > 1.2 and wide.min() < -0.2
    assert np.abs(to_pixels(images).numpy() - np.stack(expected)).max() <= 0.5 + 1e-3
    assert torch.equal(images.x, kept)


def test_whitened_images_are_shown_unwhitened():
    g = torch.Generator().manual_seed(0)
    matrix = torch.linalg.qr(torch.randn(6, 6, generator=g)).Q * 2
    zca = Whitening(torch.full((6,), 0.5), matrix, matrix.inverse())
    spec = DataSpec("z", (1, 2, 3), ("a",), (0.0,), (1.0,), zca=zca)
    pixels = torch.randint(0, 256, (5, 1, 2, 3), generator=g, dtype=torch.uint8)
    images = Images(spec.normalise(pixels), torch.zeros(5, dtype=torch.long), spec)
    assert torch.equal(to_pixels(images), pixels.permute(0, 2, 3, 1))


@pytest.mark.parametrize("k", [1, 2, 25, 26, 100, 103])
def test_sheets_of_many_classes_stay_of_a_readable_shape(tmp_path, k):
    names = [f"a rather long_class-name, number {i}" if i % 2 else "" for i in range(k)]
    contact_sheet(images_of((3, 8, 8), k, 1, names), tmp_path / "sheet.png")
    height, width = read(tmp_path / "sheet.png").shape[:2]
    assert height <= 25 * 52 + 4 + 21 and width <= 4 * 200 + 4 and min(height, width) >= 32


@pytest.mark.parametrize("name", ["\n\x00\u202e", "\udcff", "x" * 5000, "Ωмега 类"])
def test_odd_class_names_are_drawn_without_failure(tmp_path, name):
    contact_sheet(images_of((1, 8, 8), 2, 2, [name, "b"]), tmp_path / "sheet.png")
    assert read(tmp_path / "sheet.png").shape[1] < 300


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_any_number_of_channels_is_shown(tmp_path, channels):
    images = images_of((channels, 8, 6), 2, 1)
    contact_sheet(images, tmp_path / "sheet.png")
    tile = to_pixels(images)[1].numpy().repeat(8, 0).repeat(8, 1)
    assert contains(read(tmp_path / "sheet.png"), np.broadcast_to(tile, (64, 48, 3)))


def test_classes_without_an_image_leave_an_empty_row(tmp_path):
    images = images_of((1, 8, 8), 3, 1)
    contact_sheet(images.take(torch.tensor([0, 2])), tmp_path / "sheet.png")
    assert read(tmp_path / "sheet.png").shape[0] == 3 * 52 + 4


def test_no_images_per_class_and_unwritable_paths_are_refused(tmp_path):
    with pytest.raises(UsageError, match="per_class=0"):
        contact_sheet(images_of((1, 8, 8), 2, 1), tmp_path / "sheet.png", per_class=0)
    with pytest.raises(UsageError, match="missing"):
        contact_sheet(images_of((1, 8, 8), 2, 1), tmp_path / "missing" / "sheet.png")

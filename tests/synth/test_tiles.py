import base64
import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ddengine.types import DataSpec
from synth import Compensated, Pixels
from synth.tiles import COUNT_MAX, tile_rows

ROOM = 5 << 20


def spec(shape=(1, 5, 7), k=3):
    c = shape[0]
    return DataSpec("toy", shape, tuple(f"class {i}" for i in range(k)), (0.5,) * c, (0.25,) * c)


def pixels(levels, labels, of, y_kind="class"):
    """A set whose pixels are `levels` / 255."""
    x = of.normalise(torch.as_tensor(levels, dtype=torch.uint8))
    return Pixels(x, labels, of, y_kind)


def opened(tile):
    return np.asarray(Image.open(io.BytesIO(tile.png)))


@pytest.mark.parametrize("c", [1, 3])
def test_a_tile_has_the_pixels_of_its_image_and_the_rows_their_classes(c):
    levels = torch.randint(0, 256, (7, c, 5, 7), generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([0, 2, 0, 2, 2, 0, 2])
    rows = tile_rows(pixels(levels, labels, spec((c, 5, 7))), ROOM)
    assert [(row.label, row.total, len(row.tiles)) for row in rows] == [
        ("class 0", 3, 3),
        ("class 1", 0, 0),
        ("class 2", 4, 4),
    ]
    assert [tile.name for tile in rows[2].tiles] == [f"image {n}" for n in (1, 2, 3, 4)]
    for row, members in ((rows[0], [0, 2, 5]), (rows[2], [1, 3, 4, 6])):
        for tile, index in zip(row.tiles, members, strict=True):
            wanted = levels[index].permute(1, 2, 0).numpy()
            assert np.array_equal(opened(tile), wanted if c == 3 else wanted[:, :, 0])
            assert tile.shares == ()


def test_soft_labels_tell_their_likeliest_classes_logits_by_softmax():
    of, logits = spec(k=7), torch.tensor([[0.0, 3, 1, 2, -1, 5, 4]])
    levels = torch.zeros(1, 1, 5, 7)
    (tile,) = tile_rows(pixels(levels, logits, of, "logit"), ROOM)[5].tiles
    expected = np.exp(logits.numpy()[0]) / np.exp(logits.numpy()).sum()
    assert [name for name, _ in tile.shares] == [f"class {i}" for i in (5, 6, 1, 3, 2)]
    assert [share for _, share in tile.shares] == pytest.approx(sorted(expected)[:1:-1], abs=1e-4)
    (same,) = tile_rows(pixels(levels, torch.as_tensor(expected)[None], of, "prob"), ROOM)[5].tiles
    assert same.shares == tile.shares


def test_composites_follow_their_base_and_have_its_class_whatever_their_labels_say():
    g = torch.Generator().manual_seed(3)
    bases = torch.randint(60, 180, (3, 1, 5, 7), generator=g, dtype=torch.uint8)
    added = torch.rand(1, 2, 1, 5, 7, generator=g) * 0.2
    classes, group = torch.tensor([2, 0, 2]), torch.zeros(3, dtype=torch.int64)
    synth = Compensated(bases, classes, added, group, spec(), labels=torch.randn(9, 3, generator=g))
    rows = tile_rows(synth, ROOM)
    assert [(row.total, len(row.tiles)) for row in rows] == [(3, 3), (0, 0), (6, 6)]
    names = [f"base {i}{said}" for i in (1, 2) for said in ("", " with compensator 1", " with compensator 2")]
    assert [tile.name for tile in rows[2].tiles] == names
    summed = (bases[2, 0] / 255 + added[0, 1, 0]).clamp(0, 1) * 255
    assert np.array_equal(opened(rows[2].tiles[5]), summed.round().numpy().astype(np.uint8))
    shares = synth.labels[2 * 3 + 2].softmax(0)
    assert dict(rows[2].tiles[5].shares)["class 1"] == pytest.approx(float(shares[1]), abs=1e-4)


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 13), st.integers(1, 11), st.integers(0, 20_000))
def test_tiles_keep_to_their_room_and_count_what_is_left_out(k, each, room):
    levels = torch.randint(0, 256, (k * each, 3, 11, 13), generator=torch.Generator().manual_seed(k))
    rows = tile_rows(pixels(levels, torch.arange(k).repeat_interleave(each), spec((3, 11, 13), k)), room)
    tiles = [tile for row in rows for tile in row.tiles]
    assert sum(len(base64.b64encode(tile.png)) for tile in tiles) <= room
    assert len(tiles) <= COUNT_MAX
    assert [row.total for row in rows] == [each] * k
    counts = [len(row.tiles) for row in rows]
    assert counts == sorted(counts, reverse=True)
    assert max(counts) - min(counts) <= 1


def test_large_images_are_reduced_and_small_ones_kept():
    large = pixels(torch.zeros(1, 3, 150, 300), torch.tensor([0]), spec((3, 150, 300)))
    assert opened(tile_rows(large, ROOM)[0].tiles[0]).shape == (64, 128, 3)
    small = pixels(torch.zeros(1, 3, 128, 2), torch.tensor([0]), spec((3, 128, 2)))
    assert opened(tile_rows(small, ROOM)[0].tiles[0]).shape == (128, 2, 3)

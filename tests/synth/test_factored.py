"""Grids of down-scaled images as a set: cells in full size, bytes of what is stored, the stored form."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ddengine.errors import UsageError
from ddengine.rng import Rng
from ddengine.types import DataSpec, Images, SynthSet, Whitening
from synth import DistilledSet, Factored, Pixels, verify
from synth.exported import export
from synth.factored import cells, enlarged, reduced
from synth.tiles import tile_rows

NO_NOTES = {"recipe": {}, "provenance": {}}
CODECS = ("fp32", "fp16", "uint8")
SETS = {
    "shape": st.tuples(st.sampled_from([1, 2, 3]), *[st.sampled_from([3, 5, 7, 8])] * 2),
    "m": st.integers(1, 5),
    "k": st.sampled_from([2, 5, 257]),
    "factor": st.integers(1, 3),
    "seed": st.integers(0, 2**31),
    "y_kind": st.sampled_from(["class", "prob", "logit"]),
    "codec": st.sampled_from(CODECS),
    "rate": st.none() | st.just(0.0123),
}


def build(shape=(3, 7, 5), m=4, k=5, factor=2, seed=0, y_kind="class", codec="uint8", rate=None) -> Factored:
    g = Rng(seed).torch("set")
    names = tuple(f"c{i}" for i in range(k))
    spec = DataSpec("s", shape, names, (0.5,) * shape[0], (0.25,) * shape[0], "a" * 64)
    hard = torch.randint(0, k, (m,), generator=g)
    soft = torch.randn((m * factor**2, k), generator=g)
    labels = {"class": hard, "logit": soft, "prob": soft.softmax(1)}[y_kind]
    return Factored(torch.randn((m, *shape), generator=g), labels, spec, factor, y_kind, codec, rate)


def by_hand(x: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bilinear up-sampling of one map, value by value: pixel centres at (i + 1/2) / n of a side."""
    found = np.zeros(size)
    for i in range(size[0]):
        for j in range(size[1]):
            corners = []
            for place, n, full in ((i, x.shape[0], size[0]), (j, x.shape[1], size[1])):
                at = max((place + 0.5) * n / full - 0.5, 0)
                low = min(int(at), n - 1)
                corners.append((low, min(low + 1, n - 1), at - low))
            (a, b, s), (c, d, t) = corners
            found[i, j] = (1 - s) * ((1 - t) * x[a, c] + t * x[a, d]) + s * ((1 - t) * x[b, c] + t * x[b, d])
    return found


@pytest.mark.parametrize(("size", "factor"), [((7, 5), 2), ((7, 5), 3), ((8, 6), 2), ((5, 11), 5)])
def test_each_decoded_image_is_one_cell_in_full_size(size, factor):
    x = torch.randn((3, 2, *size), generator=Rng(0).torch("x"), dtype=torch.float64)
    full = enlarged(x, factor)
    grid = cells(size, factor)
    assert full.shape == (3 * factor**2, 2, *size)
    for v, (rows, columns) in enumerate(grid):
        part = x[:, :, rows, columns]
        expected = F.interpolate(part, size=size, mode="bilinear", align_corners=False)
        assert torch.equal(full[v * 3 : (v + 1) * 3], expected)
        for i in range(3):
            hand = by_hand(part[i, 1].numpy(), size)
            np.testing.assert_allclose(full[v * 3 + i, 1].numpy(), hand, rtol=1e-12, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(size=st.tuples(st.integers(1, 23), st.integers(1, 23)), data=st.data())
def test_cells_cover_every_pixel_once_and_differ_by_at_most_one_to_a_side(size, data):
    factor = data.draw(st.integers(1, min(size)))
    seen = torch.zeros(size, dtype=torch.int64)
    sides = []
    for rows, columns in cells(size, factor):
        seen[rows, columns] += 1
        sides.append((rows.stop - rows.start, columns.stop - columns.start))
    assert bool((seen == 1).all()) and len(sides) == factor**2
    for side in zip(*sides, strict=True):
        assert min(side) >= 1 and max(side) - min(side) <= 1 and side[0] == max(side)


def test_a_grid_of_constant_images_decodes_to_them():
    levels = torch.arange(12.0)[:, None, None, None].expand(-1, 2, 7, 5)
    grids = reduced(levels, 2)
    assert grids.shape == (3, 2, 7, 5) and torch.equal(grids[1, 0, 0], torch.tensor([4.0, 4, 4, 5, 5]))
    full = enlarged(grids, 2)
    for i in range(3):
        for v in range(4):
            assert torch.allclose(full[v * 3 + i], torch.full((2, 7, 5), 4.0 * i + v))


def test_down_scaling_is_the_mean_over_areas():
    x = torch.randn((4, 1, 6, 4), generator=Rng(0).torch("x"), dtype=torch.float64)
    means = x.reshape(4, 1, 3, 2, 2, 2).mean((3, 5))
    torch.testing.assert_close(reduced(x, 2)[0, :, 3:, :2], means[2], rtol=1e-12, atol=0)


def test_factor_one_is_free_pixels_bit_for_bit(tmp_path):
    grids = build(factor=1, codec="uint8", rate=0.01)
    pixels = Pixels(grids.images, grids.labels, grids.spec, student_lr=0.01)
    assert torch.equal(grids.decode().x, pixels.decode().x) and grids.nbytes == pixels.nbytes
    pick = torch.tensor([3, 0, 3])
    assert torch.equal(grids.decode(pick).x, pixels.decode(pick).x)
    assert torch.equal(reduced(grids.images, 1), grids.images)
    one, two = grids.pack(), pixels.pack()
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    read = [
        DistilledSet.load(DistilledSet.make(s, **NO_NOTES).save(tmp_path / s.kind)) for s in (grids, pixels)
    ]
    assert torch.equal(read[0].decode().x, read[1].decode().x)


@settings(max_examples=60, deadline=None)
@given(**SETS)
def test_bytes_are_those_of_what_is_stored_and_it_comes_back(**drawn):
    synth = build(**drawn)
    packed = synth.pack()
    sizes = {name: t.numel() * t.element_size() for name, t in packed.items()}
    assert synth.nbytes["total"] == sum(sizes.values()) and synth.nbytes["labels"] == sizes["labels"]
    assert Factored.problem(packed, synth.y_kind, synth.spec, synth.factor) is None
    stored = Pixels(synth.images, torch.zeros(len(synth.images)).long(), synth.spec, codec=synth.codec)
    assert synth.nbytes["images"] == stored.nbytes["images"]
    fields = {"y_kind": synth.y_kind, "factor": synth.factor}
    back = Factored.unpack(packed, fields, synth.spec)
    assert (back.factor, back.codec, back.y_kind) == (synth.factor, synth.codec, synth.y_kind)
    assert torch.equal(back.images, Pixels.unpack(stored.pack(), {"y_kind": "class"}, synth.spec).images)
    assert torch.equal(back.labels, synth.labels) or synth.codec != "fp32"
    assert torch.allclose(back.labels.double(), synth.labels.double(), atol=2e-3, rtol=2e-3)
    made = DistilledSet.make(synth, **NO_NOTES)
    assert made.manifest["count"] == len(made.decode()) == synth.count and made.nbytes == synth.nbytes


@settings(max_examples=30, deadline=None)
@given(**{**SETS, "pick": st.lists(st.integers(0, 1000), max_size=9)})
def test_decode_at_indices_is_decode_of_all_at_these(pick, **drawn):
    synth = build(**drawn)
    index = torch.tensor(pick, dtype=torch.int64) % synth.count
    whole, some = synth.decode(), synth.decode(index)
    assert torch.equal(some.x, whole.x[index]) and torch.equal(some.y, whole.y[index])
    assert torch.equal(whole.classes, synth.classes) and len(whole) == synth.count


def test_only_the_cells_that_are_asked_for_are_computed():
    synth = build(m=3)
    spoiled = synth.images.clone()
    spoiled[1] = torch.nan
    spoiled[:, :, :4, :3] = torch.nan  # cell 0
    assert bool(replace(synth, images=spoiled).decode(torch.tensor([3, 5, 11])).x.isfinite().all())


def test_derivatives_are_those_of_the_up_sampling():
    synth = build(shape=(1, 3, 5), m=2, factor=3)
    x = synth.images.double().requires_grad_()
    pick = torch.tensor([17, 4, 0, 13])
    assert torch.autograd.gradcheck(lambda x: synth.replace({"images": x}).decode().x, x)
    assert torch.autograd.gradcheck(lambda x: synth.replace({"images": x}).decode(pick).x, x)


def test_hard_labels_repeat_and_soft_ones_are_free():
    hard, soft = build(), build(y_kind="logit")
    assert torch.equal(hard.decode().y, hard.labels.repeat(4)) and set(hard.params()) == {"images"}
    assert set(soft.params()) == {"images", "labels"} and isinstance(soft, SynthSet)
    moved = soft.replace({"labels": soft.labels + 1})
    assert torch.equal(moved.decode().y, soft.labels + 1) and torch.equal(moved.images, soft.images)
    with pytest.raises(UsageError, match="unknown free tensor 'labels'"):
        hard.replace({"labels": hard.labels})


BAD = {
    "no factor": ({"factor": 0}, "a whole number in 1..16"),
    "a fraction": ({"factor": 1.5}, "a whole number in 1..16|must be|type"),
    "more cells than pixels": ({"factor": 6}, "5 pixels to a side have no 6 cells"),
    "a codec": ({"codec": "int4"}, "unknown codec 'int4'"),
    "a class": ({"labels": torch.full((4,), 5)}, "class labels outside 0..4"),
    "a label for each cell": (
        {"labels": torch.zeros(16, dtype=torch.int64)},
        "and labels|jaxtyping",
    ),
    "soft labels of stored images": (
        {"labels": torch.zeros((4, 5)), "y_kind": "logit"},
        "4 soft labels for 16 decoded images",
    ),
    "soft labels of too few classes": ({"labels": torch.zeros((16, 4)), "y_kind": "prob"}, "soft labels of"),
    "a rate": ({"student_lr": -1.0}, "student_lr=-1"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_refused(case):
    changes, said = BAD[case]
    with pytest.raises((UsageError, TypeError), match=said):
        replace(build(), **changes)


@pytest.mark.parametrize("y_kind", ["class", "logit"])
def test_what_is_not_finite_is_not_stored(y_kind):
    synth = build(y_kind=y_kind)
    with pytest.raises(UsageError, match="diverged"):
        replace(synth, images=synth.images / 0).pack()
    if y_kind == "logit":
        with pytest.raises(UsageError, match="labels are not finite"):
            replace(synth, labels=synth.labels / 0).pack()


@pytest.fixture
def saved(tmp_path):
    return DistilledSet.make(build(y_kind="logit", rate=0.01), **NO_NOTES).save(tmp_path / "grids")


def test_a_saved_set_says_what_it_is(saved):
    read = DistilledSet.load(saved)
    assert read.manifest["factor"] == 2 and read.manifest["budget"]["ipc"] == 1 and read.composites() is None
    assert torch.equal(read.decode().x, read.synth.decode().x) and len(read.decode()) == 16
    assert any("16 images in the cells of 4, labels (logit) in range" in line for line in verify(saved))
    card = (saved / "README.md").read_text()
    assert "16 synthetic training images" in card and "4 stored images, each a grid of 2 x 2" in card


def test_what_is_wrong_with_stored_tensors_is_told():
    synth = build()
    packed = synth.pack()
    assert Factored.problem({}, "class", synth.spec, 2) == "tensor 'images' is missing"
    assert Factored.problem(packed, "class", synth.spec, 6).endswith("no 6 cells to a side")
    assert "not [16, 5]" in Factored.problem(packed, "prob", synth.spec, 2)


def test_tiles_are_the_cells_of_each_stored_image_in_turn():
    synth = build(m=5, k=2)
    rows = tile_rows(synth, 10**6)
    assert [row.total for row in rows] == [4 * int((synth.labels == c).sum()) for c in range(2)]
    first = int((synth.labels == 0).nonzero()[0]) + 1
    names = [f"stored image {first}, cell {v} of 4" for v in (1, 2, 3, 4)]
    assert [tile.name for tile in rows[0].tiles[:4]] == names


def test_export_writes_decoded_images(tmp_path):
    synth = build(m=10, k=5, codec="fp32", rate=0.01)
    lost = export(DistilledSet.make(synth, **NO_NOTES), "npz", tmp_path / "set.npz")
    assert lost[0] == "40 images decoded from 10 stored ones are written out"
    found = np.load(tmp_path / "set.npz")
    assert np.array_equal(found["x"], synth.decode().x.numpy()) and np.array_equal(
        found["y"], synth.y.numpy()
    )
    assert np.isclose(found["student_lr"], 0.01)


def test_whitened_images_are_cut_in_model_input_space(tmp_path):
    synth = build(shape=(1, 4, 4), codec="fp32")
    eye = torch.eye(16)
    spec = replace(synth.spec, zca=Whitening(torch.zeros(16), 2 * eye, eye / 2))
    whitened = replace(synth, spec=spec)
    read = DistilledSet.load(DistilledSet.make(whitened, **NO_NOTES).save(tmp_path / "zca"))
    assert torch.equal(read.decode().x, synth.decode().x) and isinstance(read.decode(), Images)

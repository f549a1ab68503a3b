import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ddengine import data
from ddengine.errors import UsageError

LAYOUTS = {
    "nhwc": lambda x: x.transpose(0, 2, 3, 1),
    "nchw": lambda x: x,
    "nhw": lambda x: x[:, 0],
}


def arrays(n: int = 20, shape: tuple[int, int, int] = (3, 5, 7), k: int = 2, seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 256, (n + 6, *shape), dtype=np.uint8)
    y = np.arange(n + 6) % k
    return {"x_train": x[:n], "y_train": y[:n], "x_test": x[n:], "y_test": y[n:]}


def load(folder: Path, content: dict, **options):
    np.savez(folder / "set.npz", **content)
    return data.load("npz", root=folder / "set.npz", **options)


def pairs(x: np.ndarray, y: np.ndarray) -> list[tuple[int, bytes]]:
    return sorted((int(b), np.ascontiguousarray(a).tobytes()) for a, b in zip(x, y, strict=True))


@given(
    st.integers(6, 40), st.sampled_from([1, 3]), st.sampled_from([2, 5, 7]), st.sampled_from([2, 4, 8]),
    st.integers(2, 3), st.sampled_from(["nhwc", "nchw", "nhw"]), st.booleans(), st.integers(0, 99),
)  # fmt: skip
@settings(deadline=None, max_examples=60)
def test_pixels_and_labels_survive_every_layout(n, c, h, w, k, layout, floats, seed):
    c = 1 if layout == "nhw" else c
    content = arrays(n, (c, h, w), k, seed)
    stored = {key: LAYOUTS[layout](value) if key[0] == "x" else value for key, value in content.items()}
    if floats:
        stored |= {key: stored[key].astype(np.float32) / 255 for key in ("x_train", "x_test")}
    with tempfile.TemporaryDirectory() as folder:
        made = load(Path(folder), stored)
    assert made.spec.shape == (c, h, w)
    ours = [p for part in (made.fit, made.validation) for p in pairs(part.x.numpy(), part.y.numpy())]
    assert sorted(ours) == pairs(content["x_train"], content["y_train"])
    assert pairs(made.test.x.numpy(), made.test.y.numpy()) == pairs(content["x_test"], content["y_test"])
    assert len(made.notes) == (2 if floats else 0)


def test_without_a_test_part_a_tenth_is_split_off_twice(tmp_path):
    content = arrays(50)
    made = load(tmp_path, {key: content[key] for key in ("x_train", "y_train")})
    assert (made.fit.counts, made.validation.counts, made.test.counts) == ([20, 20], [2, 2], [3, 3])


def test_class_names_and_column_labels_are_read(tmp_path):
    content = arrays() | {"class_names": np.array(["cat", "dog"])}
    content |= {key: content[key][:, None].astype(np.uint8) for key in ("y_train", "y_test")}
    assert load(tmp_path, content).spec.classes == ("cat", "dog")
    assert load(tmp_path, arrays(k=3)).spec.classes == ("0", "1", "2")


def test_size_scales_arrays(tmp_path):
    assert load(tmp_path, arrays(), size=4).spec.shape == (3, 4, 4)


def nan(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float32) / 255
    x[2, 0, 0, 0] = np.nan
    return x


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"y_train": None}, "has no array 'y_train'"),
        ({"y_test": None}, "has no array 'y_test'"),
        ({"x_test": None}, "has no array 'x_test'"),
        ({"x_train": lambda x: x[:-1]}, "differ in length"),
        ({"x_train": lambda x: x[:, :2]}, r"shape \(20, 2, 5, 7\) is in no layout"),
        ({"x_train": lambda x: x[0, 0]}, "differ in length"),
        ({"x_train": lambda x: x.reshape(20, -1)}, "is in no layout"),
        ({"x_train": lambda x: x[:, :, :0]}, "holds no pixel"),
        ({"x_test": lambda x: x[:, :, 1:]}, "images of different shapes"),
        ({"x_train": lambda x: x.astype(np.int64)}, "is int64, neither uint8 nor float"),
        ({"x_train": lambda x: x.astype(np.float32)}, r"values from 0 to 255, outside \[0, 1\]"),
        ({"x_train": nan}, "values from nan to nan"),
        ({"y_train": lambda y: y.astype(np.float32)}, "y_train is float32"),
        ({"y_train": lambda y: np.eye(2)[y]}, "not a row of class numbers"),
        ({"y_train": lambda y: y - 1}, "holds the label -1"),
        ({"y_train": lambda y: y * 2}, r"class 1 of 0\.\.2 has no image"),
        ({"y_train": lambda y: y + 1}, r"class 0 of 0\.\.2 has no image"),
        ({"y_train": lambda y: y * 0, "y_test": lambda y: y * 0}, "one class, '0'"),
        ({"y_test": lambda y: y + 1}, "labels from 1 to 2"),
        ({"y_test": lambda y: y.astype(np.int8) - 1}, "labels from -1 to 0"),
        ({"x_train": lambda x: x[:0], "y_train": lambda y: y[:0]}, "y_train is int64"),
        ({"x_train": lambda x: x.astype(object)}, "cannot read .* as npz"),
        ({"class_names": ["a"]}, "holds the label 1"),
        ({"class_names": ["a", "b", "c"]}, r"class 2 of 0\.\.2 has no image"),
        ({"class_names": ["a", "a"]}, "are not 2 different strings"),
        ({"class_names": [1, 2]}, "are not 2 different strings"),
    ],
)
def test_arrays_that_are_no_dataset_are_refused(tmp_path, change, cause):
    content = arrays()
    for key, value in change.items():
        content[key] = value(content[key]) if callable(value) else value
    with pytest.raises(UsageError, match=cause) as error:
        load(tmp_path, {key: value for key, value in content.items() if value is not None})
    assert "\n" not in error.value.cause
    assert error.value.remedy


def test_a_file_that_is_no_npz_is_refused(tmp_path):
    for name, content in {"a.npz": b"", "b.npz": b"PK\x03\x04 broken", "c.npz": b"text"}.items():
        (tmp_path / name).write_bytes(content)
    np.save(tmp_path / "d.npy", np.zeros(3))
    for name in ("a.npz", "b.npz", "c.npz", "d.npy", "missing.npz", "."):
        with pytest.raises(UsageError, match="as npz"):
            data.load("npz", root=tmp_path / name)


@given(st.integers(0, 10_000), st.integers(1, 255))
@settings(deadline=None, max_examples=40)
def test_a_damaged_byte_gives_a_usage_error_or_a_valid_set(place, flip):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "set.npz"
        np.savez(path, **arrays())
        raw = bytearray(path.read_bytes())
        raw[place % len(raw)] ^= flip
        path.write_bytes(raw)
        try:
            assert data.load("npz", root=path).spec.shape == (3, 5, 7)
        except UsageError as error:
            assert error.cause


def test_the_same_images_through_npz_and_through_folders_are_identical(tmp_path):
    names = ["airplane", "bird", "cat", "deer"]
    content = arrays(200, (3, 32, 32), 4) | {"class_names": np.array(names)}
    for part in ("train", "test"):
        for i, (x, y) in enumerate(zip(content[f"x_{part}"], content[f"y_{part}"], strict=True)):
            folder = tmp_path / "folders" / part / names[y]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(x.transpose(1, 2, 0)).save(folder / f"{(i * 37) % 211:05d}.png")
    first, second = load(tmp_path, content), data.load("image_folder", root=tmp_path / "folders")
    for name in ("fit", "validation", "test"):
        assert torch.equal(getattr(first, name).x, getattr(second, name).x)
        assert torch.equal(getattr(first, name).y, getattr(second, name).y)
    assert first.spec.fingerprint == second.spec.fingerprint
    assert (first.spec.mean, first.spec.std) == (second.spec.mean, second.spec.std)

import hashlib
import pickle
import struct
import tempfile
import tracemalloc
from dataclasses import replace
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st

from ddengine import data
from ddengine.data import published
from ddengine.data.unpickle import read_plain_pickle
from ddengine.errors import UsageError

SHARED = Path(__file__).resolve().parents[3].parent / "shared" / "data"
CIFAR = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def idx(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(f">4B{values.ndim}I", 0, 0, 8, values.ndim, *values.shape)
    path.write_bytes(header + values.tobytes())


def mnist(root: Path, n: int = 40) -> Path:
    rng = np.random.default_rng(0)
    for prefix, count in (("train", n), ("t10k", 20)):
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        idx(root / f"MNIST/raw/{prefix}-images-idx3-ubyte", images)
        idx(root / f"MNIST/raw/{prefix}-labels-idx1-ubyte", np.arange(count, dtype=np.uint8) % 10)
    return root


def cifar(root: Path, dump=pickle.dumps) -> tuple[np.ndarray, np.ndarray]:
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (120, 3072), dtype=np.uint8), np.arange(120) % 10
    files = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    for i, file in enumerate(files):
        part = slice(20 * i, 20 * i + 20)
        (folder / file).write_bytes(dump({"data": x[part], "labels": y[part].tolist()}))
    (folder / "batches.meta").write_bytes(dump({"label_names": CIFAR}))
    return x.reshape(-1, 3, 32, 32), y


def pairs(*parts) -> list[tuple[int, bytes]]:
    return sorted((int(b), np.asarray(a).tobytes()) for x, y in parts for a, b in zip(x, y, strict=True))


def python2(content: dict) -> bytes:
    """Protocol 2 under the old module names, as the official files have them."""
    return pickle.dumps(content, protocol=2).replace(b"numpy._core", b"numpy.core")


def test_fashion_mnist_equals_what_torchvision_reads():
    if not (SHARED / "FashionMNIST").is_dir():
        pytest.skip("the Fashion-MNIST files are not beside the repository")
    made = data.load("fashion_mnist", root=SHARED, download=False)
    theirs = torchvision.datasets.FashionMNIST(SHARED, train=False, download=False)
    assert pairs((made.test.x, made.test.y)) == pairs((theirs.data[:, None], theirs.targets))
    assert (made.fit.counts, made.validation.counts) == ([5400] * 10, [600] * 10)
    assert list(made.spec.classes) == theirs.classes
    assert (made.spec.mean, made.spec.std, made.spec.licence) == ((0.2861,), (0.3530,), "MIT")
    assert made.notes == ()


def test_other_checksums_load_with_a_note(tmp_path):
    made = data.load("mnist", root=mnist(tmp_path), download=False)
    assert "4 of 4 files of mnist are not the official ones" in made.notes[0]
    assert made.spec.classes == tuple("0123456789")
    assert len(made.fit) + len(made.validation) == 40


def test_the_default_root_is_used(tmp_path, monkeypatch):
    monkeypatch.setenv("DDENGINE_DATA", str(mnist(tmp_path)))
    assert data.load("mnist", download=False).spec.shape == (1, 28, 28)


@pytest.mark.parametrize(
    "dump", [pickle.dumps, python2, lambda v: pickle.dumps(v, 5), lambda v: pickle.dumps(v, 4)]
)
def test_cifar_batches_of_any_pickle_protocol_are_read(tmp_path, dump):
    x, y = cifar(tmp_path, dump)
    made = data.load("cifar10", root=tmp_path, download=False)
    ours = pairs((made.fit.x, made.fit.y), (made.validation.x, made.validation.y))
    assert ours == pairs((x[:100], y[:100]))
    assert pairs((made.test.x, made.test.y)) == pairs((x[100:], y[100:]))
    assert list(made.spec.classes) == CIFAR
    assert made.spec.std == (0.2023, 0.1994, 0.2010)
    assert "7 of 7 files of cifar10 are not the official ones" in made.notes[0]


def test_fortran_ordered_batches_are_read_alike(tmp_path):
    x, _ = cifar(tmp_path)
    folder = tmp_path / "cifar-10-batches-py"
    batch = pickle.loads((folder / "test_batch").read_bytes())
    for protocol in (2, 5):
        turned = {**batch, "data": np.asfortranarray(batch["data"])}
        (folder / "test_batch").write_bytes(pickle.dumps(turned, protocol))
        made = data.load("cifar10", root=tmp_path, download=False)
        assert pairs((made.test.x, made.test.y)) == pairs((x[100:], batch["labels"]))


class _Harm:
    def __reduce__(self):
        return (Path.touch, (Path("harm-was-done"),))


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        ({"data": _Harm(), "labels": []}, r"refers to pathlib\..*touch|refers to builtins.getattr"),
        ({"data": np.zeros((2, 3072), np.float32), "labels": [0, 1]}, "not uint8"),
        ({"data": np.array([_Harm], dtype=object), "labels": [0]}, "not a plain batch file"),
        ({"data": np.zeros((2, 3071), np.uint8), "labels": [0, 1]}, "holds no images"),
        ({"data": np.zeros((2, 3072), np.uint8), "labels": [0, 10]}, r"no list of labels 0\.\.9"),
        ({"data": np.zeros((2, 3072), np.uint8), "labels": [0]}, "holds 2 images and 1 labels"),
        ({"labels": [0]}, "holds no images"),
        ([1, 2], "not a plain batch file"),
    ],
)
def test_a_batch_with_anything_else_in_it_is_refused_and_runs_nothing(tmp_path, monkeypatch, content, cause):
    monkeypatch.chdir(tmp_path)
    cifar(tmp_path)
    (tmp_path / "cifar-10-batches-py/data_batch_3").write_bytes(pickle.dumps(content))
    with pytest.raises(UsageError, match=cause) as error:
        data.load("cifar10", root=tmp_path, download=False)
    assert "data_batch_3" in error.value.cause
    assert not (tmp_path / "harm-was-done").exists()


@given(st.integers(0, 10_000), st.integers(1, 255), st.sampled_from([2, 4, 5]))
@settings(deadline=None, max_examples=150)
def test_a_damaged_byte_in_a_batch_gives_a_value_error_or_plain_values(place, flip, protocol):
    raw = bytearray(pickle.dumps({"data": np.arange(60, dtype=np.uint8), "labels": [1, 2, 300]}, protocol))
    raw[place % len(raw)] ^= flip
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "batch"
        path.write_bytes(raw)
        try:
            content = read_plain_pickle(path)
        except ValueError:
            return
        assert all(type(key) is str for key in content)


def test_lengths_that_a_batch_claims_take_no_memory(tmp_path):
    path, most = tmp_path / "batch", 64 << 20
    room = pickle.BYTEARRAY8 + (3 << 30).to_bytes(8, "little") + b"short"
    zeros = b"cnumpy.core.numeric\n_frombuffer\n(" + b"J\xff\xff\xff\x7fNNX\x01\x00\x00\x00CtR."
    for content, cause in ((b"\x80\x05" + room, "ends within an array"), (zeros, "an array of no bytes")):
        path.write_bytes(content)
        tracemalloc.start()
        with pytest.raises(ValueError, match=cause):
            read_plain_pickle(path)
        assert tracemalloc.get_traced_memory()[1] < most
        tracemalloc.stop()


@pytest.mark.parametrize("keep", [0, 7, 100, 3000, 5000])
def test_a_truncated_file_is_a_usage_error(tmp_path, keep):
    cifar(tmp_path / "c")
    mnist(tmp_path / "m")
    for name, root, file in (
        ("cifar10", "c", "cifar-10-batches-py/data_batch_1"),
        ("mnist", "m", "MNIST/raw/train-images-idx3-ubyte"),
    ):
        path = tmp_path / root / file
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(UsageError, match="is damaged") as error:
            data.load(name, root=tmp_path / root, download=False)
        assert "\n" not in error.value.cause


def test_cifar100_uses_fine_labels(tmp_path):
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    x = np.random.default_rng(0).integers(0, 256, (200, 3072), dtype=np.uint8)
    y = {"fine_labels": (np.arange(200) % 100).tolist(), "coarse_labels": [0] * 200}
    for part in ("train", "test"):
        (folder / part).write_bytes(pickle.dumps({"data": x, **y}))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [f"c{i}" for i in range(100)]}))
    made = data.load("cifar100", root=tmp_path, download=False)
    assert (len(made.spec.classes), made.fit.counts, made.validation.counts) == (100, [1] * 100, [1] * 100)


def test_svhn_is_read_with_ten_as_zero(tmp_path):
    from scipy.io import savemat

    x = np.random.default_rng(0).integers(0, 256, (32, 32, 3, 40), dtype=np.uint8)
    y = (np.arange(40) % 10 + 1)[:, None].astype(np.uint8)
    for part in ("train", "test"):
        savemat(tmp_path / f"{part}_32x32.mat", {"X": x, "y": y})
    made = data.load("svhn", root=tmp_path, download=False)
    assert pairs((made.test.x, made.test.y)) == pairs((x.transpose(3, 2, 0, 1), y[:, 0] % 10))
    (tmp_path / "train_32x32.mat").write_bytes(b"no matlab file, but long enough to hold a header" * 9)
    with pytest.raises(UsageError, match="is not a MATLAB file of SVHN"):
        data.load("svhn", root=tmp_path, download=False)


def test_stl10_is_read_without_its_unlabelled_part(tmp_path):
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    x = np.random.default_rng(0).integers(0, 256, (20, 3, 96, 96), dtype=np.uint8)
    y = (np.arange(20) % 10 + 1).astype(np.uint8)
    for part in ("train", "test"):
        x.transpose(0, 1, 3, 2).tofile(folder / f"{part}_X.bin")
        y.tofile(folder / f"{part}_y.bin")
    made = data.load("stl10", root=tmp_path, download=False)
    assert pairs((made.test.x, made.test.y)) == pairs((x, y - 1))


def test_what_is_missing_is_named_with_the_place_for_it(tmp_path):
    for name, entry in published.PUBLISHED.items():
        with pytest.raises(UsageError) as error:
            data.load(name, root=tmp_path, download=False)
        assert f"'{name}' is not at {tmp_path}" in error.value.cause
        assert "downloading is switched off" in error.value.cause
        assert entry.kind in error.value.remedy
        assert "dataset.root=DIR" in error.value.remedy
        assert "\n" not in error.value.cause + error.value.remedy


def test_a_failed_download_is_a_usage_error(tmp_path, monkeypatch):
    def refuse(root, download, **options):
        raise URLError("no route\nto host")

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", refuse)
    with pytest.raises(UsageError, match="the download failed .*no route to host") as error:
        data.load("cifar10", root=tmp_path)
    assert "\n" not in error.value.cause


def test_a_download_is_made_once_and_then_read(tmp_path, monkeypatch):
    calls = []

    def fetch(root, download, **options):
        calls.append((root, download, options))
        mnist(tmp_path)

    monkeypatch.setattr(torchvision.datasets, "MNIST", fetch)
    for _ in range(2):
        assert data.load("mnist", root=tmp_path).spec.name == "mnist"
    assert calls == [(tmp_path, True, {})]


def test_official_files_load_without_a_note(tmp_path, monkeypatch):
    mnist(tmp_path)
    entry = published.PUBLISHED["mnist"]
    true = {file: hashlib.md5((tmp_path / file).read_bytes()).hexdigest() for file in entry.files}
    monkeypatch.setitem(published.PUBLISHED, "mnist", replace(entry, files=true))
    assert data.load("mnist", root=tmp_path, download=False).notes == ()


def test_checksums_are_torchvisions_own():
    for name, kind in (
        ("cifar10", torchvision.datasets.CIFAR10),
        ("cifar100", torchvision.datasets.CIFAR100),
    ):
        official = {f"{kind.base_folder}/{file}": md5 for file, md5 in kind.train_list + kind.test_list}
        official[f"{kind.base_folder}/{kind.meta['filename']}"] = kind.meta["md5"]
        assert published.PUBLISHED[name].files == official
    svhn = {
        file: md5 for _, file, md5 in torchvision.datasets.SVHN.split_list.values() if "extra" not in file
    }
    assert published.PUBLISHED["svhn"].files == svhn
    stl10 = dict(torchvision.datasets.STL10.train_list[:2] + torchvision.datasets.STL10.test_list)
    assert published.PUBLISHED["stl10"].files == {f"stl10_binary/{file}": md5 for file, md5 in stl10.items()}


def test_size_scales_published_sets(tmp_path):
    assert torch.equal(
        torch.tensor(data.load("mnist", root=mnist(tmp_path), size=16).spec.shape), torch.tensor([1, 16, 16])
    )

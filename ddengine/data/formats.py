"""Readers of the formats in which the published sets come; each raises ValueError naming a damaged file."""

import struct
from pathlib import Path

import numpy as np
import torch

from ddengine.data.source import Part
from ddengine.data.unpickle import read_plain_pickle

Read = tuple[Part, Part, tuple[str, ...]]


def part(path: Path, x: np.ndarray, y: np.ndarray, classes: int) -> Part:
    """Pixels [n c h w] and labels [n] as a part, after a check of lengths and labels (ValueError)."""
    if len(x) != len(y) or len(y) == 0 or int(y.min()) < 0 or int(y.max()) >= classes:
        raise ValueError(
            f"{path} holds {len(x)} images and {len(y)} labels, not one of 0..{classes - 1} for each"
        )
    return Part(torch.from_numpy(np.array(x, order="C")), torch.from_numpy(y.astype(np.int64)))


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """An IDX file of bytes: magic 0x08 and the number of axes, big-endian lengths, then the bytes."""
    data = path.read_bytes()
    start = 4 + 4 * dimensions
    if len(data) < start or data[:4] != bytes((0, 0, 8, dimensions)):
        raise ValueError(f"{path} is not an IDX file of {dimensions} axes of bytes")
    shape = struct.unpack(f">{dimensions}I", data[4:start])
    pixels = np.frombuffer(data, np.uint8, offset=start)
    if pixels.size != int(np.prod([int(length) for length in shape], dtype=object)):
        raise ValueError(f"{path} holds {pixels.size} bytes where its header says {shape}")
    return pixels.reshape(shape)


def read_mnist(folder: Path, classes: tuple[str, ...]) -> Read:
    """MNIST and its relatives: grey 28x28 images in four IDX files."""
    parts = []
    for prefix in ("train", "t10k"):
        images = folder / f"{prefix}-images-idx3-ubyte"
        x, y = read_idx(images, 3), read_idx(folder / f"{prefix}-labels-idx1-ubyte", 1)
        if x.shape[1:] != (28, 28):
            raise ValueError(f"{images} holds images of {x.shape[1:]}, not 28x28")
        parts.append(part(images, x[:, None], y, len(classes)))
    return parts[0], parts[1], classes


def read_cifar(
    folder: Path, train: tuple[str, ...], test: str, names: tuple[str, str], label_key: str
) -> Read:
    """CIFAR's pickled batches; `names` is the file and the key of the class names."""
    listed = _plain(folder / names[0]).get(names[1])
    if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
        raise ValueError(f"{folder / names[0]} lists no class names under '{names[1]}'")
    batches = [_batch(folder / file, label_key, len(listed)) for file in train]
    joined = Part(torch.cat([b.x for b in batches]), torch.cat([b.y for b in batches]))
    return joined, _batch(folder / test, label_key, len(listed)), tuple(listed)


def _plain(path: Path) -> dict[str, object]:
    try:
        return read_plain_pickle(path)
    except ValueError as error:
        raise ValueError(f"{path} is {error}") from error


def _batch(path: Path, label_key: str, classes: int) -> Part:
    batch = _plain(path)
    x, y = batch.get("data"), batch.get(label_key)
    if not isinstance(x, np.ndarray) or x.ndim != 2 or x.shape[1] != 3 * 32 * 32:
        raise ValueError(f"{path} holds no images [n, 3072] under 'data'")
    if not isinstance(y, list) or not all(type(label) is int and 0 <= label < classes for label in y):
        raise ValueError(f"{path} holds no list of labels 0..{classes - 1} under '{label_key}'")
    return part(path, x.reshape(-1, 3, 32, 32), np.array(y, dtype=np.int64), classes)


def read_svhn(folder: Path) -> Read:
    """SVHN's cropped digits: MATLAB files with X [32 32 3 n] and y [n 1], where 10 stands for digit 0."""
    from scipy.io import loadmat

    parts = []
    for name in ("train", "test"):
        path = folder / f"{name}_32x32.mat"
        try:
            content = loadmat(path, variable_names=("X", "y"))
            x, y = content["X"], content["y"].astype(np.int64).reshape(-1) % 10
        except Exception as error:  # damaged MATLAB files make scipy raise errors of any kind
            raise ValueError(f"{path} is not a MATLAB file of SVHN: {type(error).__name__}") from error
        if x.dtype != np.uint8 or x.ndim != 4 or x.shape[:3] != (32, 32, 3):
            raise ValueError(f"{path} holds {x.dtype} images {x.shape}, not uint8 [32, 32, 3, n]")
        parts.append(part(path, x.transpose(3, 2, 0, 1), y, 10))
    return parts[0], parts[1], tuple("0123456789")


def read_stl10(folder: Path) -> Read:
    """STL-10's labelled part: raw bytes, column-major 96x96 colour images and labels 1..10."""
    parts = []
    for name in ("train", "test"):
        path = folder / f"{name}_X.bin"
        pixels, labels = np.fromfile(path, np.uint8), np.fromfile(folder / f"{name}_y.bin", np.uint8)
        if pixels.size != len(labels) * 3 * 96 * 96:
            raise ValueError(f"{path} holds {pixels.size} bytes, not {len(labels)} images of 3x96x96")
        x = pixels.reshape(-1, 3, 96, 96).transpose(0, 1, 3, 2)
        parts.append(part(path, x, labels.astype(np.int64) - 1, 10))
    classes = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")
    return parts[0], parts[1], classes

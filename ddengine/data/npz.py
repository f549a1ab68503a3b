"""A user's own arrays in one .npz file."""

from pathlib import Path

import numpy as np
import torch

from ddengine.archives import read_npz
from ddengine.data.decode import resize
from ddengine.data.source import Part, Request, Source
from ddengine.errors import UsageError

KEYS = ("x_train", "y_train", "x_test", "y_test")
CHANNELS = (1, 3)
COMPRESSED = 8 << 30  # bytes of arrays once decompressed; an array that is stored as it is may have any size
SHAPES = "Store images as [n, h, w, c], [n, c, h, w] (c is 1 or 3) or [n, h, w]"


def load_npz(request: Request) -> Source:
    """Images x_train, x_test and class numbers y_train, y_test; optionally `class_names` in label order.

    Images are uint8, or floats in [0, 1] that are rounded to 8 bits, as [n h w c], [n c h w] or [n h w];
    the last axis counts as channels if it is 1 or 3. Without x_test and y_test 10 % of each class are
    split off for the test part and 10 % for validation. Nothing is unpickled. Raises UsageError.
    """
    path = request.required_root("FILE.npz")
    arrays = read_arrays(path)
    missing = [key for key in KEYS[:2] if key not in arrays]
    missing += [key for key in KEYS[2:] if key not in arrays and any(k in arrays for k in KEYS[2:])]
    if missing:
        raise UsageError(
            f"{path} has no array '{missing[0]}' (it has: {', '.join(arrays) or 'none'})",
            f"Store the arrays {', '.join(KEYS)}",
        )
    classes = _classes(path, arrays)
    notes: list[str] = []
    train = _part(path, "train", arrays, classes, notes)
    test = _part(path, "test", arrays, classes, notes) if "x_test" in arrays else None
    if test is not None and test.x.shape[1:] != train.x.shape[1:]:
        shapes = f"x_train {arrays['x_train'].shape} and x_test {arrays['x_test'].shape}"
        raise UsageError(f"{path}: {shapes} hold images of different shapes", SHAPES)
    train = Part(resize(train.x, request.size), train.y)
    test = None if test is None else Part(resize(test.x, request.size), test.y)
    fraction = 1 / 9 if test is None else 0.1  # 1/9 of the 90 % that the test part leaves
    return Source(classes, train, test=test, validation_fraction=fraction, notes=tuple(notes))


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file that this module knows, without unpickling (UsageError if unreadable).

    Compressed ones are read up to 8 GiB.
    """
    try:
        arrays = read_npz(path, (*KEYS, "class_names"), COMPRESSED)
    except Exception as error:  # damaged zips and headers raise errors of any kind
        reason = getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(
            f"cannot read {path} as npz: {reason}",
            "Give dataset.root=FILE, written by numpy.savez with plain numeric arrays",
        ) from error
    return arrays


def _classes(path: Path, arrays: dict[str, np.ndarray]) -> tuple[str, ...]:
    labels = _labels(path, "y_train", arrays["y_train"])
    seen = np.unique(labels)
    names = arrays.get("class_names")
    k = int(seen[-1]) + 1 if names is None else names.size
    if seen[0] < 0 or seen[-1] >= k:
        wrong = int(seen[0] if seen[0] < 0 else seen[-1])
        raise UsageError(f"{path}: y_train holds the label {wrong}", f"Number classes 0..{k - 1}")
    if len(seen) < k:
        gap = next((i for i, label in enumerate(seen.tolist()) if i != label), len(seen))
        raise UsageError(
            f"{path}: class {gap} of 0..{k - 1} has no image in x_train",
            "Number classes 0..k-1 without gaps and give each an image",
        )
    if names is None:
        return tuple(str(i) for i in range(k))
    if names.ndim != 1 or names.dtype.kind != "U" or len(set(names.tolist())) != k:
        raise UsageError(
            f"{path}: class_names are not {k} different strings", "Store class_names as [k] strings"
        )
    return tuple(names.tolist())


def _labels(path: Path, key: str, y: np.ndarray) -> np.ndarray:
    y = y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y
    if y.ndim != 1 or y.dtype.kind not in "iu" or len(y) == 0:
        raise UsageError(
            f"{path}: {key} is {y.dtype} {y.shape}, not a row of class numbers",
            f"Store {key} as integers [n], n at least 1",
        )
    return y


def _part(
    path: Path, part: str, arrays: dict[str, np.ndarray], classes: tuple[str, ...], notes: list[str]
) -> Part:
    x, y = arrays[f"x_{part}"], _labels(path, f"y_{part}", arrays[f"y_{part}"])
    if x.ndim == 0 or len(x) != len(y):
        raise UsageError(
            f"{path}: x_{part} {x.shape} and y_{part} {y.shape} differ in length",
            "Give one label for each image",
        )
    if int(y.min()) < 0 or int(y.max()) >= len(classes):
        raise UsageError(
            f"{path}: y_{part} holds labels from {y.min()} to {y.max()}",
            f"Number classes 0..{len(classes) - 1}",
        )
    pixels = channels_first(path, f"x_{part}", _pixels(path, f"x_{part}", x, notes))
    return Part(torch.from_numpy(pixels), torch.from_numpy(y.astype(np.int64)))


def _pixels(path: Path, key: str, x: np.ndarray, notes: list[str]) -> np.ndarray:
    if x.dtype == np.uint8:
        return x
    if x.dtype.kind != "f":
        raise UsageError(
            f"{path}: {key} is {x.dtype}, neither uint8 nor float",
            "Store pixels as uint8 or as floats in [0, 1]",
        )
    low, high = (float(x.min()), float(x.max())) if x.size else (0.0, 0.0)
    if not (low >= 0 and high <= 1):  # also true of NaN
        raise UsageError(
            f"{path}: {key} holds values from {low:g} to {high:g}, outside [0, 1]",
            "Store pixels as uint8 or as floats in [0, 1]",
        )
    notes.append(f"{key} holds floats: rounded to 8 bits")
    return np.rint(x * 255).astype(np.uint8)


def channels_first(path: Path, key: str, x: np.ndarray) -> np.ndarray:
    """Images as contiguous [n c h w], whichever of the three layouts they are in (UsageError if in none)."""
    if x.ndim == 3:
        x = x[:, None]
    elif x.ndim == 4 and x.shape[3] in CHANNELS:
        x = x.transpose(0, 3, 1, 2)
    elif x.ndim != 4 or x.shape[1] not in CHANNELS:
        raise UsageError(f"{path}: {key} of shape {x.shape} is in no layout of images", SHAPES)
    if x.size == 0:
        raise UsageError(f"{path}: {key} of shape {x.shape} holds no pixel", SHAPES)
    return np.ascontiguousarray(x)

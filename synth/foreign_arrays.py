"""Distilled sets in one .npz file: arrays read without unpickling, none larger than what the file holds."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ddengine import archives
from ddengine.archives import reason_of
from ddengine.errors import ArtefactError, UsageError
from ddengine.types import DataSpec
from synth.foreign_files import (
    Found,
    image_tensor,
    label_tensor,
    one_file,
    read_rate,
    told_kind,
    told_spec,
    wrong,
)
from synth.schema import require_regular

LIMIT = 2 << 30  # bytes of the arrays once decompressed
ZCA = ("zca_mean", "zca_matrix", "zca_inverse")
PAIRS = (("x", "y"), ("images", "labels"))  # what images and labels are called; ours first
KEYS = (*PAIRS[0], *PAIRS[1], "y_kind", "classes", "mean", "std", "student_lr", *ZCA)


def read_npz(paths: Sequence[Path], spec: DataSpec, experiment: int | None) -> Found:
    """Images as [n c h w], [n h w c] or [n h w], labels as [n] or [n k], maybe `student_lr`.

    They are the arrays `x` and `y`, or `images` and `labels`. Of a file that `export` wrote, also what it
    tells of its space. Compressed members are read up to 2 GiB.
    """
    if experiment is not None:
        raise UsageError(f"experiment={experiment} is for dm and datadam", "Leave it out")
    path = one_file(paths, "FILE.npz")
    arrays = read_arrays(path)
    pair = next((pair for pair in PAIRS if set(pair) <= set(arrays)), None)
    if pair is None:
        raise ArtefactError(
            f"{path} is no distilled set: it has no arrays 'x' and 'y', nor 'images' and 'labels'",
            "Name them so: x [n, c, h, w] or [n, h, w, c], and y [n]",
        )
    x, y = (_tensor(path, key, arrays[key]) for key in pair)
    rate = arrays.get("student_lr")
    return Found(
        image_tensor(path, _channels_first(x, spec), spec),
        label_tensor(path, y),
        (path,),
        None if rate is None else read_rate(path, _tensor(path, "student_lr", rate)),
        y_kind=told_kind(path, arrays["y_kind"].tolist() if "y_kind" in arrays else None),
        made_with=told_spec(path, _told(path, arrays), spec),
    )


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays that this module knows (ArtefactError for anything but plain numbers and texts)."""
    require_regular(path)
    try:
        return archives.read_npz(path, KEYS, LIMIT)
    except Exception as error:  # damaged zips and headers raise errors of any kind
        raise wrong(path, reason_of(error)) from error


def _tensor(path: Path, key: str, array: np.ndarray) -> torch.Tensor:
    if array.dtype.kind not in "fiu" or array.dtype.itemsize > 8:
        raise wrong(path, f"its array {key!r} is {array.dtype}")
    if array.dtype.kind == "u" and array.dtype.itemsize > 1:
        if array.size and int(array.max()) >= 2**63:
            raise wrong(path, f"its array {key!r} holds {array.max()}")
        array = array.astype(np.int64)
    return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("=")))


def _channels_first(x: torch.Tensor, spec: DataSpec) -> torch.Tensor:
    """[n c h w] of whichever layout fits the spec, and `x` itself where none does."""
    c, h, w = spec.shape
    if tuple(x.shape[1:]) == (c, h, w):
        return x
    if tuple(x.shape[1:]) == (h, w, c):
        return x.permute(0, 3, 1, 2).contiguous()
    return x[:, None] if x.ndim == 3 else x


def _told(path: Path, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    told: dict[str, Any] = {key: arrays[key].tolist() for key in ("classes", "mean", "std") if key in arrays}
    if held := [key for key in ZCA if key in arrays]:
        if len(held) < len(ZCA):
            raise wrong(path, f"it has {held[0]} and not all of {', '.join(ZCA)}")
        told["zca"] = [_tensor(path, key, arrays[key]) for key in ZCA]
    return told

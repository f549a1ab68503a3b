"""Tensors in the `.pt` files of other tools, read as they lie there: no meaning is given to them yet."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddengine.archives import NUMPY_SCALARS, STORAGES, TENSORS, is_dense, load_archive, reason_of
from ddengine.errors import ArtefactError, UsageError
from ddengine.types import DataSpec, Whitening
from synth.schema import require_regular

LIMIT = 8 << 30  # bytes of a file; 50 images a class of ImageNet at 64 x 64 have 2.5 GB
ALLOWED = TENSORS | STORAGES | {"torch._utils _rebuild_parameter"}
REMEDY = "Give the files as its tool wrote them, fetched again from where they were published"
PAIR = re.compile(r"images_(zca_)?(best|\d+)\.pt")
X_KEYS, Y_KEYS = ("x", "images"), ("y", "labels")
UNWHITENED = "files named images_zca_ hold what was learned in ZCA space brought back to pixels"


@dataclass(frozen=True)
class Found:
    """What files hold: images `x` [n c h w] (uint8 or float32), labels `y` (integers [n], float32 [n k]).

    `files` are those that were read, in the folder `root` if that was given for all of them. `lr` is a
    learned learning rate. `y_kind`, `space` and `made_with` (a spec with the mean, std and whitening that the
    file tells) are None where it does not say.
    """

    x: Tensor
    y: Tensor
    files: tuple[Path, ...]
    lr: float | None = None
    notes: tuple[str, ...] = ()
    y_kind: str | None = None
    space: str | None = None
    made_with: DataSpec | None = None
    root: Path | None = None


def read_pair(paths: Sequence[Path], spec: DataSpec, experiment: int | None) -> Found:
    """`images_*.pt` with the `labels_*.pt` and `lr_*.pt` beside it, as MTT, TESLA, FTD and DATM write them.

    Give the images file, it and the labels file, or their folder, of which images_best.pt is taken, else
    those of the last iteration. Images without labels are taken class by class where they divide evenly.
    """
    _refuse_experiment(experiment)
    path, labels, notes = _images_file(paths)
    matched = PAIR.fullmatch(path.name)
    step = matched[2] if matched else ""
    beside = path.parent / f"labels_{step}.pt" if step else None
    labels = labels or (beside if beside and beside.is_file() else None)
    rates = (path.parent / name for name in (f"lr_{step}.pt", "lr.pt"))
    rate = next((file for file in rates if file.is_file()), None)
    x = image_tensor(path, load(path), spec)
    if labels is None:
        y, said = _by_row(path, len(x), len(spec.classes))
        notes = (*notes, said)
    else:
        y = label_tensor(labels, load(labels))
    unwhitened = bool(matched and matched[1])
    return Found(
        x,
        y,
        tuple(file for file in (path, labels, rate) if file is not None),
        None if rate is None else read_rate(rate, load(rate)),
        (*notes, UNWHITENED) if unwhitened else notes,
        space="pixels" if unwhitened else None,
    )


def read_experiments(paths: Sequence[Path], spec: DataSpec, experiment: int | None) -> Found:
    """`res_*.pt` as DM and DataDAM write it: {"data": [[images, labels], ...], "accs_all_exps": ...}.

    The last experiment is taken unless `experiment` (from 0) says which.
    """
    path = one_file(paths, "res_*.pt")
    content = load(path)
    rows = content.get("data") if type(content) is dict else None
    if type(rows) is not list or not rows or any(type(r) not in (list, tuple) or len(r) != 2 for r in rows):
        raise wrong(path, 'it is not a table with "data": [[images, labels], ...]')
    chosen = len(rows) - 1 if experiment is None else experiment
    if not 0 <= chosen < len(rows):
        raise UsageError(
            f"experiment={chosen} of {path}, which has {len(rows)}", f"Give one of 0..{len(rows) - 1}"
        )
    images, labels = rows[chosen]
    said = f"{path.name} holds {len(rows)} experiments: number {chosen} (from 0) is taken"
    notes = (said,) if len(rows) > 1 else ()
    return Found(image_tensor(path, images, spec), label_tensor(path, labels), (path,), None, notes)


def read_torch(paths: Sequence[Path], spec: DataSpec, experiment: int | None) -> Found:
    """One `.pt` file: {"x" or "images", "y" or "labels"[, "student_lr"]}, (x, y), or what `export` wrote."""
    _refuse_experiment(experiment)
    path = one_file(paths, "FILE.pt")
    content = load(path)
    if type(content) in (list, tuple) and len(content) == 2:
        content = dict(zip(("x", "y"), content, strict=True))
    if type(content) is not dict:
        raise wrong(path, "it is neither a table of tensors nor a pair (x, y)")
    x, y = (_one_of(path, content, keys) for keys in (X_KEYS, Y_KEYS))
    rate = content.get("student_lr")
    return Found(
        image_tensor(path, x, spec),
        label_tensor(path, y),
        (path,),
        None if rate is None else read_rate(path, rate),
        y_kind=told_kind(path, content.get("y_kind")),
        made_with=told_spec(path, content, spec),
    )


def told_spec(path: Path, content: Mapping[str, Any], spec: DataSpec) -> DataSpec | None:
    """The spec of a file that tells `classes`, `mean` and `std` and, where it has one, its whitening `zca`.

    None where it tells neither mean nor std. Raises UsageError for other classes than the dataset's.
    """
    if (classes := content.get("classes")) is not None and classes != list(spec.classes):
        count = len(classes) if type(classes) is list else "no list of"
        raise UsageError(
            f"{path} has {count} classes, not the {len(spec.classes)} of '{spec.name}' by name and order",
            "Give dataset=NAME of the data that the set was made from",
        )
    if "mean" not in content and "std" not in content:
        return None
    try:
        mean, std = (_numbers(content[key]) for key in ("mean", "std"))
        zca = content.get("zca")
        return DataSpec(
            spec.name, spec.shape, spec.classes, mean, std, zca=None if zca is None else _whitening(zca, spec)
        )
    except (KeyError, TypeError, ValueError) as error:
        raise wrong(path, "its mean, std and zca are not those of its images") from error


def told_kind(path: Path, value: Any) -> str | None:
    """The kind of labels that a file tells, None where it does not (ArtefactError for what is no text)."""
    if value is not None and type(value) is not str:
        raise wrong(path, "the kind of its labels is no text")
    return value


def _numbers(values: Any) -> tuple[float, ...]:
    numbers = tuple(float(v) for v in values)
    if not all(abs(v) < 1e9 for v in numbers):
        raise ValueError("out of range")
    return numbers


def _whitening(parts: Any, spec: DataSpec) -> Whitening:
    d = spec.shape[0] * spec.shape[1] * spec.shape[2]
    mean, matrix, inverse = parts
    for part, shape in ((mean, (d,)), (matrix, (d, d)), (inverse, (d, d))):
        if part.dtype != torch.float32 or tuple(part.shape) != shape or not is_dense(part):
            raise ValueError("out of shape")
        if not bool(part.isfinite().all()):
            raise ValueError("not finite")
    return Whitening(mean.clone(), matrix.clone(), inverse.clone())


def load(path: Path) -> Any:
    """What torch.save put into `path`; its tensors lie in the file. ArtefactError names what is wrong."""
    require_regular(path)
    try:
        return load_archive(path, ALLOWED, limit=LIMIT, stand_ins=NUMPY_SCALARS)
    except Exception as error:  # damaged zips and pickles raise errors of any kind
        raise wrong(path, reason_of(error)) from error


def wrong(path: Path, reason: str) -> ArtefactError:
    """The error for a file of another tool that cannot be what it should be."""
    return ArtefactError(f"{path} is no distilled set: {reason}", REMEDY)


def image_tensor(path: Path, value: Any, spec: DataSpec) -> Tensor:
    """Images of the spec's shape as uint8 or float32, a copy; UsageError names both shapes."""
    x = _dense(path, value, "its images")
    if x.ndim != 4 or len(x) == 0:
        raise wrong(path, f"its images have the shape {list(x.shape)}, not [n, c, h, w]")
    if tuple(x.shape[1:]) != spec.shape:
        raise UsageError(
            f"{path} has images of {list(x.shape[1:])}, '{spec.name}' has {list(spec.shape)} (c, h, w)",
            "Give dataset=NAME and dataset.size=N of the data that the set was made from",
        )
    if x.dtype != torch.uint8 and not x.is_floating_point():
        raise wrong(path, f"its images are {x.dtype}, neither uint8 nor floats")
    return x.clone() if x.dtype == torch.uint8 else finite(path, x, "its images")


def label_tensor(path: Path, value: Any) -> Tensor:
    """Labels as integers [n] or float32 [n k], a copy."""
    y = _dense(path, value, "its labels")
    y = y[:, 0] if y.ndim == 2 and y.shape[1] == 1 and not y.is_floating_point() else y
    if y.is_floating_point():
        if y.ndim != 2:
            raise wrong(path, f"its labels are {y.dtype} {list(y.shape)}, not a row for each image")
        return finite(path, y, "its labels")
    if y.ndim != 1:
        raise wrong(path, f"its labels are {y.dtype} {list(y.shape)}, not one number for each image")
    return y.long().clone()


def read_rate(path: Path, value: Any) -> float:
    """A learned learning rate: one positive finite number, as a number or a tensor of one."""
    if isinstance(value, Tensor) and value.numel() == 1 and is_dense(value):
        value = value.detach().item()
    if type(value) is not float or not 0 < value < float("inf"):
        raise wrong(path, "its learned learning rate is not one positive number")
    return value


def finite(path: Path, tensor: Tensor, what: str) -> Tensor:
    """A float32 copy of finite numbers that stay finite in it."""
    copy = tensor.detach().to(torch.float32, copy=True).contiguous()
    if not bool(copy.isfinite().all()):
        raise wrong(path, f"{what} are not finite")
    return copy


def _dense(path: Path, value: Any, what: str) -> Tensor:
    if not isinstance(value, Tensor):
        raise wrong(path, f"{what} are no tensor")
    if value.device.type != "cpu" or not is_dense(value):
        raise wrong(path, f"{what} of shape {list(value.shape)} have no storage of their own size")
    return value.detach()


def one_file(paths: Sequence[Path], pattern: str) -> Path:
    """The only path; UsageError for several, and for a folder."""
    if len(paths) != 1 or paths[0].is_dir():
        raise UsageError(f"{', '.join(map(str, paths)) or 'nothing'} was given", f"Give one file, {pattern}")
    return paths[0]


def _refuse_experiment(experiment: int | None) -> None:
    if experiment is not None:
        raise UsageError(
            f"experiment={experiment} is for files of several experiments (dm, datadam)", "Leave it out"
        )


def _one_of(path: Path, content: Mapping[str, Any], keys: tuple[str, str]) -> Any:
    held = [key for key in keys if key in content]
    if len(held) != 1:
        raise wrong(path, f"it needs one of the keys {keys[0]!r} and {keys[1]!r}")
    return content[held[0]]


def _images_file(paths: Sequence[Path]) -> tuple[Path, Path | None, tuple[str, ...]]:
    """The images file, the labels file if one was given, and notes."""
    if len(paths) == 1 and paths[0].is_dir():
        names = {file.name: file for file in paths[0].iterdir() if PAIR.fullmatch(file.name)}
        plain = {name: file for name, file in names.items() if not name.startswith("images_zca_")}
        if not names:
            raise UsageError(f"{paths[0]} holds no images_best.pt or images_N.pt", "Give the images file")
        last = max(plain or names, key=lambda name: (name == "images_best.pt", len(name), name))
        return names[last], None, (f"of {len(names)} sets in {paths[0]}, {last} is taken",)
    labels = [path for path in paths if path.name.startswith("labels")]
    images = [path for path in paths if path not in labels]
    if len(images) != 1 or len(labels) > 1:
        given = ", ".join(map(str, paths)) or "nothing"
        raise UsageError(
            f"{given} was given", "Give images_*.pt, or it and labels_*.pt, or the folder of both"
        )
    return images[0], labels[0] if labels else None, ()


def _by_row(path: Path, n: int, k: int) -> tuple[Tensor, str]:
    if n % k:
        raise UsageError(
            f"{path} has no labels file beside it, and its {n} images are not the same number of {k} classes",
            "Give the labels file too",
        )
    said = f"without a labels file the {n} images are taken class by class, {n // k} of each, in label order"
    return torch.arange(k).repeat_interleave(n // k), said

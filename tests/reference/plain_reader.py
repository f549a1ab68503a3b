"""Readers of our artefacts written from docs/formats.md alone: json, hashlib and numpy, nothing of ours."""

import hashlib
import json
import struct
from itertools import pairwise

import numpy as np

TYPES = {"U8": "u1", "I8": "i1", "I16": "<i2", "I32": "<i4", "I64": "<i8", "F16": "<f2", "F32": "<f4"}
F = np.float32


def sealed(path):
    """A sealed JSON file whose seal and spelling are right."""
    text = path.read_bytes()
    found = json.loads(text)
    rest = {key: value for key, value in found.items() if key != "seal"}
    compact = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    assert hashlib.sha256(compact.encode()).hexdigest() == found["seal"]
    assert (json.dumps(found, indent=1) + "\n").encode() == text
    return found


def tensors(path, entry):
    """The tensors of a safetensors file of the size and hash of a manifest's entry."""
    data = path.read_bytes()
    assert len(data) == entry["bytes"] and hashlib.sha256(data).hexdigest() == entry["sha256"]
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    header.pop("__metadata__", None)
    return {name: _tensor(about, body) for name, about in header.items()}


def _tensor(about, body):
    begin, end = about["data_offsets"]
    return np.frombuffer(body[begin:end], TYPES[about["dtype"]]).reshape(about["shape"])


def distilled(folder):
    """(manifest, tensors) of a distilled set."""
    manifest = sealed(folder / "manifest.json")
    assert manifest["format"] == "ddengine/distilled-set" and manifest["version"] == 1
    return manifest, tensors(folder / "data.safetensors", manifest["files"]["data.safetensors"])


def images(folder):
    """(x, y) of a set of images: model input and labels of every training image."""
    manifest, held = distilled(folder)
    made = {"pixels": stored, "subset": subset, "factored": factored, "compensated": compensated}
    return made[manifest["kind"]](manifest, held)


def _channel(values):
    return np.asarray(values, F)[:, None, None]


def normalised(pixels, manifest, held):
    """Pixels in 0..1 as model input."""
    if manifest["dataset"]["preprocessing"] == "zca":
        flat = pixels.reshape(len(pixels), -1) - held["zca.mean"]
        return (flat @ held["zca.matrix"]).reshape(pixels.shape)
    return (pixels - _channel(manifest["dataset"]["mean"])) / _channel(manifest["dataset"]["std"])


def stored(manifest, held):
    """Images of the kind `pixels`, and the stored ones of `factored`."""
    x = held["images"]
    if x.dtype != np.uint8:
        return x.astype(F), held["labels"]
    mean, std = (np.asarray(manifest["dataset"][key], np.float64) for key in ("mean", "std"))
    offset, scale = held["images.offset"], held["images.scale"]
    real = np.array_equal(offset, np.broadcast_to((-mean / std).astype(F), offset.shape))
    real = real and np.array_equal(scale, np.broadcast_to((1 / (255 * std)).astype(F), scale.shape))
    if real and manifest["dataset"]["preprocessing"] == "standard":
        return normalised(x.astype(F) / F(255), manifest, held), held["labels"]
    return x.astype(F) * scale[:, :, None, None] + offset[:, :, None, None], held["labels"]


def subset(manifest, held):
    """Copies of real images."""
    return normalised(held["images"].astype(F) / F(255), manifest, held), held["labels"]


def factored(manifest, held):
    """Every cell of every stored image in full size."""
    x, y = stored(manifest, held)
    f, (h, w) = manifest["factor"], x.shape[2:]
    cells = [x[:, :, rows, columns] for rows in spans(h, f) for columns in spans(w, f)]
    whole = [bilinear(bilinear(cell, h, 2), w, 3) for cell in cells]
    return np.concatenate(whole), np.tile(y, f * f) if manifest["y_kind"] == "class" else y


def spans(side, f):
    """Rows of each cell: the first ones a pixel longer where f does not divide the side."""
    ends = np.cumsum([0, *(side // f + (i < side % f) for i in range(f))])
    return [slice(a, b) for a, b in pairwise(ends)]


def bilinear(x, side, axis):
    """`x` with `side` pixels on an axis, corners not aligned."""
    cell = x.shape[axis]
    at = np.clip((np.arange(side) + 0.5) * cell / side - 0.5, 0, cell - 1)
    low = np.floor(at).astype(int)
    share = (at - low).reshape([-1 if i == axis else 1 for i in range(4)])
    high = np.minimum(low + 1, cell - 1)
    return np.take(x, low, axis) * (1 - share) + np.take(x, high, axis) * share


def compensated(manifest, held):
    """Bases, and their sums with the compensators of their group."""
    real = held["images"].dtype == np.uint8 and "images.scale" not in held
    bases = held["images"].astype(F) / F(255) if real else stored(manifest, {**held, "labels": None})[0]
    sums = [bases]
    if "compensators" in held:
        u = held["compensators"].astype(F)
        if "compensators.scale" in held:
            u = u * held["compensators.scale"].astype(F)[..., None, None]
        added = [bases + u[held["group"], v] for v in range(u.shape[1])]
        sums += [np.clip(x, 0, 1) for x in added] if real else added
    x = np.concatenate(sums)
    y = logits(held, len(manifest["dataset"]["classes"])) if manifest["y_kind"] == "logit" else None
    return normalised(x, manifest, held) if real else x, np.tile(
        held["labels.classes"], len(sums)
    ) if y is None else y


def logits(held, k):
    """Stored logits of k classes."""
    codes = held["labels"]
    if codes.dtype != np.uint8:
        return codes.astype(F)
    if codes.shape[1] != k:
        codes = np.stack([codes & 15, codes >> 4], 2).reshape(len(codes), -1)[:, :k]
    scale, offset = (held[f"labels.{name}"].astype(F)[:, None] for name in ("scale", "offset"))
    return codes.astype(F) * scale + offset


def forest(folder):
    """For each item of a forest: ({computation tree as a nested tuple: how often}, label, weight)."""
    manifest, held = distilled(folder)
    held = {
        name: value.astype(np.int64) if value.dtype.kind in "iu" else value for name, value in held.items()
    }
    below = [("x", *row) for row in held["trees.x"].tolist()]
    if "trees.degree" in held:
        below = [(*tree, degree) for tree, degree in zip(below, held["trees.degree"].tolist(), strict=True)]
    place, entry = 0, 0
    for size in held["trees.sizes"][1:]:
        trees = []
        for colour in range(place, place + size):
            many = held["trees.entries"][colour]
            children = [_child(held, below, i) for i in range(entry, entry + many)]
            trees.append((below[held["trees.own"][colour]], tuple(sorted(children, key=repr))))
            entry += many
        place, below = place + size, trees
    m = len(held["labels"])
    colours = held.get("items.color", np.arange(m))
    sizes = held.get("items.sizes", np.ones(len(colours), int))
    counts = held.get("items.count", np.ones(len(colours), int))
    ends = np.cumsum([0, *sizes])
    y = held["labels"]
    if manifest["y_kind"] == "prob":
        y = np.concatenate([y, 255 - y.sum(1, keepdims=True)], 1) / 255
    weights = held.get("weights", np.ones(m))
    runs = [slice(a, b) for a, b in pairwise(ends)]
    found = [{below[c]: int(n) for c, n in zip(colours[run], counts[run], strict=True)} for run in runs]
    return list(zip(found, y, weights, strict=True))


def _child(held, below, i):
    times = int(held["trees.times"][i]) if "trees.times" in held else 1
    edge = int(held["trees.edge"][i]) if "trees.edge" in held else 0
    label = tuple(held["trees.edges"][edge].tolist()) if "trees.edges" in held else ()
    return below[held["trees.child"][i]], label, times


def expert_rows(folder, number):
    """Every row of an expert, [t p] float32."""
    manifest = sealed(folder / "manifest.json")
    entry = manifest["experts"][str(number)]
    held = tensors(folder / entry["file"], entry)
    if entry["encoding"] == "fp32":
        return held["params"]
    moved = held["scale"][:, None] * held["delta"].astype(F)
    return np.concatenate([held["start"][None], held["start"] + moved])

"""Distilled sets as one file that other tools read: .npz and .pt, from which nothing of the data is lost."""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from ddengine import files
from ddengine.types import Images

ROUNDING = 1e-6  # of pixels in [0, 1]: float32 brings 8-bit pixels back within this


@dataclass(frozen=True)
class Contents:
    """What there is to export: decoded images, a learned learning rate, and the manifest of the set."""

    images: Images
    student_lr: float | None
    manifest: dict[str, Any]


def pixels_of(images: Images) -> tuple[UInt8[Tensor, "n c h w"], tuple[str, ...]]:
    """The images as 8-bit pixels, and how many were clamped and by how much rounding changed the rest."""
    x = images.spec.denormalise(images.x)
    inside = x.clamp(0, 1)
    levels = (inside * 255).round()
    clipped = int(((x - inside).abs() > ROUNDING).sum())
    error = float((inside - levels / 255).abs().max())
    notes = []
    if clipped:
        worst = float((x - inside).abs().max())
        notes.append(
            f"{clipped} of {x.numel()} pixel values lie outside [0, 1], by up to {worst:.3g}: clamped in PNG"
        )
    if error > ROUNDING:
        notes.append(f"rounding to 8 bits changes pixels by up to {error:.2g} of 1 in PNG")
    return levels.to(torch.uint8), tuple(notes)


def write_npz(contents: Contents, path: Path) -> tuple[str, ...]:
    """x (float32 model input), pixels (uint8), y, y_kind, classes, mean, std[, zca_*][, student_lr]."""
    images, spec = contents.images, contents.images.spec
    arrays: dict[str, Any] = {
        "x": images.x.numpy(),
        "pixels": pixels_of(images)[0].numpy(),
        "y": images.y.numpy(),
        "y_kind": np.array(images.y_kind),
        "classes": np.array(spec.classes),
        "mean": np.array(spec.mean, np.float64),
        "std": np.array(spec.std, np.float64),
    }
    if spec.zca is not None:
        parts = {"mean": spec.zca.mean, "matrix": spec.zca.matrix, "inverse": spec.zca.inverse}
        arrays |= {f"zca_{name}": part.cpu().numpy() for name, part in parts.items()}
    if contents.student_lr is not None:
        arrays["student_lr"] = np.array(contents.student_lr, np.float64)
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    files.write_bytes(path, buffer.getvalue())
    return ()


def write_torch(contents: Contents, path: Path) -> tuple[str, ...]:
    """images (float32 model input), labels, y_kind, classes, mean, std[, zca][, student_lr] as one table."""
    images, spec = contents.images, contents.images.spec
    table: dict[str, Any] = {
        "images": images.x.contiguous(),
        "labels": images.y.contiguous(),
        "y_kind": images.y_kind,
        "classes": list(spec.classes),
        "mean": [float(v) for v in spec.mean],
        "std": [float(v) for v in spec.std],
    }
    if spec.zca is not None:
        table["zca"] = [part.cpu().clone() for part in (spec.zca.mean, spec.zca.matrix, spec.zca.inverse)]
    if contents.student_lr is not None:
        table["student_lr"] = contents.student_lr
    buffer = io.BytesIO()
    torch.save(table, buffer)
    files.write_bytes(path, buffer.getvalue())
    return ()

"""Bytes of compensated sets from the real writer, beside their composites as PNG and a log of soft labels.

    python benchmarks/compensated_bytes.py [--images data.npz] [--groups 1]

Sets of 10 and 100 classes have images of 32x32, of 1,000 classes 64x64; there are M = 4 compensators a group,
labels are int8 logits, and the planner fills the nominal bytes (IPC uint8 images a class, labels nothing).
`--images` takes a file with `x_train` [n h w 3]: photographs, resized to the size of the set. Without it all
bases are noise, which PNG cannot compress. Compensators are smoothed noise of RMS 23/255, what INFER's have;
logits are random, since their bytes do not depend on them. The log is that of fast knowledge distillation:
IPC * C * 300 * (2 C + 25) bytes for 300 epochs.
"""

import argparse
import io
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ddengine.rng import Rng
from ddengine.types import Budget, DataSpec
from synth import Compensated, DistilledSet, label_row_bytes, nominal_bytes, plan
from synth.schema import DATA

CASES = [(10, 32, 10), (10, 32, 50), (100, 32, 10), (100, 32, 50), (1000, 64, 10), (1000, 64, 50)]
TEACHERS, EPOCHS, RMS = 4, 300, 23 / 255
ENCODED, SAMPLE = 5000, 500  # composites that are all encoded; of more only a sample, spread evenly


def bases(photographs: np.ndarray | None, count: int, side: int) -> Tensor:
    """`count` uint8 images [n 3 side side], photographs repeated where there are too few."""
    if photographs is None:
        shape = (count, 3, side, side)
        return torch.randint(0, 256, shape, generator=Rng(0).torch("bases"), dtype=torch.uint8)
    size = (side, side)
    chosen = photographs[np.arange(count) % len(photographs)]
    if chosen.shape[1:3] != size:
        chosen = np.stack(
            [np.asarray(Image.fromarray(x).resize(size, Image.Resampling.BICUBIC)) for x in chosen]
        )
    return torch.from_numpy(np.ascontiguousarray(chosen.transpose(0, 3, 1, 2)))


def compensators(groups: int, side: int) -> Tensor:
    """Noise drawn at half the size and enlarged, scaled to the RMS."""
    coarse = torch.randn((groups * TEACHERS, 3, side // 2, side // 2), generator=Rng(0).torch("u"))
    u = F.interpolate(coarse, size=side, mode="bicubic").unflatten(0, (groups, TEACHERS))
    return u * (RMS / u.square().mean().sqrt())


def png_bytes(synth: Compensated) -> tuple[int, bool]:
    """Bytes of all composites as PNG files, and whether they were extrapolated from a sample."""
    n, sampled = synth.count, synth.count > ENCODED
    index = torch.linspace(0, n - 1, SAMPLE if sampled else n).round().long()
    total = 0
    for part in index.split(256):
        pixels = synth.spec.denormalise(synth.composites().model_input(part))
        for x in (pixels.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy():
            file = io.BytesIO()
            Image.fromarray(x).save(file, "PNG")
            total += file.tell()
    return total * n // len(index), sampled


def row(classes: int, side: int, ipc: int, groups: int | None, photographs: np.ndarray | None) -> str:
    names = tuple(f"{c:04d}" for c in range(classes))
    spec = DataSpec("bytes", (3, side, side), names, (0.5,) * 3, (0.25,) * 3)
    nominal = nominal_bytes(Budget(ipc=ipc), spec)
    made = plan(nominal, spec, TEACHERS, groups, label_row_bytes(classes, "int8"))
    count = made.sheets * classes + made.last
    group = (torch.arange(count) // classes * made.groups // made.sheets).clamp(max=made.groups - 1)
    logits = torch.randn((count * (TEACHERS + 1), classes), generator=Rng(0).torch("logits"))
    pixels, u = bases(photographs, count, side), compensators(made.groups, side)
    synth = Compensated(pixels, torch.arange(count) % classes, u, group, spec, labels=logits)
    with tempfile.TemporaryDirectory() as folder:
        saved = DistilledSet.make(synth, recipe={}, provenance={}).save(Path(folder) / "set")
        file = (saved / DATA).stat().st_size
    png, sampled = png_bytes(synth)
    log = ipc * classes * EPOCHS * (2 * classes + 25)
    parts, size = synth.nbytes, f"{side}x{side}"
    assert parts["total"] == made.nbytes <= nominal
    cells = [
        f"{classes:,}", size, ipc, f"{made.sheets} + {made.last}/{classes}", made.groups, f"{synth.count:,}",
        f"{nominal:,}", f"{parts['images']:,}", f"{parts['labels']:,}", f"{parts['extras']:,}",
        f"{parts['total']:,}", f"{file:,}", f"{'~' if sampled else ''}{png:,} ({png / nominal:.2f})",
        f"{log:,} ({log / nominal:.1f})",
    ]  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, help="NPZ file with x_train [n h w 3], uint8 photographs")
    parser.add_argument("--groups", type=int, help="groups of sheets; by default each sheet is one")
    parser.add_argument("--classes", type=int, nargs="*", default=[10, 100, 1000])
    args = parser.parse_args()
    photographs = None if args.images is None else np.load(args.images)["x_train"]
    heads = [
        "classes", "images", "IPC", "sheets", "groups", "composites", "nominal bytes", "bases", "labels",
        "compensators", "set", "file", "composites as PNG (x nominal)", "300-epoch label log (x nominal)",
    ]  # fmt: skip
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for classes, side, ipc in CASES:
        if classes in args.classes:
            print(row(classes, side, ipc, args.groups, photographs), flush=True)
    shown = "noise, which PNG cannot compress" if photographs is None else "photographs"
    print(f"\nBases are {shown}. ~: extrapolated from {SAMPLE} composites where there are over {ENCODED:,}.")


if __name__ == "__main__":
    main()

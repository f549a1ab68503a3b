"""Differentiable Siamese augmentation (DSA, Zhao and Bilen 2021) as values: `sample` draws, `apply` computes.

Everything acts on normalised images: zero fill is the mean colour and nothing is clamped. Parameters are
small CPU tensors that can be stored and replayed; the same parameters on two batches are the siamese pair.
"""

import math
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from ddengine.errors import UsageError, unknown

STRATEGY = "color_crop_cutout_flip_scale_rotate"
OPS = ("color", "crop", "cutout", "flip", "scale", "rotate")
BRIGHTNESS, SATURATION, CONTRAST = 1.0, 2.0, 0.5  # strengths of the released code (DSA, ParamDiffAug)
CROP, CUTOUT, SCALE, DEGREES = 0.125, 0.5, 1.2, 15.0
DIGITS = ("digits", "mnist", "svhn")  # a mirrored digit is another sign
NONE = -1
NUMBERS = 11  # that a row of parameters is made of


@dataclass(frozen=True)
class DsaParams:
    """One row per group of images: which operator it gets and that operator's numbers.

    `op` indexes OPS, -1 is no augmentation. `colour` holds u for brightness, saturation and contrast in
    [0, 1); `shift` the pixels by which the view moves (down, right); `centre` the middle of the cut-out (row,
    column); `flip` 0 or 1; `scale` the factors (x, y); `angle` radians. Columns of other operators are drawn
    but unused.
    """

    op: Int[Tensor, " g"]
    colour: Float[Tensor, "g 3"]
    shift: Int[Tensor, "g 2"]
    centre: Int[Tensor, "g 2"]
    flip: Int[Tensor, " g"]
    scale: Float[Tensor, "g 2"]
    angle: Float[Tensor, " g"]

    def __len__(self) -> int:
        return len(self.op)

    def __getitem__(self, rows: Tensor) -> "DsaParams":
        return DsaParams(*(getattr(self, f.name)[rows] for f in fields(self)))


def strategy_for(dataset: str) -> str:
    """The papers' DSA string for a dataset: all six operators, without `flip` where the images are digits."""
    return STRATEGY.replace("flip_", "") if dataset in DIGITS else STRATEGY


def parse(strategy: str) -> tuple[int, ...]:
    """Operator numbers of a DSA string such as "color_crop_flip"; "none" or "" is none (else UsageError)."""
    names = [] if strategy in ("", "none") else strategy.split("_")
    for name in names:
        if name not in OPS:
            raise unknown("augmentation", name, OPS)
    return tuple(OPS.index(name) for name in names)


def sample(
    generator: torch.Generator, strategy: str, groups: int, size: tuple[int, int], *, one_op: bool = False
) -> DsaParams:
    """Draw parameters for `groups` rows of images of `size` (h, w).

    Each row gets one operator drawn uniformly from `strategy`; with `one_op` all rows share the operator
    and differ in its numbers (the papers' evaluation: one operator a mini-batch, parameters a sample).
    """
    ops = parse(strategy)
    op = torch.randint(max(len(ops), 1), (1 if one_op else groups,), generator=generator).expand(groups)
    u = torch.rand((groups, 12), generator=generator)
    return numbers(torch.tensor(ops)[op] if ops else torch.full((groups,), NONE), u[:, :NUMBERS], size)


def numbers(op: Int[Tensor, " g"], u: Float[Tensor, "g 11"], size: tuple[int, int]) -> DsaParams:
    """The parameters that rows of NUMBERS uniform numbers in [0, 1) stand for, on images of `size` (h, w)."""
    h, w = size
    crop, cut = [int(s * CROP + 0.5) for s in size], [int(s * CUTOUT + 0.5) for s in size]
    extent = torch.tensor([h, w])
    return DsaParams(
        op=op,
        colour=u[:, 0:3],
        shift=(u[:, 3:5] * (2 * torch.tensor(crop) + 1)).long() - torch.tensor(crop),
        centre=(u[:, 5:7] * (extent + 1 - torch.tensor(cut) % 2)).long(),
        flip=(u[:, 7] < 0.5).long(),
        scale=u[:, 8:10] * (SCALE - 1 / SCALE) + 1 / SCALE,
        angle=(u[:, 10] * 2 - 1) * math.radians(DEGREES),
    )


def in_turn(x: Float[Tensor, "n c h w"], params: DsaParams, strategy: str) -> Float[Tensor, "n c h w"]:
    """Each image under all operators of `strategy`, in its order, with the numbers of its row of `params`.

    Differentiable in x. Raises UsageError if the rows do not cover the batch.
    """
    if len(params) != len(x):
        raise UsageError(
            f"{len(params)} augmentation rows for {len(x)} images", "Give one row for each image"
        )
    for op in parse(strategy):
        x = _APPLY[op](x, params)
    return x


def apply(
    x: Float[Tensor, "n c h w"], params: DsaParams, rows: Int[Tensor, " n"] | None = None
) -> Float[Tensor, "n c h w"]:
    """Augment image i with parameter row `rows[i]` (default: row i, or row 0 for all if there is one row).

    Differentiable in x. Raises UsageError if the rows do not cover the batch.
    """
    if rows is None:
        rows = torch.zeros(len(x), dtype=torch.long) if len(params) == 1 else torch.arange(len(params))
    if len(rows) != len(x):
        raise UsageError(f"{len(rows)} augmentation rows for {len(x)} images", "Give one row for each image")
    each = params[rows]
    present = each.op.unique().tolist()
    if len(present) == 1:
        return _APPLY[present[0]](x, each)
    picks = [(op, (each.op == op).nonzero().squeeze(1)) for op in present]
    parts = [_APPLY[op](x[pick.to(x.device)], each[pick]) for op, pick in picks]
    order = torch.cat([pick for _, pick in picks]).argsort()
    return torch.cat(parts)[order.to(x.device)]


def neutral(groups: int, op: str, size: tuple[int, int]) -> DsaParams:
    """Parameters under which operator `op` changes nothing (cut-out: a centre far outside the image)."""
    generator = torch.Generator().manual_seed(0)
    far = torch.full((groups, 2), -2 * max(size))
    drawn = sample(generator, op, groups, size)
    zero = torch.zeros(groups)
    return replace(
        drawn,
        colour=torch.full((groups, 3), 0.5),
        shift=torch.zeros_like(drawn.shift),
        centre=far,
        flip=torch.zeros_like(drawn.flip),
        scale=torch.ones_like(drawn.scale),
        angle=zero,
    )


def _column(value: Tensor, x: Tensor) -> Tensor:
    return value.to(x)[:, None, None, None]


def _color(x: Tensor, p: DsaParams) -> Tensor:
    x = x + _column((p.colour[:, 0] - 0.5) * BRIGHTNESS, x)
    grey = x.mean(1, keepdim=True)
    x = (x - grey) * _column(p.colour[:, 1] * SATURATION, x) + grey
    level = x.mean((1, 2, 3), keepdim=True)
    return (x - level) * _column(p.colour[:, 2] + CONTRAST, x) + level


def _crop(x: Tensor, p: DsaParams) -> Tensor:
    n, c, h, w = x.shape
    pad = max(int(s * CROP + 0.5) for s in (h, w))
    padded = F.pad(x, [pad] * 4)
    down, right = (p.shift + pad).to(x.device).unbind(1)
    row = (down[:, None] + torch.arange(h, device=x.device))[:, None, :, None]
    col = (right[:, None] + torch.arange(w, device=x.device))[:, None, None, :]
    index = (row * padded.shape[3] + col).expand(n, c, h, w)
    return padded.flatten(2).gather(2, index.flatten(2)).reshape(n, c, h, w)


def _cutout(x: Tensor, p: DsaParams) -> Tensor:
    inside = []
    for axis, length in enumerate(x.shape[2:]):
        size = int(length * CUTOUT + 0.5)
        low = p.centre[:, axis].to(x.device)[:, None] - size // 2
        place = torch.arange(length, device=x.device)
        inside.append((place >= low) & (place < low + size))
    hole = inside[0][:, None, :, None] & inside[1][:, None, None, :]
    return x.masked_fill(hole, 0.0)


def _flip(x: Tensor, p: DsaParams) -> Tensor:
    return torch.where(_column(p.flip, x) > 0, x.flip(3), x)


def _warp(x: Tensor, theta: Tensor) -> Tensor:
    grid = F.affine_grid(theta.to(x), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _scale(x: Tensor, p: DsaParams) -> Tensor:
    theta = torch.zeros(len(x), 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = p.scale.unbind(1)
    return _warp(x, theta)


def _rotate(x: Tensor, p: DsaParams) -> Tensor:
    theta = torch.zeros(len(x), 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = p.angle.cos()
    theta[:, 0, 1], theta[:, 1, 0] = -p.angle.sin(), p.angle.sin()
    return _warp(x, theta)


def _none(x: Tensor, p: DsaParams) -> Tensor:
    return x


_APPLY = {NONE: _none, **dict(enumerate((_color, _crop, _cutout, _flip, _scale, _rotate)))}

"""Sheets: one real image of each class, several times, the last one perhaps without some classes.

Bases come sheet by sheet and in label order inside a sheet, so that a sheet is one slice. They are real
images (drawn, or chosen by a selection) or RDED's crops, which teachers find most like their class.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Int, UInt8
from torch import Tensor, nn

from ddengine.errors import UsageError
from ddengine.rng import Rng
from ddengine.types import Images, Task
from matchers.teachers import logits_of
from synth.budget import SheetPlan
from synth.starts import SELECTIONS

POOL = 300  # real images of a class that RDED scores
CROPS = 5  # crops of each of them, where a stored image holds several


@dataclass(frozen=True, eq=False)
class Sheets:
    """uint8 bases [b c h w] on the CPU, their classes [b], sheets [b] and groups of sheets [b]."""

    pixels: UInt8[Tensor, "b c h w"]
    classes: Int[Tensor, " b"]
    sheet: Int[Tensor, " b"]
    group: Int[Tensor, " b"]


def real_sheets(task: Task, plan: SheetPlan, selection: str, rng: Rng) -> Sheets:
    """Sheets of distinct real images: of each class as many as there are sheets, in the selection's order.

    UsageError for a source that does not hold uint8 images with class labels.
    """
    images = _plain(task.images)
    per_class = plan.sheets + (plan.last > 0)
    index = SELECTIONS[selection](images, per_class, rng.fold("start"))
    classes, sheet = places(plan, len(images.spec.classes), rng)
    return _made(images.x[index[classes * per_class + sheet]], classes, sheet, plan)


def confident_sheets(
    task: Task, plan: SheetPlan, teachers: Sequence[nn.Module], parts: int, rng: Rng
) -> Sheets:
    """Sheets of RDED (Sun et al., CVPR 2024): the crops that the teachers know best, `parts`^2 to an image.

    Of each class up to 300 real images are scored by the teachers' mean cross-entropy; with `parts` > 1 five
    crops each, of 1 / parts^2 of the area, of which the best counts. The best images, one crop each and
    shrunk by `parts`, are laid in a square. UsageError as `real_sheets`, and where a class has too few.
    """
    images = _plain(task.images)
    classes, sheet = places(plan, len(images.spec.classes), rng)
    per_class, (c, h, w) = plan.sheets + (plan.last > 0), images.spec.shape
    if h % parts or w % parts:
        raise UsageError(
            f"matcher.parts={parts} does not divide images of {h}x{w}", "Give a divisor of both sides"
        )
    needed = per_class * parts**2
    chosen = torch.empty(len(images.spec.classes), per_class, c, h, w, dtype=torch.uint8)
    first = 0
    for label, count in enumerate(images.counts):
        if count < needed:
            raise UsageError(
                f"class '{images.spec.classes[label]}' has {count} images, {needed} crops are needed",
                "Give a smaller ipc or matcher.parts=1",
            )
        here = rng.fold("class", label)
        pool = first + torch.randperm(count, generator=here.torch("pool"))[: max(POOL, needed)]
        best = _best(images, pool, label, teachers, parts, needed, here, task.device)
        chosen[label] = _collage(best, per_class, parts)
        first += count
    return _made(chosen[classes, sheet], classes, sheet, plan)


def _plain(images: Images) -> Images:
    if images.x.dtype != torch.uint8 or images.y_kind != "class":
        raise UsageError(
            f"sheets of {images.x.dtype} images with {images.y_kind} labels",
            "Give a source of uint8 images with class labels",
        )
    return images


def places(plan: SheetPlan, classes: int, rng: Rng) -> tuple[Int[Tensor, " b"], Int[Tensor, " b"]]:
    """Class and sheet of every base; the classes of the last, partial sheet are drawn."""
    whole = torch.arange(classes).repeat(plan.sheets)
    extra = torch.randperm(classes, generator=rng.torch("last"))[: plan.last].sort().values
    sheet = torch.arange(plan.sheets).repeat_interleave(classes)
    return torch.cat([whole, extra]), torch.cat([sheet, torch.full((plan.last,), plan.sheets)])


def _made(pixels: Tensor, classes: Tensor, sheet: Tensor, plan: SheetPlan) -> Sheets:
    return Sheets(pixels.contiguous(), classes, sheet, groups_of(plan, sheet))


def groups_of(plan: SheetPlan, sheet: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
    """Groups are of consecutive sheets; the partial one is with those before it."""
    return sheet.clamp(max=plan.sheets - 1) * plan.groups // plan.sheets


def group_sizes(plan: SheetPlan, classes: int) -> list[int]:
    """Bases in each group."""
    sheet = torch.arange(plan.sheets * classes + plan.last) // classes
    return torch.bincount(groups_of(plan, sheet), minlength=plan.groups).tolist()


def _best(
    images: Images,
    pool: Tensor,
    label: int,
    teachers: Sequence[nn.Module],
    parts: int,
    needed: int,
    rng: Rng,
    device: torch.device,
) -> UInt8[Tensor, "n c a b"]:
    """The best crop of each of the `needed` images that are best, in that order."""
    tries = CROPS if parts > 1 else 1
    crops = [_cropped(images.x[pool], parts, rng.torch(f"crop-{number}")) for number in range(tries)]
    losses = torch.stack([_losses(crop, images, label, teachers, device) for crop in crops])
    loss, which = losses.min(0)
    order = loss.argsort(stable=True)[:needed]
    return torch.stack([crops[int(which[i])][i] for i in order.tolist()])


def _cropped(x: Tensor, parts: int, generator: torch.Generator) -> Tensor:
    """One crop of a `parts`-th of each side of each image."""
    if parts == 1:
        return x
    h, w = x.shape[2] // parts, x.shape[3] // parts
    top = torch.randint(x.shape[2] - h + 1, (len(x),), generator=generator).tolist()
    left = torch.randint(x.shape[3] - w + 1, (len(x),), generator=generator).tolist()
    return torch.stack([one[:, t : t + h, s : s + w] for one, t, s in zip(x, top, left, strict=True)])


def _losses(
    x: Tensor, images: Images, label: int, teachers: Sequence[nn.Module], device: torch.device
) -> Tensor:
    """Mean cross-entropy over teachers of each crop, resized to what they were trained on."""
    seen = x.float() / 255
    if tuple(x.shape[1:]) != images.spec.shape:
        seen = F.interpolate(seen, images.spec.shape[1:], mode="bilinear", align_corners=False)
    seen = images.spec.normalise(seen).to(device)
    y = torch.full((len(x),), label, device=device)
    each = [F.cross_entropy(logits_of(net, seen), y, reduction="none") for net in teachers]
    return torch.stack(each).mean(0).cpu()


def _collage(best: Tensor, count: int, parts: int) -> Tensor:
    """`count` images, each of parts^2 crops, dealt so that every image gets one of the best."""
    if parts == 1:
        return best
    tiles = best.reshape(parts, parts, count, *best.shape[1:])
    rows = [torch.cat(list(row), 3) for row in tiles]  # [count c h parts*w]
    return torch.cat(rows, 2)

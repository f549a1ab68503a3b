"""How many sheets of real images a byte budget holds beside compensators, soft labels and teachers."""

from bisect import bisect_right
from dataclasses import dataclass
from math import prod

from ddengine.errors import UsageError, require_positive
from ddengine.types import Budget, DataSpec, label_bytes


@dataclass(frozen=True)
class SheetPlan:
    """What a budget holds: `sheets` of one image a class, and one more of the first `last` classes.

    `last` is 0 for none; the partial sheet is in the last of the `groups`. `nbytes` are the bytes of the
    stored set, `fixed` ones included.
    """

    sheets: int
    last: int
    groups: int
    nbytes: int


def nominal_bytes(budget: Budget, spec: DataSpec) -> int:
    """The bytes of a budget: its own, or those of `ipc` uint8 images a class and nothing for labels."""
    if budget.nbytes is not None:
        return budget.nbytes
    assert budget.ipc is not None
    return budget.ipc * len(spec.classes) * prod(spec.shape)


def published_sheets(ipc: int, classes: int, teachers: int) -> int:
    """K = floor(IPC / (1 + M / C)), which counts images alone (INFER, Zhang et al. 2024)."""
    return ipc * classes // (classes + teachers)


def plan(
    nominal: int,
    spec: DataSpec,
    per_group: int,
    groups: int | None,
    labels: int,
    fixed: int = 0,
    image_bytes: int | None = None,
    compensator_bytes: int | None = None,
    fraction: bool = True,
    limit: int | None = None,
    remedy: str = "Give a larger ipc or budget.nbytes, or fewer compensators",
) -> SheetPlan:
    """The most sheets whose `Compensated` set has at most `nominal` bytes.

    `per_group` is M, the compensators of a group; `groups` None gives each sheet its own and a number is an
    upper bound. `labels` are the bytes of one composite's soft label (0 for hard ones, see
    `label_row_bytes`); `fixed` those of what does not grow, such as teachers. An image has c * h * w bytes
    and a compensator c * h * w + 2 * c (int8) where not told. `fraction` spends what is left on a partial
    sheet; there are at most `limit` sheets. Raises UsageError, which advises `remedy`, where not even one
    sheet fits.
    """
    require_positive("groups", 1 if groups is None else groups)
    for name, value in (("per_group", per_group), ("labels", labels), ("fixed", fixed)):
        require_positive(name, value, zero=True)
    c, k, pixels = spec.shape[0], len(spec.classes), prod(spec.shape)
    image = pixels if image_bytes is None else image_bytes
    extra = per_group * (pixels + 2 * c if compensator_bytes is None else compensator_bytes)
    require_positive("image_bytes", image)

    def counted(sheets: int) -> int:
        return sheets if groups is None else min(groups, sheets)

    def base(sheets: int) -> int:
        numbers = label_bytes(k) + (label_bytes(counted(sheets)) if per_group else 0)
        return image + numbers + (per_group + 1) * labels

    def total(sheets: int) -> int:
        return sheets * k * base(sheets) + counted(sheets) * extra + fixed

    sheets = bisect_right(range(1, nominal // (k * image) + 1), nominal, key=total)
    if sheets == 0:
        raise _too_small(nominal, per_group, k, total(1), remedy)
    if limit is not None and sheets >= limit:
        return SheetPlan(limit, 0, counted(limit), total(limit))
    room = (nominal - total(sheets)) // base(sheets) if fraction else 0
    last = min(room, k - 1)
    return SheetPlan(sheets, last, counted(sheets), total(sheets) + last * base(sheets))


def _too_small(nominal: int, per_group: int, classes: int, needed: int, remedy: str) -> UsageError:
    return UsageError(
        f"a budget of {nominal} bytes is too small for one sheet of {classes} classes with {per_group} "
        f"compensators: it needs {needed} bytes",
        remedy,
    )

"""Grids of down-scaled images as a synthetic set: each stored image is decoded to factor^2 of full size.

Multi-formation of IDC (Kim et al., ICML 2022): a stored image is cut into factor x factor cells, and each of
them is brought to full size by bilinear up-sampling. The bytes are those of the stored images.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise, product
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from ddengine.errors import UsageError, require, require_positive
from ddengine.types import DataSpec, Images
from synth.pixels import Pixels, images_problem, labels_problem, names_problem, rate_problem
from synth.schema import FACTORS


@dataclass(frozen=True)
class Factored:
    """m stored images that stand for n = m * factor^2: image v * m + i is cell v of stored image i.

    `images` are free parameters in model-input space, unclamped; cells go row by row, and where `factor` does
    not divide a side the first ones are a pixel longer (IDC pads the last). `labels` are class numbers [m],
    which all cells of an image share (`y_kind` "class"; fixed), or rows of probabilities or logits [n k], one
    for each decoded image (free). `codec` and `student_lr` are those of `Pixels`. Raises UsageError where
    shapes disagree or an image has fewer pixels to a side than cells.
    """

    kind: ClassVar[str] = "factored"

    images: Float[Tensor, "m c h w"]
    labels: Int[Tensor, " m"] | Float[Tensor, "n k"]
    spec: DataSpec
    factor: int = 2
    y_kind: str = "class"
    codec: str = "uint8"
    student_lr: float | None = None

    def __post_init__(self) -> None:
        if wrong := factor_problem(self.factor, self.spec):
            raise UsageError(f"factor={self.factor}: {wrong}", "Give a whole number from 1 to the side")
        self._stored()
        Images(self.images[:0], self.labels[:0], self.spec, self.y_kind)
        if self.soft and len(self.labels) != self.count:
            raise UsageError(
                f"{len(self.labels)} soft labels for {self.count} decoded images",
                "Give one row for each cell of each stored image",
            )

    @property
    def soft(self) -> bool:
        """Whether the labels are soft, and with that free."""
        return self.y_kind != "class"

    @property
    def count(self) -> int:
        """Decoded images: training images that the set stands for."""
        return len(self.images) * self.factor**2

    @property
    def y(self) -> Tensor:
        """The label of every decoded image."""
        return self.labels if self.soft else self.labels.repeat(self.factor**2)

    @property
    def classes(self) -> Int[Tensor, " n"]:
        """The hard class of every decoded image, of which none is made."""
        return self.y.argmax(1) if self.soft else self.y

    def _stored(self) -> Pixels:
        """The stored images as a set of their own, whose labels are those that are hard."""
        none = torch.zeros(len(self.images), dtype=torch.int64)
        return Pixels(
            self.images, none if self.soft else self.labels, self.spec, codec=self.codec,
            student_lr=self.student_lr,
        )  # fmt: skip

    def params(self) -> dict[str, Tensor]:
        """The free tensors: the stored images, and soft labels."""
        return {"images": self.images, "labels": self.labels} if self.soft else {"images": self.images}

    def replace(self, params: Mapping[str, Tensor]) -> "Factored":
        """The same set with other free tensors (UsageError for a name that is not free)."""
        for name in params:
            require(name, self.params(), "free tensor")
        images, labels = params.get("images", self.images), params.get("labels", self.labels)
        return replace(self, images=images, labels=labels)

    def decode(self, indices: Int[Tensor, " n"] | None = None) -> Images:
        """The decoded images (all, or at `indices`) of full size; differentiable in `params()`.

        Only what is asked for is computed.
        """
        x = enlarged(self.images, self.factor, indices)
        y = self.y if indices is None else self.y[indices.to(self.labels.device)]
        return Images(x, y, self.spec, self.y_kind)

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes of what `pack` gives, by part: images (stored, not decoded), labels, extras, total."""
        found = self._stored().nbytes
        if not self.soft:
            return found
        labels = self.labels.numel() * self._label_dtype.itemsize
        return {**found, "labels": labels, "total": found["images"] + labels + found["extras"]}

    @property
    def _label_dtype(self) -> torch.dtype:
        return torch.float32 if self.codec == "fp32" else torch.float16

    def pack(self) -> dict[str, Tensor]:
        """The stored tensors (CPU), as `Pixels` has them. Raises UsageError when anything is not finite."""
        packed = self._stored().pack()
        if self.soft:
            packed["labels"] = self.labels.detach().cpu().to(self._label_dtype, copy=True)
        if not bool(packed["labels"].isfinite().all()):
            raise UsageError(
                f"the labels are not finite as {self.codec}: the run diverged",
                "Lower the rate of the labels and distil again",
            )
        return packed

    @staticmethod
    def unpack(tensors: Mapping[str, Tensor], fields: Mapping[str, Any], spec: DataSpec) -> "Factored":
        """The set from its stored tensors and its manifest fields, of which `y_kind` and `factor` count."""
        soft, labels = fields["y_kind"] != "class", tensors["labels"]
        none = {"labels": torch.zeros(len(tensors["images"]), dtype=torch.int64)} if soft else {}
        stored = Pixels.unpack({**tensors, **none}, {"y_kind": "class"}, spec)
        return Factored(
            images=stored.images,
            labels=labels.float() if soft else stored.labels,
            spec=spec,
            factor=fields["factor"],
            y_kind=fields["y_kind"],
            codec=stored.codec,
            student_lr=stored.student_lr,
        )

    @staticmethod
    def problem(tensors: Mapping[str, Tensor], y_kind: str, spec: DataSpec, factor: int) -> str | None:
        """The first thing that is wrong with stored tensors, in words; None when nothing is."""
        images = tensors.get("images")
        quantised = images is not None and images.dtype == torch.uint8
        affine = {"images.offset", "images.scale"} if quantised else set()
        if wrong := (
            factor_problem(factor, spec)
            or names_problem(tensors, {"images", "labels", *affine}, {"student_lr"})
            or images_problem(tensors, spec)
        ):
            return wrong
        rows = len(tensors["images"]) * (1 if y_kind == "class" else factor**2)
        return labels_problem(tensors["labels"], rows, y_kind, len(spec.classes)) or rate_problem(
            tensors.get("student_lr")
        )


def factor_problem(factor: int, spec: DataSpec) -> str | None:
    """What keeps images of `spec` from being grids of factor x factor, in words."""
    if type(factor) is not int or not 1 <= factor <= FACTORS:
        return f"a factor is a whole number in 1..{FACTORS}"
    side = min(spec.shape[1:])
    return None if factor <= side else f"images of {side} pixels to a side have no {factor} cells to a side"


def cells(size: tuple[int, int], factor: int) -> list[tuple[slice, slice]]:
    """Rows and columns of each cell of a grid on images of `size` (height, width), row by row of the grid."""
    return list(product(_spans(size[0], factor), _spans(size[1], factor)))


def _spans(side: int, factor: int) -> list[slice]:
    least, longer = divmod(side, factor)
    ends = accumulate((least + (i < longer) for i in range(factor)), initial=0)
    return [slice(*pair) for pair in pairwise(ends)]


def enlarged(
    x: Float[Tensor, "m c h w"], factor: int, indices: Int[Tensor, " n"] | None = None
) -> Float[Tensor, "n c h w"]:
    """Every cell of every image (or those at `indices`, cell v of image i being v * m + i) in full size.

    Bilinear, corners not aligned; of factor 1 the images themselves, bit for bit. Source: IDC, section 3.2.
    """
    if factor == 1:
        return x if indices is None else x[indices.to(x.device)]
    size = (x.shape[2], x.shape[3])
    parts = [x[:, :, rows, columns] for rows, columns in cells(size, factor)]
    if indices is None:
        return torch.cat([_full(part, size) for part in parts])
    chosen = indices.to(x.device)
    cell, image = chosen // len(x), chosen % len(x)
    made = [_full(part[image[cell == v]], size) for v, part in enumerate(parts) if bool((cell == v).any())]
    return torch.cat(made)[cell.argsort(stable=True).argsort()] if made else x[:0]


def _full(part: Float[Tensor, "m c a b"], size: tuple[int, int]) -> Float[Tensor, "m c h w"]:
    return F.interpolate(part, size, mode="bilinear", align_corners=False)


def reduced(x: Float[Tensor, "n c h w"], factor: int) -> Float[Tensor, "m c h w"]:
    """Grids of factor^2 consecutive images each, down-scaled into the cells by the mean over areas."""
    require_positive("factor", factor)
    if factor == 1:
        return x
    groups = x.unflatten(0, (-1, factor**2))
    made = torch.empty_like(groups[:, 0])
    for v, (rows, columns) in enumerate(cells((x.shape[2], x.shape[3]), factor)):
        cell = made[:, :, rows, columns]
        cell.copy_(F.adaptive_avg_pool2d(groups[:, v], (cell.shape[2], cell.shape[3])))
    return made

"""A subset of real images as a synthetic set: nothing is free, the pixels stay uint8."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from ddengine.errors import UsageError, require
from ddengine.types import DataSpec, Images, label_bytes
from synth.pixels import LABEL_DTYPES, labels_problem, names_problem


@dataclass(frozen=True)
class Subset:
    """Copies of real images and where they came from: `indices` point into the fit part of the source."""

    kind: ClassVar[str] = "subset"
    y_kind: ClassVar[str] = "class"

    pixels: UInt8[Tensor, "m c h w"]
    indices: Int[Tensor, " m"]
    labels: Int[Tensor, " m"]
    spec: DataSpec

    def __post_init__(self) -> None:
        Images(self.pixels, self.labels, self.spec)
        low, high = (int(self.indices.min()), int(self.indices.max())) if len(self.indices) else (0, 0)
        if len(self.indices) != len(self.pixels) or low < 0 or high >= 2**31:
            raise UsageError(
                f"{len(self.indices)} indices between {low} and {high} for {len(self.pixels)} images",
                "Give one index into the source, of at most 31 bits, for each image",
            )

    @staticmethod
    def of(source: Images, indices: Int[Tensor, " m"]) -> "Subset":
        """The images of `source` (uint8) at `indices` (UsageError for a source of floats or soft labels)."""
        if source.x.dtype != torch.uint8 or source.y_kind != "class":
            raise UsageError(
                f"a subset of {source.x.dtype} images with {source.y_kind} labels",
                "Give a source of uint8 images with class labels",
            )
        picked = source.take(indices)
        return Subset(picked.x, indices.to(picked.x.device), picked.y, source.spec)

    def params(self) -> dict[str, Tensor]:
        """The free tensors: none."""
        return {}

    def replace(self, params: Mapping[str, Tensor]) -> "Subset":
        """The set itself (UsageError for any tensor, since none is free)."""
        for name in params:
            require(name, self.params(), "free tensor")
        return self

    def decode(self, indices: Int[Tensor, " n"] | None = None) -> Images:
        """The images (all, or at `indices`) in model-input space, float32."""
        images = Images(self.pixels, self.labels, self.spec)
        images = images if indices is None else images.take(indices)
        return Images(images.model_input(), images.y, self.spec)

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes of what `pack` gives, by part; the indices are extras."""
        images, extras = self.pixels.numel(), 4 * len(self.indices)
        labels = len(self.labels) * label_bytes(len(self.spec.classes))
        return {"images": images, "labels": labels, "extras": extras, "total": images + labels + extras}

    def pack(self) -> dict[str, Tensor]:
        """The stored tensors (CPU): images uint8, indices int32, labels of the smallest type."""
        dtype = LABEL_DTYPES[label_bytes(len(self.spec.classes))]
        return {
            "images": self.pixels.cpu().clone(),
            "indices": self.indices.cpu().to(torch.int32, copy=True),
            "labels": self.labels.cpu().to(dtype, copy=True),
        }

    @staticmethod
    def unpack(tensors: Mapping[str, Tensor], fields: Mapping[str, Any], spec: DataSpec) -> "Subset":
        """The set from its stored tensors; no manifest field is needed."""
        return Subset(tensors["images"], tensors["indices"].long(), tensors["labels"].long(), spec)

    @staticmethod
    def problem(tensors: Mapping[str, Tensor], y_kind: str, spec: DataSpec) -> str | None:
        """The first thing that is wrong with stored tensors, in words; None when nothing is."""
        if wrong := names_problem(tensors, {"images", "indices", "labels"}, set()):
            return wrong
        images, indices = tensors["images"], tensors["indices"]
        if images.dtype != torch.uint8 or tuple(images.shape[1:]) != spec.shape or len(images) == 0:
            return f"images are {images.dtype} {list(images.shape)}, not uint8 of {list(spec.shape)}"
        if indices.dtype != torch.int32 or indices.shape != images.shape[:1] or int(indices.min()) < 0:
            return f"indices are not {len(images)} int32 numbers of at least 0"
        if y_kind != "class":
            return f"a subset has class labels, not {y_kind!r}"
        return labels_problem(tensors["labels"], len(images), y_kind, len(spec.classes))

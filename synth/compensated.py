"""Base images and shared additive compensators as a synthetic set: stored apart, summed when asked for."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from ddengine.composites import Composites
from ddengine.errors import UsageError, require, require_positive
from ddengine.types import DataSpec, Images, label_bytes
from synth.labels import LABEL_CODECS, decode_labels, encode_labels, label_codec, label_row_bytes
from synth.packing import decode_compensators, encode_bases, encode_compensators, stored_problem
from synth.pixels import CODECS, LABEL_DTYPES, decode_images

COMPENSATOR_CODECS = ("int8", "fp16")


@dataclass(frozen=True)
class Compensated:
    """b bases and g * m compensators that stand for n = b * (m + 1) composites (see `Composites`).

    `bases` are real uint8 pixels, fixed, with compensators in units of pixels in [0, 1]; or free floats in
    model-input space, with compensators there too. `labels` are logits of the composites, variant-major;
    without them a composite has the class of its base. `teachers` are networks that come with the set: flat
    parameters and batch-norm statistics (maybe none) of each. `codec`, `label_codec` and `base_codec` (of
    float bases) say how `pack` stores each. Raises UsageError where shapes or numbers disagree.
    Source: INFER, Zhang et al. 2024.
    """

    kind: ClassVar[str] = "compensated"

    bases: UInt8[Tensor, "b c h w"] | Float[Tensor, "b c h w"]
    classes: Int[Tensor, " b"]
    compensators: Float[Tensor, "g m c h w"]
    group: Int[Tensor, " b"]
    spec: DataSpec
    labels: Float[Tensor, "n k"] | None = None
    codec: str = "int8"
    label_codec: str = "int8"
    base_codec: str = "uint8"
    teachers: tuple[tuple[Tensor, Tensor], ...] = ()
    student_lr: float | None = None

    def __post_init__(self) -> None:
        require(self.codec, COMPENSATOR_CODECS, "compensator codec")
        require(self.label_codec, LABEL_CODECS, "label codec")
        require(self.base_codec, CODECS, "base codec")
        Images(self.bases, self.classes, self.spec)
        Images(self.bases[:0], self._y()[:0], self.spec, self.y_kind)
        self.composites()
        if any(p.ndim != 1 or s.ndim != 1 or not len(p) for p, s in self.teachers):
            raise UsageError(
                f"teachers of shapes {[(tuple(p.shape), tuple(s.shape)) for p, s in self.teachers]}",
                "Give the parameters and the statistics of each as one flat vector",
            )
        if self.student_lr is not None:
            require_positive("student_lr", self.student_lr)

    @property
    def y_kind(self) -> str:
        """ "logit" where composites have soft labels, else "class"."""
        return "class" if self.labels is None else "logit"

    @property
    def count(self) -> int:
        """Composites: training images that the set stands for."""
        return len(self.bases) * (self.compensators.shape[1] + 1)

    @property
    def real(self) -> bool:
        """Whether the bases are real pixels, which stay as they are."""
        return self.bases.dtype == torch.uint8

    def _y(self) -> Tensor:
        return self.classes.repeat(self.compensators.shape[1] + 1) if self.labels is None else self.labels

    def composites(self) -> Composites:
        """All composites, none of which is computed before it is asked for."""
        return Composites(self.bases, self.compensators, self.group, self._y(), self.spec, self.y_kind)

    def decode(self, indices: Int[Tensor, " n"] | None = None) -> Images:
        """The composites (all, or at `indices`) in model-input space, unquantised.

        Differentiable in `params()`; only what is asked for is computed.
        """
        every = torch.arange(self.count, device=self.bases.device)
        return self.composites().take(every if indices is None else indices.to(every.device))

    def params(self) -> dict[str, Tensor]:
        """The free tensors: compensators; with float bases these too, and soft labels."""
        free = {"compensators": self.compensators}
        if self.real:
            return free
        soft = {} if self.labels is None else {"labels": self.labels}
        return {"bases": self.bases, **free, **soft}

    def replace(self, params: Mapping[str, Tensor]) -> "Compensated":
        """The same set with other free tensors (UsageError for a name that is not free)."""
        for name in params:
            require(name, self.params(), "free tensor")
        names = ("bases", "compensators", "labels")
        bases, compensators, labels = (params.get(name, getattr(self, name)) for name in names)
        return replace(self, bases=bases, compensators=compensators, labels=labels)

    @property
    def teacher_bytes(self) -> int:
        """Bytes of the stored teachers, which are among the extras."""
        return sum(2 * len(params) + 4 * len(statistics) for params, statistics in self.teachers)

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes of what `pack` gives, by part: images (bases), labels, extras (all else), total."""
        g, m, c = self.compensators.shape[:3]
        b, k = len(self.bases), len(self.spec.classes)
        affine = 0 if self.real or self.base_codec != "uint8" else 8 * b * c
        images = self.bases.numel() * (1 if self.real else CODECS[self.base_codec].itemsize) + affine
        rows = 0 if self.labels is None else self.count * label_row_bytes(k, self.label_codec)
        labels = b * label_bytes(k) + rows
        added = self.compensators.numel() * (1 if self.codec == "int8" else 2)
        added += (2 * g * m * c if self.codec == "int8" else 0) + (b * label_bytes(g) if m else 0)
        extras = added + self.teacher_bytes + (0 if self.student_lr is None else 4)
        return {"images": images, "labels": labels, "extras": extras, "total": images + labels + extras}

    def pack(self) -> dict[str, Tensor]:
        """The stored tensors (CPU). Raises UsageError when anything is not finite in its stored form."""
        packed = self._packed()
        floats = [t for name, t in packed.items() if t.is_floating_point() and name != "images"]
        bases = self.bases if self.real else decode_images(packed)
        if not all(bool(t.isfinite().all()) for t in (bases, *floats)):
            raise UsageError(
                f"the bases, compensators or teachers are not finite as {self.codec}: the run diverged",
                "Lower the learning rate and distil again",
            )
        return packed

    def quantised(self) -> "Compensated":
        """The same set as its stored form gives it back, so that labels can describe what will be decoded.

        It is on the CPU. Bases and compensators are the same bits however often they are stored.
        """
        stored = Compensated.unpack(self.pack(), {}, self.spec)
        added = self.compensators.shape[1] > 0
        return replace(
            stored,
            compensators=stored.compensators if added else self.compensators.detach().cpu(),
            group=stored.group if added else self.group.cpu(),
            codec=self.codec,
            label_codec=self.label_codec,
            base_codec=self.base_codec,
        )

    def _packed(self) -> dict[str, Tensor]:
        g, m = self.compensators.shape[:2]
        packed = (
            {"images": self.bases.detach().cpu().clone()}
            if self.real
            else encode_bases(self.bases, self.base_codec)
        )
        packed["labels.classes"] = _integers(self.classes, len(self.spec.classes))
        if self.labels is not None:
            packed |= encode_labels(self.labels, self.label_codec)
        if m:
            packed |= encode_compensators(self.compensators, self.codec)
            packed["group"] = _integers(self.group, g)
        for i, (params, statistics) in enumerate(self.teachers):
            packed[f"teachers.{i}.params"] = params.detach().cpu().to(torch.float16, copy=True)
            if len(statistics):
                packed[f"teachers.{i}.statistics"] = statistics.detach().cpu().to(torch.float32, copy=True)
        if self.student_lr is not None:
            packed["student_lr"] = torch.tensor(self.student_lr, dtype=torch.float32)
        return packed

    @staticmethod
    def stored_count(tensors: Mapping[str, Tensor]) -> int:
        """Composites of the stored tensors of a set."""
        m = tensors["compensators"].shape[1] if "compensators" in tensors else 0
        return len(tensors["images"]) * (m + 1)

    @staticmethod
    def unpack(tensors: Mapping[str, Tensor], fields: Mapping[str, Any], spec: DataSpec) -> "Compensated":
        """The set from its stored tensors; no manifest field is needed.

        Without compensators there is one group, of none.
        """
        images, u, k = tensors["images"], tensors.get("compensators"), len(spec.classes)
        real = images.dtype == torch.uint8 and "images.scale" not in tensors
        rate, soft = tensors.get("student_lr"), "labels" in tensors
        return Compensated(
            bases=images if real else decode_images(tensors),
            classes=tensors["labels.classes"].long(),
            compensators=torch.zeros((1, 0, *spec.shape)) if u is None else decode_compensators(tensors),
            group=torch.zeros(len(images)).long() if u is None else tensors["group"].long(),
            spec=spec,
            labels=decode_labels(tensors, k) if soft else None,
            codec="fp16" if u is not None and u.dtype == torch.float16 else "int8",
            label_codec=label_codec(tensors, k) if soft else "int8",
            base_codec=next(name for name, dtype in CODECS.items() if dtype == images.dtype),
            teachers=_teachers(tensors),
            student_lr=None if rate is None else float(rate),
        )

    @staticmethod
    def problem(tensors: Mapping[str, Tensor], y_kind: str, spec: DataSpec) -> str | None:
        """The first thing that is wrong with stored tensors, in words; None when nothing is."""
        return stored_problem(tensors, y_kind, spec)


def _integers(values: Tensor, count: int) -> Tensor:
    """Numbers below `count` in the smallest type that has them all."""
    return values.cpu().to(LABEL_DTYPES[label_bytes(count)], copy=True)


def _teachers(tensors: Mapping[str, Tensor]) -> tuple[tuple[Tensor, Tensor], ...]:
    count = sum(name.startswith("teachers.") and name.endswith(".params") for name in tensors)
    return tuple(
        (tensors[f"teachers.{i}.params"].float(), tensors.get(f"teachers.{i}.statistics", torch.zeros(0)))
        for i in range(count)
    )

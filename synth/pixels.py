"""Free pixels as a synthetic set, and the codecs that store them: float32, float16 or affine uint8."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from ddengine.errors import UsageError, require, require_positive
from ddengine.types import DataSpec, Images, label_bytes

CODECS = {"fp32": torch.float32, "fp16": torch.float16, "uint8": torch.uint8}
LABEL_DTYPES = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
LEVELS = 255
OFF_LEVEL = 1e-3  # of a level, that a pixel may be off by and still be one, as float32 rounds it


@dataclass(frozen=True)
class Pixels:
    """Images as free parameters in model-input space, unclamped; `codec` says how `pack` stores them.

    Codec "uint8" keeps images that are uint8 pixels as those pixels, others by `encode_images`.

    `labels` are class numbers [m] (`y_kind` "class"; fixed) or rows of probabilities or logits [m k] (free).
    `student_lr` is a learned learning rate for the networks that train on the set.
    """

    kind: ClassVar[str] = "pixels"

    images: Float[Tensor, "m c h w"]
    labels: Int[Tensor, " m"] | Float[Tensor, "m k"]
    spec: DataSpec
    y_kind: str = "class"
    codec: str = "uint8"
    student_lr: float | None = None

    def __post_init__(self) -> None:
        require(self.codec, CODECS, "codec")
        Images(self.images, self.labels, self.spec, self.y_kind)
        if self.student_lr is not None:
            require_positive("student_lr", self.student_lr)

    @property
    def soft(self) -> bool:
        """Whether the labels are soft, and with that free."""
        return self.y_kind != "class"

    def params(self) -> dict[str, Tensor]:
        """The free tensors: the images, and soft labels."""
        return {"images": self.images, "labels": self.labels} if self.soft else {"images": self.images}

    def replace(self, params: Mapping[str, Tensor]) -> "Pixels":
        """The same set with other free tensors (UsageError for a name that is not free)."""
        for name in params:
            require(name, self.params(), "free tensor")
        images, labels = params.get("images", self.images), params.get("labels", self.labels)
        return replace(self, images=images, labels=labels)

    def decode(self, indices: Int[Tensor, " n"] | None = None) -> Images:
        """The images (all, or at `indices`) as free floats, unquantised; differentiable in `params()`."""
        images = Images(self.images, self.labels, self.spec, self.y_kind)
        return images if indices is None else images.take(indices)

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes of what `pack` gives, by part: images, labels, extras, total."""
        m, c = self.images.shape[:2]
        affine = 8 * m * c if self.codec == "uint8" else 0
        images = self.images.numel() * CODECS[self.codec].itemsize + affine
        labels = self.labels.numel() * self._label_dtype.itemsize
        extras = 0 if self.student_lr is None else 4
        return {"images": images, "labels": labels, "extras": extras, "total": images + labels + extras}

    @property
    def _label_dtype(self) -> torch.dtype:
        if self.soft:
            return torch.float32 if self.codec == "fp32" else torch.float16
        return LABEL_DTYPES[label_bytes(len(self.spec.classes))]

    def pack(self) -> dict[str, Tensor]:
        """The stored tensors (CPU). Raises UsageError when anything is not finite in its stored form."""
        raw = raw_levels(self.images, self.spec) if self.codec == "uint8" else None
        packed = encode_images(self.images, self.codec) if raw is None else _as_levels(raw, self.spec)
        packed["labels"] = self.labels.detach().cpu().to(self._label_dtype, copy=True)
        if self.student_lr is not None:
            packed["student_lr"] = torch.tensor(self.student_lr, dtype=torch.float32)
        if not all(bool(t.isfinite().all()) for t in (decode_images(packed), packed["labels"])):
            raise UsageError(
                f"the synthetic images or labels are not finite as {self.codec}: the run diverged",
                "Lower the pixel learning rate and distil again",
            )
        return packed

    @staticmethod
    def unpack(tensors: Mapping[str, Tensor], fields: Mapping[str, Any], spec: DataSpec) -> "Pixels":
        """The set from its stored tensors and its manifest fields (of which `y_kind` is read)."""
        y_kind, labels, rate = fields["y_kind"], tensors["labels"], tensors.get("student_lr")
        return Pixels(
            images=_as_pixels(tensors, spec),
            labels=labels.long() if y_kind == "class" else labels.float(),
            spec=spec,
            y_kind=y_kind,
            codec=next(name for name, dtype in CODECS.items() if dtype == tensors["images"].dtype),
            student_lr=None if rate is None else float(rate),
        )

    @staticmethod
    def problem(tensors: Mapping[str, Tensor], y_kind: str, spec: DataSpec) -> str | None:
        """The first thing that is wrong with stored tensors, in words; None when nothing is."""
        images = tensors.get("images")
        quantised = images is not None and images.dtype == torch.uint8
        affine = {"images.offset", "images.scale"} if quantised else set()
        return (
            names_problem(tensors, {"images", "labels", *affine}, {"student_lr"})
            or images_problem(tensors, spec)
            or labels_problem(tensors["labels"], len(tensors["images"]), y_kind, len(spec.classes))
            or rate_problem(tensors.get("student_lr"))
        )


def encode_images(x: Float[Tensor, "m c h w"], codec: str) -> dict[str, Tensor]:
    """Stored tensors of images: "images", and for uint8 "images.offset" and "images.scale" [m c], float32.

    uint8 is affine per image and channel: offset = min, scale = (max - min) / 255, so that the error is at
    most scale / 2 (plus float32 rounding); a constant channel has scale 0.
    """
    x = x.detach().cpu()
    if codec != "uint8":
        return {"images": x.to(CODECS[codec], copy=True)}
    offset, high = x.float().amin((2, 3)), x.float().amax((2, 3))
    scale = ((high.double() - offset.double()) / LEVELS).float()
    step = torch.where(scale > 0, scale, 1).double()
    levels = (x.double() - offset.double()[:, :, None, None]) / step[:, :, None, None]
    levels = levels.nan_to_num(0.0).round().clamp(0, LEVELS).to(torch.uint8)
    return {"images": levels, "images.offset": offset, "images.scale": scale}


def raw_levels(x: Float[Tensor, "m c h w"], spec: DataSpec) -> UInt8[Tensor, "m c h w"] | None:
    """The uint8 pixels that model input was made of by mean and std; None where it was not, or by ZCA."""
    if spec.zca is not None:
        return None
    levels = spec.denormalise(x.detach().cpu().double()) * LEVELS
    near = levels.round()
    exact = ((levels - near).abs() <= OFF_LEVEL) & (near >= 0) & (near <= LEVELS)
    return near.to(torch.uint8) if bool(exact.all()) else None


def _as_levels(levels: UInt8[Tensor, "m c h w"], spec: DataSpec) -> dict[str, Tensor]:
    """Stored tensors of pixels as they are: offset and scale are those of their way into model input."""
    std, mean = torch.tensor(spec.std, dtype=torch.float64), torch.tensor(spec.mean, dtype=torch.float64)
    offset, scale = (
        value.float().expand(len(levels), -1).contiguous() for value in (-mean / std, 1 / (LEVELS * std))
    )
    return {"images": levels, "images.offset": offset, "images.scale": scale}


def _as_pixels(tensors: Mapping[str, Tensor], spec: DataSpec) -> Float[Tensor, "m c h w"]:
    """The images of stored tensors, of pixels exactly as `spec` normalises them."""
    levels = tensors["images"]
    if levels.dtype == torch.uint8 and spec.zca is None:
        raw = _as_levels(levels, spec)
        if all(torch.equal(tensors[name], raw[name]) for name in ("images.offset", "images.scale")):
            return spec.normalise(levels)
    return decode_images(tensors)


def decode_images(tensors: Mapping[str, Tensor]) -> Float[Tensor, "m c h w"]:
    """Float32 images from what `encode_images` gave."""
    images = tensors["images"].float()
    if tensors["images"].dtype != torch.uint8:
        return images
    return images * tensors["images.scale"][:, :, None, None] + tensors["images.offset"][:, :, None, None]


def names_problem(tensors: Mapping[str, Tensor], needed: set[str], optional: set[str]) -> str | None:
    """What is wrong with the names of stored tensors."""
    missing, extra = needed - set(tensors), set(tensors) - needed - optional
    if missing:
        return f"tensor {min(missing)!r} is missing"
    return f"tensor {min(extra)!r} does not belong to this kind of set" if extra else None


def labels_problem(labels: Tensor, m: int, y_kind: str, k: int) -> str | None:
    """What is wrong with the stored labels of `m` images of `k` classes."""
    shape = (m,) if y_kind == "class" else (m, k)
    dtypes = tuple(LABEL_DTYPES.values()) if y_kind == "class" else (torch.float16, torch.float32)
    if tuple(labels.shape) != shape or labels.dtype not in dtypes:
        return f"labels are {labels.dtype} {list(labels.shape)}, not {list(shape)} as y_kind {y_kind!r} needs"
    if not bool(labels.isfinite().all()):
        return "labels are not finite"
    high = {"class": k - 1, "prob": 1, "logit": None}[y_kind]
    if high is not None and not 0 <= labels.min().item() <= labels.max().item() <= high:
        return f"labels lie outside 0..{high}"
    return None


def images_problem(tensors: Mapping[str, Tensor], spec: DataSpec) -> str | None:
    """What is wrong with stored images in the tensors of `encode_images`, all of which must be there."""
    images = tensors["images"]
    if images.dtype not in CODECS.values() or tuple(images.shape[1:]) != spec.shape or len(images) == 0:
        return f"images are {images.dtype} {list(images.shape)}, not one or more of {list(spec.shape)}"
    if images.dtype != torch.uint8:
        return None if bool(images.isfinite().all()) else "images are not finite"
    offset, scale = tensors["images.offset"], tensors["images.scale"]
    for name, tensor in (("offset", offset), ("scale", scale)):
        if tensor.dtype != torch.float32 or tensor.shape != images.shape[:2]:
            return f"images.{name} is {tensor.dtype} {list(tensor.shape)}, not one float32 a channel"
    # The brightest level bounds all others, so this covers every pixel without decoding it.
    ends = torch.stack([offset, scale * LEVELS + offset])
    return None if bool(ends.isfinite().all()) and bool((scale >= 0).all()) else "images are not finite"


def rate_problem(rate: Tensor | None) -> str | None:
    """What is wrong with a stored learning rate; None for one that is right or not there."""
    if rate is None or (rate.dtype == torch.float32 and rate.ndim == 0 and 0 < rate.item() < float("inf")):
        return None
    return "student_lr is not one positive float32"

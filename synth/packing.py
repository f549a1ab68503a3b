"""The stored tensors of a set of bases and compensators: codecs of compensators, and what can be wrong."""

import re
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from ddengine.types import DataSpec
from synth.labels import stored_labels_problem
from synth.pixels import (
    LABEL_DTYPES,
    decode_images,
    encode_images,
    images_problem,
    labels_problem,
    names_problem,
    rate_problem,
)

LEVELS = 127
SCALE_MIN = (
    2.0**-14
)  # the smallest float16 of full precision, so that storing what was stored changes nothing
TEACHER = re.compile(r"teachers\.(0|[1-9][0-9]?)\.(params|statistics)")


def encode_bases(x: Float[Tensor, "b c h w"], codec: str) -> dict[str, Tensor]:
    """Stored tensors of float bases, as `encode_images` makes them, that decode to what encodes to the same.

    An affine range in float32 can move by a last bit each time it is stored. Only its scale does, and that
    in one direction, since decoding and encoding are monotone in it: so it comes to rest.
    """
    stored = encode_images(x, codec)
    decoded = decode_images(stored)
    while bool(decoded.isfinite().all()):
        stored = encode_images(decoded, codec)
        again = decode_images(stored)
        if torch.equal(again, decoded):
            break
        decoded = again
    return stored


def encode_compensators(u: Float[Tensor, "g m c h w"], codec: str) -> dict[str, Tensor]:
    """Stored tensors of compensators: "compensators", and for int8 "compensators.scale" [g m c], float16.

    int8 is symmetric, so that zero stays exactly zero: scale = max|u| / 127 of each channel, at least 2^-14
    where that is not zero, and the error is at most scale / 2. What is not finite shows as such a scale.
    """
    u = u.detach().cpu().float()
    if codec == "fp16":
        return {"compensators": u.to(torch.float16, copy=True)}
    high = u.abs().amax((3, 4))
    scale = torch.where(high > 0, (high.double() / LEVELS).clamp(min=SCALE_MIN), high.double()).half()
    step = torch.where(scale > 0, scale.double(), 1.0)[..., None, None]
    codes = (u.double() / step).nan_to_num(0.0).round().clamp(-LEVELS, LEVELS).to(torch.int8)
    return {"compensators": codes, "compensators.scale": scale}


def decode_compensators(tensors: Mapping[str, Tensor]) -> Float[Tensor, "g m c h w"]:
    """Float32 compensators from what `encode_compensators` gave."""
    u = tensors["compensators"].float()
    scale = tensors.get("compensators.scale")
    return u if scale is None else u * scale.float()[..., None, None]


def stored_problem(tensors: Mapping[str, Tensor], y_kind: str, spec: DataSpec) -> str | None:
    """The first thing that is wrong with the stored tensors of a set, in words; None when nothing is."""
    if wrong := names_problem(tensors, *_names(tensors, y_kind)) or _bases_problem(tensors, spec):
        return wrong
    b, k = len(tensors["images"]), len(spec.classes)
    wrong = labels_problem(tensors["labels.classes"], b, "class", k) or _compensators_problem(tensors, spec)
    if wrong or y_kind not in ("class", "logit"):
        return wrong or f"composites have class numbers or logits, not {y_kind!r}"
    m = tensors["compensators"].shape[1] if "compensators" in tensors else 0
    return (
        (stored_labels_problem(tensors, b * (m + 1), k) if y_kind == "logit" else None)
        or _teachers_problem(tensors)
        or rate_problem(tensors.get("student_lr"))
    )


def _names(tensors: Mapping[str, Tensor], y_kind: str) -> tuple[set[str], set[str]]:
    """The names that must be there and those that may, given the types of those that are."""
    needed, optional = {"images", "labels.classes"}, {"student_lr"}
    if "images.offset" in tensors or "images.scale" in tensors:
        needed |= {"images.offset", "images.scale"}
    if y_kind == "logit":
        labels = tensors.get("labels")
        coded = labels is not None and labels.dtype == torch.uint8
        needed |= {"labels", "labels.scale", "labels.offset"} if coded else {"labels"}
    if {"compensators", "compensators.scale", "group"} & set(tensors):
        u = tensors.get("compensators")
        coded = u is not None and u.dtype == torch.int8
        needed |= {"compensators", "group", *(["compensators.scale"] if coded else [])}
    teachers = {name for name in tensors if TEACHER.fullmatch(name)}
    for i in range(sum(name.endswith(".params") for name in teachers)):
        needed.add(f"teachers.{i}.params")
        optional.add(f"teachers.{i}.statistics")
    return needed, optional


def _bases_problem(tensors: Mapping[str, Tensor], spec: DataSpec) -> str | None:
    images = tensors["images"]
    if images.dtype != torch.uint8 or "images.scale" in tensors:
        affine = {"images.offset", "images.scale"} & set(tensors)
        if affine and images.dtype != torch.uint8:
            return f"{min(affine)} does not belong to images of {images.dtype}"
        return images_problem(tensors, spec)
    if tuple(images.shape[1:]) != spec.shape or len(images) == 0:
        return f"images are {list(images.shape)}, not one or more of {list(spec.shape)}"
    return None


def _compensators_problem(tensors: Mapping[str, Tensor], spec: DataSpec) -> str | None:
    if "compensators" not in tensors:
        return None
    u, group, b = tensors["compensators"], tensors["group"], len(tensors["images"])
    right = u.dtype in (torch.int8, torch.float16) and u.ndim == 5 and tuple(u.shape[2:]) == spec.shape
    if not right or u.numel() == 0:
        return f"compensators are {u.dtype} {list(u.shape)}, not int8 or float16 of {list(spec.shape)}"
    if group.dtype not in LABEL_DTYPES.values() or group.shape != (b,):
        return f"group is {group.dtype} {list(group.shape)}, not one number for each of {b} bases"
    if not 0 <= int(group.min()) <= int(group.max()) < len(u):
        return f"group lies outside 0..{len(u) - 1}"
    if u.dtype == torch.float16:
        return None if bool(u.isfinite().all()) else "compensators are not finite"
    return _scale_problem(tensors["compensators.scale"], u)


def _scale_problem(scale: Tensor, u: Tensor) -> str | None:
    if scale.dtype != torch.float16 or scale.shape != u.shape[:3]:
        return f"compensators.scale is {scale.dtype} {list(scale.shape)}, not one float16 a channel"
    right = bool(scale.isfinite().all()) and bool((scale >= 0).all())
    return None if right else "compensators.scale is negative or not finite"


def _teachers_problem(tensors: Mapping[str, Tensor]) -> str | None:
    for name in sorted(filter(TEACHER.fullmatch, tensors)):
        part, dtype = tensors[name], torch.float16 if name.endswith("params") else torch.float32
        if part.dtype != dtype or part.ndim != 1 or len(part) == 0 or not bool(part.isfinite().all()):
            return f"{name} is not a vector of finite {str(dtype).removeprefix('torch.')} numbers"
    return None

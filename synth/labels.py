"""How rows of logits are stored: as floats, or row-affine in 8 or 4 bits; and top-k labels, to be measured.

Row-affine: z is offset + code * scale with one float16 offset and one float16 scale a row. Top-k labels are
no codec of stored sets, since a softened target lives in its tail.
"""

from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ddengine.errors import UsageError, require, require_positive

LABEL_CODECS = ("fp32", "fp16", "int8", "int4")
LEVELS = {"int8": 255, "int4": 15}
HALF_MAX = 65504.0
ROWS = 1 << 13  # rows coded at once: a million soft labels in float64 would be many times their file
TOPK_TEMPERATURE = 4.0  # above it the classes that top-k labels leave out hold most of a softened target


def encode_labels(z: Float[Tensor, "n k"], codec: str) -> dict[str, Tensor]:
    """Stored tensors of logits: "labels", and for int8 and int4 "labels.scale" and "labels.offset" [n].

    "labels" is float32 or float16 [n k]; for int8 uint8 codes [n k]; for int4 two codes a byte, uint8
    [n ceil(k / 2)], the first in the low half. The error is at most scale / 2 (plus float32 rounding): the
    offset is rounded down to float16, and the scale up, so that the codes span the row. Raises UsageError
    for logits that are not finite in their stored form.
    """
    require(codec, LABEL_CODECS, "label codec")
    z = z.detach().cpu().float()
    _require_storable(z, codec)
    if codec not in LEVELS:
        return {"labels": z.to(torch.float16 if codec == "fp16" else torch.float32, copy=True)}
    offset, scale = _affine(z, LEVELS[codec])
    parts = zip(z.split(ROWS), offset.split(ROWS), scale.split(ROWS), strict=True)
    codes = torch.cat([_codes(*part, LEVELS[codec]) for part in parts])
    packed = _paired(codes) if codec == "int4" else codes
    return {"labels": packed, "labels.scale": scale, "labels.offset": offset}


def decode_labels(tensors: Mapping[str, Tensor], k: int) -> Float[Tensor, "n k"]:
    """Float32 logits of `k` classes from what `encode_labels` gave."""
    labels = tensors["labels"]
    if labels.dtype != torch.uint8:
        return labels.float()
    codes = labels if label_codec(tensors, k) == "int8" else _unpaired(labels)[:, :k]
    return (
        codes.float() * tensors["labels.scale"].float()[:, None] + tensors["labels.offset"].float()[:, None]
    )


def label_codec(tensors: Mapping[str, Tensor], k: int) -> str:
    """The codec of stored labels of `k` classes.

    One class reads as int8 in both: a pair of codes of which there is only the first is that code.
    """
    labels = tensors["labels"]
    if labels.dtype != torch.uint8:
        return "fp16" if labels.dtype == torch.float16 else "fp32"
    return "int8" if labels.shape[1] == k else "int4"


def label_row_bytes(k: int, codec: str) -> int:
    """Stored bytes of one row of `k` logits, its offset and scale included."""
    require(codec, LABEL_CODECS, "label codec")
    return {"fp32": 4 * k, "fp16": 2 * k, "int8": k + 4, "int4": (k + 1) // 2 + 4}[codec]


def stored_labels_problem(tensors: Mapping[str, Tensor], n: int, k: int) -> str | None:
    """What is wrong with the stored logits of `n` items of `k` classes, in words; None when nothing is."""
    labels = tensors["labels"]
    if labels.dtype in (torch.float16, torch.float32):
        if labels.shape != (n, k):
            return f"labels are {list(labels.shape)}, not {[n, k]}"
        return None if bool(labels.isfinite().all()) else "labels are not finite"
    if labels.dtype != torch.uint8 or tuple(labels.shape) not in ((n, k), (n, (k + 1) // 2)):
        return f"labels are {labels.dtype} {list(labels.shape)}, not one row of {k} logits for each of {n}"
    for name in ("labels.scale", "labels.offset"):
        part = tensors[name]
        if part.dtype != torch.float16 or part.shape != (n,) or not bool(part.isfinite().all()):
            return f"{name} is not one finite float16 for each of {n} rows"
    return None if bool((tensors["labels.scale"] >= 0).all()) else "labels.scale is negative"


def check_topk(top_k: int, temperature: float | int) -> None:
    """Refuse labels of the `top_k` largest logits for training at a temperature above 4 (UsageError)."""
    require_positive("top_k", top_k)
    require_positive("temperature", temperature)
    if temperature > TOPK_TEMPERATURE:
        raise UsageError(
            f"top-{top_k} labels at temperature {temperature:g}: a softened target lives in its tail, which "
            f"they leave out (top-k needs a temperature of at most {TOPK_TEMPERATURE:g})",
            "Store all logits as int8 or int4, or lower the temperature",
        )


def encode_topk(z: Float[Tensor, "n k"], top_k: int) -> dict[str, Tensor]:
    """The `top_k` largest logits of each row: "values" float16 [n top_k], "indices", and "tail" float16 [n].

    "indices" [n top_k] is uint8 up to 256 classes and int16 above; "tail" is the log-mean-exp of the other
    logits, so that their mass at T = 1 is kept. Raises UsageError as `encode_labels` does, and unless
    1 <= top_k < k.
    """
    k = z.shape[1]
    if not 1 <= top_k < k or k > 2**15:
        raise UsageError(f"top_k={top_k} of {k} classes", f"Give a top_k in 1..{min(k, 2**15) - 1}")
    z = z.detach().cpu().float()
    _require_storable(z, "fp16")
    values, indices = z.double().topk(top_k, dim=1)
    rest = z.double().scatter(1, indices, -torch.inf)
    tail = rest.logsumexp(1) - np.log(k - top_k)
    return {
        "values": values.half(),
        "indices": indices.to(torch.uint8 if k <= 256 else torch.int16),
        "tail": tail.half(),
    }


def decode_topk(tensors: Mapping[str, Tensor], k: int) -> Float[Tensor, "n k"]:
    """Float32 logits of `k` classes from what `encode_topk` gave: every other class has the tail's value."""
    full = tensors["tail"].float()[:, None].repeat(1, k)
    return full.scatter(1, tensors["indices"].long(), tensors["values"].float())


def _require_storable(z: Tensor, codec: str) -> None:
    if not bool(z.isfinite().all()):
        raise UsageError(
            "the label logits are not finite: the teacher or the run diverged", "Check the teachers' accuracy"
        )
    worst = float(z.abs().max()) if z.numel() else 0.0
    if codec != "fp32" and worst > HALF_MAX:
        raise UsageError(
            f"a label logit of size {worst:g} is outside float16, which label codec {codec} needs "
            f"(at most {HALF_MAX:g})",
            "Store the labels as fp32",
        )


def _affine(z: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Float16 offset and scale of each row, such that what decodes from codes 0..levels spans the row."""
    low, high = z.amin(1).numpy(), z.amax(1).numpy()
    offset = low.astype(np.float16)
    with np.errstate(over="ignore"):  # below the lowest offset, which no row needs
        offset = np.where(offset > low, np.nextafter(offset, np.float16(-np.inf)), offset)
    exact = (high.astype(np.float64) - offset) / levels
    scale = exact.astype(np.float16)
    scale = np.where(scale > exact, np.nextafter(scale, np.float16(0)), scale)
    # In the arithmetic of decoding, so that storing what was stored finds the same scale.
    top = scale.astype(np.float32) * np.float32(levels) + offset.astype(np.float32)
    scale = np.where(top < high, np.nextafter(scale, np.float16(np.inf)), scale)
    return torch.from_numpy(offset), torch.from_numpy(scale)


def _codes(z: Tensor, offset: Tensor, scale: Tensor, levels: int) -> Tensor:
    step = torch.where(scale > 0, scale.double(), 1.0)[:, None]
    return ((z.double() - offset.double()[:, None]) / step).round().clamp(0, levels).to(torch.uint8)


def _paired(codes: Tensor) -> Tensor:
    """Two 4-bit codes a byte, the first in the low half; an odd row ends in a half of zeros."""
    even = torch.nn.functional.pad(codes, (0, codes.shape[1] % 2))
    return even[:, ::2] | (even[:, 1::2] << 4)


def _unpaired(packed: Tensor) -> Tensor:
    return torch.stack([packed & 15, packed >> 4], dim=2).flatten(1)

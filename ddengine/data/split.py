"""Splits and orders that depend on what the images show, never on the order in which files were read."""

from hashlib import blake2b

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor

TEST, VALIDATION, ORDER = b"ddengine/test", b"ddengine/validation", b"ddengine/order"


def content_hashes(x: UInt8[Tensor, "n c h w"], salt: bytes) -> np.ndarray:
    """A uint64 for each image: BLAKE2b of its pixel bytes, keyed by `salt` (at most 64 bytes)."""
    rows = np.ascontiguousarray(x.flatten(1).cpu().numpy())
    digests = b"".join(blake2b(row.data, digest_size=8, key=salt).digest() for row in rows)
    return np.frombuffer(digests, dtype="<u8").astype(np.uint64)


def by_class_and_content(
    x: UInt8[Tensor, "n c h w"], y: Int[Tensor, " n"], salt: bytes = ORDER
) -> Int[Tensor, " n"]:
    """The order (class, content hash, index): the same images come out alike from whatever order they had."""
    order = np.lexsort((content_hashes(x, salt), y.cpu().numpy()))
    return torch.from_numpy(order.astype(np.int64))


def held_out(count: int, fraction: float) -> int:
    """How many of `count` images of a class are held out: round(count x fraction), at least 1, leaving 1."""
    return min(max(1, int(count * fraction + 0.5)), count - 1) if count >= 2 else 0


def split(
    x: UInt8[Tensor, "n c h w"], y: Int[Tensor, " n"], fraction: float, salt: bytes
) -> tuple[Int[Tensor, " a"], Int[Tensor, " b"]]:
    """Indices (kept, held out): in each class the images of lowest content hash are held out.

    `fraction` is that of each class (see `held_out`); a class of one image is kept. Equal images differ in
    nothing but their index, which breaks the tie. Splits with different salts are independent.
    """
    order = by_class_and_content(x, y, salt)
    counts = torch.bincount(y.cpu())
    starts = counts.cumsum(0) - counts
    held = torch.tensor([held_out(n, fraction) for n in counts.tolist()], dtype=torch.long)
    labels = y.cpu()[order]
    rank = torch.arange(len(order)) - starts[labels]
    out = rank < held[labels]
    return order[~out], order[out]

"""Whole numbers as the narrowest type that a stored set knows, and what can be wrong with them in a file."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ddengine.errors import UsageError

INTEGERS = {torch.uint8: 2**8, torch.int16: 2**15, torch.int32: 2**31}  # each type holds 0 up to below this


def narrow(values: Tensor) -> Tensor:
    """The same whole numbers (CPU, contiguous) as uint8, int16 or int32, whichever is the narrowest.

    Raises UsageError for a number below 0 or of more than 31 bits.
    """
    low, high = (int(values.min()), int(values.max())) if values.numel() else (0, 0)
    fitting = [dtype for dtype, limit in INTEGERS.items() if low >= 0 and high < limit]
    if not fitting:
        raise UsageError(f"numbers {low}..{high} cannot be stored", f"Give whole numbers in 0..{2**31 - 1}")
    return values.detach().cpu().to(fitting[0], copy=True).contiguous()


def integers_problem(tensors: Mapping[str, Tensor], columns: Mapping[str, int | None]) -> str | None:
    """What is wrong with stored whole numbers: their type, their axes, or a number below 0.

    `columns` gives the names that are looked at where they are there: None for a vector, else the columns of
    a table. An empty tensor is wrong, since it is left out of a file.
    """
    for name, width in columns.items():
        tensor = tensors.get(name)
        if tensor is None:
            continue
        shape = (len(tensor) if tensor.ndim else 0,) if width is None else (*tensor.shape[:1], width)
        if tensor.dtype not in INTEGERS or tuple(tensor.shape) != shape or tensor.numel() == 0:
            wanted = "a vector" if width is None else f"a table of {width} columns"
            return f"{name} is {tensor.dtype} {list(tensor.shape)}, not {wanted} of narrow whole numbers"
        if int(tensor.min()) < 0:
            return f"{name} holds a number below 0"
    return None


def lengths_problem(tensors: Mapping[str, Tensor], lengths: Mapping[str, int]) -> str | None:
    """What is wrong with the lengths of those of these tensors that are there."""
    for name, length in lengths.items():
        if name in tensors and len(tensors[name]) != length:
            return f"{name} has {len(tensors[name])} rows where the other tensors call for {length}"
    return None

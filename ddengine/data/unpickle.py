"""CIFAR's pickled batches, read without running anything: arrays are rebuilt from inert stand-ins."""

import math
import pickle
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ddengine.archives import reason_of

LIMIT = 256 << 20  # the largest official file (CIFAR-100 train) has 156 MB


class _Dtype:
    """Stands in for numpy.dtype: remembers its code."""

    def __init__(self, code: Any, *flags: Any) -> None:
        self.code = code

    def __setstate__(self, state: Any) -> None:
        pass


class _Array:
    """Stands in for numpy.ndarray: remembers its state (version, shape, dtype, Fortran order, bytes)."""

    state: tuple[Any, ...] = ()

    def __setstate__(self, state: Any) -> None:
        self.state = tuple(state)


def _rebuild(*unused: Any) -> _Array:
    return _Array()


def _from_buffer(data: Any, dtype: Any, shape: Any, order: Any, axes: Any = None) -> _Array:
    if order not in ("C", "F") or axes is not None:
        raise ValueError("an array in an unusual memory order")
    if not isinstance(data, bytes | bytearray):  # of a number bytes() makes as many zeros
        raise ValueError("an array of no bytes")
    array = _Array()
    array.state = (1, shape, dtype, order == "F", bytes(data))
    return array


def _latin1(text: Any, codec: Any = "latin1") -> bytes:
    if not isinstance(text, str) or codec != "latin1":
        raise ValueError("an unusual text encoding")
    return text.encode("latin1")


ALLOWED = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("numpy.core.multiarray", "_reconstruct"): _rebuild,
    ("numpy._core.multiarray", "_reconstruct"): _rebuild,
    ("numpy.core.numeric", "_frombuffer"): _from_buffer,
    ("numpy._core.numeric", "_frombuffer"): _from_buffer,
    ("_codecs", "encode"): _latin1,
}


def _bytearray8(unpickler: Any) -> None:
    """As the opcode asks, but Python's own version makes room for the length that the file claims first."""
    length = int.from_bytes(unpickler.read(8), "little")
    data = unpickler.read(min(length, LIMIT))
    if len(data) < length:
        raise pickle.UnpicklingError("it ends within an array")
    unpickler.append(bytearray(data))


# The Python version: the C one sizes its memo table by a number in the file, so a damaged byte could ask
# for all memory.
class _PlainUnpickler(pickle._Unpickler):
    dispatch: ClassVar[dict[int, Any]] = {**pickle._Unpickler.dispatch, pickle.BYTEARRAY8[0]: _bytearray8}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}")
        return ALLOWED[module, name]


def _array(stand_in: _Array) -> np.ndarray:
    _, shape, dtype, fortran, raw = stand_in.state
    if not isinstance(dtype, _Dtype) or dtype.code not in ("u1", "|u1"):
        raise ValueError("an array that is not uint8")
    raw = raw.encode("latin1") if isinstance(raw, str) else raw
    if not isinstance(raw, bytes) or math.prod(shape) != len(raw):
        raise ValueError("an array whose bytes do not fill its shape")
    return np.frombuffer(raw, np.uint8).reshape(shape, order="F" if fortran else "C")


def read_plain_pickle(path: Path) -> dict[str, Any]:
    """A pickled dict of plain values and uint8 arrays, as Python 2 or 3 and any numpy wrote it.

    Raises ValueError saying what else the file holds; no code in it can run.
    """
    if path.stat().st_size > LIMIT:
        raise ValueError(f"larger than {LIMIT} bytes")
    try:
        content = _PlainUnpickler(BytesIO(path.read_bytes()), encoding="latin1").load()
        items = content.items()
        return {str(key): _array(value) if isinstance(value, _Array) else value for key, value in items}
    except Exception as error:  # damaged pickles raise errors of any kind
        raise ValueError(f"not a plain batch file: {reason_of(error)}") from error

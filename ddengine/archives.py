"""Files that others wrote, checked before torch, numpy or YAML see them: reading is all that they can do."""

import math
import pickletools
import struct
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from numpy.lib import format as npy
from torch import Tensor

from ddengine.errors import one_line

MEMBERS, PICKLE = 1 << 18, 64 << 20  # tensors in a file; bytes of the pickle that lists them
OLD = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"  # the pickled number that torch before 1.6 began files with
# What a file of plain tensors in lists, tuples and dicts refers to, as "module name".
TENSORS = frozenset({"torch._utils _rebuild_tensor_v2", "collections OrderedDict"})
STORAGES = frozenset(
    f"torch {kind}Storage"
    for kind in ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte")
)
YAML, PIECE = 1 << 20, 1 << 24  # bytes of a configuration; bytes that are read of an array at a time
HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
NUMBERS = {"f2": "e", "f4": "f", "f8": "d", "i4": "i", "i8": "q", "b1": "?"}


def load_archive(
    path: Path, allowed: Collection[str], *, limit: int, stand_ins: Mapping[str, Any] | None = None
) -> Any:
    """What torch.save put into `path`, read with `weights_only`, mapped, so that no more than it holds is
    ever allocated. Its tensors lie in the file: copy what is kept.

    The file must be an uncompressed zip of at most `limit` bytes that refers to nothing but `allowed` and
    the keys of `stand_ins`, in whose place their values are called. Raises errors of any kind for anything
    else and for damage; `reason_of` puts them on one line.
    """
    stand_ins = stand_ins or {}
    check_archive(path, {*allowed, *stand_ins}, limit)
    named: list[Any] = [(value, name.replace(" ", ".")) for name, value in stand_ins.items()]
    with torch.serialization.safe_globals(named):
        return torch.load(path, weights_only=True, map_location="cpu", mmap=True)


def reason_of(error: Exception) -> str:
    """The first line of an error, printable."""
    return one_line((str(error).splitlines() or [type(error).__name__])[0])


def check_archive(path: Path, allowed: Collection[str], limit: int) -> None:
    """Refuse (ValueError) what torch.load need not see: other formats, zip bombs, references to code."""
    size = path.stat().st_size
    if size > limit:
        raise ValueError(f"it has {size} bytes, more than {limit}")
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            old = file.read(len(OLD)) == OLD
        known = "of torch before 1.6: load and save it again with a newer torch" if old else ""
        raise ValueError(f"it is not a zip archive as torch.save writes it{known and ', but a file '}{known}")
    with zipfile.ZipFile(path) as archive:
        root = _check_members(archive, size)
        pickle = archive.getinfo(f"{root}/data.pkl")
        if pickle.file_size > PICKLE:
            raise ValueError(f"its table of tensors is larger than {PICKLE} bytes")
        _check_pickle(archive.read(pickle), allowed)


def _check_members(archive: zipfile.ZipFile, size: int) -> str:
    """The folder that all members lie in, once they are found right."""
    found, names = archive.infolist(), archive.namelist()
    if not 0 < len(found) <= MEMBERS or len(set(names)) < len(names) or archive.comment:
        raise ValueError("its table of members is not one of torch.save")
    if any(m.compress_type != zipfile.ZIP_STORED or m.flag_bits & 1 for m in found):
        raise ValueError("a member is compressed or encrypted")
    if sum(m.file_size for m in found) > size or any(m.file_size != m.compress_size for m in found):
        raise ValueError("its members claim more bytes than it has")
    root = names[0].partition("/")[0]
    if any(".." in name or "\\" in name or name.partition("/")[0] != root for name in names):
        raise ValueError("a member lies outside the archive's folder")
    if f"{root}/constants.pkl" in names:
        raise ValueError("it is a program of TorchScript, not tensors")
    return root


def _check_pickle(data: bytes, allowed: Collection[str]) -> None:
    """Refuse (ValueError) a pickle that names anything but what is allowed; nothing in it is run."""
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name in ("STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"):
            raise ValueError(f"it uses the pickle instruction {opcode.name}")
        if opcode.name == "GLOBAL" and argument not in allowed:
            raise ValueError(f"it refers to {argument}")


def is_dense(tensor: Tensor) -> bool:
    """Whether the tensor's storage has a number for each of its elements, so that copying it is no bomb."""
    strided = tensor.layout == torch.strided
    return strided and tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.element_size()


class _Dtype:
    """Stands in for numpy.dtype: remembers its code and the order of its bytes."""

    def __init__(self, code: Any, *flags: Any) -> None:
        self.code, self.order = code, "<"

    def __setstate__(self, state: Any) -> None:
        self.order = state[1]


def _number(dtype: Any, raw: Any) -> float | int:
    """Stands in for numpy's scalars: a plain number from its bytes."""
    if not isinstance(dtype, _Dtype) or dtype.code not in NUMBERS or dtype.order not in ("<", ">", "|"):
        raise ValueError("a scalar of numpy that is no number")
    order = ">" if dtype.order == ">" else "<"
    return struct.unpack(order + NUMBERS[dtype.code], raw)[0]


def _latin1(text: Any, codec: Any = "latin1") -> bytes:
    if not isinstance(text, str) or codec != "latin1":
        raise ValueError("an unusual text encoding")
    return text.encode("latin1")


# Old files keep accuracies as scalars of numpy: these read them without calling anything of numpy.
NUMPY_SCALARS: dict[str, Any] = {
    "numpy.core.multiarray scalar": _number,
    "numpy._core.multiarray scalar": _number,
    "numpy dtype": _Dtype,
    "_codecs encode": _latin1,
}


def read_npz(path: Path, keys: Collection[str], limit: int) -> dict[str, np.ndarray]:
    """The arrays of an .npz file that `keys` names: plain numbers and texts, each in memory of its own.

    Compressed members are read up to `limit` bytes in all, stored ones up to what the file has. Raises
    errors of any kind for objects, headers that claim other sizes than the members have, and damage.
    """
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        if len(set(names)) < len(names):
            raise ValueError("a member comes twice")
        members = {key: archive.getinfo(f"{key}.npy") for key in keys if f"{key}.npy" in names}
        stored = sum(m.file_size for m in members.values() if m.compress_type == zipfile.ZIP_STORED)
        if stored > path.stat().st_size:
            raise ValueError(f"its arrays claim {stored} bytes, more than it has")
        if sum(m.file_size for m in members.values()) - stored > limit:
            raise ValueError(f"its compressed arrays claim more than {limit} bytes")
        return {key: _npy(archive, member) for key, member in members.items()}


def _npy(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    """One .npy member whose header claims exactly the bytes that follow it."""
    with archive.open(member) as file:
        version = npy.read_magic(file)
        if version not in HEADERS:
            raise ValueError(f"an array of the unknown version {version}")
        shape, fortran, dtype = HEADERS[version](file)
        left = member.file_size - file.tell()
        if (
            dtype.kind not in "fiubU"
            or min(shape, default=0) < 0
            or math.prod(shape) * dtype.itemsize != left
        ):
            raise ValueError(f"an array of {dtype} {list(shape)} in {left} bytes")
        data = bytearray()
        while piece := file.read(PIECE):
            data += piece
    if len(data) != left:
        raise ValueError(f"an array of {dtype} {list(shape)} in {len(data)} bytes")
    return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")


def plain_yaml(path: Path) -> str:
    """The text of a YAML file of at most 1 MiB without aliases, a few of which can stand for any amount.

    Raises ValueError for another, YAMLError and OSError for one that cannot be read.
    """
    with path.open("rb") as file:
        data = file.read(YAML + 1)
    if len(data) > YAML:
        raise ValueError(f"it has more than {YAML} bytes")
    text = data.decode("utf-8")
    if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
        raise ValueError("it has aliases")
    return text

"""Artefacts as an attacker would make them: hashes, sizes and seals agree with whatever is in them."""

import hashlib
import json
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddengine import checkpoint, files
from expert_buffers.manifest import write_manifest
from synth import schema

GIB = 1 << 30
Change = Callable[[str, bytes], tuple[str, bytes, int]]  # a member's name and data to these and compression
DATA = "data.safetensors"


def edited(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest of a set or a buffer by `edit`, and seal it again."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    edit(manifest)
    if manifest.get("format") == schema.FORMAT:
        path.write_text(json.dumps({**manifest, "seal": schema.seal(manifest)}, indent=1) + "\n")
    else:
        write_manifest(folder, {key: value for key, value in manifest.items() if key != "seal"})


def with_tensors(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Put other tensors into a set, declared as they are."""
    entry = files.write_tensors(folder / DATA, tensors)
    declared = {name: schema.declare(tensor) for name, tensor in sorted(tensors.items())}

    def edit(manifest: dict[str, Any]) -> None:
        manifest["files"][DATA], manifest["tensors"] = entry, declared
        if all(found["dtype"] in schema.DTYPES for found in declared.values()):
            manifest["budget"] |= schema.part_bytes(declared, manifest["kind"])

    edited(folder, edit)


def with_bytes(folder: Path, data: bytes, name: str = DATA) -> None:
    """Put other bytes into a file that a manifest lists, of a set, a buffer or a checkpoint."""
    (folder / name).write_bytes(data)
    entry = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    if (folder / "manifest.json").is_file() and name == "state.safetensors":
        _reseal_checkpoint(folder, entry)
        return

    def edit(manifest: dict[str, Any]) -> None:
        if "files" in manifest:
            manifest["files"][name] = entry
        for found in manifest.get("experts", {}).values():
            found.update(entry if found["file"] == name else {})

    edited(folder, edit)


def _reseal_checkpoint(folder: Path, entry: Mapping[str, Any]) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["state.safetensors"] = dict(entry)
    manifest.pop("seal")
    sealed = {**manifest, "seal": checkpoint._seal(manifest)}
    (folder / "manifest.json").write_bytes(files.json_bytes(sealed))


def header(entries: Mapping[str, tuple[str, list[int], int, int]], claimed: int | None = None) -> bytes:
    """A safetensors file of a header alone: name -> (dtype, shape, start, stop); `claimed` is its length."""
    table = {n: {"dtype": d, "shape": s, "data_offsets": [a, b]} for n, (d, s, a, b) in entries.items()}
    text = json.dumps(table).encode()
    return struct.pack("<Q", len(text) if claimed is None else claimed) + text


def npy(shape: tuple[int, ...], descr: str = "<f4", data: bytes = b"\0" * 4) -> bytes:
    """A .npy member that claims a shape, whatever follows."""
    text = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode() + data


def zipped(path: Path, members: Mapping[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    """A zip archive of these members; names are taken as they are."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(name), data, compression)
    return path


def lying(path: Path, claimed: int) -> Path:
    """The zip at `path`, its directory and its local headers claiming that members have `claimed` bytes."""
    data = bytearray(path.read_bytes())
    for mark, method, sizes in ((b"PK\x01\x02", 10, 20), (b"PK\x03\x04", 8, 18)):
        place = data.find(mark)
        while place >= 0:
            stored = data[place + method] == zipfile.ZIP_STORED
            start = place + sizes + (0 if stored else 4)
            data[start : place + sizes + 8] = struct.pack("<I", claimed) * (1 + stored)
            place = data.find(mark, place + 4)
    path.write_bytes(data)
    return path


def png(width: int, height: int, body: bytes = b"") -> bytes:
    """A grey PNG that claims a size; `body` are its deflated rows."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def torch_file(path: Path, value: object, change: Change | None = None) -> Path:
    """What torch.save makes of `value`, each member passed through `change`."""
    torch.save(value, path)
    if change is not None:
        with zipfile.ZipFile(path) as old:
            members = [change(name, old.read(name)) for name in old.namelist()]
        with zipfile.ZipFile(path, "w") as new:
            for name, data, compression in members:
                new.writestr(name, data, compression)
    return path

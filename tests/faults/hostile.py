"""Hostile artefacts, each as its maker would send it, and the reader that a user would point at it.

A case writes its files into a folder and returns what a user runs on them. `sentinel` is the file that a
payload makes when code of it runs. Whatever a case holds, a reader refuses it in a line or shows it as text.
"""

import pickle
import shutil
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

import forging
from kinds import KINDS, SHAPE, STEP, Said, spec
from toy_experts import NET, SPEC

from ddengine import data
from ddengine.data.unpickle import read_plain_pickle
from ddengine.errors import EXIT_ARTEFACT, EXIT_DONE, DDError
from ddengine.nets import build
from ddengine.rng import Rng
from expert_buffers.legacy import order_of_use, read_replay_buffer
from expert_buffers.params import ParamSpec
from synth.foreign import read_foreign

Met = Callable[[], Said]
Make = Callable[[Path, Path], Met]
STORED, DEFLATED = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED
IMAGES, LABELS = torch.zeros((10, *SHAPE)), torch.arange(10) % 5


@dataclass(frozen=True)
class Case:
    """A hostile artefact; `shown` where it is well formed, and what it names must be shown as text."""

    make: Make
    shown: bool = False


@cache
def _pristine(kind: str) -> TemporaryDirectory[str]:
    """An artefact of a kind, made once for this process, at the end of which it goes."""
    folder = TemporaryDirectory(prefix="hostile-")
    KINDS[kind].make(Path(folder.name) / "artefact")
    return folder


def copied(kind: str, folder: Path) -> Path:
    """An artefact of a kind, to be spoiled."""
    return shutil.copytree(Path(_pristine(kind).name) / "artefact", folder / "artefact")


def called(read: Callable[[], object]) -> Said:
    """What a function says that has no command of its own."""
    try:
        read()
    except DDError as error:
        return Said(error.code, "", error.cause, len(str(error).splitlines()))
    except ValueError as error:  # of readers inside a dataset's, which turns it into one of ours
        return Said(EXIT_ARTEFACT, "", str(error), 2)
    return Said(EXIT_DONE, "", "")


def payloads(target: Path) -> dict[str, bytes]:
    """Pickles that make `target` when they are loaded by whoever trusts them, each by another instruction."""
    text = f"touch {target}"
    line, short = text.encode(), struct.pack("<B", len(text)) + text.encode()
    call = f"__import__('os').system({text!r})"
    spoken = struct.pack("<B", len(call)) + call.encode()

    class Reduced:
        def __reduce__(self) -> Any:
            import os

            return os.system, (text,)

    stacked = b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c" + short + b"\x85R."
    return {
        "REDUCE": pickle.dumps(Reduced(), 2),
        "STACK_GLOBAL": stacked,
        "in a frame": pickle.dumps(Reduced(), 4),
        "INST": b"(S'" + line + b"'\niposix\nsystem\n.",
        "OBJ": b"(cposix\nsystem\nS'" + line + b"'\no.",
        "NEWOBJ": b"\x80\x02csubprocess\nPopen\nU" + short + b"\x85\x81.",
        "NEWOBJ_EX": b"\x80\x04\x8c\nsubprocess\x8c\x05Popen\x93\x8c" + short + b"\x85}\x92.",
        "eval": b"\x80\x02cbuiltins\neval\nU" + spoken + b"\x85R.",
        "exec": b"\x80\x02c__builtin__\nexec\nU" + spoken + b"\x85R.",
        "getattr": b"\x80\x02cbuiltins\ngetattr\ncposix\nU\x06system\x86RU" + short + b"\x85R.",
        "EXT1": b"\x80\x02\x82\x01U" + short + b"\x85R.",
        "BUILD": b"\x80\x02ccollections\nOrderedDict\n)R}U\x0c__setstate__cposix\nsystem\nsbU"
        + short
        + b"b.",
        "nested": b"\x80\x02}U\x01aU\x01b}U\x01c" + pickle.dumps(Reduced(), 2)[2:-1] + b"sss.",
        "persistent": b"\x80\x02U" + short + b"Q.",
        "torch.load": b"\x80\x02ctorch.serialization\nload\nU" + short + b"\x85R.",
        "a method": b"\x80\x04\x8c\x0ctorch._utils\x8c%_rebuild_tensor_v2.__globals__.__getitem__\x93.",
    }


def _archive(path: Path, payload: bytes) -> Path:
    members = {"archive/data.pkl": payload, "archive/byteorder": b"little", "archive/version": b"3\n"}
    return forging.zipped(path, members)


def _arrays(path: Path, payload: bytes, names: tuple[str, ...]) -> Path:
    member = forging.npy((1,), "|O", payload)
    return forging.zipped(path, {f"{name}.npy": member for name in names})


def foreign(form: str, path: Path) -> Met:
    """Reading `path` as a set of another tool."""
    return lambda: called(lambda: read_foreign([path], form, spec()))


def _replay(path: Path) -> Met:
    return lambda: called(lambda: read_replay_buffer(path, _layout()))


@cache
def _layout() -> ParamSpec:
    net = build(NET, SPEC.shape, len(SPEC.classes), Rng(0).torch("layout"))
    return order_of_use(net, SPEC.shape)


def placed(kind: str, name: str, folder: Path, content: bytes) -> Met:
    """Reading an artefact one of whose files has other content, which its manifest vouches for."""
    place = copied(kind, folder)
    forging.with_bytes(place / Path(name).parent, content, Path(name).name)
    return lambda: KINDS[kind].read(place)


def _written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


STEP_FOLDER = f"step_{STEP:06d}"
CARRIERS: dict[str, Callable[[Path, bytes], Met]] = {
    "torch": lambda f, p: foreign("torch", _archive(f / "set.pt", p)),
    "torch, no archive": lambda f, p: foreign("torch", _written(f / "set.pt", p)),
    "mtt": lambda f, p: foreign("mtt", _archive(f / "images_best.pt", p)),
    "dm": lambda f, p: foreign("dm", _archive(f / "res_DM.pt", p)),
    "replay buffer": lambda f, p: _replay(_archive(f / "replay_buffer_0.pt", p)),
    "npz set": lambda f, p: foreign("npz", _arrays(f / "set.npz", p, ("x", "y"))),
    "npz set, no archive": lambda f, p: foreign("npz", _written(f / "set.npz", p)),
    "npz dataset": lambda f, p: _dataset(_arrays(f / "data.npz", p, ("x_train", "y_train"))),
    "pickled batch": lambda f, p: _batch(_written(f / "data_batch_1", p)),
    "distilled set": lambda f, p: placed("pixels", "data.safetensors", f, p + bytes(1500)),
    "expert": lambda f, p: placed("expert buffer", "expert_00000.safetensors", f, p.ljust(3600, b"\0")),
    "checkpoint": lambda f, p: placed("checkpoint", f"{STEP_FOLDER}/state.safetensors", f, p),
}


def _dataset(path: Path) -> Met:
    return lambda: called(lambda: data.load("npz", root=str(path)))


def _batch(path: Path) -> Met:
    """Inert stand-ins may be built from a batch; whatever is none of its plain values is refused."""

    def read() -> None:
        found = read_plain_pickle(path)
        raise ValueError(f"read, and of plain values: {sorted(found)}")

    return lambda: called(read)


def code() -> Iterator[tuple[str, Case]]:
    """Every payload in every carrier."""
    for name in payloads(Path("x")):
        for carrier, write in CARRIERS.items():
            make = lambda folder, sentinel, n=name, w=write: w(folder, payloads(sentinel)[n])
            yield f"code, {name} in {carrier}", Case(make)


MEMBERS: dict[str, Callable[[str, bytes], tuple[str, bytes, int]]] = {
    "deflated": lambda n, d: (n, d, DEFLATED),
    "bzip2": lambda n, d: (n, d, zipfile.ZIP_BZIP2),
    "named ../x": lambda n, d: (n.replace("/data/0", "/../../x"), d, STORED),
    "named /x": lambda n, d: (n.replace("set/data/0", "/tmp/x"), d, STORED),
    "named with a backslash": lambda n, d: (n.replace("/data/0", "/..\\x"), d, STORED),
    "of TorchScript": lambda n, d: (n.replace("data/0", "constants.pkl"), d, STORED),
    "cut short": lambda n, d: (n, d[: len(d) // 2] if n.endswith("data/0") else d, STORED),
    "empty": lambda n, d: (n, b"", STORED),
}


def members() -> Iterator[tuple[str, Case]]:
    """Archives whose members are packed, named or cut as torch.save never does."""
    for name, change in MEMBERS.items():
        make = lambda folder, sentinel, c=change: foreign(
            "torch", forging.torch_file(folder / "set.pt", (IMAGES, LABELS), c)
        )
        yield f"a torch member {name}", Case(make)

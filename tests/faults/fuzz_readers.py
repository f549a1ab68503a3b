"""The readers that are fuzzed, each with small valid files for its corpus."""

import json
import pickle
import struct
import sys
import zlib
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

import forging
import kinds
from fuzz import Reader
from hostile import payloads
from kinds import KINDS, SHAPE, STEP
from toy_experts import NET, SPEC

from ddengine import commands, data, runs
from ddengine.data.unpickle import read_plain_pickle
from ddengine.errors import ArtefactError, DDError
from ddengine.nets import build
from ddengine.rng import Rng
from expert_buffers import ExpertBuffer
from expert_buffers.legacy import order_of_use, read_replay_buffer
from synth import verify
from synth.foreign import read_foreign
from synth.schema import read_manifest

IMAGES, LABELS = torch.linspace(0, 1, 10 * 105).reshape(10, *SHAPE), torch.arange(10) % 5
TRAINING = {"x_train": torch.zeros(60, 5, 4, 3, dtype=torch.uint8), "y_train": torch.arange(60) % 5}


@cache
def _artefact(kind: str) -> TemporaryDirectory[str]:
    folder = TemporaryDirectory(prefix="fuzz-")
    KINDS[kind].make(Path(folder.name) / "artefact")
    return folder


def _of(kind: str) -> Path:
    return Path(_artefact(kind).name) / "artefact"


@cache
def _place(kind: str, reader: str) -> Path:
    """An artefact of a kind for one reader, which writes the bytes of each input over a file of it."""
    place = Path(_artefact(kind).name) / reader
    KINDS[kind].make(place)
    return place


def _forged(path: Path) -> object:
    """The bytes as data.safetensors of a set whose manifest vouches for them."""
    place = _place("pixels", "set_data")
    forging.with_bytes(place, path.read_bytes())
    return verify(place)


def _expert(path: Path) -> object:
    """The bytes as an expert of a buffer whose manifest vouches for them."""
    place = _place("expert buffer", "expert")
    forging.with_bytes(place, path.read_bytes(), "expert_00000.safetensors")
    return ExpertBuffer(place).verify()


def _state(path: Path) -> object:
    """The bytes as the manifest of a checkpoint."""
    place = _place("checkpoint", "checkpoint")
    (place / f"step_{STEP:06d}" / "manifest.json").write_bytes(path.read_bytes())
    said = KINDS["checkpoint"].read(place)
    if said.code:
        raise ArtefactError(said.cause)
    return said


def _run_file(name: str, path: Path) -> object:
    """The bytes as a file of a run that a report shows."""
    place = _place("run", name)
    (place / name).write_bytes(path.read_bytes())
    return runs.read_run(place).shown()


def _foreign(form: str, path: Path) -> object:
    return read_foreign([path], form, kinds.spec())


@cache
def _layout() -> object:
    net = build(NET, SPEC.shape, len(SPEC.classes), Rng(0).torch("layout"))
    return order_of_use(net, SPEC.shape)


def _replay(path: Path) -> object:
    return read_replay_buffer(path, _layout())  # type: ignore[arg-type]


def _torch_seeds(folder: Path) -> list[bytes]:
    tables = (
        (IMAGES, LABELS),
        {"x": IMAGES, "y": LABELS, "student_lr": 0.1, "mean": [0.5] * 3, "std": [1.0] * 3},
    )
    found = [forging.torch_file(folder / "set.pt", table).read_bytes() for table in tables]
    members = {"archive/data.pkl": payloads(folder / "ran")["REDUCE"], "archive/version": b"3\n"}
    return [*found, forging.zipped(folder / "code.pt", members).read_bytes()]


def _dm_seeds(folder: Path) -> list[bytes]:
    table = {"data": [[IMAGES, LABELS]] * 2, "accs_all_exps": {"ConvNet": [np.float64(0.5)]}}
    return [forging.torch_file(folder / "res.pt", table).read_bytes()]


def _replay_seeds(folder: Path) -> list[bytes]:
    rows = [[torch.full(shape, float(step)) for shape in _layout().shapes] for step in range(2)]  # type: ignore[attr-defined]
    return [forging.torch_file(folder / "replay_buffer_0.pt", [rows]).read_bytes()]


def _npz_seeds(arrays: Mapping[str, Tensor], folder: Path) -> list[bytes]:
    plain = {name: array.numpy() for name, array in arrays.items()}
    np.savez(folder / "a.npz", **plain)
    np.savez_compressed(folder / "b.npz", **plain, student_lr=np.array(0.1))
    return [(folder / name).read_bytes() for name in ("a.npz", "b.npz")]


def _batch_seeds(folder: Path) -> list[bytes]:
    batch = {"data": np.zeros((2, 12), np.uint8), "labels": [0, 1], "names": ["a", "b"]}
    return [pickle.dumps(batch, protocol) for protocol in (0, 2, 4)] + [
        payloads(folder / "ran")["STACK_GLOBAL"]
    ]


@cache
def _class_folders() -> TemporaryDirectory[str]:
    folder = TemporaryDirectory(prefix="fuzz-")
    (Path(folder.name) / "ant").mkdir()
    return folder


def _picture(path: Path) -> object:
    """The bytes as the only picture of a set in class folders."""
    place = Path(_class_folders().name)
    (place / "ant" / "0.png").write_bytes(path.read_bytes())
    return read_foreign([place], "imagefolder", kinds.spec())


def _picture_seeds(folder: Path) -> list[bytes]:
    grey = forging.png(5, 7, zlib.compress(bytes(7 * 6)))
    huge = forging.png(2**31 - 1, 2**31 - 1, struct.pack(">I", 7))
    return [grey, huge]


def _config_seeds(folder: Path) -> list[bytes]:
    config = {
        group: {"name": name} for group, name in (("dataset", "digits"), ("matcher", "x"), ("network", "m:N"))
    }
    return [json.dumps(config).encode(), b"dataset: {name: a}\nmatcher: &x {name: b}\nnetwork: *x\n", b"7"]


def _set_manifest(path: Path) -> object:
    return read_manifest(path.parent)


def _buffer(path: Path) -> object:
    """The bytes as the manifest of a buffer, beside its experts."""
    place = _place("expert buffer", "buffer_manifest")
    (place / "manifest.json").write_bytes(path.read_bytes())
    return ExpertBuffer(place)


def _dataset(path: Path) -> object:
    return data.load("npz", root=str(path))


def _stored(name: str, read: Callable[[Path], object], kind: str, file: str) -> Reader:
    """A reader of one file of an artefact of ours."""
    return Reader(name, read, ArtefactError, lambda folder: [(_of(kind) / file).read_bytes()])


READERS: dict[str, Reader] = {
    "set_manifest": _stored("manifest.json", _set_manifest, "pixels", "manifest.json"),
    "graph_manifest": _stored("manifest.json", _set_manifest, "graphs", "manifest.json"),
    "set_data": _stored("in/data", _forged, "pixels", "data.safetensors"),
    "buffer_manifest": _stored("in/manifest", _buffer, "expert buffer", "manifest.json"),
    "expert": _stored("in/expert", _expert, "expert buffer", "expert_00000.safetensors"),
    "checkpoint": _stored("in/manifest", _state, "checkpoint", f"step_{STEP:06d}/manifest.json"),
    "table": _stored("in/table", partial(_run_file, "table.json"), "run", "table.json"),
    "run": _stored("in/run", partial(_run_file, "run.json"), "run", "run.json"),
    "metrics": _stored("in/log", partial(_run_file, "metrics.jsonl"), "run", "metrics.jsonl"),
    "config": Reader("config.yaml", commands.distill_command, ArtefactError, _config_seeds),
    "torch": Reader("set.pt", partial(_foreign, "torch"), DDError, _torch_seeds),
    "dm": Reader("res.pt", partial(_foreign, "dm"), DDError, _dm_seeds),
    "npz": Reader(
        "set.npz", partial(_foreign, "npz"), DDError, partial(_npz_seeds, {"x": IMAGES, "y": LABELS})
    ),
    "npz_dataset": Reader("data.npz", _dataset, DDError, partial(_npz_seeds, TRAINING)),
    "replay_buffer": Reader("replay_buffer_0.pt", _replay, ArtefactError, _replay_seeds),
    "batch": Reader("data_batch_1", read_plain_pickle, ValueError, _batch_seeds),
    "picture": Reader("in/0.png", _picture, DDError, _picture_seeds),
}

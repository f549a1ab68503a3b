"""Small files that claim a gigabyte or more: what reading them takes, measured in a process of its own."""

import os
import pickle
import struct
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

import forging
from forging import GIB
from kinds import SHAPE, STEP, compensated, pixels, spec
from toy_experts import NET, SPEC, walk, write

from ddengine import checkpoint, commands, data, files, runs
from ddengine.data.unpickle import read_plain_pickle
from ddengine.errors import DDError
from ddengine.nets import build
from ddengine.rng import Rng
from expert_buffers import ExpertBuffer
from expert_buffers.legacy import order_of_use, read_replay_buffer
from synth import DistilledSet, verify
from synth.foreign import read_foreign

LIMIT = {"memory_mib": 64, "address_space_mib": 256}  # threads and their stacks take the second
Read = Callable[[], object]
LABELS = torch.arange(10) % 5


def _set(folder: Path) -> Path:
    return DistilledSet.make(pixels(), recipe={}, provenance={}).save(folder / "set")


def _header_of_a_set(folder: Path) -> Read:
    place = _set(folder)
    forging.with_bytes(place, forging.header({"images": ("U8", [GIB], 0, GIB)}) + bytes(1600))
    return lambda: verify(place)


def _length_of_a_header(folder: Path) -> Read:
    place = _set(folder)
    forging.with_bytes(place, forging.header({"images": ("U8", [1], 0, 1)}, claimed=GIB) + bytes(1600))
    return lambda: verify(place)


def _manifest_of_a_set(folder: Path) -> Read:
    place = _set(folder)

    def edit(manifest: dict) -> None:
        manifest["tensors"]["images"]["shape"] = [GIB // 105, *SHAPE]
        manifest["count"] = GIB // 105
        manifest["files"][forging.DATA]["bytes"] = 105 * (GIB // 105) + 1000

    forging.edited(place, edit)
    return lambda: verify(place)


def _sparse_data_of_a_set(folder: Path) -> Read:
    place = _set(folder)
    with (place / forging.DATA).open("ab") as file:
        file.truncate(GIB)
    forging.edited(place, lambda m: m["files"][forging.DATA].update(bytes=GIB))
    return lambda: verify(place)


def _composites(folder: Path) -> Read:
    place = DistilledSet.make(compensated(), recipe={}, provenance={}).save(folder / "set")
    forging.edited(place, lambda m: m.update(count=2**31))
    return lambda: verify(place)


def _image_that_a_manifest_claims(folder: Path) -> Read:
    place = _set(folder)
    forging.edited(place, lambda m: m["dataset"].update(shape=[3, 2**20, 2**20]))
    return lambda: verify(place)


def _header_of_an_expert(folder: Path) -> Read:
    write(folder / "buffer", [walk(NET, 2, 0)])
    forged = forging.header({"params": ("F16", [GIB // 2], 0, GIB)})
    forging.with_bytes(folder / "buffer", forged + bytes(3600 - len(forged)), "expert_00000.safetensors")
    return lambda: ExpertBuffer(folder / "buffer").verify()


def _checkpoints_of_an_expert(folder: Path) -> Read:
    write(folder / "buffer", [walk(NET, 2, 0)])
    forging.edited(folder / "buffer", lambda m: m["experts"]["0"].update(checkpoints=1 << 19))
    return lambda: ExpertBuffer(folder / "buffer")


def _header_of_a_checkpoint(folder: Path) -> Read:
    state = {"pixels": torch.zeros(7)}
    place = checkpoint.save(folder, STEP, state, {})
    forging.with_bytes(place, forging.header({"/pixels": ("U8", [GIB], 0, GIB)}), "state.safetensors")
    return lambda: checkpoint.load(folder, STEP, state)


def _large_json(folder: Path) -> Read:
    (folder / "manifest.json").write_bytes(b"[" + b"0," * (GIB >> 6) + b"0]")
    return lambda: verify(folder)


def _foreign(path: Path, form: str) -> Read:
    return lambda: read_foreign([path], form, spec())


def _storage_of_a_tensor(folder: Path) -> Read:
    told, large = b"K\xc8", b"J" + struct.pack("<i", GIB)
    change = lambda name, data: (name, data.replace(told, large), zipfile.ZIP_STORED)
    return _foreign(forging.torch_file(folder / "set.pt", (torch.zeros(200), LABELS), change), "torch")


def _view_of_a_tensor(folder: Path) -> Read:
    wide = torch.zeros(1).expand(GIB // 105, *SHAPE)
    return _foreign(forging.torch_file(folder / "set.pt", (wide, LABELS)), "torch")


def _deflated_tensors(folder: Path) -> Read:
    members = {"archive/data.pkl": bytes(1 << 24), "archive/data/0": bytes(1 << 24)}
    path = forging.zipped(folder / "set.pt", members, zipfile.ZIP_DEFLATED)
    return _foreign(forging.lying(path, GIB), "torch")


def _members_of_a_torch_file(folder: Path) -> Read:
    path = forging.torch_file(folder / "set.pt", (torch.zeros(200), LABELS))
    return _foreign(forging.lying(path, GIB), "torch")


def _shared_checkpoints(folder: Path) -> Read:
    net = build(NET, SPEC.shape, len(SPEC.classes), Rng(0).torch("layout"))
    layout = order_of_use(net, SPEC.shape)
    row = [torch.zeros(shape) for shape in layout.shapes]
    other = [tensor + 1 for tensor in row]
    path = forging.torch_file(folder / "replay_buffer_0.pt", [[row, other] * 2_500])
    return lambda: read_replay_buffer(path, layout)


def _header_of_an_array(folder: Path) -> Read:
    members = {"x.npy": forging.npy((GIB // 420, *SHAPE)), "y.npy": forging.npy((10,), "<i8")}
    return _foreign(forging.zipped(folder / "set.npz", members), "npz")


def _deflated_array(folder: Path) -> Read:
    """Two arrays of 1.5 GiB, more than all compressed arrays may have."""
    members = {name: forging.npy((3 * GIB // 2 - 128,), "|u1", bytes(1 << 24)) for name in ("x.npy", "y.npy")}
    path = forging.zipped(folder / "set.npz", members, zipfile.ZIP_DEFLATED)
    return _foreign(forging.lying(path, 3 * GIB // 2), "npz")


def _array_that_inflates_to_more(folder: Path) -> Read:
    """A member of 64 MiB that says it has 4,096 bytes."""
    data = {"x.npy": forging.npy((4096 - 128,), "|u1", bytes(1 << 26)), "y.npy": forging.npy((10,), "<i8")}
    path = forging.zipped(folder / "set.npz", data, zipfile.ZIP_DEFLATED)
    return _foreign(forging.lying(path, 4096), "npz")


def _dataset(path: Path) -> Read:
    return lambda: data.load("npz", root=str(path))


def _header_of_a_dataset(folder: Path) -> Read:
    members = {
        "x_train.npy": forging.npy((GIB // 192, 8, 8, 3), "|u1"),
        "y_train.npy": forging.npy((1,), "|u1"),
    }
    return _dataset(forging.zipped(folder / "data.npz", members))


def _members_of_a_dataset(folder: Path) -> Read:
    members = {"x_train.npy": forging.npy((GIB - 200,), "|u1"), "y_train.npy": forging.npy((1,), "|u1")}
    return _dataset(forging.lying(forging.zipped(folder / "data.npz", members), GIB))


def _pickled_bytes(folder: Path) -> Read:
    (folder / "batch").write_bytes(b"\x80\x04\x8e" + struct.pack("<Q", GIB) + b"abc.")
    return lambda: read_plain_pickle(folder / "batch")


def _pickled_array(folder: Path) -> Read:
    (folder / "batch").write_bytes(b"\x80\x05\x96" + struct.pack("<Q", GIB) + b"abc.")
    return lambda: read_plain_pickle(folder / "batch")


def _pickled_memo(folder: Path) -> Read:
    (folder / "batch").write_bytes(b"\x80\x04}r" + struct.pack("<I", GIB) + b".")
    return lambda: _as_table(read_plain_pickle(folder / "batch"))


def _as_table(found: object) -> None:
    raise ValueError("read, and taken as it is") if found == {} else AssertionError(found)


def _picture(folder: Path) -> Read:
    (folder / "set" / "ant").mkdir(parents=True)
    rows = zlib.compress(bytes(1 << 22))
    (folder / "set" / "ant" / "0.png").write_bytes(forging.png(2**15, 2**15, rows))
    return _foreign(folder / "set", "imagefolder")


def _picture_of_a_dataset(folder: Path) -> Read:
    for name in ("ant", "bee"):
        (folder / name).mkdir()
        (folder / name / "0.png").write_bytes(forging.png(2**15, 2**15))
    return lambda: data.load("image_folder", root=str(folder))


def _aliases(folder: Path) -> Read:
    """Ten of ten of ten ...: 10 ** 9 in half a kilobyte."""
    lines = ["a: &a [x,x,x,x,x,x,x,x,x,x]"]
    for old, new in pairwise("abcdefghi"):
        lines.append(f"{new}: &{new} [{','.join([f'*{old}'] * 10)}]")
    (folder / "config.yaml").write_text("\n".join(lines))
    return lambda: commands.distill_command(folder / "config.yaml")


def _large_table(folder: Path) -> Read:
    head = {"format": "ddengine/run", "version": 1, "identity": {"matcher": {"type": "x"}, "budget": None}}
    head["identity"]["dataset"] = {"name": "d", "shape": [1]}
    files.write_json(folder / "run.json", head)
    (folder / "table.json").write_bytes(b" " * (GIB >> 5) + b"{}")
    return lambda: runs.read_run(folder)


CLAIMS: dict[str, Callable[[Path], Read]] = {
    "a set: header of data.safetensors": _header_of_a_set,
    "a set: length of that header": _length_of_a_header,
    "a set: tensors in the manifest": _manifest_of_a_set,
    "a set: a sparse file": _sparse_data_of_a_set,
    "a set: composites": _composites,
    "a set: shape of its images": _image_that_a_manifest_claims,
    "a set: a manifest of 32 MiB": _large_json,
    "an expert buffer: header of an expert": _header_of_an_expert,
    "an expert buffer: number of checkpoints": _checkpoints_of_an_expert,
    "a checkpoint: header of its state": _header_of_a_checkpoint,
    "a run: a table of 32 MiB": _large_table,
    "a run: aliases in its configuration": _aliases,
    "torch: storage of a tensor": _storage_of_a_tensor,
    "torch: view of a small storage": _view_of_a_tensor,
    "torch: deflated member": _deflated_tensors,
    "torch: sizes in the directory": _members_of_a_torch_file,
    "replay buffer: 5,000 checkpoints in one storage": _shared_checkpoints,
    "npz set: header of an array": _header_of_an_array,
    "npz set: deflated array": _deflated_array,
    "npz set: an array that inflates to more than it says": _array_that_inflates_to_more,
    "npz dataset: header of an array": _header_of_a_dataset,
    "npz dataset: sizes in the directory": _members_of_a_dataset,
    "pickled batch: bytes": _pickled_bytes,
    "pickled batch: array": _pickled_array,
    "pickled batch: place in the memo": _pickled_memo,
    "picture in a set": _picture,
    "picture in a dataset": _picture_of_a_dataset,
}


def measured(claim: Callable[[Path], Read]) -> dict[str, object]:
    """Whether a reader refuses the claim, and by how many MiB its address space or memory grew at most."""
    with tempfile.TemporaryDirectory() as folder:
        read = claim(Path(folder))
        out, inn = os.pipe()
        if (child := os.fork()) == 0:
            os.write(inn, pickle.dumps(_met(read)))
            os._exit(0)
        os.close(inn)
        with os.fdopen(out, "rb") as pipe:
            said = pipe.read()
        status = os.waitpid(child, 0)[1]
    return pickle.loads(said) if said else {"refused": False, "said": f"ended by status {status}"}


def excess(name: str, found: dict[str, object]) -> list[str]:
    """What is wrong with a measured claim, in words."""
    if not found["refused"]:
        return [f"{name}: {found['said']}"]
    return [f"{name}: {found[key]} MiB as {key}" for key, most in LIMIT.items() if found[key] > most]  # type: ignore[operator]


def _met(read: Read) -> dict[str, object]:
    before = _peaks()
    refused, said = False, "read as it is"
    try:
        read()
    except (DDError, ValueError) as error:
        refused, said = True, str(error).splitlines()[0].rpartition("/")[2]
    except BaseException as error:
        said = f"{type(error).__name__}: {error}"
    grown = {key: round((now - before[key]) / 1024, 1) for key, now in _peaks().items()}
    return {"refused": refused, **grown, "said": said[:160]}


def _peaks() -> dict[str, int]:
    """The largest memory and the largest address space of this process so far, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    status = dict(line.split(":\t") for line in lines if ":\t" in line)
    return {key: int(status[name].split()[0]) for key, name in zip(LIMIT, ("VmHWM", "VmPeak"), strict=True)}

"""Expert buffers on disk, read by rows: one file per expert, memory-mapped, verified before its first use.

Only what the manifest lists exists, so a recording that is cut off at any point leaves a valid buffer.
"""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import safetensors
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor, nn

from ddengine import files
from ddengine.errors import UsageError
from ddengine.nets import NetSpec, build, resolve
from ddengine.rng import Rng
from ddengine.types import DataSpec
from expert_buffers.manifest import (
    FORMAT,
    IDENTITY,
    MANIFEST,
    VERSION,
    compact,
    damaged,
    describe,
    extent,
    header,
    mismatch,
    read_manifest,
    require_regular,
)  # fmt: skip
from expert_buffers.params import ParamSpec
from expert_buffers.trajectory import ENCODINGS, Recording, Trajectory, decode, gather, problem
from expert_buffers.writing import commit, load_recording, open_for_writing, save_expert

__all__ = [
    "ENCODINGS", "FORMAT", "VERSION", "ExpertBuffer", "Recording", "Trajectory", "commit", "header",
    "load_recording", "open_for_writing", "save_expert",
]  # fmt: skip

HANDLES = 64  # files kept open
DTYPES = {"F32": torch.float32, "F16": torch.float16}
T = TypeVar("T")


class ExpertBuffer:
    """Experts in a folder, read by rows: nothing but the manifest is read until rows are asked for.

    `buffer[i]` is a whole Trajectory; i counts the committed experts. Threads may share a buffer.
    """

    def __init__(self, root: str | Path) -> None:
        """Raises UsageError when there is no such folder, ArtefactError naming a file that is damaged."""
        self.root = Path(root)
        if not self.root.is_dir():
            raise UsageError(f"there is no folder {self.root}", "Give the folder of an expert buffer")
        self.manifest = read_manifest(self.root)
        self._entries = list(self.manifest["experts"].values())
        self._layouts = {
            name: (ParamSpec.from_json(found["parameters"]), ParamSpec.from_json(found["statistics"]))
            for name, found in self.manifest["architectures"].items()
        }
        self._handles: OrderedDict[int, Any] = OrderedDict()
        self._verified: set[int] = set()
        self._lock = threading.Lock()
        for entry in self._entries:
            _require_size(self.root / entry["file"], entry["bytes"])

    @property
    def digest(self) -> str:
        """SHA-256 of what the buffer holds: its identity and each expert's SHA-256, wherever it lies."""
        identity = [self.manifest[key] for key in (*IDENTITY, "architectures")]
        experts = {number: entry["sha256"] for number, entry in self.manifest["experts"].items()}
        return hashlib.sha256(compact([identity, experts])).hexdigest()

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user of these experts should know."""
        saw = self.manifest["recipe"].get("saw")
        return (f"note: the experts of {self.root} saw {saw}",) if saw else ()

    @property
    def identity(self) -> dict[str, Any]:
        """The content of the buffer as plain JSON: numbers of experts and checkpoints, recipe, digest."""
        checkpoints = sum(entry["checkpoints"] for entry in self._entries)
        recipe = self.manifest["recipe"].get("name")
        return {"count": len(self), "checkpoints": checkpoints, "recipe": recipe, "digest": self.digest}

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, i: int) -> Trajectory:
        t = self.epochs(i) + 1
        params, stats = self.rows(i, range(t))
        measured = [torch.empty(0), torch.empty(0)]
        if self._entry(i)["loss"] is not None:
            measured = self._read(i, lambda f: [f.get_tensor(key).clone() for key in ("loss", "accuracy")])
        layouts = (self.spec(i), self.stat_spec(i), self.network(i))
        return Trajectory(params, stats, torch.arange(t), measured[0], measured[1], *layouts)

    def epochs(self, i: int) -> int:
        """Epochs that expert i was recorded for: its checkpoints - 1."""
        return self._entry(i)["checkpoints"] - 1

    def network(self, i: int) -> NetSpec:
        """The resolved network of expert i."""
        return NetSpec(**self.manifest["architectures"][self._entry(i)["architecture"]]["network"])

    def spec(self, i: int) -> ParamSpec:
        """The layout of the parameters of expert i."""
        return self._layouts[self._entry(i)["architecture"]][0]

    def stat_spec(self, i: int) -> ParamSpec:
        """The layout of the batch-norm statistics of expert i."""
        return self._layouts[self._entry(i)["architecture"]][1]

    def rows(self, i: int, index: Sequence[int]) -> tuple[Float[Tensor, "r p"], Float[Tensor, "r s"]]:
        """Parameters and statistics of expert i after the epochs in `index`, float32, in their own memory.

        UsageError for an epoch beyond those recorded, ArtefactError for a file that changed.
        """
        entry, last = self._entry(i), self.epochs(i)
        if wrong := [row for row in index if not 0 <= row <= last]:
            raise UsageError(
                f"expert {i} has no checkpoint {wrong[0]}: it was recorded for {last} epochs",
                f"Ask for 0..{last}, or continue the buffer: the same buffer command with epochs={wrong[0]}",
            )

        def read(f: Any) -> tuple[Tensor, Tensor]:
            def run(name: str, rows: slice) -> Tensor:
                return f.get_slice(name)[rows]

            return decode(entry["encoding"], index, run), gather("stats", index, run).clone()

        return self._read(i, read)

    def load(self, net: nn.Module, i: int, row: int) -> nn.Module:
        """Copy weights and statistics of expert i after epoch `row` into `net`, in place; returns it.

        UsageError when `net` has another layout.
        """
        if ParamSpec.of(net) != self.spec(i) or ParamSpec.of_buffers(net) != self.stat_spec(i):
            raise UsageError(
                f"expert {i} is a {describe(self.network(i))}, the network has other parameters",
                "Build the network with buffer.network(i)",
            )
        params, stats = self.rows(i, [row])
        stored = {**self.spec(i).unflatten(params[0]), **self.stat_spec(i).unflatten(stats[0])}
        with torch.no_grad():
            for name, tensor in [*net.named_parameters(), *net.named_buffers()]:
                tensor.copy_(stored[name])
        return net

    def build(self, i: int, row: int) -> nn.Module:
        """A fresh network on the CPU with the weights and statistics of expert i after epoch `row`."""
        c, h, w = self.manifest["dataset"]["shape"]
        classes = len(self.manifest["dataset"]["classes"])
        return self.load(build(self.network(i), (c, h, w), classes, Rng(0).torch("unused")), i, row)

    def matching(self, network: NetSpec) -> list[int]:
        """Which experts have that network, its defaults filled in for the buffer's images."""
        c, h, w = self.manifest["dataset"]["shape"]
        wanted = resolve(network, (c, h, w))
        return [i for i in range(len(self)) if self.network(i) == wanted]

    def check(self, spec: DataSpec, network: NetSpec | None = None) -> None:
        """Refuse a task that these experts were not trained for, naming the first difference (UsageError)."""
        if first := mismatch(self.manifest["dataset"], spec) or self._other_network(spec, network):
            raise UsageError(
                first, "Record a buffer for this task with `ddengine buffer`, or give the matching option"
            )

    def _other_network(self, spec: DataSpec, network: NetSpec | None) -> str:
        if not self._entries:
            return f"the buffer {self.root} holds no expert"
        if network is None or self.matching(network):
            return ""
        held = dict.fromkeys(describe(self.network(i)) for i in range(len(self)))
        return (
            f"the buffer holds {', '.join(held)}, the matcher uses {describe(resolve(network, spec.shape))}"
        )

    def verify(self) -> list[str]:
        """Check every byte and number: a line for each file found right, else ArtefactError naming one."""
        lines = [f"{MANIFEST}: {FORMAT} version {self.manifest['version']}, fields well formed, seal intact"]
        for number, entry in self.manifest["experts"].items():
            recording = load_recording(self.root, self.manifest, int(number))
            if wrong := recording.fault():
                raise damaged(self.root / entry["file"], wrong)
            lines.append(f"{entry['file']}: {entry['checkpoints']} checkpoints, sha256 ok")
        return lines

    def summary(self) -> dict[str, Any]:
        """What the buffer holds, as plain JSON."""
        epochs = [self.epochs(i) for i in range(len(self))]
        accuracies = [e["accuracy"] for e in self._entries if e["accuracy"] is not None]
        return {
            "path": str(self.root),
            **{
                key: self.manifest[key]
                for key in ("format", "version", "networks", "recipe", "encoding", "plan")
            },
            "experts": len(self),
            "epochs": [min(epochs), max(epochs)] if epochs else None,
            "dataset": self.manifest["dataset"]["name"],
            "preprocessing": self.manifest["dataset"]["preprocessing"],
            "bytes": sum(entry["bytes"] for entry in self._entries),
            "accuracy": sum(accuracies) / len(accuracies) if accuracies else None,
        }

    def _entry(self, i: int) -> dict[str, Any]:
        if not -len(self) <= i < len(self):
            raise IndexError(f"expert {i} of {len(self)}")
        return self._entries[i]

    def _read(self, i: int, use: Callable[[Any], T]) -> T:
        """What `use` makes of the open file of expert i; at most HANDLES files stay open."""
        i %= len(self)
        path = self.root / self._entries[i]["file"]
        with self._lock:
            try:
                if i not in self._handles:
                    self._handles[i] = self._open(i, path)
                self._handles.move_to_end(i)
                while len(self._handles) > HANDLES:
                    self._handles.popitem(last=False)
                return use(self._handles[i])
            except (SafetensorError, OSError, RuntimeError) as error:
                raise damaged(path, type(error).__name__) from error

    def _open(self, i: int, path: Path) -> Any:
        entry = self._entries[i]
        _require_size(path, entry["bytes"])
        if i not in self._verified and files.sha256(path) != entry["sha256"]:
            raise damaged(path, "its SHA-256 is not the manifest's")
        handle = safetensors.safe_open(path, "pt")
        found = {}
        for name in handle.keys():  # noqa: SIM118 - a handle is no mapping
            stored = handle.get_slice(name)
            found[name] = (DTYPES.get(stored.get_dtype(), torch.bool), tuple(stored.get_shape()))
        if wrong := problem(
            found, entry["encoding"], *extent(self.manifest, entry), entry["loss"] is not None
        ):
            raise damaged(path, wrong)
        self._verified.add(i)
        return handle


def _require_size(path: Path, declared: int) -> None:
    require_regular(path)
    size = path.stat().st_size
    if size != declared:
        raise damaged(path, f"{size} bytes where the manifest says {declared}")

"""Real targets that are computed once and used again: by later steps, other sizes and starts, other runs.

What a step wants of the real images is a few thousand floats a class. With a bank, networks and
augmentations come in pairs, each drawn from its number: a block of pairs is gone through `reuse` times before
the next begins. What a pair's targets are is decided by facts that are written down and hashed; an entry lies
under that hash, says the facts again, and is believed only where both agree with its bytes. So an entry read,
remembered or computed is the same, and a folder of them can be shared, copied or deleted at any time.
"""

import hashlib
import json
import os
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ddengine
import expert_buffers
from ddengine import files
from ddengine.data.disk import DiskPixels
from ddengine.errors import ArtefactError, UsageError
from ddengine.nets import NETWORKS
from ddengine.nets.core import NetSpec
from ddengine.rng import Rng
from ddengine.types import Images, Task, fingerprint

FORMAT, VERSION = "ddengine/target", 1
BLOCK = 50  # pairs before the first of them comes again: consecutive steps are to differ
MEMORY = 256 << 20  # bytes of entries that are remembered
CODE = ("rng.py", "types.py", "nets", "ops")  # what targets come from, beside matchers and experts


def pair(count: int, reuse: int) -> tuple[int, int]:
    """The pair that the network number `count` of a run is, and the number of the network that was it first.

    Blocks of BLOCK pairs, each gone through `reuse` times in the same order.
    """
    block, place = divmod(count, BLOCK * reuse)
    return block * BLOCK + place % BLOCK, block * BLOCK * reuse + place % BLOCK


def computed_share(networks: int, reuse: int) -> float:
    """The share of the first `networks` networks of a run whose pair was not there before."""
    whole, rest = divmod(networks, BLOCK * reuse)
    return (whole * BLOCK + min(rest, BLOCK)) / networks


def bank_folder() -> Path:
    """Where targets are kept: `bank` in $DDENGINE_CACHE, else `ddengine/bank` in the user's cache."""
    if given := os.environ.get("DDENGINE_CACHE"):
        return Path(given).expanduser() / "bank"
    known = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(known) if Path(known).is_absolute() else Path.home() / ".cache"
    return base / "ddengine" / "bank"


class TargetBank:
    """Targets by what they depend on: `facts` that hold for a whole run, and the draws of each pair.

    They are remembered up to MEMORY bytes, and kept in the folder `root` where one is given. Raises
    UsageError where that cannot be written.
    """

    def __init__(self, facts: Mapping[str, Any], root: Path | None) -> None:
        self.facts, self.root = json.loads(json.dumps(facts)), root
        self._known: OrderedDict[str, list[Tensor]] = OrderedDict()
        if root is not None:
            try:
                root.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UsageError(
                    f"cannot create {root} for real targets: {error.strerror}",
                    "Set DDENGINE_CACHE to a folder that you may write to, or give matcher.bank=off",
                ) from error
            files.sweep(root)

    def targets(
        self, draws: Rng, iteration: int, device: torch.device, make: Callable[[], list[Tensor]]
    ) -> list[Tensor]:
        """The targets of the pair that `draws` and `iteration` give, from `make` where none are kept."""
        depends = {**self.facts, "seed": draws.seed, "path": list(draws.path), "iteration": iteration}
        key = _hash(depends)
        found = self._known.pop(key, None)
        if found is None:
            found = self._read(key, depends)
        if found is None:
            found = [t.detach().cpu() for t in make()]
            self._write(key, depends, found)
        self._known[key] = found
        while sum(_nbytes(kept) for kept in self._known.values()) > MEMORY and len(self._known) > 1:
            self._known.popitem(last=False)
        return [t.to(device) for t in found]

    def _read(self, key: str, depends: Mapping[str, Any]) -> list[Tensor] | None:
        """The entry of the folder; None, with a warning, where what is there cannot be believed."""
        if self.root is None or not (self.root / f"{key}.json").exists():
            return None
        try:
            said = files.read_json(self.root / f"{key}.json")
            if not isinstance(said, dict) or said.get("depends") != depends:
                raise ArtefactError(f"{self.root / key}.json is damaged: it is of other targets", "")
            if not isinstance(said.get("tensors"), dict):
                raise ArtefactError(f"{self.root / key}.json is damaged: it names no tensors", "")
            held = files.read_tensors(self.root / f"{key}.safetensors", said["tensors"])
            return [held[str(i)] for i in range(len(held))]
        except (ArtefactError, KeyError) as error:
            cause = getattr(error, "cause", f"{self.root / key}.json is damaged: it lacks {error}")
            warnings.warn(f"{cause}; these targets are computed again", stacklevel=2)
            return None

    def _write(self, key: str, depends: Mapping[str, Any], found: list[Tensor]) -> None:
        if self.root is not None:
            named = {str(i): tensor for i, tensor in enumerate(found)}
            entry = files.write_tensors(self.root / f"{key}.safetensors", named)
            said = {"format": FORMAT, "version": VERSION, "depends": depends, "tensors": entry}
            files.write_json(self.root / f"{key}.json", said)

    def close(self) -> None:
        """Forget what is remembered; the folder stays."""
        self._known.clear()


def opened(
    task: Task, network: NetSpec, net: nn.Module, facts: Mapping[str, Any]
) -> tuple[TargetBank, str | None]:
    """The bank of a run whose real targets depend on `facts` beside task and network; what to tell its user.

    Raises UsageError for a network that draws anew for every batch.
    """
    if getattr(net, "draws", None) is not None:
        raise UsageError(
            f"matcher.bank=on, and network '{network.name}' draws anew for every batch",
            "Give matcher.bank=off",
        )
    known = {
        **facts, **data_facts(task.images), **machine_facts(task.device), "network": network.to_dict(),
        "precision": task.precision,
    }  # fmt: skip
    if network.name in NETWORKS:
        return TargetBank(known, bank_folder()), None
    return TargetBank(known, None), f"real targets are not kept: {network.name} is no network of ddengine"


def data_facts(images: Images) -> dict[str, Any]:
    """What real images are: a hash of pixels, labels and class names, and the way into model-input space."""
    spec = images.spec
    whitening = [spec.zca.mean, spec.zca.matrix] if spec.zca is not None else []
    said: Any = None
    if isinstance(images.x, DiskPixels):  # the index of the files has hashed all their pixels
        rows = torch.from_numpy(images.x.rows)
        said = [spec.fingerprint, list(images.x.shape), fingerprint(rows, images.y, spec.classes)]
    return {
        "images": said or fingerprint(images.x, images.y, spec.classes),
        "mean": list(spec.mean), "std": list(spec.std), "zca": [fingerprint(t, t, ()) for t in whitening],
    }  # fmt: skip


def machine_facts(device: torch.device) -> dict[str, Any]:
    """What else the bits of a target depend on: the device, its kernels and threads, and this code."""
    cuda = device.type == "cuda"
    place = [torch.cuda.get_device_name(device)] if cuda else [torch.backends.cpu.get_cpu_capability()]
    return {
        "device": [device.type, *place], "threads": 0 if cuda else torch.get_num_threads(),
        "torch": torch.__version__, "code": _code(),
    }  # fmt: skip


@cache
def _code() -> str:
    """SHA-256 of the modules that targets come from."""
    core, found = Path(ddengine.__file__).parent, hashlib.sha256()
    places = [*(core / name for name in CODE), Path(__file__).parent, Path(expert_buffers.__file__).parent]
    for place in places:
        for file in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            found.update(file.read_bytes())
    return found.hexdigest()


def _hash(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _nbytes(tensors: list[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)

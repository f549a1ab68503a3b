"""Networks of rows that depend on data and recipe alone, trained once and kept for the next set.

An entry lies under the hash of all that it depends on, and says it again inside; what does not agree with
its name and seal is not believed, and is trained and written again.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

from ddengine import files
from ddengine.errors import ArtefactError
from ddengine.locks import others
from ddengine.types import Images

CODE = ("train.py", "bench.py", "robust.py", "rng.py", "types.py", "nets", "ops")  # what numbers come from
PIECE = 1 << 12  # rows hashed at a time, so that images on disk need not be in memory together
NAME = re.compile(r"[0-9a-f]{64}\.json")
Record = dict[str, Any]


def kept_folder() -> Path:
    """Where rows are kept by default: $DDENGINE_CACHE, else `ddengine/rows` in the user's cache."""
    if given := os.environ.get("DDENGINE_CACHE"):
        return Path(given).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(cache) if Path(cache).is_absolute() else Path.home() / ".cache"
    return base / "ddengine" / "rows"


class Kept:
    """Records of trained networks in the folder `root`, by what they depend on (plain JSON values)."""

    def __init__(self, root: Path) -> None:
        self.root = root
        files.make_folder(root)
        if all(NAME.fullmatch(name) for name in others(root)):
            files.sweep(root)

    def find(self, depends: Mapping[str, Any]) -> Record | None:
        """The record that was kept for `depends`, None where there is none that can be believed."""
        path = self._path(depends)
        if not path.is_file():
            return None
        try:
            entry = files.read_json(path)
        except ArtefactError:
            return None
        if not isinstance(entry, dict) or entry.get("depends") != _plain(depends):
            return None
        record = entry.get("record")
        return record if isinstance(record, dict) and entry.get("seal") == _hash(record) else None

    def put(self, depends: Mapping[str, Any], record: Record) -> None:
        """Keep `record`; the file appears as a whole (UsageError where it cannot be written)."""
        entry = {"depends": _plain(depends), "record": record, "seal": _hash(record)}
        files.write_json(self._path(depends), entry)

    def _path(self, depends: Mapping[str, Any]) -> Path:
        return self.root / f"{_hash(depends)}.json"


def _plain(depends: Mapping[str, Any]) -> Any:
    return json.loads(json.dumps(depends))


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, allow_nan=False).encode()).hexdigest()


def digest(*tensors: Tensor) -> str:
    """SHA-256 of the bytes, shapes and types of tensors."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        for piece in tensor.detach().split(PIECE) if tensor.ndim else [tensor.detach()]:
            found.update(piece.cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def content(images: Images) -> str:
    """SHA-256 of images, labels and the way into model-input space."""
    spec = images.spec
    whitening = () if spec.zca is None else (spec.zca.mean, spec.zca.matrix)
    meaning = f"{spec.classes}{spec.mean}{spec.std}{images.y_kind}"
    return hashlib.sha256(f"{digest(images.x, images.y, *whitening)}{meaning}".encode()).hexdigest()


@cache
def code() -> str:
    """SHA-256 of the modules that a trained network's numbers come from."""
    here, found = Path(__file__).parent, hashlib.sha256()
    for name in CODE:
        path = here / name
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            found.update(file.read_bytes())
    return found.hexdigest()

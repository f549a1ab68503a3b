"""A run as a report sees it: what lies in its folder, checked, and the page that shows it."""

import base64
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddengine import files
from ddengine.artefacts import is_buffer
from ddengine.commands import distill_command, evaluate_command
from ddengine.errors import ArtefactError, UsageError
from ddengine.loop import RUN_FORMAT
from synth import DistilledSet

Record = dict[str, Any]
Check = Callable[[Any], bool]
NO_METRICS = ("step", "seconds", "expert", "epoch")


@dataclass(frozen=True)
class Run:
    """What a run's folder holds. `table`, `manifest` and `preview` (PNG) are None where there is none yet.

    `curves` are (step, value) pairs by metric in the order of the log; `commands` has the lines for distill
    and evaluate, None for one that no command line can say.
    """

    path: Path
    identity: Record
    table: Record | None
    curves: Mapping[str, Sequence[tuple[int, float | int]]]
    manifest: Record | None
    preview: bytes | None
    commands: Mapping[str, str | None]

    def to_json(self) -> Record:
        """The run as `report --json` prints it: plain JSON values."""
        curves = {metric: [list(point) for point in points] for metric, points in self.curves.items()}
        return {"path": str(self.path), "run": self.identity, "table": self.table, "curves": curves}

    def shown(self) -> Record:
        """The same with all that a report shows: `set` is the manifest, `preview` base64."""
        picture = self.preview and base64.b64encode(self.preview).decode()
        return {**self.to_json(), "set": self.manifest, "preview": picture, "commands": dict(self.commands)}


def read_run(path: Path) -> Run:
    """Read the run in the folder `path`, finished or not, evaluated or not.

    Raises ArtefactError for a folder that is no run, and for a file of it that is damaged.
    """
    identity = _identity(path)
    curves = _curves(path / "metrics.jsonl")
    table = _table(path / "table.json")
    folder = path / "distilled"
    distilled = DistilledSet.load(folder) if folder.is_dir() else None
    pictured = distilled is not None and "preview.png" in distilled.manifest["files"]
    return Run(
        path,
        identity,
        table,
        curves,
        None if distilled is None else distilled.manifest,
        (folder / "preview.png").read_bytes() if pictured else None,
        {
            "distill": distill_command(path / "config.yaml"),
            "evaluate": evaluate_command(path, table, distilled),
        },
    )


def write_page(path: Path, document: str) -> None:
    """Write an HTML document atomically; it replaces another one, no other file (UsageError)."""
    start = document[:15].encode()
    if path.exists() and not (path.is_file() and path.read_bytes()[: len(start)] == start):
        raise UsageError(f"{path} is there and is no page of a report", "Choose another --html FILE")
    files.write_bytes(path, document.encode())


def _identity(path: Path) -> Record:
    marker = path / "run.json"
    if not marker.is_file():
        what = "is an expert buffer, not a run" if is_buffer(path) else "is not a run: it holds no run.json"
        raise ArtefactError(f"{path} {what}", "Give the folder that distill or demo made")
    found = files.read_json(marker)
    identity = found.get("identity") if isinstance(found, dict) else None
    if not _fits({"format": RUN_FORMAT.__eq__, "identity": _mapping}, found) or not _fits(IDENTITY, identity):
        raise ArtefactError(f"{marker} is damaged: it names no run", "Restore it from a copy")
    return identity  # type: ignore[return-value]


def _curves(path: Path) -> dict[str, list[tuple[int, float | int]]]:
    """The metrics of a log; seconds are a cost, and which expert and epoch a step drew is no measure."""
    curves: dict[str, list[tuple[int, float | int]]] = {}
    for number, record in enumerate(files.read_json_lines(path), 1):
        step, values = record.get("step"), {k: v for k, v in record.items() if k not in NO_METRICS}
        if type(step) is not int or not all(map(_number, values.values())):
            raise ArtefactError(f"{path}, line {number} is damaged", "Remove that line")
        for metric, value in values.items():
            curves.setdefault(metric, []).append((step, value))
    return curves


def _table(path: Path) -> Record | None:
    """The newest evaluation, None where there is none."""
    if not path.exists():
        return None
    found = files.read_json(path)
    rows = found.get("rows") if _fits(TABLE, found) else []
    if not rows or not all(_fits(ROW, row) for row in rows):
        raise ArtefactError(f"{path} is damaged: it is no table", "Repeat the run's evaluate command")
    return found


def _text(value: Any) -> bool:
    return type(value) is str


def _mapping(value: Any) -> bool:
    return type(value) is dict


def _whole(value: Any) -> bool:
    return type(value) is int


def _number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _numbers(value: Any) -> bool:
    return type(value) is list and all(map(_number, value))


def _fits(checks: Mapping[str, Check], value: Any) -> bool:
    """Whether `value` is a table whose entries, absent ones as None, pass `checks`."""
    return _mapping(value) and all(check(value.get(key)) for key, check in checks.items())


ROW: dict[str, Check] = {
    "name": _text,
    "network": _text,
    "mean": _number,
    "std": lambda value: value is None or _number(value),
    "ci95": lambda value: value is None or (_numbers(value) and len(value) == 2),
    "n": _whole,
    "values": _numbers,
    "lr": lambda value: value is None or _number(value),
    "steps": _whole,
    "bytes": lambda value: _fits({"total": _whole}, value),
    "network_spec": _mapping,
}
TABLE: dict[str, Check] = {
    "dataset": _text,
    "protocol": _text,
    "seed": _whole,
    "recipe": _mapping,
    "rows": lambda value: type(value) is list,
}
IDENTITY: dict[str, Check] = {
    "matcher": lambda value: _fits({"type": _text}, value),
    "dataset": lambda value: _fits({"name": _text, "shape": _numbers}, value),
    "budget": lambda value: value is None or _mapping(value),
}

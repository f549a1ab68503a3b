"""A run's folder: whose it is, which state the run goes on from, and what it logs there."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from ddengine import checkpoint, files
from ddengine.errors import ArtefactError, UsageError
from ddengine.locks import others
from ddengine.seals import read_sealed, write_sealed
from synth import DistilledSet

S = TypeVar("S")
Notice = Callable[[str], None]
RUN_FORMAT, RUN_VERSION = "ddengine/run", 1
RUN_KEYS = ("format", "version", "identity")


def open_run(folder: Path, identity: Mapping[str, Any]) -> DistilledSet | None:
    """Make `folder`, or see that it holds this run. Returns the set of a finished run, None for any other.

    Raises UsageError if the folder holds another run or foreign files; nothing in it is changed.
    """
    marker = folder / "run.json"
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"out={folder} is a file", "Choose another out=DIR")
    if marker.exists():
        found = read_sealed(marker, RUN_KEYS)
        other = files.difference(found.get("identity", {}) if isinstance(found, dict) else {}, identity)
        if other:
            raise UsageError(f"out={folder} holds another run: {other}", "Choose another out=DIR")
        files.sweep(folder)
        return DistilledSet.load(folder / "distilled") if (folder / "distilled").is_dir() else None
    if folder.is_dir() and others(folder):
        raise UsageError(f"out={folder} holds files that are not a run of ddengine", "Choose another out=DIR")
    files.make_folder(folder)
    return None


def claim(folder: Path, identity: Mapping[str, Any], config: str | None) -> None:
    """Write what is missing of run.json and config.yaml, in this order: the first makes a folder a run's."""
    if not (folder / "run.json").exists():
        whole = {"format": RUN_FORMAT, "version": RUN_VERSION, "identity": dict(identity)}
        write_sealed(folder / "run.json", whole)
    if config is not None and not (folder / "config.yaml").exists():
        files.write_bytes(folder / "config.yaml", config.encode())


def resume(folder: Path, start: S, steps: int, notice: Notice) -> tuple[S, dict[str, Any], int | None]:
    """The newest sound state in `folder`, what was saved beside it, and its step; else `start`, {} and None.

    `start` is also the template of what is read. The log is cut back to the state; `steps` of the run are
    said to `notice`, as is every state that is damaged.
    """
    checkpoint.clean(folder)
    checkpoint.clean(folder / "checkpoints")
    for step in checkpoint.steps(folder / "checkpoints"):
        try:
            state, extra = checkpoint.load(folder / "checkpoints", step, start)
        except ArtefactError as error:
            notice(f"{error.cause}: going on from an older state")
            continue
        _cut_metrics(folder / "metrics.jsonl", step)
        notice(f"resuming {folder} at step {step} of {steps}")
        return state, extra, step
    _cut_metrics(folder / "metrics.jsonl", 0)
    return start, {}, None


def _cut_metrics(path: Path, step: int) -> None:
    if path.exists():
        kept = [json.dumps(record) + "\n" for record in files.read_json_lines(path) if record["step"] <= step]
        files.write_bytes(path, "".join(kept).encode())

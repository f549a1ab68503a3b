"""What an evaluation leaves in a folder: its table, and which set was judged where that lies elsewhere."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ddengine.artefacts import artefact
from ddengine.errors import ArtefactError
from ddengine.seals import read_sealed, write_sealed
from synth import DistilledSet

TABLE, JUDGED = "table.json", "set.json"


def write_table(folder: Path, table: Mapping[str, Any], path: str | Path | DistilledSet) -> None:
    """Write the newest table of `folder`, and how one gets from there to the set at `path`.

    There is no such way to a set in memory, and none is needed to the set of the run in `folder`.
    """
    (folder / JUDGED).unlink(missing_ok=True)
    write_sealed(folder / TABLE, table)
    if isinstance(path, DistilledSet):
        return
    judged = artefact(Path(path)).resolve()
    if folder.resolve() not in (judged, judged.parent):
        write_sealed(folder / JUDGED, {"path": os.path.relpath(judged, folder.resolve())})


def set_folder(folder: Path) -> Path | None:
    """Where the set of a run, of an evaluation's folder or at `folder` itself lies; None where there is none.

    Raises ArtefactError for a way to a set that is damaged.
    """
    if (folder / JUDGED).is_file():
        found = read_sealed(folder / JUDGED, {"path"})
        if type(found) is not dict or type(found.get("path")) is not str:
            raise ArtefactError(f"{folder / JUDGED} is damaged: it names no set", "Evaluate the set again")
        folder = Path(os.path.normpath(folder / found["path"]))
        return folder if (folder / "manifest.json").is_file() else None
    if (folder / "distilled").is_dir():
        return folder / "distilled"
    return folder if (folder / "manifest.json").is_file() else None

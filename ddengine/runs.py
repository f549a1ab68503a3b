"""A run as a report sees it: what lies in its folder, checked, and the page that shows it."""

import base64
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddengine import evaluated, files
from ddengine.artefacts import is_buffer, require_path
from ddengine.commands import distill_command, evaluate_command
from ddengine.errors import ArtefactError, UsageError
from ddengine.evaluated import set_folder
from ddengine.report import SCORES, costs
from ddengine.run_folder import RUN_FORMAT, RUN_KEYS
from ddengine.seals import read_sealed
from synth import DistilledSet
from synth.sheet import tile_size
from synth.store import CARD, PREVIEW
from synth.tiles import TileRow, tile_rows

Record = dict[str, Any]
Check = Callable[[Any], bool]
SHEET_ROOM, PREVIEW_ROOM = 5 << 20, 3 << 20  # bytes of base64 in a page, so that it stays under 10 MB
RUN, CARD_MAX = "run.json", 100_000
NO_METRICS = ("step", "seconds", "expert", "epoch")


@dataclass(frozen=True)
class Run:
    """What a run's folder holds. `table`, `distilled`, `preview` (PNG) and `card` may be None.

    `curves` are (step, value) pairs by metric in the order of the log; `commands` has the lines for distill
    and evaluate, None for one that no command line can say.
    """

    path: Path
    identity: Record
    table: Record | None
    curves: Mapping[str, Sequence[tuple[int, float | int]]]
    distilled: DistilledSet | None
    preview: bytes | None
    card: str | None
    commands: Mapping[str, str | None]

    def to_json(self) -> Record:
        """The run as `report --json` prints it: plain JSON values."""
        curves = {metric: [list(point) for point in points] for metric, points in self.curves.items()}
        head = {"path": str(self.path), "run": self.identity, "table": self.table, "curves": curves}
        return {**head, "costs": costs({"set": self._manifest, "table": self.table})}

    def shown(self, pages: int = 1) -> Record:
        """The same with all that a report shows, as one of `pages` runs that share the room for pictures.

        `set` is the manifest, `sheet` the images by class, `preview` base64: None where there are images, and
        where it is larger than its room.
        """
        made = self.distilled
        rows = () if made is None else tile_rows(made.synth, SHEET_ROOM // pages)
        wanted = made is not None and (not rows or made.kind == "compensated")
        preview = self.preview if wanted else None
        small = preview is not None and 4 * len(preview) // 3 <= PREVIEW_ROOM // pages
        picture = base64.b64encode(preview).decode() if small and preview else None
        found = {"set": self._manifest, "preview": picture, "sheet": _sheet(made, rows), "card": self.card}
        return {**self.to_json(), **found, "commands": dict(self.commands)}

    @property
    def _manifest(self) -> Record | None:
        return None if self.distilled is None else self.distilled.manifest


def _sheet(made: DistilledSet | None, rows: Sequence[TileRow]) -> Record | None:
    """Images by class as plain JSON, PNG in base64; `size` is the width and height of a tile on a screen."""
    if made is None or not rows:
        return None
    found = [
        {
            "label": row.label,
            "total": row.total,
            "tiles": [
                {
                    "name": tile.name,
                    "png": base64.b64encode(tile.png).decode(),
                    "shares": [list(share) for share in tile.shares],
                }
                for tile in row.tiles
            ],
        }
        for row in rows
    ]
    return {"size": list(tile_size(made.spec)), "rows": found}


def read_run(path: Path) -> Run:
    """Read the run in the folder `path`, finished or not, evaluated or not; or a set; or the folder of an
    evaluation (`evaluate SET out=DIR`) with the set that it judged, if that is still there.

    Raises ArtefactError for a folder that is none of these, and for a file of it that is damaged; UsageError
    where there is nothing.
    """
    require_path(path)
    table = _table(path / evaluated.TABLE)
    folder = None if is_buffer(path) else set_folder(path)
    distilled = None if folder is None else DistilledSet.load(folder)
    identity = _identity(path) if (path / RUN).is_file() else _told(path, distilled, table)
    curves = _curves(path / "metrics.jsonl")
    held = set() if distilled is None else set(distilled.manifest["files"])
    return Run(
        path,
        identity,
        table,
        curves,
        distilled,
        (folder / PREVIEW).read_bytes() if folder and PREVIEW in held else None,
        _card(folder / CARD) if folder and CARD in held else None,
        {
            "distill": distill_command(path / "config.yaml"),
            "evaluate": evaluate_command(path, table),
        },
    )


def _card(path: Path) -> str:
    """The data card, cut off after as much as anyone reads."""
    with path.open(encoding="utf-8", errors="replace") as file:
        card = file.read(CARD_MAX + 1)
    return card if len(card) <= CARD_MAX else f"{card[:CARD_MAX]}\n[cut off after {CARD_MAX:,} characters]"


def write_page(path: Path, document: str) -> None:
    """Write an HTML document atomically; it replaces another one, no other file (UsageError)."""
    start = document[:15].encode()
    if path.exists() and not (path.is_file() and path.read_bytes()[: len(start)] == start):
        raise UsageError(f"{path} is there and is no page of a report", "Choose another --html FILE")
    files.write_bytes(path, document.encode())


def _told(path: Path, distilled: DistilledSet | None, table: Record | None) -> Record:
    """The identity that a set of no run, or the table of an evaluation whose set is gone, lets one tell."""
    if distilled is None and table is None:
        what = "is an expert buffer, not a run" if is_buffer(path) else "is not a run: it holds no run.json"
        raise ArtefactError(
            f"{path} {what}", "Give a run, a distilled set, or the folder that evaluate was given as out=DIR"
        )
    made = {} if distilled is None else distilled.manifest["provenance"]
    about = {} if distilled is None else distilled.manifest["dataset"]
    dataset = {"name": about.get("name") or (table or {})["dataset"], "shape": about.get("shape", [])}
    dataset |= {"preprocessing": about["preprocessing"]} if "preprocessing" in about else {}
    found = {"dataset": dataset, "matcher": {"type": "not known"}, "budget": None}
    found |= {key: made[key] for key in ("dataset", "matcher", "budget", "seed", "precision") if key in made}
    if not _fits(IDENTITY, found):
        raise ArtefactError(f"{path} is damaged: its provenance tells no matcher", "Make the set again")
    return found


def _identity(path: Path) -> Record:
    marker = path / RUN
    found = read_sealed(marker, RUN_KEYS)
    identity = found.get("identity") if isinstance(found, dict) else None
    checks: dict[str, Check] = {"format": lambda value: value == RUN_FORMAT, "identity": _mapping}
    if not _fits(checks, found) or not _fits(IDENTITY, identity):
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
    if not any(value for _, value in curves.get("skipped", [])):
        curves.pop("skipped", None)  # nothing was, which needs no curve
    return curves


def _table(path: Path) -> Record | None:
    """The newest evaluation, None where there is none."""
    if not path.exists():
        return None
    found = read_sealed(path, TABLE_KEYS)
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


def _maybe(check: Check) -> Check:
    """`check`, or nothing at all."""
    return lambda value: value is None or check(value)


def _named_numbers(value: Any) -> bool:
    return _mapping(value) and all(map(_number, value.values()))


def _typed(value: Any) -> bool:
    """Whether a text is one evaluate command and, pasted into a shell, nothing beside it."""
    try:
        words = shlex.split(value) if _text(value) else []
    except ValueError:
        return False
    return words[:2] == ["ddengine", "evaluate"] and value == shlex.join(words)


SCORED: dict[str, Check] = {name: _maybe(_number) for name in SCORES}
ROW: dict[str, Check] = {
    "name": _text,
    "network": _text,
    "mean": _number,
    "std": _maybe(_number),
    "ci95": lambda value: value is None or (_numbers(value) and len(value) == 2),
    "n": _whole,
    "values": _numbers,
    "lr": _maybe(_number),
    "steps": _whole,
    "bytes": lambda value: _fits({"total": _whole}, value) and all(map(_whole, value.values())),
    "network_spec": _mapping,
    "train_seconds": _maybe(_number),
    "ece": _maybe(_number),
    "worst_class": _maybe(_number),
    "per_class": _maybe(lambda value: type(value) is list and all(v is None or _number(v) for v in value)),
    "robust": _maybe(_named_numbers),
}
TABLE: dict[str, Check] = {
    "dataset": _text,
    "protocol": _text,
    "seed": _whole,
    "recipe": _mapping,
    "rows": lambda value: type(value) is list,
    "cost": _maybe(_mapping),
    "seeds": _maybe(_whole),
    "command": _maybe(_typed),
    "parts": _maybe(lambda value: _mapping(value) and all(map(_whole, value.values()))),
    "untested": _maybe(lambda value: type(value) is list and all(map(_text, value))),
    "protocol_spec": _maybe(_mapping),
    "scores": _maybe(
        lambda value: (
            _fits(SCORED | {"network": _maybe(_text), "components": _maybe(_mapping)}, value)
            and _maybe(_scored_networks)(value.get("networks"))
        )
    ),
}


def _scored_networks(value: Any) -> bool:
    return _mapping(value) and all(_fits(SCORED, scores) for scores in value.values())


TABLE_KEYS = {*TABLE, "source_matches", "fingerprint"}
IDENTITY: dict[str, Check] = {
    "matcher": lambda value: _fits({"type": _text}, value),
    "dataset": lambda value: _fits({"name": _text, "shape": _numbers}, value),
    "budget": lambda value: value is None or _mapping(value),
}

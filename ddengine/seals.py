"""JSON files that bear the SHA-256 of what they say: a reader sees any change that was not meant."""

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ddengine import files
from ddengine.errors import ArtefactError

SEAL = "seal"
REMEDY = "Restore it from a copy or make it again"


def write_sealed(path: Path, value: Mapping[str, Any]) -> None:
    """Replace `path` atomically by the JSON of `value` and its seal."""
    files.write_json(path, {**value, SEAL: _digest(value)})


def read_sealed(path: Path, known: Collection[str]) -> Any:
    """What a JSON file says, without its seal; files from before there were seals have none.

    Raises ArtefactError naming the file for a seal or a text that is not what was written, for a key that
    comes twice, and in an unsealed file for one that is not `known`.
    """
    found = files.read_json(path)
    if type(found) is not dict:
        return found
    if wrong := _changed(path, found) if SEAL in found else _unknown(path, found, known):
        raise ArtefactError(f"{path} is damaged: {wrong}", REMEDY)
    return {key: value for key, value in found.items() if key != SEAL}


def _changed(path: Path, found: Mapping[str, Any]) -> str | None:
    value = {key: kept for key, kept in found.items() if key != SEAL}
    try:
        whole = found[SEAL] == _digest(value) and path.read_bytes() == files.json_bytes(found)
    except (ValueError, RecursionError, OSError) as error:
        return type(error).__name__
    return None if whole else "its text was changed after it was sealed"


def _unknown(path: Path, found: Mapping[str, Any], known: Collection[str]) -> str | None:
    try:
        json.loads(path.read_bytes(), object_pairs_hook=_once)
    except (ValueError, RecursionError, OSError) as error:
        return str(error)
    more = sorted(set(found) - set(known))
    return f"it has the unknown key {more[0]!r}" if more else None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key comes twice")
    return found


def _digest(value: Mapping[str, Any]) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()

"""What a reader of graph files gives, and numbers read from text with errors that name file and row."""

import gzip
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Float64, Int, Int64
from torch import Tensor

from ddengine.errors import UsageError, one_line

EXACT = 2**53  # integers up to here are exact as doubles
COLUMNS_MAX = 256  # label columns of nodes or of edges that the stored form of a synthetic set holds


@dataclass(frozen=True)
class RawGraphs:
    """Graphs as files hold them: labels are any integers, attributes any finite numbers, either may lack.

    `batch` does not decrease and gives each graph a node; messages run from `edge_index[0]` to
    `edge_index[1]`. `y` numbers `classes`, the sorted original labels. `parts` are the graphs of the official
    fit, validation and test part, where there are such parts. `notes` are lines for the user.
    """

    name: str
    edge_index: Int[Tensor, "2 e"]
    batch: Int[Tensor, " n"]
    y: Int[Tensor, " g"]
    classes: tuple[str, ...]
    node_labels: Int[Tensor, "n f"] | None = None
    node_attributes: Float[Tensor, "n a"] | None = None
    edge_labels: Int[Tensor, "e q"] | None = None
    edge_attributes: Float[Tensor, "e b"] | None = None
    parts: tuple[Int[Tensor, " _"], Int[Tensor, " _"], Int[Tensor, " _"]] | None = None
    notes: tuple[str, ...] = ()
    licence: str = ""


def check_columns(name: str, nodes: int, edges: int) -> None:
    """Refuse numbers of label columns that no synthetic set can be stored with (UsageError)."""
    for kind, count in (("node", nodes), ("edge", edges)):
        if count > COLUMNS_MAX:
            raise UsageError(
                f"{name} has {count} {kind} label columns, more than {COLUMNS_MAX}",
                f"Keep {COLUMNS_MAX} or fewer of them",
            )


def check_made_columns(raw: RawGraphs, method: str | None = None) -> None:
    """Refuse too many columns of labels and of what `method` makes of attributes (UsageError).

    "quantile" makes a column of each attribute, "kmeans" one of all of them.
    """
    columns, least = [], []
    for kind in ("node", "edge"):
        labels, attributes = (
            0 if (found := getattr(raw, f"{kind}_{part}")) is None else found.shape[1]
            for part in ("labels", "attributes")
        )
        least.append(labels + min(attributes, 1))
        columns.append(labels + attributes if method == "quantile" else least[-1])
    if max(columns) > COLUMNS_MAX >= max(least):
        kind = "node" if columns[0] >= columns[1] else "edge"
        raise UsageError(
            f"dataset.discretise=quantile makes {max(columns)} {kind} label columns of {raw.name}, "
            f"more than {COLUMNS_MAX}",
            "Give dataset.discretise=kmeans, which makes one column of all attributes",
        )
    check_columns(raw.name, *columns)


def read_numbers(path: Path) -> Float64[np.ndarray, "r c"]:
    """A table of numbers, comma separated with or without spaces; .gz is unpacked.

    Raises UsageError for a file that is missing, unreadable or empty, a field that is no finite number, and
    rows of different length, and names the row.
    """
    table = _table(path, np.float64)
    wrong = np.argwhere(~np.isfinite(table))
    if len(wrong):
        row, column = wrong[0]
        raise UsageError(
            f"{path}: row {row + 1} holds {table[row, column]} in column {column + 1}",
            "Give finite numbers only",
        )
    return table


def read_integers(path: Path) -> Int64[np.ndarray, "r c"]:
    """A table of integers, which may be written as 1.0 (UsageError as `read_numbers`, and for a fraction)."""
    try:
        return _parsed(path, np.int64)
    except (ValueError, DeprecationWarning, OSError, EOFError, zlib.error):
        table = read_numbers(path)  # says what is wrong, or reads integers that are written as floats
    wrong = np.argwhere((table != np.rint(table)) | (np.abs(table) > EXACT))
    if len(wrong):
        row, column = wrong[0]
        raise UsageError(
            f"{path}: row {row + 1} holds {table[row, column]:g} where an integer is needed",
            "Give integers there; real values belong into a file of attributes",
        )
    return table.astype(np.int64)


def read_text(path: Path) -> str:
    """The text of a file, unpacked where its name ends in .gz (UsageError if it cannot be read)."""
    try:
        data = path.read_bytes()
        return (gzip.decompress(data) if path.suffix == ".gz" else data).decode(errors="replace")
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UsageError(
            f"cannot read {path}: {one_line(reason)}",
            "Restore the file as it was published, or give another dataset.root=DIR",
        ) from error


def is_blank(path: Path) -> bool:
    """Whether a file holds white space only, unpacked where its name ends in .gz; False if unreadable."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            return not any(line.strip() for line in file)
    except (OSError, EOFError, zlib.error):
        return False


def require_rows(path: Path, found: int, needed: int, of: Path) -> None:
    """Refuse a file that has not one row for each row or unit of `of` (UsageError)."""
    if found != needed:
        raise UsageError(
            f"{path} has {found} rows where {of.name} makes it {needed}",
            "Restore both files from one source: their rows belong together",
        )


def _parsed(path: Path, kind: type) -> np.ndarray:
    if path.suffix != ".gz" and path.stat().st_size == 0:
        raise ValueError("no data")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # numpy only warns of empty files and of integers written as floats
        try:
            return np.loadtxt(path, dtype=kind, delimiter=",", ndmin=2, comments=None, encoding="utf-8")
        except UserWarning as error:
            raise ValueError(str(error)) from error


def _table(path: Path, kind: type) -> np.ndarray:
    try:
        return _parsed(path, kind)
    except (ValueError, OSError, EOFError, zlib.error) as error:
        raise _located(path, read_text(path), error) from error


def _located(path: Path, text: str, error: Exception) -> UsageError:
    """The error that names the first row which is no row of numbers; `error` is what the parser said."""
    width = 0
    rows = [line for line in text.splitlines() if line.strip()]
    for number, line in enumerate(rows, 1):
        fields = line.split(",")
        bad = next((field for field in fields if not _is_number(field)), None)
        if bad is not None:
            shown = one_line(bad.strip()[:40])
            return UsageError(
                f"{path}: row {number} holds '{shown}', which is no number",
                "Give numbers separated by commas, one row to a line",
            )
        width = width or len(fields)
        if len(fields) != width:
            return UsageError(
                f"{path}: row {number} has {len(fields)} columns, the rows before it have {width}",
                "Give every row the same number of columns",
            )
    cause = "is empty" if not rows else f"cannot be read as numbers: {one_line(error)}"
    return UsageError(f"{path} {cause}", "Restore the file as it was published")


def _is_number(field: str) -> bool:
    try:
        float(field)
    except ValueError:
        return False
    return "_" not in field

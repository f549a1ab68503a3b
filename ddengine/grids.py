"""Small tables of texts and what they are sorted by: as aligned plain text and as Markdown."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ddengine.errors import one_line

Cell = tuple[str, str | float | int]  # what is shown, and what a column is sorted by
ABSENT: Cell = ("-", -1)
MIB = 2**20


@dataclass(frozen=True)
class Grid:
    """Heads and rows of equal length; the first `words` columns hold words, the others numbers."""

    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    words: int = 1

    def text(self) -> str:
        """Aligned plain text: words to the left, numbers to the right; no newline at the end."""
        rows = [self.head, *([one_line(shown) for shown, _ in row] for row in self.rows)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(self.head))]
        lines = ["  ".join(self._padded(row, widths)).rstrip() for row in rows]
        lines.insert(1, "  ".join("-" * width for width in widths))
        return "\n".join(lines)

    def _padded(self, row: Sequence[str], widths: Sequence[int]) -> list[str]:
        padded = enumerate(zip(row, widths, strict=True))
        return [cell.ljust(w) if column < self.words else cell.rjust(w) for column, (cell, w) in padded]

    def markdown(self) -> str:
        """A Markdown table; no newline at the end."""
        rule = [":--"] * self.words + ["--:"] * (len(self.head) - self.words)
        rows = (self.head, rule, *([shown for shown, _ in row] for row in self.rows))
        return "\n".join(map(markdown_row, rows))


def markdown_row(row: Sequence[str]) -> str:
    """One row of a Markdown table, whatever its cells hold."""
    return "| " + " | ".join(literal(cell).replace("|", "\\|") for cell in row) + " |"


def literal(text: str) -> str:
    """Text from a file on one line, with nothing in it that Markdown takes for HTML, a link or a picture."""
    plain = one_line(text).replace("\\", "\\\\").replace("[", "\\[").replace("`", "\\`")
    return plain.replace("&", "&amp;").replace("<", "&lt;")


def word(value: Any) -> Cell:
    """A cell of words."""
    return str(value), str(value)


def number(value: Any, spelled: str = ",", unit: float | int = 1) -> Cell:
    """A finite number in units of `unit` as the format `spelled` says; a dash for anything else."""
    if type(value) not in (int, float) or not math.isfinite(value):
        return ABSENT
    return format(value if unit == 1 else value / unit, spelled), value


def percent(fraction: Any) -> Cell:
    """A fraction in percent with one decimal."""
    return number(fraction, ".1f", 0.01)

"""What the report's tables are made of: rows and columns of plain text, and how a number reads in a cell."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

NO_VALUE = "\u2013"  # a dash


@dataclass(frozen=True)
class Row:
    """One line of a table; a ``heading`` line opens a block and has only its first cell. ``values``: what a cell sorts
    by where that is not its text; ``run``: whose line it is, -1 for nobody's.
    """

    cells: tuple[str, ...]
    heading: bool = False
    values: tuple[float | None, ...] = ()
    run: int = -1

    def only(self, kept: Sequence[int]) -> "Row":
        """The line without the other columns; call it where every cell has its entry in ``values``."""
        return replace(self, cells=tuple(self.cells[i] for i in kept), values=tuple(self.values[i] for i in kept))


@dataclass(frozen=True)
class Table:
    """``kind`` picks the look: "runs" has a column per run, "numbers" aligns right, "words" left.

    ``noun`` says what its rows are and makes them sortable; readers may choose among the values of columns ``choose``.
    ``brief`` are the rows of the Markdown twin, which is read in a pull request, where they are fewer.
    """

    title: str
    head: tuple[str, ...]
    rows: tuple[Row, ...]
    kind: str = "numbers"
    note: str = ""
    noun: str = ""
    choose: tuple[int, ...] = ()
    brief: tuple[Row, ...] | None = None


def percent(value: float) -> str:
    """``percent(0.041)`` -> ``"4.1%"``."""
    if not math.isfinite(value):
        return NO_VALUE
    digits = 0 if value == 0 or abs(value) >= 0.995 else 1
    return f"{value:.{digits}%}".replace("-", "\u2212")


def duration(seconds: float) -> str:
    """Two units at most: ``0.034 s``, ``12.5 s``, ``3 min 20 s``, ``5 h 07 min``, ``2 d 03 h``."""
    if not math.isfinite(seconds):
        return NO_VALUE
    if seconds < 60:
        return f"{seconds:.3f} s" if seconds < 1 else f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600:02d} h"


def with_content(tables: Sequence[Table | None]) -> list[Table]:
    """The tables that have something to show."""
    return [table for table in tables if table is not None and (table.rows or table.note)]

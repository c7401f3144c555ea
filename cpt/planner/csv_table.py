"""A CSV file of numbers as people and spreadsheets save it: columns by name, every faulty cell with its line.

Owns decoding and parsing: a byte-order mark, ``;`` or tabs as separator, decimal commas beside ``;``. Refuses what is
no table: an empty or huge file, zero bytes, text that is not UTF-8. What the columns mean is the caller's.
"""

import csv
import io
import math
from pathlib import Path

import numpy as np

from cpt.planner.fitting import FloatArray
from cpt.rundir import DataError

MAX_BYTES = 256 * 2**20


def read_bytes(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise DataError(f"{path}: {path.stat().st_size} bytes is no table of pilot runs (at most {MAX_BYTES})")
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}); give the CSV that `cpt plan pilots` wrote"
        ) from None
    if not raw.strip():
        raise DataError(f"{path}: is empty; it needs a header and rows, see `cpt plan pilots --help`")
    return raw


def split_rows(path: Path, raw: bytes) -> tuple[list[str], list[list[str]]]:
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not UTF-8; save the table as CSV UTF-8") from None
    if not text.strip():
        raise DataError(f"{path}: is empty; it needs a header and rows")
    if "\0" in text:
        raise DataError(f"{path}: holds zero bytes; it is not a CSV file")
    first = text.splitlines()[0]
    delimiter = ";" if first.count(";") > first.count(",") else "\t" if "\t" in first else ","
    try:
        rows = list(csv.reader(io.StringIO("\n".join(text.splitlines())), delimiter=delimiter))
    except csv.Error as error:
        raise DataError(f"{path}: is no CSV ({error}); write one row of plain numbers per line") from None
    header = [name.strip().lower() for name in rows[0]]
    if delimiter == ";":  # the separator of locales that write a decimal comma
        rows = [[cell.replace(",", ".") for cell in row] for row in rows]
    return header, rows


class Table:
    """Cells by column name, with the file's line numbers; faults are appended to ``problems``."""

    def __init__(self, header: list[str], rows: list[list[str]], problems: list[str]) -> None:
        numbered = [(line, row) for line, row in enumerate(rows[1:], start=2) if any(cell.strip() for cell in row)]
        for line, row in numbered:
            if len(row) != len(header):
                problems.append(f"line {line}: {len(row)} cells, the header has {len(header)}; is the file cut short?")
        if not numbered:
            problems.append("it has a header but no rows")
        self.lines = [line for line, _ in numbered]
        self._columns = {
            name: [row[i].strip() if i < len(row) else "" for _, row in numbered] for i, name in enumerate(header)
        }
        self._problems = problems

    def texts(self, name: str, *, required: bool = False) -> tuple[str, ...]:
        values = self._columns.get(name, [""] * len(self.lines))
        if required:
            self._problems += [f"line {n}: {name} is empty" for n, v in zip(self.lines, values, strict=True) if not v]
        return tuple(values)

    def numbers(
        self, name: str, *, low: float = -math.inf, high: float = math.inf, required: bool = False
    ) -> FloatArray:
        values = self._columns.get(name, [""] * len(self.lines))
        return np.array(
            [
                self._number(name, line, value, (low, high, required))
                for line, value in zip(self.lines, values, strict=True)
            ]
        )

    def _number(self, name: str, line: int, text: str, rule: tuple[float, float, bool]) -> float:
        low, high, required = rule
        if not text:
            if required:
                self.problem(line, f"{name} is empty")
            return math.nan
        try:
            value = float(text.replace("_", ""))
        except ValueError:
            self.problem(line, f"{name} is {text!r:.60}, not a number")
            return math.nan
        if not math.isfinite(value):
            self.problem(line, f"{name} is {text}; leave the row out (a pilot that diverged) or measure it again")
        elif not low <= value <= high:
            limits = f"between {low:g} and {high:g}" if math.isfinite(high) else f"at least {low:g}"
            self.problem(line, f"{name} is {text}; it must be {limits}")
        return value

    def problem(self, line: int, told: str) -> None:
        self._problems.append(f"line {line}: {told}")

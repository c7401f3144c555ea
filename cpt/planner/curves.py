"""Measured loss curves and learning-rate schedules: CSV files read, checked, and turned into one rate per step.

A curve has columns ``step, lr, loss``, a schedule ``step, lr``; both may list some steps only. The rate of every step
follows from the rows by three rules:

* before the first row the rate warms up linearly from 0 at step 0;
* between two rows it is interpolated linearly,
* except where it is level before and after: then it drops (or jumps) at the later row, in one step.

Owns these rules and the messages about faulty files. Refuses to know any law.
"""

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cpt.planner.fitting import FloatArray
from cpt.rundir import DataError

IntArray = NDArray[np.int64]

MIN_CURVE_ROWS = 8
MAX_STEPS = 20_000_000  # one rate per step is held in memory
LEVEL = 1e-3  # a change by less than this part of the larger rate is no change


@dataclass(frozen=True)
class LossCurve:
    """A measured run: ``losses`` (n,) in nats at ``steps`` (n,), increasing, and ``rates`` (T,), one for each step from
    0 on. ``warmup_end``: the step up to which the rate only rises."""

    name: str
    steps: IntArray
    losses: FloatArray
    rates: FloatArray
    warmup_end: int


@dataclass(frozen=True)
class Schedule:
    """``rates`` (T,) and ``warmup_end`` as in a curve; ``steps`` (n,): the rows of its file."""

    name: str
    steps: IntArray
    rates: FloatArray
    warmup_end: int


def read_curve(path: Path, warmup_steps: int | None = None) -> LossCurve:
    """A curve file. ``warmup_steps``: where the warm-up ended, when that was before the first row.

    Raises:
        DataError: the file is missing, not a table, lacks a column, or holds a row that cannot be.
    """
    table = _read_columns(path, ("step", "lr", "loss"))
    steps, lr = _checked_rows(path, table)
    losses = table.values["loss"]
    _refuse_first(path, table, losses <= 0, "loss", "must be above 0", "write nats per token")
    if len(steps) < MIN_CURVE_ROWS:
        raise DataError(f"{path}: {len(steps)} rows; a curve needs at least {MIN_CURVE_ROWS}, write more of its steps")
    if not lr.any():
        raise DataError(f"{path}: every lr is 0; nothing was learnt, write the rates that the run used")
    rates = rates_of(steps, lr, warmup_steps)
    return LossCurve(path.stem, steps, losses, rates, rise_end(rates))


def read_schedule(path: Path, warmup_steps: int | None = None) -> Schedule:
    """A schedule file.

    Raises:
        DataError: as for :func:`read_curve`.
    """
    table = _read_columns(path, ("step", "lr"))
    steps, lr = _checked_rows(path, table)
    if len(steps) < 2:
        raise DataError(f"{path}: {len(steps)} row; a schedule needs at least its first and last step")
    if not lr.any():
        raise DataError(f"{path}: every lr is 0; nothing would be learnt, write the rates of the run")
    rates = rates_of(steps, lr, warmup_steps)
    return Schedule(path.stem, steps, rates, rise_end(rates))


def rates_of(steps: IntArray, lr: FloatArray, warmup_steps: int | None = None) -> FloatArray:
    """One rate per step, 0 to the last row's, by the rules in the module's docstring. A warm-up that ended before the
    first row ended at ``warmup_steps``; a first row inside the warm-up overrules it."""
    last, first = int(steps[-1]), int(steps[0])
    end = first if warmup_steps is None else min(warmup_steps, first)
    rates = np.interp(np.arange(last + 1), steps, lr)
    if end:
        rates[: end + 1] = lr[0] * np.arange(end + 1) / end
    for gap in np.flatnonzero(_jumps(lr)):
        rates[steps[gap] : steps[gap + 1]] = lr[gap]
    return rates


def rise_end(rates: FloatArray) -> int:
    """The step up to which the rate only rises: the end of the warm-up, 0 where there is none."""
    falls = np.flatnonzero(np.diff(rates) <= 0)
    return int(falls[0]) if len(falls) else len(rates) - 1


def thinned(steps: IntArray, losses: FloatArray, rows: int) -> tuple[IntArray, FloatArray]:
    """At most ``rows`` points of a curve; where there are more, neighbours are averaged."""
    size = -(-len(steps) // rows)
    whole = len(steps) // size * size
    return steps[:whole].reshape(-1, size)[:, size // 2], losses[:whole].reshape(-1, size).mean(axis=1)


def _jumps(lr: FloatArray) -> NDArray[np.bool_]:
    """(n-1,) gaps between rows over which the rate changes while it is level in both neighbouring gaps."""
    changed = np.abs(np.diff(lr)) > LEVEL * np.maximum(lr[1:], lr[:-1])
    jump = np.zeros(len(changed), dtype=np.bool_)
    jump[1:-1] = changed[1:-1] & ~changed[:-2] & ~changed[2:]
    return jump


@dataclass(frozen=True)
class _Columns:
    lines: list[int]
    values: dict[str, FloatArray]


def _read_columns(path: Path, names: Sequence[str]) -> _Columns:
    header, rows = _read_rows(path)
    places = [_place(path, header, name) for name in names]
    values = [[_cell(f"{path}:{line}", row, at, n) for at, n in zip(places, names, strict=True)] for line, row in rows]
    columns = np.array(values, dtype=np.float64).reshape(len(values), len(names)).T
    return _Columns(
        [line for line, _ in rows],
        {name: np.ascontiguousarray(column) for name, column in zip(names, columns, strict=True)},
    )


def _read_rows(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """The header, and each row that is not blank with its line; separated by commas or semicolons."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}; name a CSV file") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text (byte {error.start}); save it as CSV in UTF-8") from error
    if "\0" in text:
        raise DataError(f"{path}: holds a zero byte; save it as CSV in UTF-8")
    first = text.partition("\n")[0]
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=";" if ";" in first and "," not in first else ",")
    try:
        header = [cell.strip().lower() for cell in next(reader, [])]
        return header, [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: is not CSV: {error}; one row per line, without quotes") from error


def _place(path: Path, header: list[str], name: str) -> int:
    if header.count(name) != 1:
        found = ", ".join(header) if any(header) else "nothing"
        what = "is missing" if name not in header else "stands there twice"
        raise DataError(
            f"{path}: column {name!r} {what}; its first line has {found}, it needs step, lr and, for a "
            "measured curve, loss"
        )
    return header.index(name)


def _cell(where: str, row: list[str], place: int, name: str) -> float:
    text = row[place].strip() if place < len(row) else ""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise DataError(
            f"{where}: {name} = {text!r} is not a finite number; write it with a decimal point, or drop the row"
        )
    return value


def _checked_rows(path: Path, table: _Columns) -> tuple[IntArray, FloatArray]:
    step, lr = table.values["step"], table.values["lr"]
    if not len(step):
        raise DataError(f"{path}: has no rows below its first line; write the run's steps")
    whole = (step >= 0) & (step == np.floor(step))
    _refuse_first(path, table, ~whole, "step", "must be a whole number from 0 on", "count optimizer steps")
    _refuse_first(path, table, step > MAX_STEPS, "step", f"is above {MAX_STEPS:,}", "count optimizer steps")
    _refuse_first(path, table, lr < 0, "lr", "must not be negative", "write the rate that the step used")
    back = np.concatenate([[False], np.diff(step) <= 0])
    _refuse_first(path, table, back, "step", "does not come after the row before", "sort by step, each step once")
    return step.astype(np.int64), lr


def _refuse_first(path: Path, table: _Columns, wrong: NDArray[np.bool_], name: str, rule: str, fix: str) -> None:
    if wrong.any():
        at = int(np.argmax(wrong))
        raise DataError(f"{path}:{table.lines[at]}: {name} = {table.values[name][at]:g} {rule}; {fix}")

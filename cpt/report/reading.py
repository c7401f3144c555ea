"""Tolerant reading of JSON and JSON lines: what cannot be read is left out and said in words."""

import json
import math
from pathlib import Path
from typing import Any

import orjson

Record = dict[str, Any]


def read_object(path: Path, warnings: list[str]) -> Record:
    if not path.exists():
        warnings.append(f"{path.name} is missing.")
        return {}
    value = load_object(path)
    if value is None:
        warnings.append(f"{path.name} is not a JSON object and was left out.")
    return value or {}


def load_object(path: Path) -> Record | None:
    """The JSON object in a file; None also for a folder, and for a file that is gone since it was listed."""
    try:
        return parse_object(path.read_bytes())
    except OSError:
        return None


def parse_object(raw: bytes) -> Record | None:
    """One JSON object, None for anything else; the second parser is there because it knows NaN."""
    try:
        value = orjson.loads(raw)
    except ValueError:
        try:
            value = json.loads(raw)
        except (ValueError, RecursionError):
            return None
    return value if isinstance(value, dict) else None


def read_lines(path: Path, warnings: list[str]) -> list[Record]:
    if not path.exists():
        warnings.append(f"{path.name} is missing.")
        return []
    raw = path.read_bytes()
    numbered = [(place, line) for place, line in enumerate(raw.split(b"\n"), start=1) if line.strip()]
    parsed = [(place, parse_object(line)) for place, line in numbered]
    bad = [place for place, record in parsed if record is None]
    if bad and bad[-1] == numbered[-1][0] and not raw.endswith(b"\n"):
        warnings.append(
            f"{path.name}: the last line ({bad.pop()}) is cut off and was left out; the run was stopped "
            "while writing it."
        )
    if bad:
        shown = ", ".join(map(str, bad[:5])) + (", …" if len(bad) > 5 else "")
        warnings.append(
            f"{path.name}: {count(len(bad), 'line')} cannot be read and {'was' if len(bad) == 1 else 'were'} "
            f"left out (line {shown})."
        )
    return [record for _, record in parsed if record is not None]


def count(amount: int, noun: str) -> str:
    """``count(2, "line")`` -> ``"2 lines"``."""
    return f"{amount:,} {noun}{'' if amount == 1 else 's'}"


def number(value: Any) -> float:
    """NaN for whatever is no number, and for an integer beyond all floats."""
    try:
        return float(value) if isinstance(value, int | float) else math.nan
    except OverflowError:
        return math.nan

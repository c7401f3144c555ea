"""Draws the pictures of docs/concepts.md from the code they explain; same code, same bytes.

    python docs/images/make_images.py       # rewrites schedules.svg and packing.svg beside this file

The picture of the report is a screenshot and not made here.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter

from cpt.data.packing import IGNORE_INDEX, PackedRow, concat_row
from cpt.schedule_fields import Schedule
from cpt.train.schedules import build_schedule

HERE = Path(__file__).parent
INK, SOFT, GRID, PAGE = "#1d2330", "#646e80", "#d5d9e0", "#ffffff"
LINE, FIRST, SECOND = "#0068b0", "#dbe9f6", "#fbe7c6"

STEPS = 1000
# Settings that make each shape visible; the infinite ones are those of arXiv 2403.08763.
SCHEDULES: tuple[dict[str, Any], ...] = (
    {"name": "rewarm_cosine", "warmup_steps": 50},
    {"name": "constant", "warmup_steps": 50},
    {"name": "linear_to_zero", "warmup_steps": 50},
    {"name": "wsd", "warmup_steps": 50, "decay_steps": 200},
    {"name": "infinite_cosine", "warmup_steps": 50, "cooldown_steps": 400, "constant_steps": 400},
    {"name": "infinite_inv_sqrt", "warmup_steps": 50, "cooldown_steps": 400, "constant_steps": 400},
)
PANEL_WIDTH, PANEL_HEIGHT, COLUMNS = 250, 130, 3
MARGIN_LEFT, MARGIN_TOP, GAP_X, GAP_Y = 40, 34, 30, 52


def svg(width: int, height: int, label: str, body: Sequence[str]) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="{label}" font-family="sans-serif" font-size="13">'
    )
    return "\n".join([head, f'<rect width="{width}" height="{height}" fill="{PAGE}"/>', *body, "</svg>"]) + "\n"


def text(x: float, y: float, content: str, *, fill: str = INK, anchor: str = "start") -> str:
    return f'<text x="{x:g}" y="{y:g}" fill="{fill}" text-anchor="{anchor}">{content}</text>'


def rule(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<path d="M{x1:g} {y1:g}L{x2:g} {y2:g}" stroke="{GRID}"/>'


def curve(fields: dict[str, Any]) -> list[float]:
    """The multiplier of the peak rate at updates 1 to STEPS."""
    schedule: Schedule = TypeAdapter(Schedule).validate_python(fields)
    scale = build_schedule(schedule, total_steps=STEPS)
    return [scale(n) for n in range(1, STEPS + 1)]


def panel(fields: dict[str, Any], left: int, top: int) -> Iterator[str]:
    bottom, right = top + PANEL_HEIGHT, left + PANEL_WIDTH
    yield text(left, top - 10, fields["name"])
    for share in (0.0, 0.5, 1.0):
        y = bottom - share * PANEL_HEIGHT
        yield rule(left, y, right, y)
        yield text(left - 6, y + 4, f"{share:g}", fill=SOFT, anchor="end")
    values = curve(fields)
    points = [
        f"{left + n / STEPS * PANEL_WIDTH:.1f},{bottom - values[n - 1] * PANEL_HEIGHT:.1f}"
        for n in range(1, STEPS + 1)
        if n % 5 == 0 or n == 1
    ]
    yield f'<polyline points="{" ".join(points)}" fill="none" stroke="{LINE}" stroke-width="2"/>'
    yield text(left, bottom + 18, "1", fill=SOFT)
    yield text(right, bottom + 18, f"{STEPS} updates", fill=SOFT, anchor="end")


def schedules_svg() -> str:
    body = []
    for number, fields in enumerate(SCHEDULES):
        row, column = divmod(number, COLUMNS)
        left = MARGIN_LEFT + column * (PANEL_WIDTH + GAP_X)
        body += panel(fields, left, MARGIN_TOP + row * (PANEL_HEIGHT + GAP_Y))
    width = MARGIN_LEFT + COLUMNS * (PANEL_WIDTH + GAP_X)
    height = MARGIN_TOP + len(SCHEDULES) // COLUMNS * (PANEL_HEIGHT + GAP_Y)
    return svg(width, height, "learning rate over peak rate, for the six schedules", body)


class Letters:
    """Documents ``abc#``, ``de#`` and ``fghij#`` as a token store whose ids are character codes."""

    stream = "abc#de#fghij#"
    num_tokens = len(stream)

    def read(self, start: int, stop: int) -> NDArray[np.int64]:
        return np.array([ord(letter) for letter in self.stream[start:stop]], dtype=np.int64)

    def document_starts(self, start: int, stop: int) -> NDArray[np.int64]:
        starts = [p for p in range(start, stop) if p == 0 or self.stream[p - 1] == "#"]
        return np.array(starts, dtype=np.int64)


CELL, LABEL_WIDTH, ROW_GAP = 36, 96, 34


def packed_cells(row: PackedRow, left: int, top: int) -> Iterator[str]:
    labels = ["·" if label == IGNORE_INDEX else chr(label) for label in row.labels.tolist()]
    lines = (
        ("input_ids", [chr(token) for token in row.input_ids.tolist()]),
        ("labels", labels),
        ("positions", [str(position) for position in row.positions.tolist()]),
        ("segments", [str(segment) for segment in row.segments.tolist()]),
    )
    for index, (name, cells) in enumerate(lines):
        y = top + index * CELL
        yield text(left - 10, y + CELL / 2 + 5, name, fill=SOFT, anchor="end")
        for t, cell in enumerate(cells):
            fill = SECOND if row.segments[t] % 2 else FIRST
            x = left + t * CELL
            yield f'<rect x="{x}" y="{y}" width="{CELL}" height="{CELL}" fill="{fill}" stroke="{PAGE}"/>'
            yield text(x + CELL / 2, y + CELL / 2 + 5, cell, anchor="middle")


def packing_svg() -> str:
    body: list[str] = []
    width_of_row = 6 * CELL
    for number in range(2):
        left = LABEL_WIDTH + number * (width_of_row + LABEL_WIDTH + ROW_GAP)
        body.append(text(left, 22, f"row {number}"))
        body += packed_cells(concat_row(Letters(), number, 6), left, 34)
    width = 2 * (LABEL_WIDTH + width_of_row) + 2 * ROW_GAP
    return svg(width, 34 + 4 * CELL + 14, "three documents packed into two rows of six tokens", body)


PICTURES = {"schedules.svg": schedules_svg, "packing.svg": packing_svg}


def main() -> None:
    for name, draw in PICTURES.items():
        (HERE / name).write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    main()

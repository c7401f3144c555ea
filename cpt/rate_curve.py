"""The learning rate of a whole run, shown before it is trained: a picture, and a table of the points where it turns.

Owns the facts of ``cpt extend`` about rates and how they are drawn. Refuses to know why a run has this curve: it asks
``cpt.train.schedules`` for the rate of each update, which is what the trainer asks too.
"""

from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cpt import schedule_fields as fields
from cpt.planner.wording import Facts, amount
from cpt.run_fields import TrainSection
from cpt.train.schedules import RateSegment, learning_rates, rate_segments, warmup_steps

COLUMNS, ROWS = 66, 8
BARS = " ▁▂▃▄▅▆▇█"
LEAP = 0.1  # of the highest rate; more than that from one update to the next is called a jump


def curve_facts(train: TrainSection, *, total_steps: int) -> dict[str, Any]:
    """Rates of ``COLUMNS`` updates, evenly spaced, and of the updates where the curve turns."""
    rate = learning_rates(train, total_steps=total_steps)
    segments = rate_segments(train, total_steps=total_steps)
    count = min(COLUMNS, total_steps)
    shown = [max(1, round(total_steps * (i + 1) / count)) for i in range(count)]
    corners = [corner for segment in segments for corner in _corners(segment)]
    return {
        "steps": total_steps,
        "step_tokens": train.global_batch_tokens,
        "extended_at": [segment.start for segment in segments[1:]],
        "curve": [{"step": step, "lr": rate(step)} for step in shown],
        "corners": [{"step": step, "lr": rate(step), "what": what} for step, what in corners],
    }


def jump(train: TrainSection, *, total_steps: int, step: int) -> tuple[float, float] | None:
    """The rates of update ``step`` and of the next one, where they lie further apart than a curve without a leap."""
    rate = learning_rates(train, total_steps=total_steps)
    before, after = rate(step), rate(step + 1)
    highest = max(segment.peak_lr for segment in rate_segments(train, total_steps=total_steps))
    return (before, after) if abs(after - before) > LEAP * highest else None


def _corners(segment: RateSegment) -> list[tuple[int, str]]:
    """(number of the update, what happens there), in order, each update once."""
    total, schedule = segment.total, segment.schedule
    warmup = warmup_steps(schedule, total)
    turns = [(1, "first update" if not segment.start else "first update after the extension")]
    turns += [(warmup, "peak, warm-up ends")] if warmup else []
    if isinstance(schedule, fields.WarmupStableDecay):
        turns.append((total - schedule.decay_steps, "decay begins"))
    if isinstance(schedule, fields.Infinite):
        plateau = warmup + schedule.cooldown_steps
        turns += [(plateau, "plateau begins"), (plateau + schedule.constant_steps, "anneal begins")]
    end = segment.end - segment.start
    turns.append((end, "end" if end == total else "extended before its end"))
    found: dict[int, list[str]] = {}
    for n, what in turns:
        if 0 < n <= end:
            found.setdefault(n, []).append(what)
    return [(segment.start + n, "; ".join(what)) for n, what in sorted(found.items())]


def render_curve(facts: Facts) -> RenderableType:
    """The picture, dim where it is trained already, over the table of its corners."""
    rates = [point["lr"] for point in facts["curve"]]
    since = facts["extended_at"][-1] if facts["extended_at"] else 0
    trained = sum(point["step"] <= since for point in facts["curve"])
    table = Table()
    for column in ("step", "tokens", "learning rate"):
        table.add_column(column, justify="right")
    table.add_column("")
    for corner in facts["corners"]:
        tokens = amount(corner["step"] * facts["step_tokens"])
        table.add_row(f"{corner['step']:,}", tokens, f"{corner['lr']:.3e}", corner["what"])
    return Group(*_picture(rates, trained), table)


def _picture(rates: Sequence[float], trained: int) -> list[Text]:
    """Columns of eighths of a cell, ``ROWS`` cells high; the highest rate fills them."""
    highest = max(rates)
    heights = [round(8 * ROWS * rate / highest) for rate in rates]
    lines = []
    for row in reversed(range(ROWS)):
        cells = "".join(BARS[max(0, min(8, height - 8 * row))] for height in heights)
        label = f"{highest:9.2e} ┤" if row == ROWS - 1 else f"{0:9.2e} ┤" if row == 0 else " " * 10 + "│"
        lines.append(Text.assemble(label, (cells[:trained], "dim"), (cells[trained:], "bold")))
    mark = " " * 11 + "─" * trained + "┴" + "─" * (len(rates) - trained) if trained else " " * 11 + "─" * len(rates)
    words = f"{'trained':<{trained}} to come" if trained else ""
    return [*lines, Text(mark), *([Text(" " * 11 + words)] if words else [])]

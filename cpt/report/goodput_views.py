"""Goodput in the report: a table of attempts per run, a bar of its wall time, and the numbers for ``--json``."""

from collections.abc import Sequence
from typing import Any

from cpt.report.bars import Bar, Part, stacked_bars
from cpt.report.cells import NO_VALUE, Row, Table, duration, percent
from cpt.report.goodput import CAUSES, Goodput
from cpt.report.plots import Chart
from cpt.report.reading import count
from cpt.report.summary import Summary, plain

WORDS = {
    "training": "steps that counted",
    "undone": "steps undone",
    "start_up": "start-up",
    "checkpoint": "checkpoints",
    "evaluation": "evaluations",
    "interrupted": "interrupted",
    "other": "other",
}
PARTS = {
    "training": Part(WORDS["training"], "run2"),
    "undone": Part(WORDS["undone"], "run1", hatched=True),
    "start_up": Part(WORDS["start_up"], "run3"),
    "checkpoint": Part(WORDS["checkpoint"], "run4"),
    "evaluation": Part(WORDS["evaluation"], "run4", 0.5),
    "interrupted": Part(WORDS["interrupted"], "ink", hatched=True),
    "other": Part(WORDS["other"], "soft", 0.35),
}
MAX_TOLD = 4  # runs whose goodput is told in words under the figure; the tables have all


def goodput_table(item: Summary) -> Table | None:
    """One line per start of the run, and their sum; None where no time is known."""
    found = item.run.goodput
    if not found.wall_seconds:
        return None
    rows = [
        Row(
            (
                str(number),
                f"{each.first_step:,} to {each.last_step:,}",
                NO_VALUE if each.processes is None else str(each.processes),
                each.ended,
                *(duration(each.seconds[cause]) for cause in CAUSES),
            )
        )
        for number, each in enumerate(found.attempts, start=1)
    ]
    total = found.seconds
    rows.append(Row(("Share", "", "", "", *(percent(total[cause] / found.wall_seconds) for cause in CAUSES))))
    head = ("Start", "Steps", "Processes", "Ended", *(WORDS[cause].capitalize() for cause in CAUSES))
    return Table(f"Goodput: {item.label}", head, tuple(rows), note=in_words(found))


def in_words(found: Goodput) -> str:
    """``97.2% of 5 h 07 min of wall time went into steps that counted; 2 interruptions ...``."""
    spent = f"{percent(found.fraction)} of {duration(found.wall_seconds)} of wall time went into steps that counted"
    troubles = [
        f"{count(found.interruptions, 'interruption')} (the longest {duration(found.longest_gap)})"
        if found.interruptions
        else "",
        count(found.rollbacks, "rollback") if found.rollbacks else "",
        f"{count(found.steps_repeated, 'step')} repeated" if found.steps_repeated else "",
    ]
    return f"{spent}; {', '.join(filter(None, troubles)) or 'no interruption'}."


def goodput_chart(runs: Sequence[Summary]) -> Chart | None:
    """A stacked bar per run: the shares of its wall time."""
    drawn = [item for item in runs if item.run.goodput.wall_seconds]
    if not drawn:
        return None
    bars = []
    for item in drawn:
        found = item.run.goodput
        shares = {cause: found.seconds[cause] / found.wall_seconds for cause in CAUSES}
        bars.append(Bar(item.label, shares, note=duration(found.wall_seconds)))
    parts = {cause: part for cause, part in PARTS.items() if any(bar.shares[cause] > 0 for bar in bars)}
    title = "Goodput: what the wall time went into"
    told = " ".join(f"{item.label}: {in_words(item.run.goodput)}" for item in drawn[:MAX_TOLD])
    caption = f"Hatched: paid for twice, or for nothing. At the right: wall time. {told}"
    return Chart("goodput", title, caption, stacked_bars("goodput", title, parts, bars))


def goodput_data(found: Goodput) -> dict[str, Any]:
    """For ``--json``: seconds, steps, and the share of the wall time that counted."""
    return {
        "fraction": plain(found.fraction),
        "wall_seconds": found.wall_seconds,
        "seconds": found.seconds,
        "interruptions": found.interruptions,
        "rollbacks": found.rollbacks,
        "steps_repeated": found.steps_repeated,
        "longest_gap_seconds": found.longest_gap,
        "attempts": [
            {
                "first_step": each.first_step,
                "last_step": each.last_step,
                "processes": each.processes,
                "ended": each.ended,
                "seconds": dict(each.seconds),
            }
            for each in found.attempts
        ],
    }

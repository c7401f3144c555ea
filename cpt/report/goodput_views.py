"""Goodput in the report: a table of attempts per run, a bar of its wall time, and the numbers for ``--json``."""

from collections.abc import Sequence
from typing import Any

from matplotlib.ticker import PercentFormatter

from cpt.report.drawing import Chart, blank, ink, run_colour, short, to_chart, write_beside
from cpt.report.goodput import CAUSES, Goodput
from cpt.report.reading import count
from cpt.report.summary import Summary, plain
from cpt.report.tables import NO_VALUE, Row, Table, duration, percent

WORDS = {
    "training": "steps that counted",
    "undone": "steps undone",
    "start_up": "start-up",
    "checkpoint": "checkpoints",
    "evaluation": "evaluations",
    "interrupted": "interrupted",
    "other": "other",
}
SHADES = {"training": 1.0, "undone": 0.25, "start_up": 0.7, "checkpoint": 0.55, "evaluation": 0.4, "interrupted": 0.25}


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
    drawn = [(index, item) for index, item in enumerate(runs) if item.run.goodput.wall_seconds]
    if not drawn:
        return None
    figure, axes = blank("share of the wall time", "", height=95.0 + 34.0 * len(drawn), grid="x")
    for place, (index, item) in enumerate(drawn):
        found, left = item.run.goodput, 0.0
        for cause in CAUSES:
            width = found.seconds[cause] / found.wall_seconds
            hatch = "////" if cause in ("undone", "interrupted") else None  # what nobody wants to pay for
            axes.barh(
                place,
                width,
                left=left,
                height=0.62,
                color=run_colour(index) if cause != "other" else ink("grid"),
                alpha=SHADES.get(cause, 1.0),
                hatch=hatch,
                edgecolor=ink("page"),
                linewidth=0.6,
            )
            left += width
        inside = {"colour": ink("page"), "offset": (6, 0), "level": "center", "bold": True}
        write_beside(axes, (0.0, place), percent(found.fraction), **inside)
    axes.set_yticks(range(len(drawn)), [short(item.label) for _, item in drawn], parse_math=False)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    caption = (
        f"From the left: {', '.join(WORDS[cause] for cause in CAUSES)}. Hatched: paid for twice, or for nothing. "
        f"{' '.join(f'{item.label}: {in_words(item.run.goodput)}' for _, item in drawn)}"
    )
    return to_chart("goodput", "Goodput: what the wall time went into", caption, figure)


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

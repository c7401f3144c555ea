"""What happened to a run while it trained, as marks on its curves: a letter each, told in words below the figure."""

from collections.abc import Sequence

import numpy as np

from cpt.report.collect import Event
from cpt.report.plots import FloatArray, Mark, finite_points
from cpt.report.summary import Summary

LETTERS = {
    "spike": ("!", "loss spike"),
    "rollback": ("R", "rollback by the guard"),
    "guard_stop": ("G", "the guard ended the run"),
    "hang": ("H", "hang"),
    "resume": ("S", "started again"),
    "mix_changed": ("M", "mixture changed"),
    "extended": ("E", "extended"),
}
MAX_MARKS = 40  # the last ones of each run; the table of events has more


def event_marks(runs: Sequence[Summary]) -> tuple[Mark, ...]:
    """Of every run's events those that have a letter, at the tokens of their step."""
    found: list[Mark] = []
    for index, item in enumerate(runs):
        known = finite_points(item.run.metrics.scalars["step"], item.run.metrics.tokens)
        events = [event for event in item.run.events if event.kind in LETTERS and event.step is not None]
        if len(known) and events:
            found += [_mark(index, item.label, event, known) for event in events[-MAX_MARKS:]]
    return tuple(found)


def told_marks(marks: Sequence[Mark]) -> str:
    """`` Marked: R rollback by the guard, S started again.``; nothing without marks."""
    shown = {mark.symbol for mark in marks}
    told = ", ".join(f"{letter} {words}" for letter, words in LETTERS.values() if letter in shown)
    return f" Marked: {told}." if told else ""


def _mark(run: int, label: str, event: Event, known: FloatArray) -> Mark:
    letter, words = LETTERS[event.kind]
    text = f"{label}: {words}, step {event.step:,}"
    if isinstance(to := event.details.get("to"), int):
        text += f", back to step {to:,}"
    if reasons := event.details.get("reasons"):
        text += f" ({', '.join(map(str, reasons)) if isinstance(reasons, list) else reasons})"
    return Mark(run, float(np.interp(event.step or 0, known[:, 0], known[:, 1])), letter, text[:200])

"""Where the wall time of a run went, from its first start to its last word: steps that counted, and everything else.

From events.jsonl and metrics.jsonl, lines as they were written. Both carry wall-clock time, which may jump: a step
backwards counts as no time at all, never as a negative one, and a start that took longer than its gap as the gap. A
run that was stopped on request and resumed a week later has not lost a week: such a pause is left out.

    steps in the file     10 (1-10)   20 (11-20)   | crash, resume at 15 |   20 (16-20)   25 (21-25)
    counted                   10           5                                     5            5
    undone                     0           5

Seconds are measured by rank 0. What lies between the last word of a start that crashed and the first of the next one
is ``interrupted``: steps that were never logged, the watchdog's patience, the wait and the queue.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from typing import Any, NamedTuple

from cpt.report.reading import Record, number

CAUSES = ("training", "undone", "start_up", "checkpoint", "evaluation", "interrupted", "other")
STARTS = ("start", "resume")
STOPS = ("sigterm", "stop", "stopped")  # on request, after a save
FROM_OUTSIDE = ("restart", "gave_up", "hang", "extended", "mix_changed")  # written when the job was dead or dying


@dataclass(frozen=True)
class Attempt:
    """One start of the run: how it ended (finished, stopped, crashed, unknown), and its seconds by cause."""

    first_step: int
    last_step: int
    processes: int | None
    ended: str
    seconds: Mapping[str, float]


@dataclass(frozen=True)
class Goodput:
    """Seconds by cause over all attempts; ``longest_gap`` is the longest interruption, ``steps_repeated`` counts every
    step that was trained again as often as it was.
    """

    attempts: tuple[Attempt, ...]
    interruptions: int
    rollbacks: int
    steps_repeated: int
    longest_gap: float

    @property
    def seconds(self) -> dict[str, float]:
        return {cause: math.fsum(each.seconds.get(cause, 0.0) for each in self.attempts) for cause in CAUSES}

    @property
    def wall_seconds(self) -> float:
        return math.fsum(self.seconds.values())

    @property
    def fraction(self) -> float:
        """Share of the wall time spent on steps that counted; NaN where no time is known."""
        return self.seconds["training"] / self.wall_seconds if self.wall_seconds else math.nan


class _Line(NamedTuple):
    """A line of either file."""

    time: float
    kind: str  # of an event; "" for a metrics record
    fields: Record


@dataclass(frozen=True)
class _Work:
    """Steps of one metrics record that counted and that were undone later, and its seconds per step."""

    counted: int
    undone: int
    step_seconds: float


def measure(events: Sequence[Record], records: Sequence[Record]) -> Goodput:
    """The goodput of a run from the lines of its two files, in file order."""
    stepped = [record for record in records if math.isfinite(number(record.get("step")))]
    work = {id(record): part for record, part in zip(stepped, _work_of(stepped), strict=True)}
    parts = _attempts_of(_merged(events, stepped))
    attempts = tuple(
        _attempt(lines, following[0] if following else None, work) for lines, following in zip_longest(parts, parts[1:])
    )
    gaps = [each.seconds["interrupted"] for each in attempts]
    crashed = [pair for pair, each in zip(pairwise(parts), attempts, strict=False) if each.ended == "crashed"]
    return Goodput(
        attempts=attempts,
        interruptions=len(crashed),
        rollbacks=sum(event.get("event") == "rollback" for event in events),
        steps_repeated=sum(part.undone for part in work.values()) + sum(_never_logged(a, b[0]) for a, b in crashed),
        longest_gap=max(gaps, default=0.0),
    )


def _work_of(records: Sequence[Record]) -> list[_Work]:
    """A step counts unless a later record trained it, or one before it, again (see the example at the top)."""
    found = []
    floor = math.inf  # steps above it are trained again later
    for record in reversed(records):
        last = int(record["step"])
        steps = max(0, int(_or_zero(record.get("steps", 1))))
        counted = int(max(0, min(last, floor) - (last - steps)))
        found.append(_Work(counted, steps - counted, _or_zero(record.get("step_seconds"))))
        floor = min(floor, last - steps)
    return found[::-1]


def _merged(events: Sequence[Record], records: Sequence[Record]) -> list[_Line]:
    """Both files as one, each in its own order; a line without a time follows the one before it.

    The next line is the earliest that is not before the last one; where the clock was set back, both files go back.
    """
    said = [_Line(number(event.get("time")), str(event.get("event", "")), event) for event in reversed(events)]
    logged = [_Line(number(record.get("time")), "", record) for record in reversed(records)]
    merged: list[_Line] = []
    while said or logged:
        now = merged[-1].time if merged else -math.inf
        is_event = not logged or (bool(said) and _order(said[-1], now) <= _order(logged[-1], now))
        line = (said if is_event else logged).pop()
        merged.append(_Line(line.time if math.isfinite(line.time) else now if merged else 0.0, line.kind, line.fields))
    return merged


def _order(line: _Line, now: float) -> tuple[bool, float]:
    return (line.time < now, line.time) if math.isfinite(line.time) else (False, -math.inf)


def _attempts_of(lines: Sequence[_Line]) -> list[list[_Line]]:
    """Split before every start; what an older version wrote without one counts as one attempt."""
    parts: list[list[_Line]] = []
    for line in lines:
        if line.kind in STARTS or not parts:
            parts.append([])
        parts[-1].append(line)
    return parts


def _attempt(lines: Sequence[_Line], following: _Line | None, work: Mapping[int, _Work]) -> Attempt:
    inside = _without_end(lines)
    span = math.fsum(max(0.0, b.time - a.time) for a, b in pairwise(inside))
    ended = _how_it_ended(inside, following is not None)
    seconds = {"start_up": _start_seconds(inside[0])} | _stalls(inside)
    done = [work[id(line.fields)] for line in inside if not line.kind]
    seconds["training"] = math.fsum(part.counted * part.step_seconds for part in done)
    seconds["undone"] = math.fsum(part.undone * part.step_seconds for part in done)
    known = math.fsum(value for cause, value in seconds.items() if cause != "start_up")
    seconds["other"] = max(0.0, span - known)
    after = lines[len(inside) - 1 :] if following is None else [*lines[len(inside) - 1 :], following]
    gap = math.fsum(max(0.0, b.time - a.time) for a, b in pairwise(after))
    starting = _start_seconds(following) if following else 0.0
    seconds["interrupted"] = max(0.0, gap - starting) if ended == "crashed" else 0.0
    steps = [int(line.fields["step"]) for line in inside if isinstance(line.fields.get("step"), int)]
    processes = inside[0].fields.get("world_size")
    return Attempt(
        first_step=steps[0] if steps else 0,
        last_step=max(steps, default=0),
        processes=processes if isinstance(processes, int) else None,
        ended=ended,
        seconds={cause: seconds[cause] for cause in CAUSES},
    )


def _without_end(lines: Sequence[_Line]) -> Sequence[_Line]:
    """Up to the last line that the job wrote while it was well; the first one at least."""
    inside = list(lines)
    while len(inside) > 1 and inside[-1].kind in FROM_OUTSIDE:
        inside.pop()
    return inside


def _how_it_ended(inside: Sequence[_Line], is_followed: bool) -> str:
    kinds = {line.kind for line in inside}
    if "finish" in kinds:
        return "finished"
    if kinds & set(STOPS):
        return "stopped"
    return "crashed" if is_followed else "unknown"


def _start_seconds(line: _Line) -> float:
    """From the start of the process to its first word."""
    return _or_zero(line.fields.get("startup_seconds")) if line.kind in STARTS else 0.0


def _stalls(inside: Sequence[_Line]) -> dict[str, float]:
    """Seconds of the loop in checkpoints and evaluations: as phases of the records and of the last event, or, where
    there are none, as the events say.
    """
    phased = [line.fields for line in inside if isinstance(line.fields.get("phase_seconds"), dict)]
    found = {}
    for phase, kind in (("checkpoint", "checkpoint"), ("evaluation", "eval")):
        own = [line.fields for line in inside if line.kind == kind]
        by_event = [_or_zero(fields.get("stall_seconds", fields.get("seconds"))) for fields in own]
        found[phase] = math.fsum([_phase(fields, phase) for fields in phased] if phased else by_event)
    return found


def _phase(fields: Record, phase: str) -> float:
    """A record says seconds per step, an event seconds."""
    times = 1.0 if "event" in fields else _or_zero(fields.get("steps", 1))
    return times * _or_zero(fields["phase_seconds"].get(phase))


def _never_logged(lines: Sequence[_Line], following: _Line) -> int:
    """Steps that a crashed attempt did after its last record, and that the next one did again. How far it came stands
    with the supervisor or the watchdog.
    """
    logged = [int(line.fields["step"]) for line in lines if not line.kind]
    resumed_at = following.fields.get("step")
    known = [line.fields.get("step") for line in lines if line.kind in FROM_OUTSIDE]
    farthest = max((step for step in known if isinstance(step, int)), default=0)
    return max(0, farthest - max([*logged, resumed_at if isinstance(resumed_at, int) else 0]))


def _or_zero(value: Any) -> float:
    found = number(value)
    return found if math.isfinite(found) and found > 0 else 0.0

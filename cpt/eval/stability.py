"""How deep a run fell before it recovered: worst point and largest change within a window, of accuracies and losses.

Metrics of arXiv 2205.13452 (continual evaluation). A general ability is an old task, learned before the run began; the
domain is the current one. A model may end where it began and still have lost much on the way ("stability gap"), which
final values hide.

    min-ACC   mean over old tasks of the lowest accuracy at any evaluation
    WF_w      largest fall from one evaluation to a later one within w evaluations in a row, 0 if it never fell
    WP_w      largest rise likewise
    WC-ACC    (1/k) current accuracy + (1 - 1/k) min-ACC, k tasks so far, the current one among them

Of losses the lowest becomes the highest and a fall a rise. Worked example, accuracies .80 .78 .55 .60 .70 .76 .79:
lowest .55, WF_3 = WF_10 = .25, WP_10 = .24; with a current accuracy of .9 and k = 2 WC-ACC is .725.
Evaluations without a finite value are left out. Time is linear in the number of evaluations. No torch, no files.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

WINDOWS = (10, 100)  # evaluations; those of the paper

Values = Sequence[float | None]


@dataclass(frozen=True)
class Course:
    """One task or source over a run. ``worst`` is the lowest accuracy or highest loss, ``worst_step`` its first step;
    ``forgetting`` and ``plasticity`` map a window to WF and WP, in the unit of the values. None where fewer than two
    evaluations had a value.
    """

    worst: float | None
    worst_step: int | None
    final: float | None
    forgetting: Mapping[int, float | None]
    plasticity: Mapping[int, float | None]


@dataclass(frozen=True)
class Stability:
    """``worst`` is min-ACC, or for losses the mean of the highest; ``worst_case`` is WC-ACC after the last evaluation,
    None where nothing is being learned or one of the tasks was never measured.
    """

    higher_is_better: bool
    old: Mapping[str, Course]
    current: Course | None
    worst: float | None
    worst_case: float | None


def measure_stability(
    steps: Sequence[int], old: Mapping[str, Values], current: Values | None, *, higher_is_better: bool
) -> Stability:
    """``old`` maps tasks to their values at ``steps``, the first of which is when the run began; ``current`` are those
    of the task being learned.
    """
    courses = {name: measure_course(steps, values, higher_is_better=higher_is_better) for name, values in old.items()}
    learned = None if current is None else measure_course(steps, current, higher_is_better=higher_is_better)
    lowest = [course.worst for course in courses.values()]
    worst = _mean(lowest)
    worst_case = None if learned is None else _mean([learned.final, *lowest])
    return Stability(higher_is_better, courses, learned, worst, worst_case)


def measure_course(steps: Sequence[int], values: Values, *, higher_is_better: bool) -> Course:
    """One series; ``final`` is None where the last evaluation has no value."""
    known = [(value, step) for value, step in zip(values, steps, strict=True) if value is not None]
    upward = np.array([value for value, _ in known]) * (1.0 if higher_is_better else -1.0)
    lowest = int(upward.argmin()) if known else None
    return Course(
        worst=None if lowest is None else known[lowest][0],
        worst_step=None if lowest is None else known[lowest][1],
        final=values[-1] if values else None,
        forgetting={window: largest_fall(upward, window) for window in WINDOWS},
        plasticity={window: largest_fall(-upward, window) for window in WINDOWS},
    )


def largest_fall(values: Sequence[float] | NDArray[np.float64], window: int) -> float | None:
    """Largest ``values[a] - values[b]`` with ``a <= b < a + window``; None of fewer than two values.

    The highest of the last ``window`` values is the higher of two running maxima: from the start of b's block of
    ``window`` values forward to b, and from the end of the block before backward to where the window begins (van Herk
    1992). Blocks make it linear.
    """
    series = np.asarray(values, dtype=np.float64)
    number = len(series)
    if number < 2:
        return None
    width = min(window, number)
    padded = np.full(-(-number // width) * width + width, -np.inf)
    padded[width : width + number] = series  # a block of nothing goes first
    blocks = padded.reshape(-1, width)
    forward = np.maximum.accumulate(blocks, axis=1).ravel()
    backward = np.maximum.accumulate(blocks[:, ::-1], axis=1)[:, ::-1].ravel()
    last = np.arange(width, width + number)
    highest = np.maximum(forward[last], backward[last - width + 1])
    return float((highest - series).max())


def _mean(values: Values) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None

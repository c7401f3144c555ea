"""Learning-rate schedules: pure functions from the number of an update to a multiplier of the peak rate.

Updates are counted from 1, so that a warm-up of W steps reaches the peak at update W and the last update T gets exactly
the final rate. Nothing is stored: resuming needs the step alone, and extending a finished run means evaluating the
function with another total.
"""

import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass

from cpt import schedule_fields as fields
from cpt.run_fields import TrainSection

LrScale = Callable[[int], float]
Rates = Callable[[int], float]  # number of the update, from 1 -> learning rate


def rewarm_cosine(schedule: fields.RewarmCosine, total_steps: int) -> LrScale:
    """Linear re-warm, then cosine re-decay to the floor at the last step (arXiv 2403.08763, section 3)."""
    warmup = warmup_steps(schedule, total_steps)
    floor = schedule.min_lr_ratio

    def scale(n: int) -> float:
        if n <= warmup:
            return n / warmup
        progress = min(1.0, (n - warmup) / max(1, total_steps - warmup))
        return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))

    return scale


def constant(schedule: fields.Constant, total_steps: int) -> LrScale:
    """Linear warm-up, then the peak rate for ever."""
    return lambda n: min(1.0, n / schedule.warmup_steps) if schedule.warmup_steps else 1.0


def linear_to_zero(schedule: fields.LinearToZero, total_steps: int) -> LrScale:
    """Linear warm-up, then a straight line that is 0 at the last step (arXiv 2310.07831)."""
    warmup = schedule.warmup_steps

    def scale(n: int) -> float:
        if n <= warmup:
            return n / warmup
        return max(0.0, 1.0 - (n - warmup) / max(1, total_steps - warmup))

    return scale


# What is left of the plateau at progress x of the decay (EPFL scheduler study, arXiv 2405.18392).
DECAYS: dict[str, Callable[[float], float]] = {
    "linear": lambda x: 1.0 - x,
    "sqrt": lambda x: 1.0 - math.sqrt(x),
    "square": lambda x: 1.0 - x * x,
    "cosine": lambda x: 0.5 * (1.0 + math.cos(math.pi * x)),
}


def wsd(schedule: fields.WarmupStableDecay, total_steps: int) -> LrScale:
    """Warm-up, stable plateau at the peak, decay over the last ``decay_steps`` (MiniCPM, arXiv 2404.06395)."""
    start, floor, shape = total_steps - schedule.decay_steps, schedule.min_lr_ratio, DECAYS[schedule.decay]

    def scale(n: int) -> float:
        if n <= schedule.warmup_steps:
            return n / schedule.warmup_steps
        if n <= start:
            return 1.0
        progress = min(1.0, (n - start) / schedule.decay_steps)
        return floor + (1.0 - floor) * shape(progress)

    return scale


def infinite(schedule: fields.Infinite, total_steps: int) -> LrScale:
    """Warm-up, cooldown to a plateau, exponential anneal over what is left of the run (arXiv 2403.08763, 2503.02844).

    The anneal's exponent is its own progress, (n - first step) / length, so that the floor is reached at the last step.
    """
    warmup, cooldown, plateau = schedule.warmup_steps, schedule.cooldown_steps, schedule.constant_lr_ratio
    anneal_start = warmup + cooldown + schedule.constant_steps

    def bend(x: float) -> float:
        return 1.0 / math.sqrt(1.0 + schedule.timescale * x) - 1.0

    def cool(x: float) -> float:
        if schedule.name == "infinite_cosine":
            return plateau + (1.0 - plateau) * 0.5 * (1.0 + math.cos(math.pi * x))
        return 1.0 + (plateau - 1.0) / bend(1.0) * bend(x)

    def scale(n: int) -> float:
        if n <= warmup:
            return n / warmup
        if n <= warmup + cooldown:
            return cool((n - warmup) / cooldown)
        if n <= anneal_start:
            return plateau
        progress = min(1.0, (n - anneal_start) / (total_steps - anneal_start))
        return float(plateau * (schedule.min_lr_ratio / plateau) ** progress)

    return scale


SCHEDULES: dict[str, Callable[..., LrScale]] = {
    "rewarm_cosine": rewarm_cosine,
    "constant": constant,
    "linear_to_zero": linear_to_zero,
    "wsd": wsd,
    "infinite_cosine": infinite,
    "infinite_inv_sqrt": infinite,
}


def build_schedule(schedule: fields.Schedule, *, total_steps: int) -> LrScale:
    """The multiplier of the peak rate as a function of the update's number, 1 to ``total_steps``."""
    return SCHEDULES[schedule.name](schedule, total_steps)


def warmup_steps(schedule: fields.Schedule, total_steps: int) -> int:
    """As stated; the cosine's default is 1% of its steps."""
    if schedule.warmup_steps is None:
        return max(1, round(0.01 * total_steps))
    return schedule.warmup_steps


@dataclass(frozen=True)
class RateSegment:
    """Steps after ``start`` up to ``end``, under one schedule that was made for ``total`` steps counted from there.

    ``end`` lies before ``start + total`` where a run was extended before it had finished.
    """

    start: int
    end: int
    total: int
    peak_lr: float
    schedule: fields.Schedule


def rate_segments(train: TrainSection, *, total_steps: int) -> list[RateSegment]:
    """The schedules of a run in turn: one, and one more for each time that it was extended."""
    found: list[RateSegment] = []
    start = 0
    for past in train.past:
        total = past.tokens // train.global_batch_tokens - start
        found.append(RateSegment(start, past.until_step, total, past.peak_lr, past.schedule))
        start = past.until_step
    return [*found, RateSegment(start, total_steps, total_steps - start, train.peak_lr, train.schedule)]


def learning_rates(train: TrainSection, *, total_steps: int) -> Rates:
    """The rate of every update of a run. Where it was extended, the warm-up starts from the rate that it then had.

    Worked example: 100 steps of a cosine to 10% of a peak of 1, then 50 more that warm up over 10. Update 100 has 0.1,
    update 101 has 0.1 + 0.9 * 1/10 = 0.19, update 110 has 1.
    """
    segments = rate_segments(train, total_steps=total_steps)
    curves: list[Rates] = []
    for segment in segments:
        before = curves[-1](segment.start) if curves else 0.0
        curves.append(_curve(segment, before))
    ends = [segment.end for segment in segments]

    def rate(n: int) -> float:
        return curves[min(bisect_left(ends, n), len(curves) - 1)](n)

    return rate


def _curve(segment: RateSegment, before: float) -> Rates:
    scale = build_schedule(segment.schedule, total_steps=segment.total)
    warmup = warmup_steps(segment.schedule, segment.total)

    def rate(n: int) -> float:
        m = n - segment.start
        rest = before * (1.0 - m / warmup) if m < warmup else 0.0
        return segment.peak_lr * scale(m) + rest

    return rate

"""How sure a difference is: standard errors, paired bootstrap, sign-flip test, Holm's correction, and words for it.

Two models answered the same items, or read the same documents, so they are compared in pairs. What is resampled is one
unit: an item, or a whole document whose tokens depend on each other. Units form strata (a task, a source), each
resampled by itself; a group is the ratio of sums over its strata. No torch, no files.

Worked example, 4 items right before [1 1 0 1] and after [1 0 0 0]: difference -0.5, two items lost and none regained,
so p = 2 * 0.5^2 = 0.5: within noise.

Interval: percentiles of the resampled differences, pushed outward for few units (Hesterberg 2015, arXiv 1411.5279,
"expanded percentile"). p: share of random exchanges of before and after, unit by unit, that differ at least as much as
what was measured; for scores of 0 and 1 that is the exact sign test (McNemar). Both are reproducible: the seed is the
name of what is compared. Exchanging before and after changes signs only.

Units are the caller's: the metric's for items, nats per token for documents. Refuses nothing: NaN pairs are left out
and the number of units says how many are left.
"""

import math
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import bdtr, ndtr, stdtrit

FloatArray = NDArray[np.float64]
Word = Literal["gain", "drop", "within noise", "not tested"]

RESAMPLES = 10_000
TAIL = 0.025  # of a 95% interval, on each side
SIGNIFICANT = 0.05
FEW_VALUES = 64  # up to so many distinct differences, counts are drawn in place of indices
BLOCK = 2**18  # random numbers held at a time: they stay in the processor's cache


@dataclass(frozen=True)
class Difference:
    """``value`` = after - before with its 95% interval; None where it cannot be known. ``p`` is two-sided and not
    corrected for other comparisons; ``units`` are the items or documents that were paired.
    """

    before: float | None
    after: float | None
    value: float | None
    low: float | None = None
    high: float | None = None
    stderr: float | None = None
    p: float | None = None
    units: int = 0

    def negated(self) -> "Difference":
        """The same as a fall: ``value`` = before - after."""
        low, high = _negative(self.high), _negative(self.low)
        return replace(self, value=_negative(self.value), low=low, high=high)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def _negative(value: float | None) -> float | None:
    return None if value is None else -value


@dataclass(frozen=True)
class Stratum:
    """Paired units of one task or source: sums over them, and what resampling and exchanging makes of the sums.

    ``tops`` [resamples] are sums of after - before, ``bottoms`` those of what they are divided by; ``flips``
    [resamples] are ``tops`` when before and after are exchanged at random, ``square`` the sum of their squared terms.
    ``sign_p`` is exact, for scores of 0 and 1 only.
    """

    before: float
    after: float
    bottom: float
    tops: FloatArray
    bottoms: FloatArray
    flips: FloatArray
    square: float
    units: int
    sign_p: float | None


def mean_stderr(values: ArrayLike) -> float | None:
    """Standard error of a mean, sample deviation / sqrt(n), as lm_eval states it; None of fewer than two values."""
    known = np.asarray(values, dtype=np.float64)
    known = known[np.isfinite(known)]
    return None if len(known) < 2 else float(known.std(ddof=1)) / math.sqrt(len(known))


def pair_means(before: ArrayLike, after: ArrayLike, *, name: str, resamples: int = RESAMPLES) -> Stratum | None:
    """Scores [N] of the same items as a stratum whose sums are means; None where no pair is finite."""
    old, new = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    known = np.isfinite(old) & np.isfinite(new)
    old, new = old[known], new[known]
    if not len(old):
        return None
    number, rng = len(old), _generator(name)
    sign, change = _oriented(new - old)
    binary = bool(np.isin(old, (0.0, 1.0)).all() and np.isin(new, (0.0, 1.0)).all())
    return Stratum(
        before=float(old.mean()),
        after=float(new.mean()),
        bottom=1.0,
        tops=sign * (_binary_sums if binary else _sums)(change, rng, resamples) / number,
        bottoms=np.ones(1),
        flips=sign * _flips(change, rng, resamples) / number,
        square=float(np.square(change).sum()) / number**2,
        units=number,
        sign_p=_sign_test(change) if binary else None,
    )


def pair_ratios(
    before: ArrayLike, after: ArrayLike, tokens: ArrayLike, *, name: str, resamples: int = RESAMPLES
) -> Stratum | None:
    """Summed losses [documents] of the same documents and their counted tokens as a stratum; None where no document
    has finite losses and a token.
    """
    old, new, weight = (np.asarray(each, dtype=np.float64) for each in (before, after, tokens))
    known = np.isfinite(old) & np.isfinite(new) & (weight > 0)
    old, new, weight = old[known], new[known], weight[known]
    if not len(old):
        return None
    rng = _generator(name)
    sign, change = _oriented(new - old)
    tops, bottoms = _indexed(np.stack([change, weight]), rng, resamples)
    return Stratum(
        before=float(old.sum()),
        after=float(new.sum()),
        bottom=float(weight.sum()),
        tops=sign * tops,
        bottoms=bottoms,
        flips=sign * _flips(change, rng, resamples),
        square=float(np.square(change).sum()),
        units=len(old),
        sign_p=None,
    )


def difference(strata: Sequence[Stratum]) -> Difference:
    """One task or source, or the group of several: sums over strata divided by each other.

    Of tasks that is the unweighted mean of their means, of sources the loss over all their tokens.
    """
    if not strata:
        return Difference(None, None, None)
    bottom = sum(stratum.bottom for stratum in strata)
    before = math.fsum(stratum.before for stratum in strata) / bottom
    after = math.fsum(stratum.after for stratum in strata) / bottom
    units = sum(stratum.units for stratum in strata)
    found = Difference(before, after, after - before, units=units)
    free = units - len(strata)
    if free < 1:
        return found
    draws = np.sum([s.tops for s in strata], axis=0) / np.sum([s.bottoms for s in strata], axis=0)
    widen = math.sqrt(units / free)
    tail = float(ndtr(widen * stdtrit(free, TAIL)))
    low, high = np.quantile(draws, [tail, 1 - tail])
    return replace(
        found,
        low=min(float(low), after - before),
        high=max(float(high), after - before),
        stderr=float(draws.std()) * widen,
        p=_p_value(strata),
    )


def difference_apart(
    before: float | None, before_stderr: float | None, after: float | None, after_stderr: float | None
) -> Difference:
    """Two figures that share no items: normal interval and test from their standard errors."""
    if before is None or after is None:
        return Difference(before, after, None)
    value = after - before
    if before_stderr is None or after_stderr is None:
        return Difference(before, after, value)
    stderr = math.hypot(before_stderr, after_stderr)
    reach = -float(stdtrit(math.inf, TAIL)) * stderr
    p = 2 * float(ndtr(-abs(value) / stderr)) if stderr else float(value == 0)
    return Difference(before, after, value, value - reach, value + reach, stderr, p)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """p-values corrected for how many there are (Holm 1979): the chance that any difference is called real when none
    is stays below the level. None stays None and is not counted.
    """
    known = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, index) in enumerate(known):
        largest = max(largest, min(1.0, p * (len(known) - rank)))
        corrected[index] = largest
    return corrected


def wording(value: float | None, corrected_p: float | None, *, higher_is_better: bool) -> Word:
    """What a difference may be called."""
    if value is None or corrected_p is None:
        return "not tested"
    if corrected_p >= SIGNIFICANT or value == 0:
        return "within noise"
    return "gain" if (value > 0) == higher_is_better else "drop"


def _generator(name: str) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(name.encode()))


def _oriented(change: FloatArray) -> tuple[float, FloatArray]:
    """The changes with the first one that is not 0 positive, and the sign that was taken out: the random numbers do
    not know which of two models is called the baseline.
    """
    moved = np.flatnonzero(change)
    sign = -1.0 if len(moved) and change[moved[0]] < 0 else 1.0
    return sign, sign * change


def _binary_sums(change: FloatArray, rng: np.random.Generator, resamples: int) -> FloatArray:
    """Sums of resampled -1, 0 and 1. One more item, half lost and half gained, joins what is drawn from: otherwise ten
    items of which none changed would look certain.
    """
    number = len(change)
    counts = np.array([np.sum(change < 0) + 0.5, np.sum(change == 0), np.sum(change > 0) + 0.5])
    drawn = rng.multinomial(number, counts / (number + 1), size=resamples)
    sums = (drawn[:, 2] - drawn[:, 0]).astype(np.float64)
    # Without a change neither side is first: half of the resamples are the mirror of the other half.
    return sums if change.any() else np.concatenate([sums[::2], -sums[::2]])[:resamples]


def _sums(change: FloatArray, rng: np.random.Generator, resamples: int) -> FloatArray:
    """Sums of ``change`` resampled with replacement; of few distinct values it is enough to draw how often each comes,
    which costs the same for 10^2 and 10^6 items.
    """
    values, counts = np.unique(change, return_counts=True)
    sums: FloatArray
    if len(values) > FEW_VALUES:
        (sums,) = _indexed(change[None], rng, resamples)
    else:
        sums = rng.multinomial(len(change), counts / len(change), size=resamples) @ values
    return sums


def _indexed(columns: FloatArray, rng: np.random.Generator, resamples: int) -> FloatArray:
    """Sums [columns, resamples] of columns [columns, N] whose units are drawn together."""
    number = columns.shape[1]
    parts = []
    for rows in _blocks(resamples, number):
        drawn = rng.integers(number, size=(rows, number), dtype=np.intp)
        parts.append([np.take(column, drawn).sum(axis=1) for column in columns])
    return np.concatenate(parts, axis=1)


def _flips(change: FloatArray, rng: np.random.Generator, resamples: int) -> FloatArray:
    """Sums of ``change`` with random signs."""
    sizes, counts = np.unique(np.abs(change[change != 0]), return_counts=True)
    if len(sizes) <= FEW_VALUES:
        kept = rng.binomial(counts, 0.5, size=(resamples, len(sizes)))
        flipped: FloatArray = (2.0 * kept - counts) @ sizes
        return flipped
    parts = []
    for rows in _blocks(resamples, len(change)):
        signs = rng.integers(2, size=(rows, len(change)), dtype=np.uint8)
        parts.append(2.0 * (signs @ change) - change.sum())
    return np.concatenate(parts)


def _blocks(resamples: int, number: int) -> list[int]:
    """Resamples in blocks whose random numbers fit into memory."""
    rows = max(1, BLOCK // number)
    return [min(rows, resamples - first) for first in range(0, resamples, rows)]


def _sign_test(change: FloatArray) -> float:
    """Two-sided: as many or fewer on the rarer side, when each change is a loss or a gain with equal chances."""
    lost, gained = int(np.sum(change < 0)), int(np.sum(change > 0))
    return min(1.0, 2.0 * float(bdtr(min(lost, gained), lost + gained, 0.5))) if lost + gained else 1.0


def _p_value(strata: Sequence[Stratum]) -> float:
    if len(strata) == 1 and strata[0].sign_p is not None:
        return strata[0].sign_p
    observed = abs(sum(stratum.after - stratum.before for stratum in strata))
    flips = np.abs(np.sum([stratum.flips for stratum in strata], axis=0))
    beyond = int(np.sum(flips >= observed * (1 - 1e-9)))
    p = (1 + beyond) / (1 + len(flips))
    square = sum(stratum.square for stratum in strata)
    if beyond or not square:
        return p
    # Rarer than the exchanges can show; Hoeffding's inequality for random signs bounds it all the same.
    return min(p, 2 * math.exp(-(observed**2) / (2 * square)))

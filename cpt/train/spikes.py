"""Is this step's loss or gradient norm a spike? Robust statistics over the last accepted steps; arithmetic only.

A series holds the mean loss of one source; or by how much a batch exceeds what its sources usually lose, which sees
what shows a little in each of them and does not depend on their shares; or the log of the gradient norm. Its *centre*
is the median of the last 16 values, its *scale* 1.4826 x the median absolute difference of neighbours / sqrt 2 over the
last 128: both ignore a few wild values, and differences of neighbours do not see a slow trend, so neither falling loss
nor the slow rise while the rate is re-warmed widens the scale. A value is a spike where it lies more than ``sigma``
scales above the centre. Never below it: a loss that falls is no reason to stop.

Three things keep noise from being taken for a spike:
- The scale has a floor, for a curve can be flat: 1% of the loss, and 0.35 for the log of the norm (clipped anyway).
- A mean over few tokens is noisier than one over many: differences are compared per root of their counted tokens. Means
  over few rows also have heavier tails, so that ``sigma`` grows by 3 / rows.
- A spike must lift the loss of the whole batch by 1%, or it cannot have done harm.

Worked example, one source, 64 rows a step: losses 2.50 2.52 2.48 2.51 ... have centre 2.50 and scale 0.015, the floor
is 0.025; with sigma 8 x (1 + 3 / 64) = 8.4 a spike begins at 2.50 + 8.4 x 0.025 = 2.71.
"""

import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

WINDOW = 128  # accepted steps that are remembered
CENTRE_STEPS = 16
KNOWN_STEPS = 8  # accepted steps of a source before its centre is trusted
MIN_HISTORY = 24  # accepted values of a series before one is called a spike
LOSS_FLOOR = 0.01  # of the centre
NORM_FLOOR = 0.35  # of the natural logarithm: with 8 sigma a norm 16 times the usual one
FEW_ROWS = 3.0
LOSS_OF, BATCHES, NORMS = "loss of ", "excess of the batch", "log of the norm"  # the series of a history
UNSETTLED = 2.0  # what sigma is multiplied by while the rate rises, and after a stage border

History = dict[str, list[tuple[float, float]]]  # by series: (value, weight) of accepted steps, oldest first


@dataclass(frozen=True)
class Spike:
    """A value above its limit, both in the units that people read: nats per token, or the norm itself."""

    what: str
    value: float
    usual: float
    limit: float

    def __str__(self) -> str:
        return f"{self.what} is {self.value:.4g}, usually {self.usual:.4g} (limit {self.limit:.4g})"


def centre(values: Sequence[float]) -> float:
    """What the next value should be near to."""
    return statistics.median(values[-CENTRE_STEPS:])


def noise(values: Sequence[float], weights: Sequence[float]) -> float:
    """Robust standard deviation of a value of weight 1 around its own slow trend, from differences of neighbours.

    A value of weight w (counted tokens) is taken to have variance noise^2 / w.
    """
    series: NDArray[np.float64] = np.asarray(values, dtype=np.float64)
    inverse = 1.0 / np.asarray(weights, dtype=np.float64)
    steps = np.abs(np.diff(series)) / np.sqrt(inverse[1:] + inverse[:-1])
    return 1.4826 * float(np.median(steps))


def upper_limit(
    values: Sequence[float], weights: Sequence[float], *, weight: float, sigma: float, floor: float
) -> float:
    """The largest value of weight ``weight`` that is no spike after these ones; infinite where they are too few."""
    if len(values) < MIN_HISTORY:
        return math.inf
    return centre(values) + sigma * max(noise(values, weights) / math.sqrt(weight), floor)


class Recent:
    """The last accepted values of one series, with their weights."""

    def __init__(self, history: Sequence[tuple[float, float]] = ()) -> None:
        self._held: deque[tuple[float, float]] = deque(history, maxlen=WINDOW)

    @property
    def values(self) -> list[float]:
        return [value for value, _ in self._held]

    @property
    def weights(self) -> list[float]:
        return [weight for _, weight in self._held]

    @property
    def is_known(self) -> bool:
        return len(self._held) >= KNOWN_STEPS

    def add(self, value: float, weight: float = 1.0) -> None:
        self._held.append((float(value), float(weight)))

    def history(self) -> list[tuple[float, float]]:
        """(value, weight) of each, oldest first."""
        return list(self._held)


@dataclass(frozen=True)
class Excess:
    """How far a batch lies above what its sources usually lose; ``tokens`` of sources that are known well enough."""

    value: float  # nats per token
    usual: float
    tokens: int


@dataclass
class SpikeDetector:
    """Knows the accepted steps of a run; the same on all ranks, because it is shown the same numbers."""

    sigma: float | None  # None: nothing is a spike
    tokens_per_row: int

    def __post_init__(self) -> None:
        self.go_back_to({})

    def in_losses(self, sums: Mapping[str, float], counted: Mapping[str, int], *, settled: bool) -> dict[str, Spike]:
        """Spikes of mean losses, ``sums`` in nats / ``counted`` tokens, by source; where only the batch as a whole is
        too high, its highest sources. ``settled``: neither does the rate rise nor is a stage border near.
        """
        batch = self._excess(sums, counted)
        if self.sigma is None or not batch.tokens or batch.value <= LOSS_FLOOR * batch.usual:  # most steps end here
            return {}
        found = {}
        for name in self._known(counted):
            recent, tokens, value = self._losses[name], counted[name], sums[name] / counted[name]
            usual = centre(recent.values)
            if (value - usual) * tokens > LOSS_FLOOR * batch.usual * batch.tokens:
                limit = self._limit(recent, tokens, settled=settled, floor=LOSS_FLOOR * usual)
                if value > limit:
                    found[name] = Spike(f"the loss of {name}", value, usual, limit)
        limit = self._limit(self._batches, batch.tokens, settled=settled, floor=LOSS_FLOOR * batch.usual)
        return found if found or batch.value <= limit else self._above(sums, counted, by=limit)

    def _above(self, sums: Mapping[str, float], counted: Mapping[str, int], *, by: float) -> dict[str, Spike]:
        usual = {name: centre(self._losses[name].values) for name in self._known(counted)}
        return {
            name: Spike(f"the loss of {name}", sums[name] / counted[name], usual[name], usual[name] + by)
            for name in usual
            if sums[name] / counted[name] > usual[name] + by
        }

    def _limit(self, recent: Recent, tokens: int, *, settled: bool, floor: float) -> float:
        assert self.sigma is not None
        rows = max(1.0, tokens / self.tokens_per_row)
        sigma = self.sigma * (1.0 + FEW_ROWS / rows) * (1.0 if settled else UNSETTLED)
        return upper_limit(recent.values, recent.weights, weight=tokens, sigma=sigma, floor=floor)

    def _known(self, counted: Mapping[str, int]) -> list[str]:
        """Sources with tokens in this step and enough steps before it."""
        return [n for n, tokens in counted.items() if tokens and n in self._losses and self._losses[n].is_known]

    def _excess(self, sums: Mapping[str, float], counted: Mapping[str, int]) -> Excess:
        known = self._known(counted)
        tokens = sum(counted[name] for name in known)
        usual = sum(centre(self._losses[name].values) * counted[name] for name in known) / max(1, tokens)
        return Excess(sum(sums[name] for name in known) / max(1, tokens) - usual, usual, tokens)

    def in_norm(self, norm: float, *, settled: bool) -> list[Spike]:
        """Whether the gradient norm before clipping is a spike: a list of one, or empty."""
        if self.sigma is None or norm <= 0.0:
            return []
        sigma = self.sigma * (1.0 if settled else UNSETTLED)
        recent = self._norms
        limit = upper_limit(recent.values, recent.weights, weight=1.0, sigma=sigma, floor=NORM_FLOOR)
        if math.log(norm) <= limit:
            return []
        return [Spike("the gradient norm", norm, math.exp(centre(recent.values)), math.exp(limit))]

    def accept(self, sums: Mapping[str, float], counted: Mapping[str, int], norm: float) -> None:
        """Remember a step that was taken."""
        batch = self._excess(sums, counted)
        if batch.tokens:
            self._batches.add(batch.value, batch.tokens)
        for name, tokens in counted.items():
            if tokens:
                self._losses.setdefault(name, Recent()).add(sums[name] / tokens, tokens)
        if norm > 0.0:
            self._norms.add(math.log(norm))

    def history(self) -> History:
        """What the next step is judged by: goes into a checkpoint, so that a run which goes on judges like one that
        never stopped.
        """
        series = {LOSS_OF + name: recent.history() for name, recent in self._losses.items()}
        return {**series, BATCHES: self._batches.history(), NORMS: self._norms.history()}

    def go_back_to(self, history: History) -> None:
        """Know these steps and no others; of an empty history none, as at the start of a run."""
        self._losses = {n.removeprefix(LOSS_OF): Recent(held) for n, held in history.items() if n.startswith(LOSS_OF)}
        self._batches = Recent(history.get(BATCHES, ()))
        self._norms = Recent(history.get(NORMS, ()))

    def recent_norms(self) -> list[float]:
        """The newest accepted gradient norms, oldest first."""
        return [math.exp(value) for value in self._norms.values[-CENTRE_STEPS:]]

    def recent_losses(self) -> dict[str, list[float]]:
        """The newest accepted losses of every source, oldest first, for a diagnosis."""
        return {name: recent.values[-CENTRE_STEPS:] for name, recent in self._losses.items()}


def outlying_rows(means: Sequence[float], *, sigma: float) -> list[int]:
    """Which of a source's rows stand out: not finite, or more than ``sigma`` robust deviations above the others. Not
    more than half of them: then it is not the rows.
    """
    values: NDArray[np.float64] = np.asarray(means, dtype=np.float64)
    good = values[np.isfinite(values)]
    if not len(good):
        return []
    middle = float(np.median(good))
    scale = max(1.4826 * float(np.median(np.abs(good - middle))), LOSS_FLOOR * abs(middle))
    apart = ~np.isfinite(values) | (values > middle + sigma * scale)
    return np.flatnonzero(apart).tolist() if apart.sum() * 2 <= len(values) else []

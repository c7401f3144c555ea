"""The multi-power law of loss curves (arXiv 2503.12811, section 3), and a stiffer form of it for few curves.

    mpl       L(t)  = L0 + A S1(t)^-alpha - LD(t)
              LD(t) = B sum over k <= t of (eta_(k-1) - eta_k) G(eta_k^-gamma (S1(t) - S1(k-1)))
              G(x)  = 1 - (1 + C x)^-beta

Loss in nats, eta the rate of a step, S1 the sum of the rates up to a step, warm-up included. Each lowering of the rate
wins some loss, which training then pays out as a power of the area behind it. gamma lies between 0 (the curvature of
the loss stays as it is) and 1 (it grows as the rate falls, the edge of stability); beyond 1 a low rate would relax in
fewer steps than a high one.

    mpl_tied  the same with beta = alpha, gamma and p fixed, and
              LD(t) = B S1(t)^-kappa sum over k <= t of (eta_(k-1)^p - eta_k^p) G(...)

Two or three curves do not tell B, C, beta and gamma apart, and what they leave open decides how far a prediction can be
trusted. mpl_tied ties them: beta = alpha, since both count the directions that training has not yet reached when no
direction starts further off than others; gamma = 0.65, as in the paper's fits at three sizes; and what a rate costs is
concave in it (p = 0.85) and falls with the gradient noise as training goes on (kappa). gamma and p have the lowest
error on what is left out, in turn, of the three curves that the paper fits on: one of them, or the later part of all.

Owns both formulas and how a schedule is compressed for them: the sum over steps runs over blocks of neighbouring
steps; a block ends at every wanted step and around every large change, so none reaches beyond a wanted step.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from cpt.planner.curves import IntArray
from cpt.planner.fitting import FloatArray, Parameter, positive
from cpt.planner.laws.curve_law import CurveLaw, Track

PAPER = "arXiv 2503.12811"
TIED_GAMMA = 0.65
TIED_POWER = 0.85
MAX_BLOCKS = 256  # beyond those that the wanted steps and the jumps ask for
JUMP = 0.01  # a change in one step by more than this part of the highest rate is a block of its own
SMALLEST_RATE = 1e-12  # a schedule may end at 0, and 0^-gamma is no number
MAX_CELLS = 2_000_000  # (starts x points x blocks) held at once


@dataclass(frozen=True)
class View:
    """A schedule for the law: ``area`` (n,) S1 at the wanted steps; for each of K blocks the ``drops`` of the rate (or
    of its power), the logarithm of the rate after them, and ``behind`` (n, K), the area between the block and each
    wanted step, 0 where the block comes later. ``dropped`` (n,): the drops so far."""

    area: FloatArray
    drops: FloatArray
    log_rates: FloatArray
    behind: FloatArray
    dropped: FloatArray


def prepare(track: Track, power: float = 1.0) -> View:
    rates, steps = track.rates, track.steps
    area, worth = np.cumsum(rates), rates**power
    drops = -np.diff(worth, prepend=worth[:1])
    size = np.abs(drops)
    edges = _edges(size, steps)
    total = np.add.reduceat(size, edges)
    moved = total > 0

    def mean(values: FloatArray) -> FloatArray:
        """Over each block that moves, weighted by the size of its moves."""
        return np.asarray(np.add.reduceat(size * values, edges)[moved] / total[moved])

    net = np.add.reduceat(drops, edges)[moved]
    earlier = edges[moved][None, :] <= steps[:, None]
    behind = np.where(earlier, np.maximum(area[steps][:, None] - mean(area - rates)[None, :], 0.0), 0.0)
    log_rates = mean(np.log(np.maximum(rates, SMALLEST_RATE)))
    dropped = np.asarray(earlier.astype(np.float64) @ net)
    return View(np.maximum(area[steps], SMALLEST_RATE), net, log_rates, behind, dropped)


def _edges(size: FloatArray, steps: IntArray) -> IntArray:
    """First steps of the blocks."""
    jumps = np.flatnonzero(size > JUMP * max(float(size.sum()), 1e-300) / 2.0)
    even = np.linspace(0, len(size) - 1, min(MAX_BLOCKS, len(size)), dtype=np.int64)
    edges = np.unique(np.concatenate([even, steps + 1, jumps, jumps + 1]))
    return edges[edges < len(size)]


def multi_power(theta: FloatArray, view: View) -> tuple[FloatArray, FloatArray]:
    """mpl. ``theta`` (S, 7) in the order L0, A, alpha, B, C, beta, gamma."""
    return _in_chunks(_multi_power, theta, view)


def tied(theta: FloatArray, view: View) -> tuple[FloatArray, FloatArray]:
    """mpl_tied, with a view of ``prepare_tied``. ``theta`` (S, 6) in the order L0, A, alpha, B, C, kappa."""
    return _in_chunks(_tied, theta, view)


def prepare_tied(track: Track) -> View:
    return prepare(track, TIED_POWER)


def _multi_power(theta: FloatArray, view: View) -> tuple[FloatArray, FloatArray]:
    floor, a, alpha, b, c, beta, gamma = theta.T[:, :, None]
    log_area = np.log(view.area)
    power = np.exp(-alpha * log_area)
    won, by_c, by_beta, by_gamma = _won(view, c, beta, gamma)
    slopes = (np.ones_like(power), power, -a * power * log_area, -won, -b * by_c, -b * by_beta, -b * by_gamma)
    return floor + a * power - b * won, np.stack(slopes, axis=1)


def _tied(theta: FloatArray, view: View) -> tuple[FloatArray, FloatArray]:
    floor, a, alpha, b, c, kappa = theta.T[:, :, None]
    log_area = np.log(view.area)
    power, noise = np.exp(-alpha * log_area), np.exp(-kappa * log_area)
    won, by_c, by_alpha, _ = _won(view, c, alpha, np.full_like(c, TIED_GAMMA))
    gain = b * noise * won
    by_alpha = -a * power * log_area - b * noise * by_alpha
    slopes = (np.ones_like(power), power, by_alpha, -noise * won, -b * noise * by_c, gain * log_area)
    return floor + a * power - gain, np.stack(slopes, axis=1)


def _won(view: View, c: FloatArray, beta: FloatArray, gamma: FloatArray) -> tuple[FloatArray, ...]:
    """The sum of drops times G, and its derivatives by C, beta and gamma, each (S, n)."""
    x = view.behind * (c * np.exp(-gamma * view.log_rates))[:, None, :]
    log_base = np.log1p(x)
    left = np.exp(-beta[:, :, None] * log_base)
    pace = left * (x / (1.0 + x))
    outstanding = left @ view.drops - (view.drops.sum() - view.dropped)  # later blocks have left = 1
    return (
        view.dropped - outstanding,
        beta / c * (pace @ view.drops),
        (left * log_base) @ view.drops,
        -beta * (pace @ (view.log_rates * view.drops)),
    )


_Formula = Callable[[FloatArray, View], tuple[FloatArray, FloatArray]]


def _in_chunks(formula: _Formula, theta: FloatArray, view: View) -> tuple[FloatArray, FloatArray]:
    """Few rows of ``theta`` at a time, so that the (S, n, K) intermediates stay small."""
    chunk = max(1, MAX_CELLS // max(1, view.behind.size))
    parts = [formula(theta[i : i + chunk], view) for i in range(0, len(theta), chunk)]
    return np.concatenate([loss for loss, _ in parts]), np.concatenate([slopes for _, slopes in parts])


def _trunk(losses: FloatArray) -> tuple[Parameter, ...]:
    lowest = float(losses.min())
    return (
        positive("L0", 0.1 * lowest, 1.2 * lowest, (0.7 * lowest, lowest)),
        positive("A", 1e-4, 1e3, (0.2, 2.0)),
        positive("alpha", 0.02, 3.0, (0.2, 1.0)),
    )


def _gain(tracks: Sequence[Track], power: float) -> tuple[Parameter, ...]:
    """B, around the value that makes a decay to zero worth 0.1 nats, and C, so that tens to thousands of steps pay it
    out."""
    peak = max(float(track.rates.max()) for track in tracks)
    worth, pace = 0.1 / peak**power, peak ** (TIED_GAMMA - 1.0)
    return (
        positive("B", 1e-3 * worth, 1e3 * worth, (0.3 * worth, 3.0 * worth)),
        positive("C", 1e-7 * pace, 1e3 * pace, (3e-4 * pace, 1e-1 * pace)),
    )


def _mpl_ranges(tracks: Sequence[Track], losses: FloatArray) -> tuple[Parameter, ...]:
    shape = (positive("beta", 0.01, 10.0, (0.2, 1.5)), positive("gamma", 1e-3, 1.0, (0.3, 1.0)))
    return (*_trunk(losses), *_gain(tracks, 1.0), *shape)


def _tied_ranges(tracks: Sequence[Track], losses: FloatArray) -> tuple[Parameter, ...]:
    return (*_trunk(losses), *_gain(tracks, TIED_POWER), positive("kappa", 1e-3, 0.5, (0.01, 0.3)))


MULTI_POWER = CurveLaw("mpl", "multi-power law: L0 + A S1^-alpha - LD", PAPER, _mpl_ranges, prepare, multi_power)
MULTI_POWER_TIED = CurveLaw(
    "mpl_tied",
    "multi-power law, tied: beta = alpha, concave rate, noise that falls with training",
    f"form after {PAPER}",
    _tied_ranges,
    prepare_tied,
    tied,
)

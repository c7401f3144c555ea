"""What a figure shows, before it is drawn: axes, one series per run and quantity, marks for events. Pure.

A plot is drawn twice from the same numbers: as SVG by :mod:`cpt.report.plot_svg`, for paper, the Markdown twin and a
browser without script, and again by the page's script when a reader zooms, hides a run or chooses another axis. Owns
the thinning of long curves; refuses to know what a run is: it has its number, for the colour, and its label.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
HUGE = 1e30  # as good as infinite: the page holds its numbers in 32 bits

# line: a strong curve; raw: every logged step, light; held_out: open markers on a thin line; plan: dashed; path: a
# line with its points, ending in a large marker; front: thin steps; goal: one point with a cross of intervals; crossed:
# points crossed out.
Style = Literal["line", "raw", "held_out", "plan", "path", "front", "goal", "crossed"]
Kind = Literal["tokens", "number", "share"]


@dataclass(frozen=True)
class Axis:
    """``kind`` picks how numbers are written. ``limits`` fix the range; ``from_zero`` only its lower end."""

    label: str
    kind: Kind = "number"
    limits: tuple[float, float] | None = None
    from_zero: bool = False


@dataclass(frozen=True)
class Series:
    """Points [N, 2] of one run; ``run`` is -1 where they belong to none. ``low`` and ``high``: the interval of y, of
    every point [N] or of the last one [1]; ``left`` and ``right``: of x of the last one [1]. ``steps`` [N] where the
    horizontal axis does not tell them.
    """

    run: int
    label: str
    points: FloatArray
    style: Style = "line"
    low: FloatArray | None = None
    high: FloatArray | None = None
    left: FloatArray | None = None
    right: FloatArray | None = None
    steps: FloatArray | None = None


@dataclass(frozen=True)
class Mark:
    """Something that happened to a run at one place of the horizontal axis."""

    run: int
    x: float
    symbol: str
    text: str


@dataclass(frozen=True)
class Plot:
    """One set of axes with what is drawn in them; ``origin`` names the point (0, 0) and draws both zero lines."""

    x: Axis
    y: Axis
    series: tuple[Series, ...]
    marks: tuple[Mark, ...] = ()
    origin: str = ""
    height: float = 290.0


@dataclass(frozen=True)
class Chart:
    """One figure; ``svg`` is ready to stand in a page. ``plots`` are what the page's script can draw again, in the
    order of the panels from above.
    """

    name: str
    title: str
    caption: str
    svg: str
    plots: tuple[Plot, ...] = ()


def decimate(curve: FloatArray, buckets: int) -> FloatArray:
    """At most ``4 * buckets`` points [N, 2] of a curve sorted by x: first, lowest, highest and last of every bucket of
    equal width, so that no spike is lost.
    """
    if len(curve) <= 4 * buckets:
        return curve
    x, y = curve.T
    bucket = np.searchsorted(np.linspace(x[0], x[-1], buckets + 1)[1:-1], x, side="right")
    first = np.flatnonzero(np.diff(bucket, prepend=-1))
    last = np.append(first[1:], len(x)) - 1
    by_height = np.lexsort((y, bucket))  # within each bucket from its lowest point to its highest
    kept: FloatArray = curve[np.unique(np.concatenate([first, last, by_height[first], by_height[last]]))]
    return kept


def running_mean(curve: FloatArray) -> FloatArray:
    """Centred mean over one fortieth of the points; at both ends over what there is of the window."""
    half = len(curve) // 80
    if half == 0:
        return curve
    total = np.concatenate([[0.0], np.cumsum(curve[:, 1])])
    at = np.arange(len(curve))
    low, high = np.maximum(at - half, 0), np.minimum(at + half + 1, len(curve))
    return np.column_stack([curve[:, 0], (total[high] - total[low]) / (high - low)])


def finite_points(x: FloatArray, y: FloatArray | None) -> FloatArray:
    if y is None:
        return np.empty((0, 2))
    keep = np.isfinite(x) & (np.abs(y) < HUGE)
    return np.column_stack([x[keep], y[keep]])


def pareto_front(points: FloatArray) -> FloatArray:
    """Of (cost, benefit) points [N, 2] those that no other beats in both, by rising cost; the first of equal points."""
    order = np.lexsort((-points[:, 1], points[:, 0]))
    ordered = points[order]
    best = np.maximum.accumulate(np.concatenate([[-np.inf], ordered[:, 1]]))[:-1]
    front: FloatArray = ordered[ordered[:, 1] > best]
    return front

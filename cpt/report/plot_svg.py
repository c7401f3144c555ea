"""A plot as SVG text, for a page, for paper and for a file of its own. Text in, text out; no matplotlib.

Colours are CSS variables, so one SVG serves light, dark and paper; the classes are those of ``templates/chart.css``. It
is drawn narrow enough to be read on a phone and scales up. ``templates/page.js`` draws the same plots by the same rules
(ticks, margins, places of names); ``tests/cpt/report`` holds both against each other in a browser.
"""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files

import numpy as np

from cpt.report.palette import DASHES, MARKERS, RUNS_LIGHT, THEMES, short
from cpt.report.plots import Axis, Chart, FloatArray, Kind, Plot, Series, decimate
from cpt.report.summary import PREFIXES

WIDTH = 460.0  # SVG units; at 360 px on a phone the letters are 9 px tall
LETTER = 6.7  # mean width of a letter of 12 units
BUCKETS = 110  # horizontal resolution of a curve; the page's script draws finer ones
FEWEST_LETTERS = 3  # of the numbers beside the vertical axis: panels line up
MOST_RAW, MOST_NAMES, MOST_DOTS = 4, 8, 500  # more runs hide each other's noise, names and points
SHAPES = {
    "o": "M-5 0a5 5 0 1 0 10 0a5 5 0 1 0-10 0z",
    "s": "M-4.5-4.5h9v9h-9z",
    "^": "M0-5.8L5.4 4.2h-10.8z",
    "D": "M0-6L6 0L0 6L-6 0z",
    "v": "M0 5.8L5.4-4.2h-10.8z",
    "P": "M-1.9-5.5h3.8v3.6h3.6v3.8h-3.6v3.6h-3.8v-3.6h-3.6v-3.8h3.6z",
}
CROSS = "m-4-4l8 8m0-8l-8 8"
# Of a name beside a point, in the order of preference; a negative first number is a name that ends there.
PLACES = ((9, -8), (-9, -8), (9, 18), (-9, 18), (11, 4), (-11, 4), (9, -22), (-9, -22), (9, 32), (-9, 32))
LONGEST_NAME = 80  # of a figure: it becomes the name of a file
FAR = 9999.0  # beyond any frame, and short to write
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Frame:
    """Where data lie on the page: data ranges, and the rectangle in SVG units."""

    x: tuple[float, float]
    y: tuple[float, float]
    left: float
    top: float
    right: float
    bottom: float

    def place(self, points: FloatArray) -> FloatArray:
        """Data [N, 2] to SVG units."""
        (x0, x1), (y0, y1) = self.x, self.y
        across = self.left + (points[:, 0] - x0) / (x1 - x0) * (self.right - self.left)
        down = self.bottom - (points[:, 1] - y0) / (y1 - y0) * (self.bottom - self.top)
        return np.column_stack([across, np.clip(down, -FAR, FAR)])


def standalone(chart: Chart) -> str:
    """The figure as an SVG file of its own, with the colours of both themes and a background."""
    light, dark = (
        ";".join(f"--{role}:{colour}" for role, colour in THEMES[theme].items()) for theme in ("light", "dark")
    )
    style = f"<style>svg{{{light}}}@media(prefers-color-scheme:dark){{svg{{{dark}}}}}{_stylesheet()}</style>"
    background = '<rect width="100%" height="100%" style="fill:var(--page)"/>'
    return re.sub(
        r"^<svg([^>]*)>", rf'<svg xmlns="http://www.w3.org/2000/svg"\1>{style}{background}', chart.svg, count=1
    )


def plot_chart(name: str, title: str, caption: str, plots: Sequence[Plot]) -> Chart:
    """A figure of one plot, or of several under one another."""
    stem = re.sub(r"[^A-Za-z0-9_-]+", "_", name)[:LONGEST_NAME]
    heights = [plot.height for plot in plots]
    panels = [
        f'<g class="plot" transform="translate(0 {sum(heights[:index]):g})">'
        f"{''.join(_panel(plot, f'{stem}-{index}-clip'))}</g>"
        for index, plot in enumerate(plots)
    ]
    return Chart(stem, title, caption, svg_element(title, sum(heights), "".join(panels)), tuple(plots))


def svg_element(title: str, height: float, body: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH:g} {height:g}" role="img" aria-label="{escape(title)}" class="drawing">{body}</svg>'
    )


def run_classes(run: int) -> str:
    """Colour and dashes; -1 is ink."""
    return "ink" if run < 0 else f"r{run % len(RUNS_LIGHT)} d{run // len(RUNS_LIGHT) % len(DASHES)}"


def symbol(run: int) -> str:
    """The outline of a run's marker around (0, 0)."""
    return SHAPES[MARKERS[run % len(MARKERS)]]


def ticks(low: float, high: float, wanted: int) -> list[float]:
    """Round numbers within a range: steps of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / wanted
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-6), math.floor(high / step + 1e-6)
    return [number * step for number in range(first, last + 1)]


def tick_text(value: float, step: float, kind: Kind) -> str:
    """A number of an axis whose ticks are ``step`` apart."""
    if kind == "share":
        value, step = value * 100, step * 100
    if abs(value) < step * 1e-6:
        text = "0"
    elif kind == "tokens" or abs(value) >= 1000:
        text = _prefixed(value, step)
    elif step < 1e-5:
        text = f"{value:.1e}"
    else:
        text = f"{value:.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"
    return text.replace("-", "\u2212") + ("%" if kind == "share" else "")


def _prefixed(value: float, step: float) -> str:
    """``1.25 M``, with as many digits as neighbours differ in: a reader may zoom far into a long run."""
    size, unit = next(((size, unit) for size, unit in PREFIXES if abs(value) >= size), (1.0, ""))
    text = f"{value / size:.{max(0, -math.floor(math.log10(step / size) + 1e-9))}f}"
    return f"{text.rstrip('0').rstrip('.') if '.' in text else text} {unit}".rstrip()


def frame_of(plot: Plot) -> Frame:
    x, y = _range_of(plot, 0), _range_of(plot, 1)
    texts = [text for _, text in _labels(y, plot.y, _rows(plot.height))]
    named = [item for item in plot.series if item.style in ("line", "held_out") and len(item.points)]
    names = [short(item.label) for item in named] if _has_names(plot) else []
    right = max((len(name) for name in names), default=0) * (LETTER + 0.4)
    left = 32.0 + LETTER * max(FEWEST_LETTERS, *(len(text) for text in texts))
    top = 20.0 if plot.marks else 10.0
    return Frame(x, y, left, top, WIDTH - 10.0 - right, plot.height - 44.0)


def _rows(height: float) -> int:
    return max(3, round(height / 58))


def _labels(span: tuple[float, float], axis: Axis, wanted: int) -> list[tuple[float, str]]:
    values = ticks(*span, wanted)
    step = values[1] - values[0] if len(values) > 1 else max(abs(span[1] - span[0]), 1e-12)
    return [(value, tick_text(value, step, axis.kind)) for value in values]


def _range_of(plot: Plot, column: int) -> tuple[float, float]:
    axis = (plot.x, plot.y)[column]
    if axis.limits:
        return axis.limits
    ends = [(item.left, item.right) if column == 0 else (item.low, item.high) for item in plot.series]
    known = [item.points[:, column] for item in plot.series] + [end for pair in ends for end in pair if end is not None]
    values = np.concatenate([*known, [0.0]] if plot.origin or axis.from_zero else known)
    values = values[np.isfinite(values)]
    if not len(values):
        return (0.0, 1.0)
    low, high = float(values.min()), float(values.max())
    if high - low < 1e-12 * max(1.0, abs(high)):
        low, high = low - 0.5 * max(abs(low), 1e-6), high + 0.5 * max(abs(high), 1e-6)
    margin = 0.0 if column == 0 and axis.kind == "tokens" else (0.08 if plot.origin else 0.05) * (high - low)
    return (low if axis.from_zero and low >= 0 else low - margin, high + margin)


def _has_names(plot: Plot) -> bool:
    runs = {item.run for item in plot.series if item.run >= 0}
    return 1 < len(runs) <= MOST_NAMES


def _panel(plot: Plot, clip: str) -> Iterator[str]:
    frame = frame_of(plot)
    yield from _axes(plot, frame)
    yield from _marks(plot, frame)
    width, height = frame.right - frame.left + 12, frame.bottom - frame.top + 6
    box = f'x="{frame.left - 6:.1f}" y="{frame.top - 3:.1f}" width="{width:.1f}" height="{height:.1f}"'
    yield f'<clipPath id="{clip}"><rect {box}/></clipPath><g clip-path="url(#{clip})">'
    for item in plot.series:
        if len(item.points) and not (item.style == "raw" and is_crowded(plot.series)):
            yield f'<g class="series {item.style} {run_classes(item.run)}">{"".join(_drawn(item, plot, frame))}</g>'
    yield "</g>"
    if plot.origin:
        x, y = frame.place(np.zeros((1, 2)))[0]
        yield f'<circle class="origin" cx="{x:.1f}" cy="{y:.1f}" r="4"/>'
        yield f'<text class="name ink" x="{x + 7:.1f}" y="{y + 16:.1f}">{escape(plot.origin)}</text>'
    if any(item.style in ("path", "goal") for item in plot.series):
        yield from _names_beside(plot, frame)
    elif _has_names(plot):
        yield from _names_right(plot, frame)


def _axes(plot: Plot, frame: Frame) -> Iterator[str]:
    for value, text in _labels(frame.y, plot.y, _rows(plot.height)):
        y = frame.place(np.array([[frame.x[0], value]]))[0, 1]
        zero = " zero" if plot.origin and text == "0" else ""
        yield f'<path class="grid{zero}" d="M{frame.left:.1f} {y:.1f}H{frame.right:.1f}"/>'
        yield f'<text class="tick" text-anchor="end" x="{frame.left - 6:.1f}" y="{y + 4:.1f}">{text}</text>'
    for value, text in _labels(frame.x, plot.x, 5):
        x = frame.place(np.array([[value, frame.y[0]]]))[0, 0]
        if plot.origin and text == "0":
            yield f'<path class="grid zero" d="M{x:.1f} {frame.top:.1f}V{frame.bottom:.1f}"/>'
        yield f'<text class="tick" text-anchor="middle" x="{x:.1f}" y="{frame.bottom + 17:.1f}">{text}</text>'
    middle = (frame.left + frame.right) / 2
    low = f'x="{middle:.1f}" y="{plot.height - 8:g}"'
    yield f'<text class="axis" text-anchor="middle" {low}>{escape(plot.x.label)}</text>'
    centre = (frame.top + frame.bottom) / 2
    yield (
        f'<text class="axis" text-anchor="middle" transform="translate(12 {centre:.1f}) rotate(-90)">'
        f"{escape(plot.y.label)}</text>"
    )


def _marks(plot: Plot, frame: Frame) -> Iterator[str]:
    last = -math.inf
    for mark in sorted(plot.marks, key=lambda mark: mark.x):
        if not frame.x[0] <= mark.x <= frame.x[1]:
            continue
        x = frame.place(np.array([[mark.x, frame.y[0]]]))[0, 0]
        letter = ""
        if x - last >= 10:  # a later one is told by its line alone: letters do not cover each other
            letter = f'<text class="name" text-anchor="middle" x="{x:.1f}" y="{frame.top - 5:.1f}">{mark.symbol}</text>'
            last = x
        yield (
            f'<g class="mark {run_classes(mark.run)}"><title>{escape(mark.text)}</title>'
            f'<path d="M{x:.1f} {frame.top:.1f}V{frame.bottom:.1f}"/>{letter}</g>'
        )


def _drawn(item: Series, plot: Plot, frame: Frame) -> Iterator[str]:
    curve = item.points if item.style in ("path", "front", "goal") else decimate(item.points, BUCKETS)
    places = frame.place(curve)
    if item.style == "goal":
        yield from _goal(item, places, frame)
        return
    if not is_crowded(plot.series):
        yield _band(item, frame)
    if item.style == "crossed":
        yield f'<path class="crosses" d="{"".join(f"M{x:.1f} {y:.1f}{CROSS}" for x, y in places)}"/>'
    elif len(places) > 1:
        yield f'<path class="curve" d="{_steps(places) if item.style == "front" else _line(places)}"/>'
    if item.style in ("held_out", "path") and _dots_of(plot) <= MOST_DOTS:
        yield f'<path class="dots" d="{"".join(f"M{x:.1f} {y:.1f}h0" for x, y in places.tolist())}"/>'
    if item.style == "path":
        yield _end(places[-1], item.run)
        yield from _cross(item, places, frame)


def is_crowded(series: Iterable[Series]) -> bool:
    """So many runs that noise and bands would hide the curves, and are not drawn."""
    return len({item.run for item in series if item.run >= 0 and len(item.points)}) > MOST_RAW


def _dots_of(plot: Plot) -> int:
    return sum(len(item.points) for item in plot.series if item.style in ("held_out", "path"))


def _end(place: FloatArray, run: int) -> str:
    return f'<path class="end" transform="translate({place[0]:.1f} {place[1]:.1f})" d="{symbol(run)}"/>'


def _goal(item: Series, places: FloatArray, frame: Frame) -> Iterator[str]:
    """A planned point: an open marker with the cross of its intervals."""
    yield from _cross(item, places, frame)
    yield f'<circle class="open" cx="{places[-1, 0]:.1f}" cy="{places[-1, 1]:.1f}" r="5"/>'


def _cross(item: Series, places: FloatArray, frame: Frame) -> Iterator[str]:
    """Intervals of the last point, where there are any."""
    x, y = item.points[-1]
    if item.left is not None and item.right is not None and len(item.left) == 1:
        (a, _), (b, _) = frame.place(np.array([[item.left[0], y], [item.right[0], y]]))
        yield f'<path class="interval" d="M{a:.1f} {places[-1, 1]:.1f}H{b:.1f}"/>'
    if item.low is not None and item.high is not None and len(item.low) == 1:
        (_, a), (_, b) = frame.place(np.array([[x, item.low[0]], [x, item.high[0]]]))
        yield f'<path class="interval" d="M{places[-1, 0]:.1f} {a:.1f}V{b:.1f}"/>'


def _band(item: Series, frame: Frame) -> str:
    if item.low is None or item.high is None or len(item.low) != len(item.points) or len(item.points) < 2:
        return ""
    x = item.points[:, 0]
    upper = frame.place(np.column_stack([x, item.high]))
    lower = frame.place(np.column_stack([x, item.low]))[::-1]
    return f'<path class="band" d="{_line(np.concatenate([upper, lower]))}Z"/>'


def _line(places: FloatArray) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places.tolist())


def _steps(places: FloatArray) -> str:
    """To the right, then up: between two points of a front the lower one holds."""
    first, *rest = places.tolist()
    return f"M{first[0]:.1f} {first[1]:.1f}" + "".join(f"H{x:.1f}V{y:.1f}" for x, y in rest)


def _names_right(plot: Plot, frame: Frame) -> Iterator[str]:
    """Names at the right end of the curves, pushed apart so that none covers another."""
    ends: dict[int, tuple[float, str]] = {}
    for item in plot.series:
        if item.style in ("line", "held_out") and len(item.points) and item.run >= 0:
            last = float(item.points[-1, 1])
            ends[item.run] = (last, short(item.label) + (" ↑" if last > frame.y[1] else ""))
    heights = {run: frame.place(np.array([[frame.x[1], y]]))[0, 1] for run, (y, _) in ends.items()}
    wanted = sorted(
        (round(float(min(frame.bottom + 2, max(frame.top - 2, height))), 1), run, ends[run][1])
        for run, height in heights.items()
    )
    places: list[float] = []
    for y, _, _ in wanted:
        places.append(max(y, places[-1] + 14 if places else frame.top))
    surplus = max(0.0, places[-1] - frame.bottom) if places else 0.0
    for place, (_, run, text) in zip(places, wanted, strict=True):
        yield _name(frame.right + 5, place - surplus + 4, text, run, "start")


def _names_beside(plot: Plot, frame: Frame) -> Iterator[str]:
    """Names beside the last points, each at the first place where it covers no other name and no marker; a name without
    such a place is left to the legend. Of many runs only the outermost are named: least to the right, and highest.
    """
    ends = [(frame.place(item.points[-1:])[0], item) for item in plot.series if item.style in ("path", "goal")]
    outermost = min(x for (x, _), _ in ends), min(y for (_, y), _ in ends)
    taken: list[Box] = [(x - 6, y - 6, x + 6, y + 6) for (x, y), _ in ends]
    taken += [box for (x, y), item in ends for box in _interval_boxes(item, (x, y), frame)]
    origin = frame.place(np.zeros((1, 2)))[0]
    taken.append((origin[0] - 5, origin[1] - 5, origin[0] + 8 + LETTER * len(plot.origin), origin[1] + 20))
    for (x, y), item in ends:
        if len(ends) > MOST_NAMES and x > outermost[0] and y > outermost[1]:
            continue
        text = short(item.label)
        width = LETTER * len(text) + 3
        for dx, dy in PLACES:
            left = x + dx if dx > 0 else x + dx - width
            box = (left, y + dy - 11, left + width, y + dy + 3)
            inside = box[0] >= frame.left and box[2] <= WIDTH and box[1] >= 0 and box[3] <= frame.bottom
            if inside and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                yield _name(x + dx, y + dy, text, item.run, "start" if dx > 0 else "end")
                break


def _interval_boxes(item: Series, place: tuple[float, float], frame: Frame) -> Iterator[Box]:
    """What the cross of intervals at the end of a path covers."""
    x, y = item.points[-1]
    if item.left is not None and item.right is not None:
        (a, _), (b, _) = frame.place(np.array([[item.left[0], y], [item.right[0], y]]))
        yield (a, place[1] - 1, b, place[1] + 1)
    if item.low is not None and item.high is not None:
        (_, a), (_, b) = frame.place(np.array([[x, item.low[0]], [x, item.high[0]]]))
        yield (place[0] - 1, b, place[0] + 1, a)


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _name(x: float, y: float, text: str, run: int, anchor: str) -> str:
    return f'<text class="name {run_classes(run)}" text-anchor="{anchor}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'


def _stylesheet() -> str:
    return (files("cpt.report") / "templates" / "chart.css").read_text(encoding="utf-8")

"""How a figure looks and becomes SVG text: colours, axes, labels, curves of any length. Knows nothing of runs.

Each figure is drawn narrow enough to be read on a phone and scales up. Colours are not numbers but CSS variables with
a fallback, so the same SVG is legible on light, dark and paper. The same input gives the same bytes: ids are salted
with the figure's name and no date is written. A curve costs at most four points per horizontal pixel: minimum and
maximum of each bucket survive, so no spike is lost.
"""

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from cpt.report.collect import FloatArray
from cpt.report.summary import scaled

WIDTH, HEIGHT, FONT = 460.0, 290.0, 12.0  # SVG units; at 360 px on a phone the letters are 9 px tall
BUCKETS = 220  # horizontal resolution of a curve
LABEL_CHARS = 16

# Okabe-Ito hues, told apart under all common colour blindness; markers carry the same difference without colour.
LIGHT = {
    "ink": "#1d2330",
    "soft": "#646e80",
    "grid": "#e3e6eb",
    "page": "#ffffff",
    "general": "#5b6b86",
    "domain": "#b07d00",
}
DARK = {
    "ink": "#e8eaee",
    "soft": "#9aa4b5",
    "grid": "#2c3340",
    "page": "#14181f",
    "general": "#93a3bf",
    "domain": "#e3b341",
}
RUNS_LIGHT = ("#0068b0", "#cf4e00", "#00835c", "#a4508b", "#8a6d00", "#3a8fc7")
RUNS_DARK = ("#5aaaf0", "#ff8a4a", "#3fcf9f", "#e594cb", "#d9c04a", "#8fd0ff")
MARKERS = ("o", "s", "^", "D", "v", "P")
# matplotlib knows no CSS variable: each role is drawn in a colour nobody uses and exchanged in the finished text.
ROLES = (*LIGHT, *(f"run{index}" for index in range(len(RUNS_LIGHT))))
STAND_INS = {role: f"#0102{index:02x}" for index, role in enumerate(ROLES, start=16)}
THEMES = {
    "light": LIGHT | {f"run{i}": c for i, c in enumerate(RUNS_LIGHT)},
    "dark": DARK | {f"run{i}": c for i, c in enumerate(RUNS_DARK)},
}


@dataclass(frozen=True)
class Chart:
    """One figure; ``svg`` is ready to stand in a page, :func:`standalone` makes a file of it."""

    name: str
    title: str
    caption: str
    svg: str


@dataclass(frozen=True)
class EndLabel:
    """The name of a curve, wanted at the curve's last point."""

    x: float
    y: float
    text: str
    colour: str


def end_label(curve: FloatArray, text: str, colour: str) -> EndLabel:
    return EndLabel(float(curve[-1, 0]), float(curve[-1, 1]), text, colour)


def standalone(chart: Chart) -> str:
    """The figure as an SVG file of its own, with the colours of both themes and a background."""
    light, dark = (
        ";".join(f"--{role}:{colour}" for role, colour in THEMES[theme].items()) for theme in ("light", "dark")
    )
    style = f"<style>svg{{{light}}}@media(prefers-color-scheme:dark){{svg{{{dark}}}}}</style>"
    background = '<rect width="100%" height="100%" style="fill:var(--page)"/>'
    return re.sub(
        r"^<svg([^>]*)>", rf'<svg xmlns="http://www.w3.org/2000/svg"\1>{style}{background}', chart.svg, count=1
    )


def decimate(curve: FloatArray, buckets: int = BUCKETS) -> FloatArray:
    """At most ``4 * buckets`` points [N, 2] of a curve sorted by x: first, lowest, highest and last of every bucket of
    equal width."""
    if len(curve) <= 4 * buckets:
        return curve
    x, y = curve.T
    edges = np.searchsorted(x, np.linspace(x[0], x[-1], buckets + 1)[1:-1])
    parts = [part for part in np.split(np.arange(len(x)), edges) if len(part)]
    kept = {int(i) for part in parts for i in (part[0], part[np.argmin(y[part])], part[np.argmax(y[part])], part[-1])}
    return curve[sorted(kept)]


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
    keep = np.isfinite(x) & np.isfinite(y)
    return np.column_stack([x[keep], y[keep]])


def tick(value: float, _: object = None) -> str:
    """An axis number: ``1.2 M``, ``400 k``, ``0.0002``."""
    return re.sub(r"\.0+(?= )|(\.\d*?[1-9])0+(?= )", r"\1", scaled(value)) if abs(value) >= 1000 else f"{value:.3g}"


def ink(role: str) -> str:
    return STAND_INS[role]


def run_colour(index: int) -> str:
    return STAND_INS[f"run{index % len(RUNS_LIGHT)}"]


def run_marker(index: int) -> str:
    return MARKERS[index % len(MARKERS)]


def short(text: str) -> str:
    return text if len(text) <= LABEL_CHARS else f"{text[: LABEL_CHARS - 1]}…"


def blank(x_label: str, y_label: str, *, height: float = HEIGHT, grid: Literal["x", "y"] = "y") -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH / 72, height / 72), layout="constrained")
    axes = figure.add_subplot()
    _dress(axes, x_label, y_label, grid)
    figure.patch.set_visible(False)
    return figure, axes


def stacked(x_label: str, y_labels: Sequence[str]) -> tuple[Figure, list[Axes]]:
    """Panels under one another over one horizontal axis, named under the lowest."""
    figure = Figure(figsize=(WIDTH / 72, HEIGHT * 0.75 * len(y_labels) / 72), layout="constrained")
    panels: list[Axes] = list(figure.subplots(len(y_labels), sharex=True, squeeze=False)[:, 0])
    for axes, y_label in zip(panels, y_labels, strict=True):
        _dress(axes, x_label, y_label, "y")
        axes.label_outer()
    figure.patch.set_visible(False)
    return figure, panels


def _dress(axes: Axes, x_label: str, y_label: str, grid: Literal["x", "y"]) -> None:
    axes.set_xlabel(x_label, color=ink("soft"), fontsize=FONT)
    axes.set_ylabel(y_label, color=ink("soft"), fontsize=FONT)
    axes.tick_params(length=0, pad=5, labelsize=FONT, labelcolor=ink("soft"))
    axes.patch.set_visible(False)
    axes.grid(axis=grid, color=ink("grid"), linewidth=1)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)
    if x_label == "tokens seen":
        axes.xaxis.set_major_formatter(FuncFormatter(tick))
        axes.xaxis.set_major_locator(MaxNLocator(5))


def write_beside(axes: Axes, place: tuple[float, float], text: str, **style: Any) -> None:
    """Text next to a data point; ``offset`` in points. Maths is off: a run called ``a$b$`` is a name, not a formula."""
    axes.annotate(
        short(text),
        place,
        xycoords=style.get("coordinates", "data"),
        xytext=style.get("offset", (0, 0)),
        textcoords="offset points",
        ha=style.get("side", "left"),
        va=style.get("level", "baseline"),
        color=style["colour"],
        fontsize=FONT,
        fontweight="bold" if style.get("bold") else "normal",
        parse_math=False,
        annotation_clip=False,
        zorder=6,
    )


def label_right(axes: Axes, labels: Sequence[EndLabel]) -> None:
    """Names at the right end of the curves, pushed apart so that none covers another; a single curve needs none."""
    if len(labels) < 2:
        return
    low, high = axes.get_ylim()
    gap = (high - low) * (FONT * 1.25) / (HEIGHT * 0.76)
    ordered = sorted(labels, key=lambda label: label.y)
    places: list[float] = []
    for label in ordered:
        places.append(max(min(max(label.y, low), high), places[-1] + gap if places else low))
    surplus = max(0.0, places[-1] - high)
    for label, place in zip(ordered, places, strict=True):
        at = (1.0, place - surplus)
        write_beside(
            axes,
            at,
            label.text,
            colour=label.colour,
            coordinates=("axes fraction", "data"),
            offset=(6, 0),
            level="center",
            bold=True,
        )


def name_ends(axes: Axes, labels: Sequence[EndLabel]) -> None:
    """Names beside the last point of each path: to the left of points in the right half, so that they stay inside."""
    left, right = axes.get_xlim()
    for label in labels:
        on_right = (label.x - left) > 0.6 * (right - left)
        offset, side = ((-10, 9), "right") if on_right else ((10, 9), "left")
        write_beside(axes, (label.x, label.y), label.text, colour=label.colour, offset=offset, side=side, bold=True)


def to_chart(name: str, title: str, caption: str, figure: Figure) -> Chart:
    stem = re.sub(r"[^A-Za-z0-9_-]+", "_", name)
    return Chart(name=stem, title=title, caption=caption, svg=_to_svg(figure, stem, title))


def _to_svg(figure: Figure, name: str, title: str) -> str:
    buffer = StringIO()
    salt = {"svg.hashsalt": f"cpt-{name}", "svg.fonttype": "none", "font.family": "sans-serif"}
    with matplotlib.rc_context(salt), warnings.catch_warnings():
        # The reader's browser has the fonts; here they only give the widths.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return _for_a_page(buffer.getvalue(), name, title)


def _for_a_page(svg: str, name: str, title: str) -> str:
    """Only the ``<svg>`` element: ids unique in the page, no namespaces or metadata (they hold web addresses), colours
    as variables."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(
        r'<svg[^>]*viewBox="([^"]*)"[^>]*>',
        f'<svg viewBox="\\1" role="img" aria-label="{_attribute(title)}">',
        svg,
        count=1,
    )
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r"font-family: [^;\"]*", "font-family: system-ui, sans-serif", svg)
    for role, stand_in in STAND_INS.items():
        svg = svg.replace(stand_in, f"var(--{role}, {THEMES['light'][role]})")
    return re.sub(r' (?:d|x|y|points|transform)="[^"]*"', lambda match: _two_decimals(match.group(0)), svg).strip()


def _two_decimals(coordinates: str) -> str:
    return re.sub(r"(\d+\.\d\d)\d+", r"\1", coordinates)


def _attribute(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")

"""How a matplotlib figure of the planner and the data tools becomes SVG text for a page. Knows nothing of runs.

Each figure is drawn narrow enough to be read on a phone and scales up. Colours are not numbers but CSS variables with
a fallback, so the same SVG is legible on light, dark and paper. The same input gives the same bytes: ids are salted
with the figure's name and no date is written. The report's own figures need no matplotlib: :mod:`cpt.report.plot_svg`.
"""

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cpt.report.collect import FloatArray
from cpt.report.palette import LIGHT, RUNS_LIGHT, THEMES, short
from cpt.report.plots import Chart

WIDTH, HEIGHT, FONT = 460.0, 290.0, 12.0  # SVG units; at 360 px on a phone the letters are 9 px tall

# matplotlib knows no CSS variable: each role is drawn in a colour nobody uses and exchanged in the finished text.
ROLES = (*LIGHT, *(f"run{index}" for index in range(len(RUNS_LIGHT))))
STAND_INS = {role: f"#0102{index:02x}" for index, role in enumerate(ROLES, start=16)}


@dataclass(frozen=True)
class EndLabel:
    """The name of a curve, wanted at the curve's last point."""

    x: float
    y: float
    text: str
    colour: str


def end_label(curve: FloatArray, text: str, colour: str) -> EndLabel:
    return EndLabel(float(curve[-1, 0]), float(curve[-1, 1]), text, colour)


def ink(role: str) -> str:
    return STAND_INS[role]


def run_colour(index: int) -> str:
    return STAND_INS[f"run{index % len(RUNS_LIGHT)}"]


def blank(x_label: str, y_label: str, *, height: float = HEIGHT) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH / 72, height / 72), layout="constrained")
    figure.patch.set_visible(False)
    axes = figure.add_subplot()
    axes.set_xlabel(x_label, color=ink("soft"), fontsize=FONT)
    axes.set_ylabel(y_label, color=ink("soft"), fontsize=FONT)
    axes.tick_params(length=0, pad=5, labelsize=FONT, labelcolor=ink("soft"))
    axes.patch.set_visible(False)
    axes.grid(axis="y", color=ink("grid"), linewidth=1)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return figure, axes


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
        axes.annotate(
            short(label.text),
            (1.0, place - surplus),
            xycoords=("axes fraction", "data"),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            color=label.colour,
            fontsize=FONT,
            fontweight="bold",
            parse_math=False,  # a run called a$b$ is a name, not a formula
            annotation_clip=False,
            zorder=6,
        )


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

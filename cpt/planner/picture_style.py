"""How the planner's figures look, and how they become files: palette, panels, labels that cover nothing, PNG and SVG.

The palette is the report's (:mod:`cpt.report.palette`), on white: these files stand alone, where no page gives colours.
Owns that the same facts give the same bytes. Refuses to know what is drawn.
"""

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter
from matplotlib.transforms import Bbox

from cpt.planner.fitting import FloatArray
from cpt.planner.wording import Facts, ends
from cpt.report.palette import LIGHT, MARKERS, RUNS_LIGHT, tick
from cpt.rundir import write_atomic

INK, SOFT, GRID, PAGE = (LIGHT[role] for role in ("ink", "soft", "grid", "page"))
BEST, LIMIT, GREY = RUNS_LIGHT[0], RUNS_LIGHT[1], "#b9c0cb"
SIDES = {"general": LIGHT["general"], "domain": LIGHT["domain"]}
WIDTH, FONT = 10.0, 11.0  # inches and points: 15 px letters in a picture of 1000 px
DPI = 150
UNIT = "nats per token"
# Marker and name of what was held out.
KINDS = {"share": ("o", "by share"), "tokens": ("^", "by tokens"), "params": ("s", "by model size")}
# Set while drawing and while writing, never for the process: a figure looks the same under any user's settings. Without
# maths, a source called ``a$b$`` is a name and no formula.
LOOK = {
    "font.family": "DejaVu Sans",
    "font.size": FONT,
    "text.parse_math": False,
    "axes.unicode_minus": False,
    "hatch.linewidth": 0.8,
    "hatch.color": GREY,
    "svg.fonttype": "none",
    "svg.hashsalt": "cpt-plan",
}


@dataclass(frozen=True)
class Label:
    """A text wanted near a data point."""

    x: float
    y: float
    text: str
    colour: str = INK


def styled(draw: Callable[[Facts], Figure]) -> Callable[[Facts], Figure]:
    """Draws under LOOK."""

    @wraps(draw)
    def drawn(facts: Facts) -> Figure:
        with matplotlib.rc_context(LOOK):
            return draw(facts)

    return drawn


def save_figure(figure: Figure, path_without_suffix: Path) -> tuple[Path, Path]:
    """Writes ``.png`` and ``.svg``, each whole or not at all, the same bytes for the same figure.

    Raises:
        OSError: the folder is missing, read-only or full.
    """
    metadata: dict[str, dict[str, None]] = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}
    written = []
    for suffix, fields in metadata.items():
        buffer = BytesIO()
        with matplotlib.rc_context(LOOK):
            figure.savefig(buffer, format=suffix, dpi=DPI, metadata=fields, facecolor=PAGE)
        # Names may hold dots ("plan-7.5"): the suffix is added, not exchanged.
        path = path_without_suffix.with_name(f"{path_without_suffix.name}.{suffix}")
        write_atomic(path, buffer.getvalue())
        written.append(path)
    return written[0], written[1]


def sheet(title: str, subtitle: str, height: float, *, between: float = 0.03) -> Figure:
    """An empty figure with its message, and below it smaller what it holds for."""
    figure = Figure(figsize=(WIDTH, height), facecolor=PAGE)
    FigureCanvasAgg(figure)
    top = 0.14
    for text, columns, size, style in ((title, 84, FONT * 1.25, "bold"), (subtitle, 112, FONT, "normal")):
        lines = textwrap.wrap(text, columns)
        figure.text(
            0.012, 1 - top / height, "\n".join(lines), ha="left", va="top", fontsize=size, fontweight=style,
            color=INK if style == "bold" else SOFT, linespacing=1.3,
        )  # fmt: skip
        top += len(lines) * size * 1.4 / 72
    below = (0, 0, 1, 1 - (top + 0.06) / height)
    figure.set_layout_engine(ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08, wspace=between, hspace=0.03, rect=below))
    return figure


def dress(axes: Axes, x_label: str, y_label: str, *, title: str = "", grid: Literal["x", "y", "both"] = "y") -> None:
    """Labels, a light grid along one axis, no frame."""
    axes.set_xlabel(x_label, color=SOFT)
    axes.set_ylabel(y_label, color=SOFT)
    axes.set_title(title, loc="left", color=INK, fontsize=FONT * 1.05)
    axes.tick_params(length=0, pad=5, labelcolor=SOFT, which="both")
    axes.grid(axis=grid, color=GRID, linewidth=1)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)


def in_percent(axes: Axes) -> None:
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=None, symbol="%"))


def hatch_untrusted(axes: Axes, trusted: Any) -> bool:
    """Hatches the shares outside the ends of ``trusted``; whether there are any."""
    low, high = ends(trusted)
    outside = [edges for edges in ((0.0, low), (high, 1.0)) if edges[1] - edges[0] > 0.002]
    for edges in outside:
        axes.axvspan(*edges, facecolor="none", edgecolor=GREY, hatch="////", linewidth=0, zorder=0)
    return bool(outside)


def in_counts(axes: Axes) -> None:
    """A logarithmic axis of tokens or parameters: 200 M, 1 B."""
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    wide = high / low > 30
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0), numticks=8))
    axes.xaxis.set_major_formatter(FuncFormatter(tick))
    axes.xaxis.set_minor_formatter(NullFormatter())


def legend(figure: Figure, handles: Sequence[Any], columns: int = 4) -> None:
    """Below all panels, where it covers nothing."""
    if handles:
        figure.legend(handles=list(handles), loc="outside lower left", ncols=columns, frameon=False, labelcolor=INK)


def marker(index: int) -> str:
    return MARKERS[index % len(MARKERS)]


def no_values(axes: Axes, text: str = "no values") -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=SOFT)
    axes.set_xticks([])
    axes.set_yticks([])


def few_ticks(axes: Axes, count: int = 6) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(count))


def place_labels(axes: Axes, labels: Sequence[Label], lines: Sequence[FloatArray]) -> None:
    """Each text near its point where it hides neither the ``lines`` [N, 2], nor a point, nor a text placed before.

    A text that had to go further away gets a thin line to its point. Call it when limits and layout are final.
    """
    scale = axes.figure.dpi / 72
    inside = axes.get_window_extent()
    points = axes.transData.transform(np.array([(label.x, label.y) for label in labels]).reshape(-1, 2))
    drawn = np.concatenate([_dense(axes.transData.transform(line), scale) for line in lines])
    taken: list[Bbox] = []
    for label, anchor in zip(labels, points, strict=True):
        text = axes.annotate(
            label.text, (label.x, label.y), xytext=(0, 0), textcoords="offset points", color=label.colour, zorder=7,
            bbox={"facecolor": PAGE, "edgecolor": "none", "alpha": 0.75, "pad": 0.5}, fontsize=FONT * 0.95,
        )  # fmt: skip
        boxes = _places(anchor, text.get_window_extent(), scale)
        box = min(boxes, key=lambda box: _cost(box, _leader(anchor, box), points, drawn, inside, taken))
        taken.append(box)
        text.xyann = ((box.x0 - anchor[0]) / scale, (box.y0 - anchor[1]) / scale)
        leader = _leader(anchor, box)
        if np.hypot(*(leader[-1] - anchor)) > 14 * scale:
            drawn = np.concatenate([drawn, leader])
            axes.plot(*axes.transData.inverted().transform(leader).T, color=label.colour, linewidth=0.7, zorder=4)


def _dense(line: FloatArray, scale: float) -> FloatArray:
    """A path in pixels with a point every two points of type, so that none of it is overlooked."""
    line = line[np.isfinite(line).all(axis=1)]
    if len(line) < 2:
        return line
    along = np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(line, axis=0).T))])
    at = np.arange(0.0, min(along[-1], 1e5), 2 * scale)
    return np.column_stack([np.interp(at, along, column) for column in line.T])


def _places(anchor: FloatArray, size: Bbox, scale: float) -> list[Bbox]:
    """Boxes of a text's size around a point, the nearest ring first."""
    boxes = []
    for radius in (9, 18, 30, 44, 60):
        level = [0, 180] if radius == 9 else []  # a long level line to a point would pass for a line of the grid
        for angle in np.deg2rad([40, 140, 90, *level, -40, -140, -90, 65, 115, -65, -115]):
            across, up = np.cos(angle), np.sin(angle)
            # The box's side or corner that faces the point lies on the ring.
            x = anchor[0] + across * radius * scale + (np.rint(across) - 1) / 2 * size.width
            y = anchor[1] + up * radius * scale + (np.rint(up) - 1) / 2 * size.height
            boxes.append(Bbox.from_bounds(x, y, size.width, size.height))
    return boxes


def _leader(anchor: FloatArray, box: Bbox) -> FloatArray:
    """Points [20, 2] from a data point to the nearest point of its text."""
    near = np.clip(anchor, box.min, box.max)
    points: FloatArray = anchor + np.linspace(0, 1, 20)[:, None] * (near - anchor)
    return points


def _cost(
    box: Bbox, leader: FloatArray, points: FloatArray, drawn: FloatArray, inside: Bbox, taken: Sequence[Bbox]
) -> float:
    """What a text in this box would hide: texts and the frame's edge weigh most, then points, then lines; then how far
    it is from its own point."""
    wide = box.padded(3)
    out = box.x0 < inside.x0 or box.x1 > inside.x1 or box.y0 < inside.y0 or box.y1 > inside.y1
    clashes = sum(wide.overlaps(other) or _covered(other, leader) > 0 for other in taken)
    away = float(np.hypot(*(leader[-1] - leader[0])))
    return 1000 * (clashes + int(out)) + 300 * _covered(box.padded(8), points) + 5 * _covered(wide, drawn) + away / 4


def _covered(box: Bbox, points: FloatArray) -> int:
    return int(((points >= box.min) & (points <= box.max)).all(axis=1).sum())

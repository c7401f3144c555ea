"""The figure of ``cpt plan predict-curve``: measured, fitted and predicted losses above, the learning rates below.

Refuses to compute losses: it draws the facts of :func:`cpt.planner.predict_curve.predict_curve`.
"""

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from cpt.planner.picture_style import INK, SOFT, UNIT, dress, few_ticks, legend, sheet, styled
from cpt.planner.wording import Facts
from cpt.report.palette import RUNS_LIGHT, tick

STEEP = 0.04  # first part of a curve that may leave the picture: right after the warm-up the loss falls steeply


@styled
def draw_curve(facts: Facts) -> Figure:
    """Dots: measured losses; thin lines: the law fitted on them; thick line: the schedule that was asked for."""
    title = f"{facts['schedule']} is predicted to end at {facts['loss'][-1]:.3f} {UNIT}"
    place = f"law {facts['law']}; mean absolute error {facts['fit']['mae']:.4f} on the curves it was fitted on"
    figure = sheet(title, place, height=6.2)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    dress(upper, "", f"loss ({UNIT})")
    dress(lower, "step", "learning rate")
    handles = []
    for index, one in enumerate(facts["measured"]):
        colour = RUNS_LIGHT[index % len(RUNS_LIGHT)]
        every = max(1, len(one["steps"]) // 60)
        upper.plot(one["steps"][::every], one["loss"][::every], ".", color=colour, markersize=5)
        upper.plot(one["steps"], one["fitted"], color=colour, linewidth=1.2)
        _rates(lower, one, colour, 1.2)
        handles.append(Line2D([], [], color=colour, marker=".", linewidth=1.2, label=one["name"]))
    upper.plot(facts["steps"], facts["loss"], color=INK, linewidth=2.4)
    _rates(lower, facts, INK, 2.4)
    handles.append(Line2D([], [], color=INK, linewidth=2.4, label=f"predicted: {facts['schedule']}"))
    upper.set_ylim(*_window(facts))
    lower.set_ylim(bottom=0.0)
    lower.xaxis.set_major_formatter(FuncFormatter(tick))
    few_ticks(lower)
    legend(figure, handles)
    return figure


def _rates(axes: Axes, run: Facts, colour: str, width: float) -> None:
    """The rate at a run's rows, with the warm-up before them."""
    axes.plot([0, run["steps"][0]], [0, run["lr"][0]], color=SOFT, linewidth=0.8, linestyle=":")
    axes.plot(run["steps"], run["lr"], color=colour, linewidth=width)


def _window(facts: Facts) -> tuple[float, float]:
    """All losses but those right after the warm-up, with a margin."""
    curves = [facts["loss"], *(one["loss"] for one in facts["measured"])]
    late = [loss for curve in curves for loss in curve[int(STEEP * len(curve)) :]]
    margin = 0.05 * (max(late) - min(late)) or 0.05
    return min(late) - margin, max(late) + margin

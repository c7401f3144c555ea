import math
import xml.etree.ElementTree as ElementTree

import numpy as np
from matplotlib.figure import Figure

from cpt.report.drawing import (
    BUCKETS,
    STAND_INS,
    EndLabel,
    blank,
    decimate,
    label_right,
    running_mean,
    standalone,
    tick,
    to_chart,
)


def line(values: list[float]) -> np.ndarray:
    return np.column_stack([np.arange(len(values), dtype=np.float64), values])


def drawn(name: str = "a title") -> Figure:
    figure, axes = blank("tokens seen", "loss")
    axes.plot([0, 1.5e6], [0.00012345, 2])
    axes.set_ylim(0, 2)
    label_right(axes, [EndLabel(1, 2, name, STAND_INS["run0"]), EndLabel(1, 2, "other", STAND_INS["run1"])])
    return figure


def test_a_long_curve_keeps_every_spike_in_few_points() -> None:
    values = [2.0] * 100_000
    values[31_337], values[77_777] = 9.0, -9.0
    short = decimate(line(values))
    assert len(short) <= 4 * BUCKETS
    assert {9.0, -9.0} <= set(short[:, 1])
    assert (np.diff(short[:, 0]) > 0).all() and short[0, 0] == 0 and short[-1, 0] == 99_999


def test_a_short_curve_is_left_alone() -> None:
    curve = line([1.0, math.pi, 2.0])
    assert decimate(curve) is curve and running_mean(curve) is curve


def test_the_running_mean_of_a_constant_is_the_constant_to_the_ends() -> None:
    assert np.allclose(running_mean(line([3.0] * 500))[:, 1], 3.0)


def test_the_same_figure_gives_the_same_bytes() -> None:
    assert to_chart("x", "T", "", drawn()).svg == to_chart("x", "T", "", drawn()).svg


def test_colours_become_variables_and_ids_carry_the_figure_name() -> None:
    svg = to_chart("x", "T", "", drawn()).svg
    assert "var(--run0, #0068b0)" in svg and not any(colour in svg for colour in STAND_INS.values())
    assert 'id="x-' in svg and 'id="axes' not in svg
    assert "http" not in svg


def test_a_name_that_looks_like_markup_or_maths_is_drawn_as_text() -> None:
    svg = to_chart("x", "a <b> & c", "", drawn("$x_<i>$--><script>")).svg
    assert "<script" not in svg and "<i>" not in svg and "$x_&lt;i&gt;$" in svg


def test_a_figure_file_is_valid_xml_with_both_themes() -> None:
    text = standalone(to_chart("x", 'T "quoted"', "", drawn()))
    assert ElementTree.fromstring(text).tag == "{http://www.w3.org/2000/svg}svg"
    assert "prefers-color-scheme:dark" in text


def test_axis_numbers_are_short() -> None:
    assert [tick(value) for value in (0, 0.0002, 950, 400_000, 1_200_000, 1_250_000, 2e9)] == [
        "0", "0.0002", "950", "400 k", "1.2 M", "1.25 M", "2 B",
    ]  # fmt: skip

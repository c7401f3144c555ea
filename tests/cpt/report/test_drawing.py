"""matplotlib figures of the planner and the data tools as SVG for a page."""

import xml.etree.ElementTree as ElementTree

from matplotlib.figure import Figure

from cpt.report.drawing import STAND_INS, EndLabel, blank, label_right, to_chart
from cpt.report.plot_svg import standalone


def drawn(name: str = "a title") -> Figure:
    figure, axes = blank("tokens seen", "loss")
    axes.plot([0, 1.5e6], [0.00012345, 2])
    axes.set_ylim(0, 2)
    label_right(axes, [EndLabel(1, 2, name, STAND_INS["run0"]), EndLabel(1, 2, "other", STAND_INS["run1"])])
    return figure


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

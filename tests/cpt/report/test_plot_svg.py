"""Plots as SVG text: round ticks, names that cover nothing, text that stays text."""

import math
import re
import xml.etree.ElementTree as ElementTree
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpt.report.palette import DASHES, MARKERS, RUNS_LIGHT, tick
from cpt.report.plot_svg import BUCKETS, WIDTH, frame_of, plot_chart, run_classes, standalone, tick_text, ticks
from cpt.report.plots import Axis, Mark, Plot, Series


def curve(run: int, label: str, height: float, style: str = "line") -> Series:
    x = np.linspace(0, 1e6, 50)
    return Series(run, label, np.column_stack([x, np.full(50, height)]), style)  # type: ignore[arg-type]


def plotted(*series: Series, **fields: object) -> Plot:
    return Plot(Axis("tokens seen", "tokens"), Axis("loss"), series, **fields)  # type: ignore[arg-type]


def names(svg: str) -> list[tuple[float, float, str]]:
    found = re.findall(r'<text class="name[^"]*" text-anchor="(?:start|end)" x="([^"]+)" y="([^"]+)">([^<]*)', svg)
    return [(float(x), float(y), text) for x, y, text in found]


def test_axis_numbers_are_short() -> None:
    assert [tick(value) for value in (0, 0.0002, 950, 400_000, 1_200_000, 1_250_000, 2e9)] == [
        "0", "0.0002", "950", "400 k", "1.2 M", "1.25 M", "2 B",
    ]  # fmt: skip
    cases = [
        (0.0, 0.5, "number"),
        (-0.25, 0.05, "number"),
        (0.3, 0.1, "share"),
        (2e6, 1e6, "tokens"),
        (3e-6, 1e-6, "number"),
        (950, 50, "tokens"),
        (1.05e6, 5e4, "tokens"),
    ]
    expected = ["0", "\u22120.25", "30%", "2 M", "3.0e\u221206", "950", "1.05 M"]
    assert [tick_text(*case) for case in cases] == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(("low", "high"), [(1.2340e9, 1.2345e9), (123_400, 123_460), (999_990, 1_000_010)])
def test_ticks_of_a_far_zoom_differ(low: float, high: float) -> None:
    found = ticks(low, high, 5)
    texts = [tick_text(value, found[1] - found[0], "tokens") for value in found]
    assert len(set(texts)) == len(texts) > 2


@given(st.floats(-1e3, 1e3), st.floats(1e-3, 1e6), st.integers(3, 8))
def test_ticks_are_round_inside_the_range_and_neither_many_nor_few(low: float, span: float, wanted: int) -> None:
    found = ticks(low, low + span, wanted)
    assert 1 <= len(found) <= wanted + 1
    assert all(low - 1e-5 * span <= value <= low + span * 1.00001 for value in found)
    for before, later in pairwise(found):
        step = later - before
        factor = step / 10 ** math.floor(math.log10(step) + 1e-6)
        assert min(abs(factor - round_one) for round_one in (1, 2, 5)) < 1e-3


def test_names_at_the_right_end_do_not_cover_each_other() -> None:
    svg = plot_chart("x", "T", "", [plotted(*(curve(run, f"run {run}", 2.0) for run in range(8)))]).svg
    heights = sorted(y for _, y, _ in names(svg))
    assert len(heights) == 8
    assert all(b - a >= 13.9 for a, b in pairwise(heights))


def test_more_than_eight_runs_are_named_by_the_legend_only() -> None:
    assert names(plot_chart("x", "T", "", [plotted(*(curve(run, "r", run) for run in range(9)))]).svg) == []


def test_names_beside_the_ends_of_paths_cover_neither_names_nor_markers() -> None:
    ends = [(1.0, 1.0), (1.001, 1.0), (1.0, 1.001), (0.02, 0.01), (2.0, 1.5)]
    paths = [Series(n, f"run number {n}", np.array([(0.0, 0.0), end]), "path") for n, end in enumerate(ends)]
    plot = Plot(Axis("forgetting"), Axis("gain"), tuple(paths), origin="base", height=360)
    svg = plot_chart("x", "T", "", [plot]).svg
    boxes = []
    for anchor, x, y, text in re.findall(r'text-anchor="(start|end)" x="([^"]+)" y="([^"]+)">(run[^<]*)', svg):
        width = 6.7 * len(text)
        left = float(x) if anchor == "start" else float(x) - width
        boxes.append((left, float(y) - 11, left + width, float(y) + 3))
    assert len(boxes) >= 3
    for i, a in enumerate(boxes):
        assert a[0] >= 0 and a[2] <= WIDTH
        assert not any(a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3] for b in boxes[i + 1 :])


def test_what_leaves_the_frame_is_cut_off_at_its_edge() -> None:
    wild = np.array([(0.0, 2.0), (1.0, 1e9), (2.0, 2.0)])
    plot = Plot(Axis("x"), Axis("y", limits=(1.0, 3.0)), (Series(0, "a", wild),))
    frame = frame_of(plot)
    svg = plot_chart("x", "T", "", [plot]).svg
    (path,) = re.findall(r'class="curve" d="([^"]+)"', svg)
    heights = [float(point.split()[1]) for point in path[1:].split("L")]
    assert heights[0] == heights[2] == pytest.approx((frame.top + frame.bottom) / 2, abs=0.1)
    assert heights[1] == -9999.0  # and not a million digits
    y, height = re.findall(r'<clipPath id="x-0-clip"><rect x="[^"]+" y="([^"]+)" width="[^"]+" height="([^"]+)"', svg)[
        0
    ]
    assert float(y) == frame.top - 3 and float(height) == pytest.approx(frame.bottom - frame.top + 6)
    assert 'clip-path="url(#x-0-clip)"' in svg


def test_a_curve_of_a_hundred_thousand_points_is_drawn_with_few() -> None:
    rng = np.random.default_rng(1)
    points = np.column_stack([np.arange(100_000.0), rng.normal(size=100_000)])
    svg = plot_chart("x", "T", "", [plotted(Series(0, "a", points, "raw"))]).svg
    assert svg.count("L") <= 4 * BUCKETS and len(svg) < 12_000


def test_noise_of_many_runs_is_left_out() -> None:
    series = [curve(run, "r", run, style) for run in range(5) for style in ("raw", "line")]
    assert 'class="series raw' not in plot_chart("x", "T", "", [plotted(*series)]).svg
    assert 'class="series raw' in plot_chart("x", "T", "", [plotted(*series[:8])]).svg


def test_text_of_a_run_is_drawn_as_text() -> None:
    evil = "<script>&\"'"
    plot = plotted(curve(0, evil, 1.0), curve(1, "b", 2.0), marks=(Mark(0, 5e5, "R", evil),))
    text = standalone(plot_chart("x y", evil, "", [plot]))
    assert "<script" not in text
    root = ElementTree.fromstring(text)
    assert root.attrib["aria-label"] == evil
    assert evil in [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]


def test_marks_stand_at_their_place_and_their_letters_keep_apart() -> None:
    marks = tuple(Mark(0, x, "R", "rollback") for x in (1e5, 1.01e5, 9e5, 5e6))
    svg = plot_chart("x", "T", "", [plotted(curve(0, "a", 1.0), marks=marks)]).svg
    assert svg.count('class="mark') == 3  # the last one lies outside
    assert svg.count(">R</text>") == 2


def test_a_figure_file_has_both_themes_and_no_address() -> None:
    text = standalone(plot_chart("x", "T", "", [plotted(curve(0, "a", 1.0))]))
    assert "prefers-color-scheme:dark" in text and ".curve" in text
    assert re.findall(r"https?://[^\"]+", text) == ["http://www.w3.org/2000/svg"]


def test_the_first_24_runs_differ_without_colour() -> None:
    looks = {(run % len(MARKERS), run // len(RUNS_LIGHT) % len(DASHES)) for run in range(24)}
    assert len(looks) == 24
    assert len({run_classes(run) for run in range(24)}) == 24 and run_classes(-1) == "ink"


def test_a_flat_curve_and_an_empty_plot_have_axes() -> None:
    for series in (curve(0, "a", 2.0), Series(0, "a", np.empty((0, 2)))):
        assert "tokens seen" in plot_chart("x", "T", "", [plotted(series)]).svg

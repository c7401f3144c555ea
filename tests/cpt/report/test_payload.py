"""The page's data: numbers travel as they are, long curves within a budget, and no text ends the script element."""

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cpt.report.collect import collect_run
from cpt.report.payload import BUDGET, FEWEST, page_data
from cpt.report.plot_svg import plot_chart
from cpt.report.plots import Axis, Chart, Mark, Plot, Series
from cpt.report.summary import Summary
from cpt.report.verdict import overview


def summary(root: Path) -> Summary:
    return overview([collect_run(root)]).summaries[0]


def chart(*series: Series, marks: tuple[Mark, ...] = ()) -> Chart:
    return plot_chart("loss", "T", "", [Plot(Axis("tokens seen", "tokens"), Axis("loss"), series, marks)])


def unpacked(text: str) -> tuple[dict[str, Any], np.ndarray]:
    told = json.loads(text)
    return told, np.frombuffer(base64.b64decode(told["floats"]), dtype="<f4")


def column(numbers: np.ndarray, entry: list[int]) -> list[float]:
    return numbers[entry[0] : entry[0] + entry[1]].tolist()


def test_a_series_arrives_as_it_was_sent(make_run: Callable[..., Path]) -> None:
    points = np.array([(0.0, 1.5), (4096.0, 2.5)])
    sent = Series(0, "a", points, "held_out", low=points[:, 1] - 0.5, high=points[:, 1] + 0.5)
    told, numbers = unpacked(page_data([chart(sent)], [summary(make_run(steps=20))]))
    (series,) = told["charts"]["loss"][0]["series"]
    assert column(numbers, series["x"]) == [0.0, 4096.0] and column(numbers, series["y"]) == [1.5, 2.5]
    assert column(numbers, series["low"]) == [1.0, 2.0] and "left" not in series
    assert (series["style"], series["run"]) == ("held_out", 0)


def test_tokens_lead_to_steps_and_hours(make_run: Callable[..., Path]) -> None:
    told, numbers = unpacked(page_data([], [summary(make_run(steps=500))]))
    tokens, steps, hours = (column(numbers, entry) for entry in told["runs"][0]["knots"])
    assert tokens[-1] == 500 * 4096 and steps[0] == 1 and steps[-1] == 500 and told["runs"][0]["hours"]
    assert hours[0] == 0 and np.isclose(hours[-1], 499 / 3600) and (np.diff(hours) >= 0).all()
    assert len(tokens) == 200


def test_many_long_curves_share_a_budget_and_short_ones_are_sent_whole(make_run: Callable[..., Path]) -> None:
    rng = np.random.default_rng(0)
    noise = np.column_stack([np.arange(100_000.0), rng.normal(size=100_000)])
    noise[31_337, 1] = 99.0
    series = [Series(0, "a", noise, "raw")] * 12 + [Series(0, "b", noise[:50], "raw")]
    told, numbers = unpacked(page_data([chart(*series)], [summary(make_run(steps=20))]))
    sent = told["charts"]["loss"][0]["series"]
    counts = [entry["x"][1] for entry in sent]
    assert sum(counts) <= BUDGET["raw"] * 1.01 and min(counts[:-1]) > FEWEST and counts[-1] == 50
    assert max(column(numbers, sent[0]["y"])) == 99.0


def test_no_name_can_end_the_script_element(make_run: Callable[..., Path]) -> None:
    evil = "</script><script>alert(1)</script><!--"
    item = summary(make_run(name=evil, steps=20))
    sent = chart(Series(0, evil, np.array([(0.0, 1.0), (1.0, 2.0)])), marks=(Mark(0, 0.5, "R", evil),))
    text = page_data([sent], [item])
    assert "<" not in text
    told = json.loads(text)
    assert told["runs"][0]["label"] == evil and told["charts"]["loss"][0]["marks"][0]["text"] == evil


def test_a_run_that_logged_nothing_has_no_knots(make_run: Callable[..., Path]) -> None:
    root = make_run(steps=20)
    (root / "metrics.jsonl").unlink()
    told, _ = unpacked(page_data([], [summary(root)]))
    assert told["runs"][0]["knots"] == [[0, 0], [0, 0], [0, 0]] and not told["runs"][0]["hours"]

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from cpt.report.cells import duration, percent
from cpt.report.collect import collect_run
from cpt.report.figures import time_split
from cpt.report.summary import nats, scaled, signed, summarise, tokens_text
from cpt.report.tables import cost_table
from cpt.report.verdict import Overview, overview
from cpt.rundir import RunDir

RunWriter = Callable[..., Path]


def view(*folders: Path) -> Overview:
    return overview([collect_run(folder) for folder in folders])


def test_the_run_without_replay_is_the_reference_whatever_the_order(make_run: RunWriter) -> None:
    replay = make_run(name="replay", share_general=0.25)
    scratch = make_run(name="scratch", share_general=0.0, init_from=None)
    no_replay = make_run(name="no_replay", share_general=0.0, general_end=3.58, domain_end=2.26, bump=0)
    found = view(replay, scratch, no_replay)
    assert found.reference == "no_replay"
    assert list(found.versus) == ["replay"]
    assert found.versus["replay"].forgetting_ratio == pytest.approx(0.04 / 0.60, abs=0.01)
    assert found.versus["replay"].gain_given_up == pytest.approx(1 - 1.60 / 1.64, abs=0.005)
    assert found.verdict[0].startswith(
        "replay kept general forgetting at 0.040 nats (no_replay: 0.599 nats, 15.0 times as much)"
    )
    assert found.verdict[0].endswith("gave up 2% of the domain gain (1.599 against 1.639 nats).")
    assert found.verdict[1].startswith("scratch: Trained from random weights")
    assert found.warnings == ()


def test_a_run_that_forgot_nothing_or_more_than_the_reference_is_told_so(make_run: RunWriter) -> None:
    none = make_run(name="none", share_general=0.0, general_end=3.28, bump=0)
    better = make_run(name="better", general_end=2.9, bump=0, domain_end=2.1)
    worse = make_run(name="worse", general_end=3.5, bump=0)
    first, second = view(none, better, worse).verdict
    assert first.startswith(
        "better forgot nothing (general loss fell by 0.080 nats; none: 0.300 nats) and gained 12% more"
    )
    assert second.startswith(
        "worse did not reduce general forgetting: 0.520 nats (none: 0.300 nats) and gave up none of the domain gain"
    )


def test_no_two_runs_have_one_label(make_run: RunWriter) -> None:
    named = [make_run(name=name, steps=20) for name in ("a", "b", "c")]
    for root, name in zip(named, ("a (2)", "a", "a"), strict=True):
        file = RunDir(root).config
        file.write_text(file.read_text().replace("name: " + root.name, f"name: {name}"))
    assert [item.label for item in view(*named).summaries] == ["a (2)", "a", "a (3)"]


def test_a_run_of_which_only_the_base_is_evaluated_has_no_result_yet(make_run: RunWriter) -> None:
    paths = RunDir(make_run())
    for file in paths.evals.glob("step_*.json"):
        if file != paths.eval_file(0):
            file.unlink()
    found = view(paths.root)
    assert found.verdict == ("Gain and forgetting are unknown: only the base is evaluated yet.",)
    assert math.isnan(found.summaries[0].final_loss("general"))
    assert any(text.startswith("Only the base is evaluated") for _, text in found.warnings)


def test_a_ratio_of_one_is_not_told(make_run: RunWriter) -> None:
    none = make_run(name="none", share_general=0.0, general_end=3.5, bump=0)
    same = make_run(name="same", general_end=3.49, bump=0)
    assert view(none, same).verdict[0].startswith("same kept general forgetting at 0.510 nats (none: 0.520 nats) and")


def test_one_run_is_measured_against_its_own_base(make_run: RunWriter) -> None:
    (sentence,) = view(make_run()).verdict
    assert sentence.startswith(
        "Domain loss fell by 1.599 nats (3.900 to 2.301). General forgetting against the base is 0.040 nats"
    )
    assert sentence.endswith("0.150 nats at its worst (step 40).")


def test_runs_of_another_base_or_another_budget_are_not_silently_compared(make_run: RunWriter) -> None:
    none, other = make_run(name="none", share_general=0.0), make_run(name="other", init_from="elsewhere", steps=100)
    found = view(none, other)
    assert found.versus == {}
    texts = [text for _, text in found.warnings]
    assert any("other continues another base (elsewhere)" in text for text in texts)
    assert any("unequal budgets" in text for text in texts)


def test_without_a_run_that_replays_nothing_the_report_says_what_it_cannot_measure(make_run: RunWriter) -> None:
    found = view(make_run(name="a"), make_run(name="b"))
    assert found.reference is None
    assert any("replay's effect is not measured" in text for _, text in found.warnings)
    assert [sentence.split(":")[0] for sentence in found.verdict] == ["a", "b"]


def test_shares_and_tokens_are_those_of_the_plan_and_of_the_log(make_run: RunWriter) -> None:
    (item,) = view(make_run(share_general=0.25)).summaries
    assert item.share_planned == pytest.approx(0.25) and item.share_realised == pytest.approx(0.25, abs=0.01)
    assert item.tokens == item.tokens_planned == sum(item.realised_by_source.values()) == 200 * 4096


def test_two_runs_of_one_name_get_different_labels(make_run: RunWriter, tmp_path: Path) -> None:
    first = make_run(name="same")
    second = first.rename(tmp_path / "moved")
    third = make_run(name="same")
    assert [item.label for item in view(second, third).summaries] == ["same", "same (2)"]


def test_numbers_are_written_with_their_unit() -> None:
    assert nats(0.0312) == "0.031 nats" and nats(math.nan) == "unknown"
    assert signed(-0.02) == "\u22120.020 nats" and signed(0.5, "") == "+0.500"
    assert [scaled(value) for value in (950, 12_600_000, 1.25e9, 3e12, 999_600, math.nan)] == [
        "950", "12.6 M", "1.25 B", "3.00 T", "1,000 k", "unknown",
    ]  # fmt: skip
    assert tokens_text(2e6) == "2.00 M tokens"
    assert [percent(value) for value in (0, 0.041, 1, -0.021, math.nan)] == [
        "0%",
        "4.1%",
        "100%",
        "\u22122.1%",
        "\u2013",
    ]
    assert [duration(value) for value in (0.0341, 12.52, 200, 18_420, 183_600, math.nan)] == [
        "0.034 s", "12.5 s", "3 min 20 s", "5 h 07 min", "2 d 03 h", "\u2013",
    ]  # fmt: skip


def test_the_time_of_a_run_is_split_by_phase_with_what_the_end_added(make_run: RunWriter) -> None:
    root = make_run(steps=10)
    with (root / "events.jsonl").open("a") as events:
        events.write(
            json.dumps({"time": 1.0, "step": 10, "event": "finish", "phase_seconds": {"evaluation": 2.0}}) + "\n"
        )
    item = summarise(collect_run(root), "a")
    expected = {"data": 0.02, "forward": 1.5, "backward": 2.5, "optimizer": 0.3, "evaluation": 0.18 + 2.0}
    loop = 10 * 0.45 - 0.02 - 1.5 - 2.5 - 0.3
    assert item.seconds_by_phase == pytest.approx(expected | {"loop": loop})
    assert sum(item.share_by_phase.values()) == pytest.approx(1.0)
    assert item.share_by_phase["forward"] == pytest.approx(1.5 / (4.5 + 2.18))


def test_a_run_that_did_not_measure_phases_has_no_split(make_run: RunWriter) -> None:
    root = make_run(steps=4)
    lines = [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]
    (root / "metrics.jsonl").write_text("".join(json.dumps({**line, "phase_seconds": None}) + "\n" for line in lines))
    item = summarise(collect_run(root), "a")
    assert item.seconds_by_phase == {} and item.share_by_phase == {}
    assert time_split([item]) is None


def test_the_split_is_drawn_and_told_in_the_table(make_run: RunWriter) -> None:
    found = view(make_run(steps=10))
    chart = time_split(found.summaries)
    assert chart is not None and "backward: 53." in chart.svg and ">53%<" in chart.svg
    cells = {row.cells[0]: row.cells[1:] for row in cost_table(found).rows}
    assert cells["Forward"] == ("32.1% (1.5 s)",) and cells["Waiting for data"] == ("0.4% (0.020 s)",)
    assert cells.keys() >= {"Backward", "Optimizer", "Evaluations", "The loop itself"}

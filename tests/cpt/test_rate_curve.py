"""The picture of the learning rate shows what the trainer will use, and where it turns."""

from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from cpt.rate_curve import COLUMNS, curve_facts, jump, render_curve
from cpt.run_fields import TrainSection
from cpt.train.schedules import learning_rates


def train_of(schedule: dict[str, Any], tokens: int = 2000, past: Any = ()) -> TrainSection:
    fields = {"tokens": tokens, "global_batch_tokens": 10, "micro_batch_size": 1, "peak_lr": 0.1}
    return TrainSection.model_validate({**fields, "schedule": schedule, "past": list(past)})


def test_every_point_is_the_rate_of_its_update_and_the_last_one_is_the_end() -> None:
    train = train_of({"name": "rewarm_cosine", "warmup_steps": 20})
    facts, rate = curve_facts(train, total_steps=200), learning_rates(train, total_steps=200)
    assert len(facts["curve"]) == COLUMNS and facts["curve"][-1]["step"] == 200
    assert all(point["lr"] == rate(point["step"]) for point in facts["curve"] + facts["corners"])


@pytest.mark.parametrize(
    ("schedule", "corners"),
    [
        ({"name": "constant"}, [(1, "first update"), (200, "end")]),
        (
            {"name": "wsd", "warmup_steps": 10, "decay_steps": 40},
            [(1, "first update"), (10, "peak, warm-up ends"), (160, "decay begins"), (200, "end")],
        ),
        (
            {"name": "infinite_cosine", "warmup_steps": 1, "cooldown_steps": 60, "constant_steps": 80},
            [(1, "first update; peak, warm-up ends"), (61, "plateau begins"), (141, "anneal begins"), (200, "end")],
        ),
    ],
)
def test_the_table_names_the_corners_of_each_schedule(schedule: dict[str, Any], corners: list[tuple[int, str]]) -> None:
    facts = curve_facts(train_of(schedule), total_steps=200)
    assert [(corner["step"], corner["what"]) for corner in facts["corners"]] == corners


def test_of_an_extended_run_the_trained_part_is_told_from_what_is_to_come() -> None:
    past = {"until_step": 150, "tokens": 2000, "peak_lr": 0.1, "schedule": {"name": "constant"}}
    facts = curve_facts(train_of({"name": "constant"}, tokens=4000, past=[past]), total_steps=400)
    assert facts["extended_at"] == [150]
    assert [corner["what"] for corner in facts["corners"]] == [
        "first update",
        "extended before its end",
        "first update after the extension",
        "end",
    ]
    console = Console(width=80, record=True, file=StringIO())
    console.print(render_curve(facts))
    shown = console.export_text()
    assert "trained" in shown and "to come" in shown and "1.00e-01 ┤█" in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_a_leap_is_seen_and_a_warm_up_is_none() -> None:
    cosine = {"name": "rewarm_cosine", "warmup_steps": 10}
    past = {"until_step": 200, "tokens": 2000, "peak_lr": 0.1, "schedule": cosine}
    leaps = train_of({"name": "constant"}, tokens=4000, past=[past])
    assert jump(leaps, total_steps=400, step=200) == pytest.approx((0.01, 0.1))
    smooth = train_of({**cosine, "warmup_steps": 20}, tokens=4000, past=[past])
    assert jump(smooth, total_steps=400, step=200) is None

"""The best checkpoint by a rule, and its pin."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpt.checkpoint.marker import delete_checkpoint
from cpt.checkpoint.retention import read_pins
from cpt.eval.best import Rule, best_step, parse_rule, pin_best
from cpt.eval.results import record_file, write_suite_record
from cpt.problems import ConfigError

TinyRun = Any  # of conftest.py
MakeRecord = Callable[..., Any]
NAMES = ("general", "one", "mmlu")


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("general.accuracy", Rule("general", "accuracy")),
        ("general", Rule("general")),
        ("one.acc", Rule("one", "acc")),
        ("mmlu_anatomy.acc", Rule("mmlu_anatomy", "acc")),  # a part of a group of tasks
    ],
)
def test_a_rule_names_a_group_or_a_task(text: str, rule: Rule) -> None:
    assert parse_rule(text, NAMES) == rule


@pytest.mark.parametrize("text", ["genral.accuracy", "", ".", "domain.accuracy", "accuracy"])
def test_an_unknown_name_is_refused_with_the_nearest(text: str) -> None:
    with pytest.raises(ConfigError, match="keep-best") as refused:
        parse_rule(text, NAMES)
    assert "general" in str(refused.value)


def test_what_was_measured_decides_and_lower_may_be_better(make_record: MakeRecord) -> None:
    record = make_record(5, 0.25)
    assert Rule("general", "accuracy").value(record) == Rule("one").value(record) == 0.25
    lower = dataclasses.replace(record.tasks["one"], higher_is_better=False, metric="bits_per_byte")
    bits = dataclasses.replace(record, tasks={"one": lower})
    assert Rule("one", "bits_per_byte").value(bits) == -0.25
    with pytest.raises(ConfigError, match=r"one\.acc"):
        Rule("one", "exact_match").value(record)


@given(st.dictionaries(st.integers(0, 40), st.none() | st.sampled_from([0.1, 0.2, 0.3]), max_size=8))
def test_the_best_is_measured_there_and_the_newest_of_equals(
    make_record: MakeRecord, accuracies: dict[int, float | None]
) -> None:
    records = [make_record(step, accuracy) for step, accuracy in accuracies.items()]
    available = {step for step in accuracies if step % 2 == 0}
    found = best_step(records, Rule("general"), available)
    allowed = {step: value for step, value in accuracies.items() if step in available - {0} and value is not None}
    if not allowed:
        assert found is None
    else:
        assert found == max(step for step, value in allowed.items() if value == max(allowed.values()))


def test_the_pin_follows_the_best_that_is_there(tiny_run: TinyRun, make_record: MakeRecord) -> None:
    rule, checkpoints = Rule("general", "accuracy"), tiny_run.rundir.checkpoints
    assert pin_best(checkpoints, tiny_run.results, rule) is None  # nothing is measured
    for step, accuracy in ((5, 0.4), (10, 0.6), (15, 0.5)):
        tiny_run.save(step, accuracy)
        write_suite_record(record_file(tiny_run.results, step), make_record(step, accuracy))
    assert pin_best(checkpoints, tiny_run.results, rule) == 10
    pin = read_pins(checkpoints)["tiny"]
    assert pin.step == 10 and "general.accuracy" in pin.reason
    assert pin_best(checkpoints, tiny_run.results, rule) is None  # as it was
    delete_checkpoint(tiny_run.rundir.checkpoint(10))  # by hand
    assert pin_best(checkpoints, tiny_run.results, rule) == 15

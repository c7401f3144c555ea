"""What a real run measures of itself: time by phase that adds up, and a trace where one is asked for."""

import gzip
import json
from typing import Any

import pytest

from cpt.train.phases import PHASES

Workshop = Any  # the fixtures of tests/conftest.py


def test_a_run_says_where_its_time_went_and_a_trace_shows_it(workshop: Workshop) -> None:
    workshop.stores()
    changes = {"eval.every_steps": 4, "checkpoint.every_steps": 4, "train.tokens": 256 * 8}
    done = workshop.cpt("train", workshop.run_file("run", changes), "--profile", 2)
    assert done.code == 0, done.text
    records = workshop.records("run")
    for record in records:
        within = [record["phase_seconds"][name] for name in PHASES if name not in ("checkpoint", "evaluation")]
        assert 0 < sum(within) <= record["step_seconds"] * 1.001
        assert record["tokens_per_second_overall"] <= record["tokens_per_second"] * 1.001
        assert record["flops_per_second"] > 0 and record["mfu"] is None
    stalls = {record["step"]: record["phase_seconds"]["evaluation"] for record in records}
    assert stalls[1] > 0 and stalls[5] > 0 and stalls[4] == 0  # after steps 0 and 4: counted with the next step
    finish = next(event for event in workshop.events("run") if event["event"] == "finish")
    assert finish["phase_seconds"]["evaluation"] > 0  # of the last step: no window took it

    trace = json.loads(gzip.decompress((workshop.run_dir("run") / "profile" / "step_00000004.json.gz").read_bytes()))
    names = [event["name"] for event in trace["traceEvents"] if event.get("cat") == "user_annotation"]
    assert names.count("cpt.forward") == names.count("cpt.backward") == 2 * 2  # two steps of two micro-batches
    assert names.count("cpt.optimizer") == 2
    table = (workshop.run_dir("run") / "profile" / "step_00000004.txt").read_text()
    assert "2 steps from 4" in table and "backward" in table and "aten::mm" in table
    assert table in done.out


@pytest.mark.parametrize("steps", [-1, 21])
def test_a_trace_is_bounded(workshop: Workshop, steps: int) -> None:
    done = workshop.cpt("train", "run.yaml", "--profile", steps)
    assert done.code == 2 and "--profile" in done.err

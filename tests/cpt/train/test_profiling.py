"""The profiler hook around a hand-made loop: what is recorded, what is left alone, what a short run leaves."""

import gzip
import json
from pathlib import Path

import torch

from cpt.train.phases import PHASES, Phases
from cpt.train.profiling import WAIT_STEPS, StepProfiler
from cpt.train.stepinfo import StepInfo


def train(profiler: StepProfiler, phases: Phases, steps: int) -> None:
    for step in range(11, 11 + steps):
        with phases("forward"):
            torch.ones(8, 8) @ torch.ones(8, 8)
        with phases("data"):
            pass
        seconds = dict.fromkeys(PHASES, 0.0) | {"forward": 0.3, "data": 0.1}
        profiler(StepInfo(step, 0, {}, {}, 0.0, 0.0, 0.5, seconds))
    profiler.close()


def test_the_steps_after_the_first_ones_are_recorded_and_no_more(tmp_path: Path) -> None:
    phases, said = Phases(), []  # type: ignore[var-annotated]
    profiler = StepProfiler(tmp_path / "profile", steps=2, phases=phases, say=said.append)
    train(profiler, phases, WAIT_STEPS + 5)
    first = 11 + WAIT_STEPS
    trace = json.loads(gzip.decompress((tmp_path / "profile" / f"step_{first:08d}.json.gz").read_bytes()))
    names = [event["name"] for event in trace["traceEvents"] if event.get("cat") == "user_annotation"]
    assert names.count("cpt.forward") == names.count("cpt.data") == 2
    (text,) = said
    assert f"2 steps from {first}, 0.5000 s each" in text
    assert "forward         60.0%  0.3000 s" in text and "data            20.0%" in text and "aten::mm" in text
    assert len(list((tmp_path / "profile").iterdir())) == 2


def test_a_run_that_ends_while_it_is_recorded_leaves_what_there_is(tmp_path: Path) -> None:
    phases, said = Phases(), []  # type: ignore[var-annotated]
    profiler = StepProfiler(tmp_path / "profile", steps=9, phases=phases, say=said.append)
    train(profiler, phases, WAIT_STEPS + 1)
    assert "1 steps from" in said[0]
    assert len(list((tmp_path / "profile").glob("*.json.gz"))) == 1


def test_a_run_that_ends_before_says_so(tmp_path: Path) -> None:
    phases, said = Phases(), []  # type: ignore[var-annotated]
    profiler = StepProfiler(tmp_path / "profile", steps=1, phases=phases, say=said.append)
    train(profiler, phases, 1)
    assert "nothing recorded" in said[0] and not (tmp_path / "profile").exists()

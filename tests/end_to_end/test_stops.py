"""A run that is asked to stop, however and wherever it stands, saves itself completely and ends with 143."""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from faulty_training import command, faults

Workshop = Any  # the fixtures of tests/conftest.py
STEPS = 12
FIELDS = {
    "train.tokens": STEPS * 256,
    "checkpoint.every_steps": 4,
    "checkpoint.keep_last": 10,
    "eval.every_steps": 4,
    "guard.spike_sigma": None,
}


@pytest.fixture(scope="session")
def shop(made_once: Callable[..., Workshop]) -> Workshop:
    """Stores, and ``whole``: the run that nothing happened to."""

    def make(shop: Workshop) -> None:
        shop.stores()
        done = shop.cpt("train", shop.run_file("whole", FIELDS))
        assert done.code == 0, done.text

    return made_once("stops", make)


def newest_complete(run_dir: Path) -> int:
    return max(int(path.parent.name.removeprefix("step_")) for path in run_dir.glob("checkpoints/*/COMPLETE"))


MOMENTS = [(0, "evaluation"), (1, "data"), (2, "communication"), (4, "evaluation"), (4, "checkpoint"), (6, "forward")]


@pytest.mark.parametrize(("step", "phase"), MOMENTS)
def test_sigterm_at_any_moment_saves_and_the_run_goes_on_bit_identical(shop: Workshop, step: int, phase: str) -> None:
    name = f"at_{step}_{phase}"
    with faults({"kind": "signal", "step": step, "phase": phase}):
        stopped = shop.cpt("train", shop.run_file(name, FIELDS))
    assert stopped.code == 143, stopped.text
    last = newest_complete(shop.run_dir(name))
    assert last in (step, step + 1)  # at most the step in flight was finished
    event = shop.events(name)[-1]
    assert (event["event"], event["step"], event["signal"]) == ("sigterm", last, "SIGTERM") and event["seconds"] < 20
    resumed = shop.cpt("resume", shop.run_dir(name))
    assert resumed.code == 0, resumed.text
    assert shop.losses(name) == shop.losses("whole")
    assert shop.evaluation(name, STEPS) == shop.evaluation("whole", STEPS)


def test_sigterm_while_steps_are_repeated_after_a_rollback_saves_too(shop: Workshop) -> None:
    bad = {"kind": "nan_rows", "step": 7, "rows": [1]}
    with faults(bad, {"kind": "signal", "step": 7, "phase": "communication"}):
        stopped = shop.cpt("train", shop.run_file("twice", FIELDS))
    assert stopped.code == 143, stopped.text
    assert "rollback" in [event["event"] for event in shop.events("twice")]
    assert newest_complete(shop.run_dir("twice")) == shop.events("twice")[-1]["step"] <= 5  # 7 was undone
    assert shop.cpt("resume", shop.run_dir("twice")).code == 0
    with faults(bad):
        assert shop.cpt("train", shop.run_file("once", FIELDS)).code == 0
    assert shop.losses("twice") == shop.losses("once")


def test_sigterm_before_the_first_step_saves_step_0(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    import signal

    import cpt.run

    build = cpt.run.build_optimizer

    def and_a_signal(*arguments: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)  # while objects are being built
        return build(*arguments)

    monkeypatch.setattr(cpt.run, "build_optimizer", and_a_signal)
    stopped = shop.cpt("train", shop.run_file("start_up", FIELDS))
    assert stopped.code == 143, stopped.text
    assert newest_complete(shop.run_dir("start_up")) == 0 and shop.records("start_up") == []
    monkeypatch.undo()
    assert shop.cpt("resume", shop.run_dir("start_up")).code == 0
    assert shop.losses("start_up") == shop.losses("whole")


def test_a_stop_file_ends_a_run_and_is_removed(shop: Workshop) -> None:
    sleepy = {"kind": "sleep", "every_step": True, "step": 1, "seconds": 0.2}
    process = shop.start_command(command([sleepy], "train", shop.run_file("filed", FIELDS)))
    shop.wait_for_step("filed", 2, process)
    (shop.run_dir("filed") / "STOP").touch()
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 143, out
    assert not (shop.run_dir("filed") / "STOP").exists()
    event = shop.events("filed")[-1]
    assert event["signal"] == "stop file" and newest_complete(shop.run_dir("filed")) == event["step"] < STEPS


def test_a_time_limit_ends_a_run_and_a_later_one_lets_it_go_on(shop: Workshop) -> None:
    stopped = shop.cpt("train", shop.run_file("timed", FIELDS | {"guard.stop_after_seconds": 1e-3}))
    assert stopped.code == 143, stopped.text
    assert shop.events("timed")[-1]["signal"] == "time limit"
    assert shop.cpt("resume", shop.run_dir("timed"), "guard.stop_after_seconds=1e4").code == 0
    assert shop.losses("timed") == shop.losses("whole")


def test_two_ranks_stop_together_where_only_one_was_asked(shop: Workshop) -> None:
    fault = {"kind": "signal", "step": 5, "phase": "forward", "rank": 1}
    process = shop.start_command(command([fault], "train", shop.run_file("pair", FIELDS), "--nproc", "2"))
    started = time.monotonic()
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 143 and time.monotonic() - started < 60, out
    assert newest_complete(shop.run_dir("pair")) == 5

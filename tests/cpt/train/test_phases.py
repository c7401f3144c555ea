"""Phases add up, wherever one lies inside another, and a slow clock loses nothing."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from cpt.train.phases import PHASES, CudaClock, HostClock, Phases, build_phases


class Ticks:
    """A clock set by hand, whose device has finished what lies before ``finished``."""

    def __init__(self) -> None:
        self.time = 0.0
        self.finished = float("inf")

    def now(self) -> float:
        return self.time

    def seconds(self, begin: object, end: object) -> float | None:
        assert isinstance(begin, float) and isinstance(end, float)
        return end - begin if end <= self.finished else None


@pytest.fixture
def clock() -> Ticks:
    return Ticks()


def spent(phases: Phases) -> dict[str, float]:
    return {name: seconds for name, seconds in phases.take().items() if seconds}


def test_a_phase_inside_another_takes_its_time_from_the_outer_one(clock: Ticks) -> None:
    phases = Phases(clock)
    with phases("backward"):
        clock.time = 2.0
        with phases("communication"):
            clock.time = 5.0
        clock.time = 6.0
    clock.time = 100.0
    with phases("optimizer"):
        clock.time = 101.0
    assert spent(phases) == {"backward": 3.0, "communication": 3.0, "optimizer": 1.0}
    assert spent(phases) == {}


def test_a_phase_that_is_open_counts_up_to_now_and_goes_on(clock: Ticks) -> None:
    phases = Phases(clock)
    with phases("evaluation"):
        clock.time = 3.0
        assert spent(phases) == {"evaluation": 3.0}
        clock.time = 4.0
    assert spent(phases) == {"evaluation": 1.0}


def test_a_phase_that_fails_is_counted_and_closed(clock: Ticks) -> None:
    phases = Phases(clock)
    with pytest.raises(OSError, match="disk"), phases("checkpoint"):
        clock.time = 2.0
        raise OSError("disk")
    clock.time = 9.0
    assert spent(phases) == {"checkpoint": 2.0}


def test_what_the_device_has_not_finished_waits_for_the_next_call(clock: Ticks) -> None:
    phases = Phases(clock)
    with phases("forward"):
        clock.time = 2.0
    with phases("optimizer"):
        clock.time = 5.0
    clock.finished = 3.0
    assert spent(phases) == {"forward": 2.0}
    clock.finished = 9.0
    assert spent(phases) == {"optimizer": 3.0}


def test_the_end_of_a_run_says_what_no_step_took(clock: Ticks) -> None:
    phases = Phases(clock)
    with phases("evaluation"):
        clock.time = 1.23456
    assert phases.after_last_step() == {"evaluation": 1.235}


def test_whoever_listens_is_told_every_phase_and_ranges_surround_it(clock: Ticks) -> None:
    told: list[str] = []
    phases = Phases(clock)
    phases.listener = lambda name: told.append(f"enter {name}")

    @contextmanager
    def named(name: str) -> Iterator[None]:
        told.append(f"range {name}")
        yield
        told.append(f"end {name}")

    phases.ranges = named
    with phases("data"), phases("communication"):
        pass
    names = ["enter data", "range data", "enter communication", "range communication", "end communication", "end data"]
    assert told == names


def test_the_host_clock_measures_real_time() -> None:
    phases = build_phases(torch.device("cpu"))
    with phases("forward"):
        end = HostClock().now() + 0.01
        while HostClock().now() < end:
            pass
    assert 0.01 <= phases.take()["forward"] < 5.0
    assert set(phases.take()) == set(PHASES)


def test_a_gpu_is_timed_by_events_that_are_read_when_they_have_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing
            self.recorded, self.passed = False, False

        def record(self, stream: object) -> None:
            assert stream == "the loop's"  # and not the one that is current by now
            self.recorded = True

        def query(self) -> bool:
            return self.passed

        def elapsed_time(self, end: "Event") -> float:
            assert self.recorded and end.recorded
            return 1500.0  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "the loop's")
    clock = CudaClock()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "that of DeepSpeed's reductions")
    begin, end = clock.now(), clock.now()
    assert clock.seconds(begin, end) is None
    end.passed = True  # type: ignore[attr-defined]
    assert clock.seconds(begin, end) == 1.5

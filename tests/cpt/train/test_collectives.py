"""Collective calls count as communication: the call itself, and the wait for one that runs beside the computation."""

from cpt.train.collectives import count_collectives
from cpt.train.phases import Phases


class Clock:
    def __init__(self) -> None:
        self.time = 0.0

    def now(self) -> float:
        return self.time

    def seconds(self, begin: object, end: object) -> float:
        assert isinstance(begin, float) and isinstance(end, float)
        return end - begin


class Transfer:
    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def wait(self) -> str:
        self.clock.time += 5.0
        return "done"

    def is_completed(self) -> bool:
        return True


class Backend:
    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def all_reduce(self, tensor: str) -> str:
        self.clock.time += 2.0
        return tensor

    def all_gather(self) -> Transfer:
        self.clock.time += 1.0
        return Transfer(self.clock)


def test_calls_and_waits_count_inside_the_phase_they_lie_in() -> None:
    clock = Clock()
    phases, backend = Phases(clock), Backend(clock)
    count_collectives(backend, phases)
    with phases("backward"):
        clock.time += 10.0
        assert backend.all_reduce("x") == "x"
        transfer = backend.all_gather()
        clock.time += 20.0
        assert transfer.is_completed() and transfer.wait() == "done"
    taken = phases.take()
    assert (taken["backward"], taken["communication"]) == (30.0, 8.0)


def test_a_second_run_in_the_process_counts_alone() -> None:
    clock = Clock()
    first, second, backend = Phases(clock), Phases(clock), Backend(clock)
    count_collectives(backend, first)
    count_collectives(backend, second)
    backend.all_reduce("x")
    assert first.take()["communication"] == 0.0 and second.take()["communication"] == 2.0


def test_an_evaluations_communication_is_a_part_of_it() -> None:
    clock = Clock()
    phases, backend = Phases(clock), Backend(clock)
    count_collectives(backend, phases)
    with phases("evaluation"):
        clock.time += 1.0
        backend.all_reduce("x")
    assert phases.take()["evaluation"] == 3.0

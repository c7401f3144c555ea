"""Where the loop stands, and how long it has been in each phase. Owns the names and the two clocks.

On a CPU the time of a phase is the host's. On a GPU kernels run behind the host's back, so an event is recorded in
the stream at every change of phase and read later, when the loop has long waited for what lies behind it: nothing is
synchronised for the sake of the measurement. Time between two events is the device's own: a phase in which it starved
(``data``) shows what the host did not hide, and the seconds of all phases still add up.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch

PHASES = ("data", "forward", "backward", "optimizer", "communication", "checkpoint", "evaluation")
STALLS = ("checkpoint", "evaluation")  # between steps: not a part of step_seconds


class Clock(Protocol):
    """Stamps a moment; the seconds between two stamps may become known only later."""

    def now(self) -> object: ...

    def seconds(self, begin: object, end: object) -> float | None:
        """None: not yet known."""


class HostClock:
    """Time as this process sees it."""

    def now(self) -> float:
        return time.perf_counter()

    def seconds(self, begin: object, end: object) -> float:
        assert isinstance(begin, float) and isinstance(end, float)
        return end - begin


class CudaClock:
    """Time as one CUDA stream sees it, by events: the one that the loop computes in. Phases also begin and end where
    DeepSpeed has another one current, in which it reduces gradients beside the backward pass.
    """

    def __init__(self) -> None:
        self._stream = torch.cuda.current_stream()

    def now(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(self._stream)
        return event

    def seconds(self, begin: object, end: object) -> float | None:
        assert isinstance(begin, torch.cuda.Event) and isinstance(end, torch.cuda.Event)
        passed = end.query()  # type: ignore[no-untyped-call]
        return begin.elapsed_time(end) / 1e3 if passed else None


@dataclass(frozen=True)
class _Span:
    phase: str
    begin: object
    end: object


class Phases:
    """``with phases("forward"):`` adds to that phase's seconds and tells the listener on entry.

    A phase inside another takes its time away from the outer one, so that the seconds of all phases add up; but what
    is done within a stall (an evaluation's communication) is a part of it, for it lies between steps.
    """

    def __init__(self, clock: Clock | None = None) -> None:
        self.listener: Callable[[str], None] | None = None
        self.ranges: Callable[[str], AbstractContextManager[object]] = nullcontext  # a profiler's named ranges
        self._clock: Clock = clock or HostClock()
        self._stack: list[str] = []
        self._since: object = None
        self._spans: deque[_Span] = deque()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._switch()
        self._stack.append(self._stack[-1] if self._stack and self._stack[-1] in STALLS else name)
        if self.listener:
            self.listener(name)
        try:
            with self.ranges(name):
                yield
        finally:
            self._switch()
            self._stack.pop()

    def beat(self) -> None:
        """Tell the listener that the phase at work, which may lawfully take minutes, goes on."""
        if self.listener and self._stack:
            self.listener(self._stack[-1])

    def take(self) -> dict[str, float]:
        """Seconds of every phase since the last call; phases that are still open count up to now.

        What the device has not finished is left for the next call: on a GPU the tail of a step's optimizer may count
        with the step after it.
        """
        self._switch()
        taken = dict.fromkeys(PHASES, 0.0)
        while self._spans:
            span = self._spans[0]
            seconds = self._clock.seconds(span.begin, span.end)
            if seconds is None:
                break
            taken[span.phase] += seconds
            self._spans.popleft()
        return taken

    def after_last_step(self) -> dict[str, float]:
        """What no step will take any more, in whole milliseconds, without the phases that have none."""
        return {name: round(seconds, 3) for name, seconds in self.take().items() if seconds >= 5e-4}

    def _switch(self) -> None:
        now = self._clock.now()
        if self._stack:
            self._spans.append(_Span(self._stack[-1], self._since, now))
        self._since = now


def build_phases(device: torch.device) -> Phases:
    """Phases by the clock that tells the truth on ``device``."""
    return Phases(CudaClock() if device.type == "cuda" else HostClock())

"""What may end a step or a run: a request to stop, and a step that must not be taken. All ranks decide together.

A request is a signal, a file ``STOP`` in the run folder, or a wall-clock limit. A bad step has a loss or gradient that
is not finite, or a spike (``cpt.train.spikes``). It is judged on numbers that are the same on all ranks, so that all
come to the same verdict without asking one another: losses before the optimizer moves; the norm of the gradient before
it moves under ZeRO 0, while DeepSpeed tells it only after the update under ZeRO 1-3 (of a norm that is not finite it
makes no update). What then becomes of the run is decided above (``cpt.run_guard``). Imports no torch before it is
needed: signals are heard while torch is still loading.
"""

import math
import signal
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from cpt.train.spikes import SpikeDetector

if TYPE_CHECKING:
    import torch

    from cpt.train.stepinfo import StepInfo

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopFlag:
    """Turns requests to stop into a flag that loops poll; a signal that comes seconds later kills at once, as usual.

    Repeats within ``GRACE_SECONDS`` are one request: launchers and schedulers send several, to the job and to each
    rank.
    """

    GRACE_SECONDS = 5.0
    LOOK_SECONDS = 0.5  # between two looks for the stop file, which may lie on a slow shared disk

    def __init__(self, *, seconds_before: float = 0.0) -> None:
        """``seconds_before``: that the job had used before this process, in starts which crashed."""
        self.reason: str | None = None  # SIGTERM, SIGINT, stop file, time limit
        self.is_agreed = False  # all ranks know, and leave together
        self.save_seconds = 0.0  # what the save at the end will take; a time limit leaves room for it
        self._started = time.monotonic()
        self._seconds_before = seconds_before
        self._raised_at = 0.0
        self._limit_seconds = math.inf
        self._file: Path | None = None
        self._looked_at = -math.inf

    def install(self) -> None:
        for number in STOP_SIGNALS:
            signal.signal(number, self._raise_flag)

    def also_at(self, *, file: Path | None = None, limit_seconds: float | None = None) -> None:
        """Raise the flag too where ``file`` appears, and ``limit_seconds`` after the job started, less the time of a
        save; but never more than half of the limit, for an estimate that exceeds it must not leave nothing to train in.
        """
        self._file = file
        self._limit_seconds = math.inf if limit_seconds is None else limit_seconds

    @property
    def is_raised(self) -> bool:
        """Whether this process has been asked to stop; says nothing of other ranks."""
        now = time.monotonic()
        room = min(self.save_seconds, self._limit_seconds / 2)
        if self.reason is None and self._seconds_before + now - self._started >= self._limit_seconds - room:
            self.reason, self._raised_at = "time limit", now
        if self.reason is None and self._file is not None and now - self._looked_at > self.LOOK_SECONDS:
            self._looked_at = now
            if self._file.exists():
                self.reason, self._raised_at = "stop file", now
        return self.reason is not None

    @property
    def age_seconds(self) -> float:
        """How long ago this process began to listen, which is the first thing it does."""
        return time.monotonic() - self._started

    @property
    def seconds_ago(self) -> float:
        """How long ago the flag was raised in this process."""
        return time.monotonic() - self._raised_at if self._raised_at else 0.0

    def agreed(self, device: "torch.device") -> bool:
        """True on every rank as soon as it is raised on one; a collective call. Launchers signal ranks one after the
        other.
        """
        import torch
        import torch.distributed as dist

        flag = torch.tensor(float(self.is_raised), device=device)
        if dist.is_initialized():
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        self.is_agreed = self.is_agreed or bool(flag.item())
        return self.is_agreed

    def obey(self) -> None:
        """The request has been carried out: a stop file goes away, so that the run can be resumed."""
        if self._file is not None:
            self._file.unlink(missing_ok=True)

    def _raise_flag(self, number: int, frame: FrameType | None) -> None:
        if self.reason is None:
            self.reason, self._raised_at = signal.Signals(number).name, time.monotonic()
        elif time.monotonic() - self._raised_at > self.GRACE_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)


class AskedToStop(RuntimeError):
    """A request to stop came before there was anything to save."""


class BadStep(RuntimeError):
    """A step that must not stand. ``limits``: what the mean loss of the sources that gave it away must not exceed;
    empty where it was the gradient.
    """

    def __init__(self, step: int, reasons: Iterable[str], limits: Mapping[str, float] | None = None) -> None:
        self.step = step
        self.reasons = tuple(reasons)
        self.limits = dict(limits or {})
        super().__init__(f"step {step}: {'; '.join(self.reasons)}")


class NonFiniteError(BadStep):
    """A loss or the gradient became NaN or infinite; the weights have not moved."""


def check_finite(values: Iterable[tuple[str, float]], *, step: int) -> None:
    """Refuse a step with a value that is not finite. The values are the same on all ranks, and so is the decision."""
    bad = [name for name, value in values if not math.isfinite(value)]
    if bad:
        raise NonFiniteError(step, [f"{', '.join(bad)} is not finite; the weights were not updated"])


class Guard:
    """Judges every step of a run by the steps before it."""

    def __init__(self, detector: SpikeDetector, *, settled: Callable[[int], bool] = lambda step: True) -> None:
        """``settled(step)``: neither does the rate rise there nor did a stage begin just before."""
        self.detector = detector
        self._settled = settled

    def check_losses(self, step: int, sums: Mapping[str, float], counted: Mapping[str, int]) -> None:
        """Raises BadStep. ``sums`` in nats over ``counted`` tokens, both over all ranks."""
        infinite = [name for name, total in sums.items() if not math.isfinite(total)]
        if infinite:
            rule = f"the loss of {', '.join(infinite)} is not finite; the weights were not updated"
            raise NonFiniteError(step, [rule], dict.fromkeys(infinite, math.inf))
        spikes = self.detector.in_losses(sums, counted, settled=self._settled(step))
        if spikes:
            raise BadStep(step, map(str, spikes.values()), {name: spike.limit for name, spike in spikes.items()})

    def check_norm(self, step: int, norm: float) -> None:
        """Raises BadStep."""
        check_finite([("the gradient", norm)], step=step)
        spikes = self.detector.in_norm(norm, settled=self._settled(step))
        if spikes:
            raise BadStep(step, map(str, spikes))

    def accept(self, info: "StepInfo") -> None:
        self.detector.accept(info.loss_sums, info.counted, info.grad_norm)

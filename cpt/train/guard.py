"""What may stop a run: signals, and a loss that is not a number. Every decision is taken by all ranks together."""

import math
import signal
import time
from collections.abc import Iterable
from types import FrameType

import torch
import torch.distributed as dist

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
EXIT_STOPPED = 143  # 128 + SIGTERM: stopped on request after a complete save


class StopFlag:
    """Turns SIGTERM and SIGINT into a flag that loops poll; a signal that comes seconds later kills at once, as usual.

    Repeats within ``GRACE_SECONDS`` are one request: launchers and schedulers send several, to the job and to each
    rank.
    """

    GRACE_SECONDS = 5.0

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._raised_at = 0.0

    def install(self) -> None:
        for number in STOP_SIGNALS:
            signal.signal(number, self._raise_flag)

    def _raise_flag(self, number: int, frame: FrameType | None) -> None:
        if self.signal_name is None:
            self.signal_name, self._raised_at = signal.Signals(number).name, time.monotonic()
        elif time.monotonic() - self._raised_at > self.GRACE_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    @property
    def is_raised(self) -> bool:
        return self.signal_name is not None

    def agreed(self, device: torch.device) -> bool:
        """True on every rank as soon as it is raised on one; a collective call. Launchers signal ranks one after the
        other.
        """
        flag = torch.tensor(float(self.is_raised), device=device)
        if dist.is_initialized():
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())


class NonFiniteError(RuntimeError):
    """A loss or the gradient became NaN or infinite; the weights have not moved."""


def check_finite(values: Iterable[tuple[str, float]], *, step: int) -> None:
    """Refuse a step with a value that is not finite. The values are the same on all ranks, and so is the decision."""
    bad = [name for name, value in values if not math.isfinite(value)]
    if bad:
        raise NonFiniteError(
            f"step {step}: {', '.join(bad)} is not finite; the weights were not updated. Look at its rows, "
            "or start a new run from the last complete checkpoint (model.init_from) with a lower train.peak_lr."
        )

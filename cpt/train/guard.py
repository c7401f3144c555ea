"""What may stop a run: signals, and a loss that is not a number. Every decision is taken by all ranks together."""

import math
import signal
from collections.abc import Iterable
from types import FrameType

import torch
import torch.distributed as dist

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
EXIT_STOPPED = 143  # 128 + SIGTERM: stopped on request after a complete save


class StopFlag:
    """Turns SIGTERM and SIGINT into a flag that loops poll; a second signal kills at once, as usual."""

    def __init__(self) -> None:
        self.signal_name: str | None = None

    def install(self) -> None:
        for number in STOP_SIGNALS:
            signal.signal(number, self._raise_flag)

    def _raise_flag(self, number: int, frame: FrameType | None) -> None:
        self.signal_name = signal.Signals(number).name
        for each in STOP_SIGNALS:
            signal.signal(each, signal.SIG_DFL)

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


class NonFiniteLossError(RuntimeError):
    """The loss became NaN or infinite; the optimizer has not moved."""


def check_finite(loss_by_source: Iterable[tuple[str, float]], *, step: int) -> None:
    """Refuse a step whose loss, already summed over all ranks, is not finite. Called before the optimizer moves."""
    bad = [name for name, loss in loss_by_source if not math.isfinite(loss)]
    if bad:
        raise NonFiniteLossError(
            f"step {step}: the loss of {', '.join(bad)} is not finite; the weights were not updated. "
            "Resume from the last checkpoint with a lower train.peak_lr, or look at the rows of this step."
        )

"""Which rank keeps the others waiting: every rank's own seconds, compared once per window of steps.

A synchronous job steps at one pace, so step times tell nothing. What a rank computes before it has to wait for the
others does: reading its rows and its forward pass. The backward pass is left out, for the gradients' collectives run
inside it. Under ZeRO 3 the forward pass gathers weights and so waits too: the ratios seen there are smaller than the
truth, and a slow rank may go unnamed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median

import torch
import torch.distributed as dist

from cpt.train.engine import Topology
from cpt.train.stepinfo import StepInfo

OWN_PHASES = ("data", "forward")
SLOW_RATIO = 1.2
SLOW_SECONDS = 0.01  # per step; less than this is noise, and costs nothing
SLOW_WINDOWS = 3  # in a row, before it is said
WINDOW_STEPS = 10  # at least, in a window


@dataclass(frozen=True)
class Straggler:
    """A rank, its seconds as a multiple of the others' median, and the phase in which it loses most."""

    rank: int
    ratio: float
    phase: str


def slow_ranks(seconds: Sequence[Sequence[float]]) -> list[Straggler]:
    """``seconds[rank]``: of each of ``OWN_PHASES``, per step. Compared with the median of all *other* ranks, so that
    of two ranks one can be slow.
    """
    found = []
    for rank, own in enumerate(seconds):
        others = [line for other, line in enumerate(seconds) if other != rank]
        typical = median(sum(line) for line in others)
        excess = sum(own) - typical
        if excess > SLOW_SECONDS and sum(own) > SLOW_RATIO * typical:
            lost = [mine - median(line[i] for line in others) for i, mine in enumerate(own)]
            ratio = sum(own) / max(typical, SLOW_SECONDS)
            found.append(Straggler(rank, ratio, OWN_PHASES[lost.index(max(lost))]))
    return found


@dataclass
class StragglerHook:
    """Runs after every step on every rank; a collective of two numbers per rank and window. ``report`` is called once
    per episode: a rank that was slow for some windows running, until it keeps up again.
    """

    topology: Topology
    window: int
    report: Callable[[Straggler, int], None]
    _sums: list[float] = field(default_factory=lambda: [0.0] * len(OWN_PHASES))
    _steps: int = -1  # the first step compiles and warms up: not counted
    _slow_for: dict[int, int] = field(default_factory=dict)

    def __call__(self, info: StepInfo) -> None:
        self._steps += 1
        if self._steps > 0:
            own = [info.seconds.get(phase, 0.0) for phase in OWN_PHASES]
            self._sums = [a + b for a, b in zip(self._sums, own, strict=True)]
        if info.step % self.window == 0 and self._steps > 0:
            self._compare(info.step)
            self._sums, self._steps = [0.0] * len(OWN_PHASES), 0

    def _compare(self, step: int) -> None:
        slow = slow_ranks(self._gathered())
        self._slow_for = {each.rank: self._slow_for.get(each.rank, 0) + 1 for each in slow}
        for each in slow:
            if self._slow_for[each.rank] == SLOW_WINDOWS:
                self.report(each, step)

    def _gathered(self) -> list[list[float]]:
        own = torch.tensor([total / self._steps for total in self._sums], device=self.topology.device)
        gathered = [torch.empty_like(own) for _ in range(self.topology.world_size)]
        dist.all_gather(gathered, own)
        lines: list[list[float]] = torch.stack(gathered).tolist()
        return lines

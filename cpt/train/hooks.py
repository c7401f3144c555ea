"""Hooks of the loop: a function and the steps at which it runs. All ranks run the same hooks in list order."""

from collections.abc import Callable
from dataclasses import dataclass, field

from cpt.train.stepinfo import StepInfo


@dataclass(frozen=True)
class Hook:
    """Run ``function`` after every ``every``-th step and after each step of ``at`` (0 = before the first)."""

    function: Callable[[StepInfo], None]
    every: int | None = None
    at: frozenset[int] = field(default_factory=frozenset)

    def is_due(self, step: int) -> bool:
        return step in self.at or (self.every is not None and step > 0 and step % self.every == 0)

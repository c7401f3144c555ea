"""Counts what a library waits for in its collective calls as communication.

Owns the wrapping of a backend object's methods: on a CPU the call itself takes the time, on a GPU the stream waits
where nothing hides the transfer, and both are what ``Phases`` measure. Transfers that run beside the computation cost
nothing here until somebody waits for them.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

from cpt.train.phases import Phases

COLLECTIVES = (
    *("all_reduce", "all_reduce_coalesced", "reduce", "reduce_scatter", "reduce_scatter_tensor", "broadcast"),
    *("all_gather", "all_gather_into_tensor", "all_gather_coalesced", "all_to_all", "all_to_all_single"),
)


class _Handle:
    """A transfer under way; the wait for it counts."""

    def __init__(self, handle: Any, phases: Phases) -> None:
        self._handle, self._phases = handle, phases

    def wait(self, *arguments: Any, **named: Any) -> Any:
        with self._phases("communication"):
            return self._handle.wait(*arguments, **named)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handle, name)


def count_collectives(backend: Any, phases: Phases) -> None:
    """Make the collective calls of ``backend`` count in ``phases``; of those given before, no longer in theirs."""
    for name in COLLECTIVES:
        if hasattr(type(backend), name):
            setattr(backend, name, _counted(getattr(type(backend), name).__get__(backend), phases))


def _counted(call: Callable[..., Any], phases: Phases) -> Callable[..., Any]:
    @wraps(call)
    def counted(*arguments: Any, **named: Any) -> Any:
        with phases("communication"):
            found = call(*arguments, **named)
        return _Handle(found, phases) if hasattr(found, "wait") else found

    return counted

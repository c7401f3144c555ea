"""Checkpoints that could not be evaluated: how often they were tried, why not, when they may be tried again, and when
they are given up. No torch.

Owns ``evals/SUITE/failed/step_N.json``, which all watchers of a run share, so that tries are bounded over all of them;
deleting it gives a checkpoint another chance. A pause is counted by each process's own clock from when it heard of the
failure: clocks of two machines are never compared. Refuses files that say something else.
"""

import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from cpt.rundir import DataError, step_name, step_of, write_atomic

LONGEST_REASON = 2000


@dataclass(frozen=True)
class Failure:
    """How often a checkpoint was tried in vain, over all watchers, and how it ended the last time."""

    tries: int
    reason: str


class Tries:
    """What one watcher knows of failures. ``pauses``: seconds between tries, and so one less than their number."""

    def __init__(self, results: Path, pauses: tuple[float, ...]) -> None:
        self._results = results
        self._pauses = pauses
        self._known: dict[int, Failure] = {}
        self._unwritten: dict[int, Failure] = {}  # the disk was full: this process alone knows them
        self._not_before: dict[int, float] = {}

    def look(self) -> None:
        """Learn what other watchers wrote, and which files are gone. Raises DataError for one that cannot be read."""
        known = {**read_failures(self._results), **self._unwritten}
        for step, failure in known.items():
            if self._known.get(step) != failure:
                self._not_before[step] = time.monotonic() + self._pause(failure)
        self._known = known

    def changed(self, step: int) -> bool:
        """Whether another watcher has tried it since the last look."""
        return step not in self._unwritten and read_failures(self._results).get(step) != self._known.get(step)

    def is_given_up(self, step: int) -> bool:
        return step in self._known and self._known[step].tries > len(self._pauses)

    @property
    def given_up(self) -> dict[int, Failure]:
        return {step: failure for step, failure in self._known.items() if self.is_given_up(step)}

    def seconds_until(self, step: int) -> float:
        """When it may be tried: 0 for now."""
        return max(0.0, self._not_before.get(step, 0.0) - time.monotonic())

    def failed(self, step: int, reason: str) -> str:
        """Note one more failure; returns what happens next, in words."""
        before = self._known[step].tries if step in self._known else 0
        failure = self._known[step] = Failure(before + 1, reason[:LONGEST_REASON])
        path = failure_file(self._results, step)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, json.dumps(asdict(failure)) + "\n")
        except OSError as error:
            self._unwritten[step] = failure
            print(f"WARNING: {path}: {error}", file=sys.stderr, flush=True)
        if self.is_given_up(step):
            return f"given up after {failure.tries} tries"
        return self.wait(step, self._pause(failure))

    def wait(self, step: int, seconds: float) -> str:
        """Leave it alone for so long, without counting a try."""
        self._not_before[step] = time.monotonic() + seconds
        return f"again in {seconds:g} s"

    def succeeded(self, step: int) -> None:
        for known in (self._known, self._unwritten):
            known.pop(step, None)
        failure_file(self._results, step).unlink(missing_ok=True)

    def _pause(self, failure: Failure) -> float:
        return self._pauses[min(failure.tries, len(self._pauses)) - 1]


def failure_file(results: Path, step: int) -> Path:
    """``results`` is ``evals/SUITE``."""
    return results / "failed" / f"{step_name(step)}.json"


def read_failures(results: Path) -> dict[int, Failure]:
    """By step.

    Raises:
        DataError: a file that says something else.
    """
    paths = (results / "failed").glob("step_*.json")
    return dict(found for path in paths if (found := _read(path)) is not None)


def _read(path: Path) -> tuple[int, Failure] | None:
    """None where another watcher deleted it, for it succeeded."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError):
        raw = None
    step, known = step_of(path), isinstance(raw, dict) and raw.keys() == {"tries", "reason"}
    if step is None or not known or type(raw["tries"]) is not int or raw["tries"] < 1:
        raise DataError(f"{path}: does not say how often a checkpoint was tried, and why it failed; delete it")
    return step, Failure(raw["tries"], str(raw["reason"]))

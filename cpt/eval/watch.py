"""A watcher: evaluates every complete checkpoint of a run once, the newest first, beside the training or after it. No
torch.

What evaluates a checkpoint comes from above and writes ``evals/SUITE/step_N.json``; this file decides which, and when.
Several watchers share the work by claims (``cpt.eval.claims``); what fails is tried again a few times
(``cpt.eval.tries``). A full disk is no fault of a checkpoint and is waited out. A checkpoint that was pruned while it
was read is no failure either.

    checkpoints 100 200 300 of a run at work, 300 is being written, 100 has results
    -> 200 is claimed and evaluated; then 300, complete by now; then nothing, until there is a newer one

It ends when the run has finished and all that is there has results or was given up, or, asked to do so once, without
waiting for more. Refuses nothing that time may mend; what the user must mend (ConfigError) ends it.
"""

import errno
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from cpt.eval.best import Rule, pin_best
from cpt.eval.remote_run import RemoteRun
from cpt.eval.results import SuiteRecord, items_file, read_suite_record, record_file, texts_file
from cpt.eval.tries import Failure, Tries, failure_file
from cpt.eval.watched_run import LocalRun, Sight
from cpt.exit_codes import EXIT_STOPPED
from cpt.rundir import DataError

GRACE_SECONDS = 5.0  # in which further signals are one request: launchers and schedulers send several
FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
FORBIDDEN = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
SILENT_LOOKS = 360  # in a row that the disk or the URL may not answer: an hour


@dataclass(frozen=True)
class Pace:
    """``retry_seconds``: the pauses between tries, and so one less than their number. ``still_seconds``: a checkpoint
    of a finished run of which nothing more arrives for so long is not waited for any longer.
    """

    poll_seconds: float = 10.0
    retry_seconds: tuple[float, ...] = (10.0, 60.0)
    still_seconds: float = 60.0


@dataclass(frozen=True)
class Work:
    """What is done with a checkpoint. ``evaluate`` gets its folder, in a run folder, and writes the suite's results
    there; it raises OSError, RuntimeError or DataError where it cannot. ``base``: what it gets for step 0, the model
    that the run started from. ``tell`` is given what this watcher measured.
    """

    evaluate: Callable[[Path], object]
    base: Path | None = None
    keep_best: Rule | None = None
    tell: Callable[[SuiteRecord], None] | None = None


@dataclass
class Outcome:
    """What a watcher did and what it left."""

    evaluated: list[int] = field(default_factory=list)  # by this watcher, in its order
    failed: dict[int, Failure] = field(default_factory=dict)  # given up
    gone: list[int] = field(default_factory=list)  # pruned while they were read
    partial: dict[int, str] = field(default_factory=dict)  # not complete at the end, and why

    @property
    def problem(self) -> str:
        """What keeps this from being a success; empty where nothing does."""
        return "\n".join(
            f"{_called(step)} could not be evaluated in {each.tries} tries: {each.reason}"
            for step, each in sorted(self.failed.items())
        )


def watch(run: LocalRun | RemoteRun, work: Work, *, once: bool = False, pace: Pace | None = None) -> Outcome:
    """Evaluate what there is, and what comes, as the module says.

    Raises:
        ConfigError: something that the user must mend, such as a task of the suite.
        DataError: results or pins in the run folder that cannot be read.
        OSError: the disk or the URL does not answer any more.
        SystemExit: 143 after SIGTERM or Ctrl-C; the claim was given back.
    """
    with _ending_on_signals():
        return _Watcher(run, work, once=once, pace=pace or Pace()).watch()


class _Watcher:
    def __init__(self, run: LocalRun | RemoteRun, work: Work, *, once: bool, pace: Pace) -> None:
        self._run, self._work, self._once, self._pace = run, work, once, pace
        self._outcome = Outcome()
        self._tries = Tries(run.results, pace.retry_seconds)
        self._unchanged: tuple[object, float] = (None, 0.0)  # what was seen, and since when
        self._silent_looks = 0
        self._said = ""

    def watch(self) -> Outcome:
        while True:
            try:
                sight = self._look()
                pending = self._pending(sight)
                if not pending and self._may_end(sight):
                    return self._ended(sight)
                if not self._take_one(pending, sight):
                    self._rest(self._words(sight, pending), pending, sight)
                self._silent_looks = 0
            except OSError as error:
                self._rest(self._endure(error), [], Sight(frozenset(), frozenset()))

    def _look(self) -> Sight:
        sight = self._run.look()
        self._tries.look()
        if self._work.keep_best:
            self._pin()
        return sight

    def _pending(self, sight: Sight) -> list[int]:
        """Steps without results, in the order of their turns."""
        base = {0} if self._work.base else set()
        todo = (sight.complete | base) - sight.evaluated - self._tries.given_up.keys()
        return sorted(todo & base) + sorted(todo - base, reverse=True)

    def _take_one(self, pending: Sequence[int], sight: Sight) -> bool:
        """Evaluate the first one that can be had; whether it is time to look again. Those that nobody claims come
        first: to ask after a claim takes seconds where its holder is on another machine.
        """
        ready = [step for step in pending if not self._tries.seconds_until(step)]
        for claimed in (False, True):
            for step in ready:
                if self._run.is_claimed(step) == claimed and (claim := self._run.claim(step)):
                    with claim:
                        if not self._run.has_results(step) and not self._tries.changed(step):
                            self._evaluate(step, f"{len(sight.evaluated)} of {len(sight.complete)} have results")
                    return True
        return False

    def _evaluate(self, step: int, standing: str) -> None:
        print(f"{self._run}: {_called(step)} with suite {self._run.results.name} ({standing})", flush=True)
        started = time.monotonic()
        try:
            record = self._measure(step)
        except (OSError, RuntimeError, DataError) as error:
            self._failed(step, error)
            return
        self._outcome.evaluated.append(step)
        groups = {name: group.accuracy for name, group in record.groups.items() if group.accuracy is not None}
        shown = "  ".join(f"{name} {accuracy:.4f}" for name, accuracy in groups.items())
        print(f"{_called(step)}: {shown or 'done'}  ({time.monotonic() - started:.1f} s)", flush=True)
        if self._work.keep_best:
            self._pin()  # before the claim ends, which keeps this checkpoint from being pruned
        if self._work.tell:
            self._work.tell(record)

    def _measure(self, step: int) -> SuiteRecord:
        results = self._run.results
        if not self._run.has_unsent(step):
            where = nullcontext(self._work.base) if step == 0 and self._work.base else self._run.bring(step)
            with where as folder:
                self._work.evaluate(folder)
        record = read_suite_record(record_file(results, step))
        self._run.publish([items_file(results, step), texts_file(results), record_file(results, step)])
        self._tries.succeeded(step)
        self._run.publish([failure_file(results, step)])
        return record

    def _failed(self, step: int, error: Exception) -> None:
        reason = f"{type(error).__name__}: {error}"
        if step and step not in self._run.look().complete:
            self._outcome.gone.append(step)
            print(f"{_called(step)}: pruned while it was read", flush=True)
            return
        if isinstance(error, OSError) and error.errno in FULL and not self._once:
            then = self._tries.wait(step, self._pace.retry_seconds[-1])
        else:
            then = self._tries.failed(step, reason)
            self._run.publish([failure_file(self._run.results, step)])
        print(f"WARNING: {_called(step)}: {reason}; {then}", file=sys.stderr, flush=True)

    def _pin(self) -> None:
        rule = self._work.keep_best
        assert rule is not None, "asked for by _work.keep_best"
        step = pin_best(self._run.rundir.checkpoints, self._run.results, rule)
        if step is not None:
            print(f"the best by {rule} is now step {step}: pinned", flush=True)

    def _may_end(self, sight: Sight) -> bool:
        if self._once or sight.all_arrived:
            return True
        seen = (sight.complete, dict(sight.partial))
        if self._unchanged[0] != seen:
            self._unchanged = (seen, time.monotonic())
        return sight.finished_at is not None and time.monotonic() - self._unchanged[1] >= self._pace.still_seconds

    def _ended(self, sight: Sight) -> Outcome:
        self._outcome.failed = self._tries.given_up
        self._outcome.partial = {step: each.reason for step, each in sight.partial.items()}
        return self._outcome

    def _endure(self, error: OSError) -> str:
        """Shared disks and networks come back; raises the error where this one does not, and where nothing may be
        written.
        """
        self._silent_looks += 1
        if error.errno in FORBIDDEN or self._silent_looks > (
            len(self._pace.retry_seconds) if self._once else SILENT_LOOKS
        ):
            raise error
        return f"{self._run}: {error}; looking again"

    def _rest(self, words: str, pending: Sequence[int], sight: Sight) -> None:
        turns = (self._tries.seconds_until(step) for step in pending)
        seconds = min([self._pace.poll_seconds, *(turn for turn in turns if turn)])
        if not sys.stdout.isatty():
            if words != self._said:
                print(words, flush=True)
            self._said = words
            time.sleep(seconds)
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        with Progress(*columns, transient=True) as bar:
            bar.add_task(words, total=len(sight.complete), completed=len(sight.evaluated & sight.complete))
            time.sleep(seconds)

    def _words(self, sight: Sight, pending: Sequence[int]) -> str:
        given_up = len(self._tries.given_up)
        parts = [f"{len(sight.evaluated & sight.complete)} of {len(sight.complete)} checkpoints have results"]
        parts += [f"{len(pending)} wait for another watcher or another try"] if pending else []
        parts += [f"{given_up} given up"] if given_up else []
        parts += [
            f"{_called(step)} is not complete: {each.reason}" for step, each in sorted(sight.partial.items())[-1:]
        ]
        return f"{self._run}: " + ", ".join(parts)


def _called(step: int) -> str:
    """For people."""
    return f"step {step}" if step else "the base model"


@contextmanager
def _ending_on_signals() -> Iterator[None]:
    """SIGTERM and Ctrl-C unwind what is going on, so that claims are given back; one that comes much later kills."""
    first: list[float] = []

    def end(number: int, frame: FrameType | None) -> None:
        if not first:
            first.append(time.monotonic())
            raise SystemExit(EXIT_STOPPED)
        if time.monotonic() - first[0] > GRACE_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

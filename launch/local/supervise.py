"""Keep a job running: start it again from its newest complete checkpoint when it crashed or hung.

Not restarted: exit 0 with a ``finish`` event, 2 (the user can fix it), a stop that was asked for; and what a restart
cannot cure: the same failure in Python at the same step twice, which the guard inside the job has already tried, or
too many starts without a new complete checkpoint. Every restart and its reason stand in events.jsonl. How many
processes there can be, on the GPUs of this machine or on the hosts of a cluster, is asked anew before every start.

    failures without a new checkpoint   1   2   3   4  ...
    wait before the next start, s       2   4   8  16  ...  300 at most
"""

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, Self, TypeVar

from cpt.exit_codes import EXIT_BUG, EXIT_DONE, EXIT_ENVIRONMENT, EXIT_STOPPED, EXIT_USER, KILLED
from cpt.heartbeats import STARTING, Beat, Observer, ask_for_stacks, read_beats
from cpt.rundir import RunDir, note_event, read_events
from launch.local.devices import Usable, usable_devices
from launch.local.ranks import Ended, Launcher
from launch.run_folder import newest_step, patiently

Result = TypeVar("Result")
FIRST_WAIT, LONGEST_WAIT = 2.0, 300.0
SILENCE_SECONDS = 900.0  # at least, until the first beat of a start: imports, and the run folder's lock
LIFECYCLE = ("start", "resume", "finish")


class Starter(Protocol):
    """What starts the ranks of a job: on this machine ``launch.local.ranks``, on others ``launch.hosts.launcher``.

    ``asked``: the signal that asked to stop, once there was one; ``wait`` returns at once then.
    """

    asked: str | None

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None: ...

    def run(
        self,
        arguments: Sequence[str],
        *,
        num_processes: int,
        devices: Sequence[str] | None = None,
        verdict: Callable[[], str | None] = ...,
    ) -> Ended: ...

    def wait(self, seconds: float) -> None: ...


@dataclass(frozen=True)
class Job:
    """What is kept running. ``arguments`` of the trainer for the first start and ``again`` for all later ones;
    ``fits``: whether a step's rows divide into so many processes; ``places``: what a process needs one of;
    ``command``: for a person, to go on after it was given up.
    """

    run_dir: Path
    arguments: Sequence[str]
    again: Sequence[str]
    num_processes: int
    fits: Callable[[int], bool]
    hang_seconds: float
    max_restarts: int = 10
    places: Literal["devices", "places on hosts"] = "devices"
    command: str = ""


@dataclass(frozen=True)
class Failure:
    """One start that did not end well. ``step`` is None where not a single step was begun; ``newer``: it left a
    complete checkpoint that was not there before; ``guard_stop``: the guard inside the job has tried and given up.
    """

    code: int
    reason: str
    step: int | None
    newer: bool
    guard_stop: bool = False

    @property
    def in_python(self) -> bool:
        """It ended itself with an error, neither killed, hung nor lost; at its start an error of the environment may
        pass.
        """
        lasting = self.code == EXIT_BUG or (self.code == EXIT_ENVIRONMENT and self.step is not None)
        return lasting and not self.reason.startswith(("hang", "lost"))

    def same_as(self, other: "Failure") -> bool:
        return (self.code, self.step) == (other.code, other.step)


@dataclass(frozen=True)
class Decision:
    """Wait so long and start again, or, where ``wait`` is None, give up; and why."""

    wait: float | None
    words: str


def decide(failures: Sequence[Failure], *, max_restarts: int) -> Decision:
    """What to do after the last of ``failures``, all there were."""
    made_progress = [number for number, failure in enumerate(failures) if failure.newer]
    fruitless = failures[made_progress[-1] if made_progress else 0 :]
    last = fruitless[-1]
    if last.guard_stop:
        return Decision(None, "the guard has rolled back as often as it may: a restart would do the same again")
    if last.in_python and any(before.in_python and before.same_as(last) for before in fruitless[:-1]):
        place = "at its start" if last.step is None else f"after step {last.step}"
        return Decision(None, f"it failed the same way twice {place}: a restart does not cure it")
    if len(fruitless) > max_restarts:
        return Decision(None, f"{len(fruitless)} starts in a row failed without a new complete checkpoint")
    return Decision(min(LONGEST_WAIT, FIRST_WAIT * 2.0 ** (len(fruitless) - 1)), last.reason)


def processes_for(usable: int, job: Job) -> int:
    """The largest number of processes, as asked for at most, that are usable and divide the batch; 0: none does."""
    return next((number for number in range(min(usable, job.num_processes), 0, -1) if job.fits(number)), 0)


def start_once(job: Job, usable: Usable, launcher: Starter) -> int:
    """Run ``job`` without a restart; returns the exit code, never 0 for a run that has not finished."""
    with launcher:
        attempt = _Attempt(job, launcher)
        devices = usable.devices[: job.num_processes] if usable.devices else None
        ended = launcher.run(job.arguments, num_processes=job.num_processes, devices=devices)
    failed = ended.code == EXIT_DONE and not attempt.finished(ended)
    words = "all ranks ended with 0, but the run did not finish" if failed else ended.words
    code = EXIT_BUG if failed else ended.code
    print(f"launch: {words} (exit code {code})", file=sys.stderr, flush=True)
    return code


def supervise(
    job: Job,
    *,
    available: Callable[[int], Usable] = usable_devices,
    launcher: Starter | None = None,
) -> int:
    """Run ``job`` to its end; returns the exit code: 0 finished, 2, 143 stopped, else that of the last failure.

    Raises:
        OSError: the run folder has no answer, for longer than ``launch.run_folder`` is patient.
    """
    failures: list[Failure] = []
    starter: Starter = launcher or Launcher()
    with starter as launcher:
        while True:
            usable = available(job.num_processes)
            processes = processes_for(usable.count, job)
            if processes == 0:
                return _give_up(job, f"of {usable.count} usable {job.places} no number divides the batch", failures)
            attempt = _Attempt(job, launcher)
            _say_start(job, processes, usable, failures, newest=attempt.newest_before)
            # A folder that was there before the first start is not this job's: the trainer refuses it.
            ended = attempt.run(job.again if failures and attempt.is_settled else job.arguments, processes, usable)
            if launcher.asked or ended.code in (EXIT_USER, EXIT_STOPPED) or attempt.finished(ended):
                return ended.code
            failures.append(attempt.failure(ended))
            decision = decide(failures, max_restarts=job.max_restarts)
            if decision.wait is None:
                return _give_up(job, decision.words, failures)
            newest = attempt.newest()
            _announce(failures, decision, newest=newest)
            launcher.wait(decision.wait)
            if launcher.asked:  # nothing runs: what is on disk is all there is
                return EXIT_ENVIRONMENT if newest is None else EXIT_STOPPED


class _Attempt:
    """One start of the job, and what it left behind. Asks the run folder again where it has no answer at first."""

    def __init__(self, job: Job, launcher: Starter) -> None:
        self._job, self._launcher = job, launcher
        self._rundir = RunDir(job.run_dir)
        self.newest_before = self.newest()
        self._beats_before = read_beats(self._rundir.heartbeats)
        self._events_before = len(self._events())

    @property
    def is_settled(self) -> bool:
        """There is a run folder to go on in; an earlier start came so far."""
        return self._patiently(self._rundir.config.exists)

    def newest(self) -> int | None:
        return self._patiently(lambda: newest_step(self._job.run_dir))

    def _events(self) -> list[dict[str, Any]]:
        return self._patiently(lambda: read_events(self._rundir))

    def _patiently(self, work: Callable[[], Result]) -> Result:
        return patiently(work, pause=self._launcher.wait)

    def run(self, arguments: Sequence[str], processes: int, usable: Usable) -> Ended:
        devices = usable.devices[:processes] if usable.devices else None
        silence = _Silence(self._rundir, self._job.hang_seconds)
        return self._launcher.run(arguments, num_processes=processes, devices=devices, verdict=silence)

    def finished(self, ended: Ended) -> bool:
        """Exit 0 alone is no proof: some launchers end with it when they are killed."""
        if ended.code != EXIT_DONE:
            return False
        known = [kind for event in self._events() if (kind := event.get("event")) in LIFECYCLE]
        return not known or known[-1] == "finish"

    def failure(self, ended: Ended) -> Failure:
        beats = read_beats(self._rundir.heartbeats)
        own = [beat for rank, beat in beats.items() if beat != self._beats_before.get(rank)]
        begun = [beat.step for beat in own if beat.phase != STARTING]
        newest = self.newest()
        newer = newest is not None and (self.newest_before is None or newest > self.newest_before)
        said = _last_words(own, ended.rank) if ended.code < KILLED else None
        reason = ended.words if ended.code else "it ended with 0 but did not finish"
        new = self._events()[self._events_before :]
        stopped = any(event.get("event") == "guard_stop" for event in new)
        return Failure(
            ended.code or EXIT_BUG, self._hang(new) or said or reason, max(begun, default=None), newer, stopped
        )

    def _hang(self, events: Sequence[Mapping[str, Any]]) -> str | None:
        hang = next((event for event in events if event.get("event") == "hang"), None)
        if hang is None:
            return None
        named = [*(hang.get("silent") or []), *(hang.get("behind") or [])]
        ranks = "; ".join(f"rank {each.get('rank')} on {each.get('host')} ({each.get('why')})" for each in named)
        return f"hang: {ranks or 'all ranks waited at the same place'}"


class _Silence:
    """Says so when no rank's heartbeat has changed for half as long again as the ranks' own watchdogs wait, or none
    has come at all: all of them are stopped, or one alone holds the interpreter. Counts only time in which it was
    itself awake.
    """

    def __init__(self, rundir: RunDir, hang_seconds: float) -> None:
        self._folder = rundir.heartbeats
        self._observer = Observer(self._folder)
        self._observer.look(0.0)
        self._old = dict(self._observer.beats)
        self._limit = 1.5 * hang_seconds
        self._every = min(5.0, hang_seconds / 4)
        self._looked = self._started = time.monotonic()
        self._waited = 0.0

    def __call__(self) -> str | None:
        now = time.monotonic()
        if now - self._looked < self._every:
            return None
        seconds, self._looked = min(now - self._looked, 2 * self._every), now
        self._observer.look(seconds)
        self._waited += seconds
        fresh = [rank for rank, beat in self._observer.beats.items() if beat != self._old.get(rank)]
        limit = self._limit if fresh else max(self._limit, SILENCE_SECONDS)
        quiet = min((self._observer.silent[rank] for rank in fresh), default=self._waited)
        if quiet < limit:
            return None
        for rank in fresh:
            ask_for_stacks(self._folder, self._observer.beats[rank])
        return f"hang: no rank has shown a sign of life for {quiet:.0f} s"


def _last_words(beats: Sequence[Beat], rank: int | None) -> str | None:
    """What the rank that failed said of itself, which is more than its exit code."""
    said = next((beat for beat in beats if beat.rank == rank and beat.state == "failed" and beat.message), None)
    return f"rank {said.rank} on {said.host}: {said.message}" if said else None


def _say_start(job: Job, processes: int, usable: Usable, failures: Sequence[Failure], *, newest: int | None) -> None:
    if processes < job.num_processes:
        why = f"{usable.count} usable, and the batch must divide"
        print(f"supervisor: {processes} of {job.num_processes} processes ({why})", file=sys.stderr, flush=True)
    if failures:
        last, waited = failures[-1], decide(failures, max_restarts=job.max_restarts).wait
        facts: dict[str, Any] = {
            "reason": last.reason,
            "exit_code": last.code,
            "attempt": len(failures) + 1,
            "processes": processes,
        }
        if job.places == "places on hosts":
            facts["hosts"] = list(dict.fromkeys((usable.devices or ())[:processes]))
        _note(job, "restart", last.step or newest or 0, waited=waited, checkpoint=newest, **facts)


def _announce(failures: Sequence[Failure], decision: Decision, *, newest: int | None) -> None:
    last = failures[-1]
    origin = f"the checkpoint after step {newest}" if newest is not None else "the start"
    print(
        f"supervisor: {last.reason} (exit code {last.code}); start {len(failures) + 1} from {origin} "
        f"in {decision.wait:g} s",
        file=sys.stderr,
        flush=True,
    )


def _give_up(job: Job, words: str, failures: Sequence[Failure]) -> int:
    last = failures[-1] if failures else Failure(EXIT_ENVIRONMENT, words, None, newer=False)
    print(
        f"supervisor: gives up: {words}. Last failure: {last.reason} (exit code {last.code}). "
        f"When it is mended: {job.command or f'cpt resume {job.run_dir} --supervise'}",
        file=sys.stderr,
        flush=True,
    )
    _note(job, "gave_up", last.step or 0, reason=words, last=last.reason, exit_code=last.code, attempts=len(failures))
    return last.code


def _note(job: Job, name: str, step: int, **details: object) -> None:
    def note() -> None:
        if job.run_dir.is_dir():  # else nothing got as far as making it
            note_event(name, step, RunDir(job.run_dir), **details)

    try:
        patiently(note)
    except OSError as error:
        print(f"WARNING: could not note {name}, {json.dumps(details)}: {error}", file=sys.stderr, flush=True)

"""Between two starts of a Slurm job: ``python -m launch.slurm.turns begin NOTES RUN_DIR``, ``end NOTES RUN_DIR CODE``.

A job is queued again, by Slurm or by its own script, as often as it is preempted or its time is over; what must not go
on for ever is a job that never gets as far as a new checkpoint. ``begin`` counts such starts and refuses one too many.
``end`` reads from the run folder how the ranks ended, which the launchers in between do not tell, prints ``again``
where the job is to be queued again, and ends with the code of the run. Owns the folder
``NOTES``, which is RUN_DIR/launch for a run; that of a pilot must not be there before the pilot makes it.
"""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cpt.exit_codes import EXIT_DONE, EXIT_ENVIRONMENT, EXIT_STOPPED
from cpt.rundir import RunDir, read_events, write_atomic
from launch.run_folder import newest_step, patiently

MAX_FRUITLESS = 10  # starts in a row without a new complete checkpoint, as of a supervisor
TURN, ASKED = "turns.json", "asked"
LIFECYCLE = ("start", "resume", "finish", "sigterm")
BY_THE_SCHEDULER = ("SIGTERM", "time limit")  # a file STOP and Ctrl-C come from a person


@dataclass(frozen=True)
class Turn:
    """What was there when a start began: the newest checkpoint, lines of events, and fruitless starts before it."""

    newest: int | None
    events: int
    fruitless: int


@dataclass(frozen=True)
class Verdict:
    """The exit code of a start, whether the job is to be queued again, and why."""

    code: int
    again: bool
    words: str


def begin(notes: Path, run_dir: Path, *, restarts: int) -> int:
    """Note a start; ``restarts``: starts of this job before it. Returns 0, or 3 where it must not be made."""
    notes.mkdir(parents=True, exist_ok=True)
    if (notes / ASKED).exists() or not restarts:  # the request was made of the start before, and so was its file
        RunDir(run_dir).stop_file.unlink(missing_ok=True)
        (notes / ASKED).unlink(missing_ok=True)
    newest, before = newest_step(run_dir), _read(notes / TURN) if restarts else None
    fruitless = before.fruitless + 1 if before and before.newest == newest else 0
    if fruitless > MAX_FRUITLESS:
        print(
            f"gives up: {fruitless} starts in a row without a new complete checkpoint in {run_dir}. Save more often "
            "(checkpoint.every_steps), or ask for more time; then `cpt launch` again",
            file=sys.stderr,
        )
        return EXIT_ENVIRONMENT
    turn = Turn(newest, len(read_events(RunDir(run_dir))), fruitless)
    write_atomic(notes / TURN, json.dumps(asdict(turn)) + "\n")
    return 0


def note_request(run_dir: Path) -> None:
    """Slurm has asked the run to stop; called in a signal handler."""
    (RunDir(run_dir).launch / ASKED).touch()


def end(notes: Path, run_dir: Path, code: int) -> Verdict:
    """How the start that ``begin`` noted has ended; ``code``: of srun."""
    turn = _read(notes / TURN) or Turn(None, 0, 0)
    return judge(read_events(RunDir(run_dir)), turn.events, code, asked=(notes / ASKED).exists())


def judge(events: Sequence[Mapping[str, Any]], before: int, code: int, *, asked: bool) -> Verdict:
    """``events`` of the run, ``before`` of them older than this start; ``asked``: Slurm told the job to stop.

    A launcher that was killed may end with 0, and one whose ranks saved with 1: what counts is the run's own word.
    """
    known = [event for event in events if event.get("event") in LIFECYCLE]
    new = [event for event in events[before:] if event.get("event") in LIFECYCLE]
    last = new[-1] if new else None
    if last is not None and last["event"] == "sigterm":
        by_slurm = asked or last.get("signal") in BY_THE_SCHEDULER
        return Verdict(EXIT_STOPPED, by_slurm, f"stopped after step {last.get('step')}, saved ({last.get('signal')})")
    if code == EXIT_DONE and known and known[-1]["event"] == "finish":
        return Verdict(EXIT_DONE, again=False, words="finished")
    if code == EXIT_STOPPED or (code == EXIT_DONE and asked):
        return Verdict(EXIT_STOPPED, again=True, words="stopped before it had begun")
    return Verdict(code or EXIT_ENVIRONMENT, again=False, words=f"failed with exit code {code}, and did not finish")


def _read(path: Path) -> Turn | None:
    try:
        return Turn(**json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def main(arguments: Sequence[str] | None = None) -> int:
    """The word for the script goes to stdout, those for people to stderr."""
    verb, notes, run_dir, *code = sys.argv[1:] if arguments is None else arguments
    if verb == "begin":
        restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        return patiently(lambda: begin(Path(notes), Path(run_dir), restarts=restarts))
    verdict = patiently(lambda: end(Path(notes), Path(run_dir), int(code[0])))
    print(f"job: {verdict.words}", file=sys.stderr, flush=True)
    if verdict.again:
        print("again")
    return verdict.code


if __name__ == "__main__":
    sys.exit(main())

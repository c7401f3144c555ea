"""Running a grid on this machine: some pilots at a time, each through the trainer in a process of its own.

Owns the processes. What is finished is skipped, what was stopped or killed goes on, and what fails is told at the end
with its log file while the others go on. SIGTERM and Ctrl-C are passed on; when all children have saved and ended, so
does this. Everything known of a grid is in its files, so it may be killed at any time; children that outlive it are
found by the lock on their run folders and waited for. ``observations.csv`` is written after every finished run.
Refuses a second process on one grid.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Protocol

from rich.console import Console

from cpt.exit_codes import EXIT_STOPPED, exit_code
from cpt.planner.observe import observe_runs, write_observations
from cpt.planner.pilot_facts import grid_facts
from cpt.planner.pilot_folders import (
    can_start,
    check_folders,
    drop_checkpoints,
    is_finished,
    is_held,
    trainer_arguments,
    write_run_files,
)
from cpt.planner.pilot_progress import Progress, progress_for
from cpt.planner.pilots import Grid, Pilot
from cpt.rundir import DataError, write_atomic
from data_tools.folder_lock import hold_folder

POLL_SECONDS = 0.2
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
TIDY_SECONDS = 3.0
RENDEZVOUS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "CROSS_RANK", "CROSS_SIZE")


class Child(Protocol):
    """What is needed of a child process; ``subprocess.Popen`` is one."""

    def poll(self) -> int | None: ...

    def send_signal(self, number: int, /) -> None: ...

    def terminate(self) -> None: ...

    def wait(self) -> int: ...


Launch = Callable[[Sequence[str], Path, Mapping[str, str]], Child]  # command, log file, environment


@dataclass
class Running:
    """A child process in its slot, and how often it was told to stop."""

    process: Child
    slot: int
    told: int = 0


class StopRequests:
    """Counts SIGTERM and Ctrl-C inside a block. Whoever polls passes them on: a handler that did so itself would miss
    the child that is being started at that moment.
    """

    def __init__(self) -> None:
        self.count = 0

    def _take(self, number: int, frame: FrameType | None) -> None:
        self.count += 1

    @contextmanager
    def listen(self) -> Iterator[None]:
        previous = {number: signal.signal(number, self._take) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            for number, former in previous.items():
                signal.signal(number, former)

    def pass_on(self, running: Running) -> None:
        """To a child that has not heard of all of them; SIGTERM either way, for a child may still be importing."""
        while running.told < self.count:
            running.told += 1
            running.process.send_signal(signal.SIGTERM)


def launch_process(command: Sequence[str], log: Path, environment: Mapping[str, str]) -> Child:
    """Start a command with its output at the end of ``log``."""
    with log.open("ab") as file:  # a session of its own: Ctrl-C reaches it once, through us
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env=environment,
            start_new_session=True,
        )  # fmt: skip


def run_pilots(
    grid: Grid, *, slots: int | None = None, console: Console | None = None, launch: Launch = launch_process
) -> int:
    """Run what is not finished; returns 0, 143 after a signal, or the exit code of the first run that failed.
    ``launch`` starts a trainer.

    Raises:
        ConfigError: the folder holds pilots of other settings.
        DataError: another process is at work on this grid.
    """
    console = console or Console()
    grid.root.mkdir(parents=True, exist_ok=True)
    with hold_folder(grid.root):
        check_folders(grid)
        write_run_files(grid)
        write_atomic(grid.facts, json.dumps(grid_facts(grid), indent=1) + "\n")
        progress = progress_for(grid, console)
        crew = Crew(grid, slots or grid.settings.slots, launch)
        try:
            crew.work(progress)
        finally:
            progress.close()
        return crew.conclude(console)


def run_only(grid: Grid, name: str) -> int:
    """One run of the grid in the foreground, as one job of many; returns the trainer's exit code.

    Takes no lock but the trainer's own on the run folder, and writes no observations: jobs run side by side.
    """
    pilot = grid.pilot(name)
    check_folders(grid)
    if is_finished(pilot):
        print(f"{name}: finished already", flush=True)
        return 0
    write_run_files(grid)
    command = command_for(grid, pilot)
    stop = StopRequests()
    with stop.listen():
        running = Running(subprocess.Popen(command, start_new_session=True), slot=0)
        while (code := running.process.poll()) is None:
            stop.pass_on(running)
            time.sleep(POLL_SECONDS)
    return EXIT_STOPPED if stop.count and code else exit_code(code)


def command_for(grid: Grid, pilot: Pilot) -> list[str]:
    """The process that trains a pilot, or goes on with it; a branch's folder is made."""
    arguments = trainer_arguments(grid, pilot)
    if grid.settings.nproc == 1:
        return [sys.executable, "-m", "cpt.train.main", *arguments]
    verb, *rest = ["resume", *arguments[1:]] if arguments[0] == "--resume" else ["train", *arguments]
    return [sys.executable, "-m", "cpt.cli", verb, *rest, "--nproc", str(grid.settings.nproc)]


def environment_of(slot: int, *, slots: int, gpus: Sequence[int] = ()) -> dict[str, str]:
    """This process's environment with the slot's part of the machine: threads, and a GPU where the file names some.

    Without the first, every run starts a thread per core, and they wait for one another. A job's rendezvous is left
    out: where this process trained something itself, its runs would all listen on the port it used.
    """
    environment = {name: value for name, value in os.environ.items() if name not in RENDEZVOUS}
    environment.setdefault("OMP_NUM_THREADS", str(max(1, _num_cores() // slots)))
    if gpus:
        environment["CUDA_VISIBLE_DEVICES"] = str(gpus[slot % len(gpus)])
    return environment


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Crew:
    """The children of one call and what became of every run."""

    def __init__(self, grid: Grid, slots: int, launch: Launch = launch_process) -> None:
        self.grid = grid
        self.slots = slots
        self.launch = launch
        self.running: dict[str, Running] = {}
        self.ended: dict[str, int] = {}  # exit code of what was started here and is not finished
        self.reasons: dict[str, str] = {}
        self.finished = {pilot.name for pilot in grid.pilots if is_finished(pilot)}
        self.held: set[str] = set()
        self.stop = StopRequests()
        self._tidied_at = 0.0

    def work(self, progress: Progress) -> None:
        """Until nothing runs and nothing can be started."""
        self._collect()
        with self.stop.listen():
            try:
                while self._turn():
                    progress.update(self.states())
                    time.sleep(POLL_SECONDS)
                progress.update(self.states())
            finally:  # an error here must leave no child behind
                for running in self.running.values():
                    running.process.terminate()
                for running in self.running.values():
                    running.process.wait()

    def states(self) -> dict[str, str]:
        return {pilot.name: self._state(pilot) for pilot in self.grid.pilots}

    def conclude(self, console: Console) -> int:
        """Say what is to be said at the end; returns the exit code."""
        failed = {name: code for name, code in self.ended.items() if code != EXIT_STOPPED}
        for name, code in failed.items():
            log = self.grid.log(self.grid.pilot(name))
            reason = self.reasons.get(name) or _last_words(log)
            console.print(f"{name} failed with exit code {code}: {log}\n    {reason}", highlight=False, soft_wrap=True)
        left = [name for name, state in self.states().items() if state != "finished"]
        if left:
            told = f"{len(self.finished)} of {len(self.grid.pilots)} pilots are finished; the same command goes on"
            console.print(f"{told} with the others", highlight=False, soft_wrap=True)
        if self.finished:
            rate = f"at peak learning rate {self.grid.template.train.peak_lr:g}; see {self.grid.facts}"
            console.print(f"observations: {self.grid.observations}\n    {rate}", highlight=False, soft_wrap=True)
        if self.stop.count or (not failed and left):
            return EXIT_STOPPED
        return next(iter(failed.values()), 0)

    def _turn(self) -> bool:
        """Reap, then start; False when there is nothing left to do."""
        self._reap()
        if self._has_room() and not self.stop.count:
            for pilot in self._startable():
                if self._has_room():
                    self._start(pilot)
        for running in self.running.values():
            self.stop.pass_on(running)
        return bool(self.running) or (bool(self.held) and not self.stop.count)

    def _has_room(self) -> bool:
        return len(self.running) + len(self.held) < self.slots

    def _startable(self) -> list[Pilot]:
        """Branches before trunks: a branch frees its checkpoint. Of those, the most expensive first."""
        known = self.finished | self.running.keys() | self.ended.keys() | self.held
        open_pilots = [pilot for pilot in self.grid.pilots if pilot.name not in known]
        ready = [pilot for pilot in open_pilots if can_start(self.grid, pilot)]
        self.held |= {pilot.name for pilot in ready if is_held(pilot)}
        free = [pilot for pilot in ready if pilot.name not in self.held]
        return sorted(free, key=lambda pilot: (pilot.trunk is None, -pilot.flops))

    def _start(self, pilot: Pilot) -> None:
        slot = min(set(range(self.slots)) - {running.slot for running in self.running.values()})
        log = self.grid.log(pilot)
        log.parent.mkdir(exist_ok=True)
        try:
            command = command_for(self.grid, pilot)
        except (DataError, OSError) as error:
            self.ended[pilot.name] = 2 if isinstance(error, DataError) else 3
            self.reasons[pilot.name] = str(error)
            return
        environment = environment_of(slot, slots=self.slots, gpus=self.grid.settings.gpus)
        self.running[pilot.name] = Running(self.launch(command, log, environment), slot)

    def _reap(self) -> None:
        ended = {name: code for name, one in self.running.items() if (code := one.process.poll()) is not None}
        released = {name for name in self.held if not is_held(self.grid.pilot(name))}
        for name, code in ended.items():
            del self.running[name]
            if not is_finished(self.grid.pilot(name)):
                # Told to stop before it had started, it just dies; there is nothing to save then.
                stopped = self.stop.count and code == -signal.SIGTERM
                self.ended[name] = EXIT_STOPPED if stopped else exit_code(code) or 1
        self.held -= released
        done = {name for name in ended.keys() | released if is_finished(self.grid.pilot(name))}
        self.finished |= done
        if done:
            self._collect()
        if done or time.monotonic() - self._tidied_at > TIDY_SECONDS:
            drop_checkpoints(self.grid)
            self._tidied_at = time.monotonic()

    def _collect(self) -> None:
        finished = [pilot.run_dir for pilot in self.grid.pilots if pilot.name in self.finished]
        if finished:
            # A branch has its trunk's history: whoever resamples runs takes those of one trunk together.
            trunks = {pilot.name: pilot.trunk or pilot.name for pilot in self.grid.pilots}
            rows = [{**row, "trunk": trunks.get(row["run"], "")} for row in observe_runs(finished)]
            write_observations(self.grid.observations, rows)

    def _state(self, pilot: Pilot) -> str:
        name = pilot.name
        if name in self.finished:
            return "finished"
        if name in self.running:
            return "stopping" if self.stop.count else "running"
        if name in self.held:
            return "running since an earlier call"
        if name in self.ended:
            return "stopped" if self.ended[name] == EXIT_STOPPED else f"failed ({self.ended[name]})"
        trunk_failed = pilot.trunk is not None and pilot.trunk in self.ended
        return "no trunk" if trunk_failed else "waits for its trunk" if pilot.trunk else "waits"


def _last_words(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() if log.exists() else []
    return lines[-1] if lines else "it said nothing"

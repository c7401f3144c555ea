"""The thread beside the training loop: says that this rank lives, and ends it where the job hangs.

Every beat it writes this rank's file (``cpt.heartbeats``). The main thread shows progress by entering phases and by
``Phases.beat``. A job hangs when no rank's main thread has got on for ``hang_seconds``: one that waits in a collective
while another still works is not stuck. Then every rank dumps its stacks and leaves with ``EXIT_ENVIRONMENT``, which
launcher and supervisor take for a crash; the first of them to say so names the ranks that are silent, or behind.

Seconds are counted in beats of this thread: a job that was suspended and goes on has not hung. A collective that waits
in C++ holds no GIL, so the thread runs on; a rank where something holds it is silent to the others, and dumps its
stacks when one of its host, or the supervisor, asks by a signal. Not before: dumping without the GIL may crash what
is well. Disks may be full: writing is tried, never needed.
"""

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from io import TextIOWrapper
from pathlib import Path
from traceback import walk_tb
from types import TracebackType
from typing import NoReturn, Self

import psutil

from cpt.exit_codes import EXIT_ENVIRONMENT
from cpt.heartbeats import STACKS_SIGNAL, Beat, Observer, ask_for_stacks, write_beat
from cpt.rundir import RunDir, note_event

START_SECONDS = 900.0  # at least, until the first step is done: weights are read, kernels compiled
FOUND = "hang.json"  # made by the rank that finds the hang first


@dataclass(frozen=True)
class Suspect:
    """A rank that the others wait for, where it was last seen, and why it is named."""

    rank: int
    host: str
    pid: int
    step: int
    phase: str
    phase_seconds: float
    why: str

    def __str__(self) -> str:
        where = f"last seen {self.phase_seconds:.0f} s into {self.phase} after step {self.step}"
        return f"rank {self.rank} (host {self.host}, process {self.pid}): {self.why}; {where}"


def interval_of(hang_seconds: float) -> float:
    """Seconds between two beats: often enough to tell a hang, seldom enough for a shared file system."""
    return min(5.0, max(0.25, hang_seconds / 60))


class Heartbeat:
    """One rank's sign of life and its watchdog, from ``start`` to ``close``."""

    def __init__(self, rundir: RunDir, *, rank: int, world_size: int, hang_seconds: float) -> None:
        self._rundir, self._world_size = rundir, world_size
        self._limit, self._interval = hang_seconds, interval_of(hang_seconds)
        self._beat = Beat(rank, socket.gethostname(), os.getpid())  # changed by the main thread alone
        self._sequence = 0  # by this one alone
        self._phase_since = time.monotonic()
        self._has_stepped = False
        self._write_failed = False
        self._seen_progress = -1
        self._stalled = self._since_look = 0.0
        self._observer: Observer | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._stacks: TextIOWrapper | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close(error)

    def start(self) -> None:
        with suppress(OSError):  # a full disk: no stacks then
            self._rundir.stacks.mkdir(exist_ok=True)
            self._stacks = self._stack_file.open("a", encoding="utf-8")
            faulthandler.register(STACKS_SIGNAL, file=self._stacks)
        self._thread.start()

    def enter(self, phase: str) -> None:
        """The main thread gets on; a listener of ``Phases``."""
        self._phase_since = time.monotonic()
        beat = self._beat
        self._beat = replace(beat, phase=phase, entered=beat.entered + 1, progress=beat.progress + 1)

    def at_step(self, step: int) -> None:
        """``step`` updates are done."""
        self._has_stepped = True
        self._beat = replace(self._beat, step=step, entered=0, progress=self._beat.progress + 1)

    def close(self, error: BaseException | None = None) -> None:
        """Say how it ended. Ranks that are lost, which may explain an error, are named."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join()
        self._phase_since = self._phase_since if error else time.monotonic()
        words = f"{type(error).__name__}: {error}".splitlines()[0] if error else ""
        self._beat = replace(self._beat, state="failed" if error else "ended", message=words)
        self._write()
        if error and self._world_size > 1 and _comes_from_torch(error):
            self._name_lost()
        if self._stacks:
            faulthandler.unregister(STACKS_SIGNAL)
            self._stacks.close()
            with suppress(OSError):
                if not self._stack_file.stat().st_size:
                    self._stack_file.unlink()
                    self._rundir.stacks.rmdir()  # where this was the last

    @property
    def _stack_file(self) -> Path:
        return self._rundir.stacks / f"rank_{self._beat.rank:05d}.txt"

    def _run(self) -> None:
        last = time.monotonic()
        while True:
            self._write()
            if self._closing.wait(self._interval):
                return
            now = time.monotonic()
            self._watch(min(now - last, 2 * self._interval))
            last = now

    def _write(self) -> None:
        self._sequence += 1
        seconds = round(time.monotonic() - self._phase_since, 3)
        try:
            write_beat(self._rundir.heartbeats, replace(self._beat, sequence=self._sequence, phase_seconds=seconds))
            self._write_failed = False
        except OSError as error:
            if not self._write_failed:
                print(f"WARNING: rank {self._beat.rank} cannot write its heartbeat: {error}", file=sys.stderr)
            self._write_failed = True

    @property
    def _patience(self) -> float:
        return self._limit if self._has_stepped else max(self._limit, START_SECONDS)

    def _watch(self, seconds: float) -> None:
        """Count ``seconds`` without progress; in the second half of the limit look at the other ranks too."""
        if self._beat.progress != self._seen_progress:
            self._seen_progress, self._stalled, self._observer = self._beat.progress, 0.0, None
            return
        self._stalled += seconds
        self._since_look += seconds
        limit = self._patience
        if self._stalled < limit / 2:
            return
        if self._observer is None or self._since_look >= limit / 40:
            self._observer = self._observer or Observer(self._rundir.heartbeats)
            self._observer.look(self._since_look)
            self._since_look = 0.0
        others = [idle for rank, idle in self._observer.idle.items() if rank != self._beat.rank]
        if self._stalled >= limit and min(others, default=limit) >= 0.4 * limit:
            self._leave(self._observer)

    def _leave(self, observer: Observer) -> NoReturn:
        self._beat = replace(self._beat, state="stuck")
        self._write()
        if self._stacks:
            with suppress(OSError, ValueError):
                faulthandler.dump_traceback(self._stacks)
        for beat in observer.beats.values():
            if beat.rank != self._beat.rank and self._is_silent(beat.rank, observer):
                ask_for_stacks(self._rundir.heartbeats, beat)
        if self._is_first_to_say():
            self._say(observer)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(EXIT_ENVIRONMENT)

    def _is_first_to_say(self) -> bool:
        try:
            os.close(os.open(self._rundir.heartbeats / FOUND, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            return False
        except OSError:
            return True  # rather twice than never
        return True

    def _say(self, observer: Observer) -> None:
        silent, behind = self._suspects(observer)
        named = silent or behind
        details = {"silent": [asdict(each) for each in silent], "behind": [asdict(each) for each in behind]}
        for line in map(str, named) if named else ["no rank is silent or behind: all wait at the same place"]:
            print(f"HANG: {line}", file=sys.stderr)
        where = f"{self._beat.phase} after step {self._beat.step}"
        words = (
            f"no rank has got on for {self._stalled:.0f} s (guard.hang_seconds); rank {self._beat.rank} is in {where}"
        )
        print(f"HANG: {words}; stacks: {self._rundir.stacks}; ending the job", file=sys.stderr, flush=True)
        try:
            note_event("hang", self._beat.step, self._rundir, seconds=round(self._stalled, 1), **details)
        except OSError as error:
            print(f"WARNING: could not note hang, {json.dumps(details)}: {error}", file=sys.stderr, flush=True)

    def _suspects(self, observer: Observer) -> tuple[list[Suspect], list[Suspect]]:
        """(ranks that show no life, living ones that are not as far as the farthest)."""
        silent = [r for r in range(self._world_size) if r != self._beat.rank and self._is_silent(r, observer)]
        places = {rank: beat.place for rank, beat in observer.beats.items() if rank not in silent}
        places[self._beat.rank] = self._beat.place
        behind = [rank for rank, place in places.items() if place < max(places.values())]
        return [suspect(r, observer, "") for r in silent], [suspect(r, observer, "is behind") for r in behind]

    def _is_silent(self, rank: int, observer: Observer) -> bool:
        beat = observer.beats.get(rank)
        return beat is None or beat.state in ("failed", "ended") or observer.silent[rank] >= 0.3 * self._patience

    def _name_lost(self) -> None:
        """Watch the others for two and a half beats, the least that tells life from silence."""
        observer = Observer(self._rundir.heartbeats)
        observer.look(0.0)
        time.sleep(2.5 * self._interval)
        observer.look(2.5 * self._interval)
        for rank in range(self._world_size):
            if rank != self._beat.rank and self._is_lost(rank, observer):
                print(f"LOST: {suspect(rank, observer, '')}", file=sys.stderr, flush=True)

    def _is_lost(self, rank: int, observer: Observer) -> bool:
        beat = observer.beats.get(rank)
        return beat is None or (
            observer.silent[rank] > 0 and beat.state != "ended" and beat.message != self._beat.message
        )


def _comes_from_torch(error: BaseException) -> bool:
    """Whether torch raised it, as where a peer is gone, rather than our own code, which all ranks obey alike."""
    frames = list(walk_tb(error.__traceback__))
    return bool(frames) and str(frames[-1][0].f_globals.get("__name__")).startswith("torch.")


def suspect(rank: int, observer: Observer, why: str) -> Suspect:
    """A rank with what its last beat said; without ``why``, what is known of its process."""
    beat = observer.beats.get(rank) or Beat(rank, "unknown", 0, phase="no beat at all")
    return Suspect(
        rank,
        beat.host,
        beat.pid,
        beat.step,
        beat.phase,
        beat.phase_seconds,
        why or _state(beat, observer.silent.get(rank)),
    )


def _state(beat: Beat, silent: float | None) -> str:
    if beat.state == "failed":
        return f"failed ({beat.message})"
    if beat.state == "ended":
        return "has ended"
    if silent is None:
        return "has shown no life"
    shown = f"no sign of life for {silent:.0f} s"
    if beat.host != socket.gethostname():
        return f"{shown}; its host or the way to it may be down"
    try:
        status = psutil.Process(beat.pid).status()
    except psutil.Error:
        return f"{shown}; its process is gone"
    dead = status in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    return f"{shown}; its process is {'dead' if dead else status}"

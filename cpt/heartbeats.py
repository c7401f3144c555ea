"""Signs of life of a job's ranks: one small file per rank in ``RUN_DIR/heartbeats``, and how long each has shown none.

A file is replaced by a rename, so a reader sees a whole one; it is not flushed to disk, for nobody needs it after a
crash of the machine. Life is a *change* of the content, measured by the reader's own clock: the clocks of two hosts
are never compared. Refuses to decide what to do about silence.
"""

import json
import os
import signal
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import psutil

STARTING = "start-up"
STACKS_SIGNAL = signal.SIGUSR2


@dataclass(frozen=True)
class Beat:
    """What a rank says of itself.

    ``sequence`` grows with every beat: the process runs. ``progress`` grows whenever its main thread gets on.
    ``entered``: phases since the step began, which orders the places inside a step.
    """

    rank: int
    host: str
    pid: int
    sequence: int = 0
    step: int = 0
    phase: str = STARTING
    phase_seconds: float = 0.0
    entered: int = 0
    progress: int = 0
    state: str = "running"  # running | stuck | failed | ended
    message: str = ""

    @property
    def place(self) -> tuple[int, int]:
        return self.step, self.entered


def write_beat(folder: Path, beat: Beat) -> None:
    """Raises OSError where the folder is full or read-only."""
    path = beat_file(folder, beat.rank)
    temporary = path.with_name(f".{path.name}.{beat.pid}")
    temporary.write_text(json.dumps(asdict(beat)), encoding="utf-8")
    os.replace(temporary, path)


def read_beats(folder: Path) -> dict[int, Beat]:
    """The newest beat of every rank; a file that is missing or not readable now is left out, and so are all of them
    where shared storage has no answer for a moment.
    """
    try:
        found = [_read(path) for path in sorted(folder.glob("rank_*.json"))] if folder.is_dir() else []
    except OSError:
        return {}
    return {beat.rank: beat for beat in found if beat}


def clear_beats(folder: Path) -> None:
    """Forget the job before this one, and have the folder there for the next."""
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        path.unlink(missing_ok=True)


def ask_for_stacks(folder: Path, beat: Beat) -> None:
    """Have a silent rank of this host dump the stacks of its threads, which it does whatever it is doing; then its end
    must be near. A process that was given its number since is left alone.
    """
    if beat.host != socket.gethostname():
        return
    with suppress(psutil.Error, OSError):
        process = psutil.Process(beat.pid)
        if process.create_time() <= beat_file(folder, beat.rank).stat().st_mtime:
            process.send_signal(STACKS_SIGNAL)


class Observer:
    """How long, in seconds of its own clock, each rank's file has not changed (``silent``) and its main thread has not
    got on (``idle``). Seconds are handed in, so that time in which the reader itself was suspended need not count.
    """

    def __init__(self, folder: Path) -> None:
        self.beats: Mapping[int, Beat] = {}
        self.silent: dict[int, float] = {}
        self.idle: dict[int, float] = {}
        self._folder = folder

    def look(self, seconds: float) -> None:
        """Read all files, ``seconds`` after the last time."""
        old, new = self.beats, {**self.beats, **read_beats(self._folder)}
        for rank, beat in new.items():
            before = old.get(rank)
            same_process = before is not None and before.pid == beat.pid
            silent = before == beat
            idle = same_process and before is not None and before.progress == beat.progress
            self.silent[rank] = self.silent.get(rank, 0.0) + seconds if silent else 0.0
            self.idle[rank] = self.idle.get(rank, 0.0) + seconds if idle else 0.0
        self.beats = new


def beat_file(folder: Path, rank: int) -> Path:
    """Where the rank of that number leaves its beats."""
    return folder / f"rank_{rank:05d}.json"


def _read(path: Path) -> Beat | None:
    try:
        raw: Any = json.loads(path.read_text(encoding="utf-8"))
        return Beat(**{field.name: raw[field.name] for field in fields(Beat)})
    except (OSError, ValueError, KeyError, TypeError):
        return None  # being replaced on a slow file system, or not ours: the next look will tell

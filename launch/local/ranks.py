"""Start the ranks of a job on this machine, pass signals on to them, and end all of them when one is lost.

The ranks are started directly: the deepspeed launcher adds a process that ends with 0 when it is killed itself, keeps
SIGTERM from the ranks or kills them 30 seconds after it, and imports torch twice. (``deepspeed --module
cpt.train.main`` still works.) A signal reaches each rank from here alone: they are not in the terminal's process
group, where Ctrl-C would reach them twice, and the second signal kills. Where this process is killed, the kernel sends
the ranks SIGTERM: they save and end.
"""

import ctypes
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Self

from cpt.exit_codes import EXIT_ENVIRONMENT, EXIT_STOPPED, exit_code

TRAIN_MODULE = "cpt.train.main"
LAUNCHER_PID = "CPT_LAUNCHER_PID"
CHANNEL = "CPT_LAUNCHER_CHANNEL"  # set: standard input hangs up when the launcher is gone
JOB_SECONDS = "CPT_JOB_SECONDS"  # how long the job had been at work when this start of it began
LISTENER = "CPT_LISTENER"  # file descriptor of the socket at MASTER_PORT, open in rank 0
PASSED_ON = (signal.SIGTERM, signal.SIGINT)
POLL_SECONDS = 0.05
GRACE_SECONDS = 5.0  # between SIGTERM and SIGKILL for ranks that can no longer do anything together
PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>


@dataclass(frozen=True)
class Ended:
    """How a job ended: the exit code of its first failure, else 143 where a rank was stopped, else 0; in words; and
    which rank failed first.
    """

    code: int
    words: str
    rank: int | None = None


@dataclass(frozen=True)
class Place:
    """Where this host stands in a job of several, each with as many ranks: rank 0 is the first on host 0."""

    host: int
    num_hosts: int
    master_address: str
    master_port: int


class Launcher:
    """Runs jobs of this machine, one after the other. Inside ``with`` signals go to the ranks of the one at work."""

    def __init__(self) -> None:
        self.asked: str | None = None  # the signal that asked to stop
        self._since = time.monotonic()
        self._ranks: list[subprocess.Popen[bytes]] = []
        self._first = 0  # rank of the first of them
        self._asked = threading.Event()
        self._previous: dict[int, Callable[[int, FrameType | None], object] | int | None] = {}

    def __enter__(self) -> Self:
        self._previous = {number: signal.signal(number, self._pass_on) for number in PASSED_ON}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end_all()
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def run(
        self,
        arguments: Sequence[str],
        *,
        num_processes: int,
        devices: Sequence[str] | None = None,
        place: Place | None = None,
        verdict: Callable[[], str | None] = lambda: None,
    ) -> Ended:
        """Train with ``num_processes`` ranks, on ``devices`` (as in CUDA_VISIBLE_DEVICES) where given; they are the
        whole job, or this host's part of one.

        ``verdict`` is asked all the time; as soon as it has words for what is wrong, the job is killed.
        """
        self._ranks = []
        self._first = place.host * num_processes if place else 0
        command = [sys.executable, "-m", TRAIN_MODULE, *arguments]
        # Held from here on and handed to rank 0: a port that is only looked up is somebody else's seconds later. The
        # port of several hosts is agreed on beforehand.
        held: AbstractContextManager[socket.socket | Place] = (
            nullcontext(place) if place else socket.create_server(("127.0.0.1", 0), backlog=num_processes)
        )
        with held as meeting:
            for environment in rank_environments(num_processes, meeting, devices=devices):
                environment[JOB_SECONDS] = f"{time.monotonic() - self._since:.3f}"
                is_first = isinstance(meeting, socket.socket) and environment["RANK"] == "0"
                handed = [int(environment[LISTENER])] if is_first else []
                if not self.asked:
                    self._ranks.append(
                        subprocess.Popen(command, env=environment, start_new_session=True, pass_fds=handed)
                    )
        if not self._ranks:
            return Ended(EXIT_ENVIRONMENT, "it was asked to stop before anything was started")
        if self.asked:  # the signal came between two starts
            self._send_all(signal.SIGTERM)
        return self._wait(verdict)

    def wait(self, seconds: float) -> None:
        """Do nothing for so long; returns at once when asked to stop."""
        self._asked.wait(seconds)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self.asked = self.asked or signal.Signals(number).name
        self._asked.set()
        self._send_all(number)

    def _send_all(self, number: int) -> None:
        for rank in self._ranks:
            if rank.returncode is None:  # not poll(): a handler must not reap what the main program is waiting for
                with suppress(ProcessLookupError):
                    os.kill(rank.pid, number)

    def _wait(self, verdict: Callable[[], str | None]) -> Ended:
        while True:
            running = [rank for rank in self._ranks if rank.poll() is None]
            failed = _first_failure([rank.returncode for rank in self._ranks])
            words = (
                f"rank {self._first + failed} (process {self._ranks[failed].pid}) {_how(self._ranks[failed])}"
                if failed is not None
                else ""
            )
            if failed is not None and running:
                print(f"{words}; ending the other {len(running)}", file=sys.stderr, flush=True)
            if failed is not None:
                self._end_all()
                return Ended(exit_code(int(self._ranks[failed].returncode)), words, self._first + failed)
            if not running:
                code = max(rank.returncode for rank in self._ranks)
                return Ended(code, "all ranks ended" if code == 0 else "all ranks saved and stopped")
            if judged := verdict():
                print(f"{judged}; killing the job", file=sys.stderr, flush=True)
                self._end_all()
                return Ended(EXIT_ENVIRONMENT, judged)
            time.sleep(POLL_SECONDS)

    def _end_all(self) -> None:
        """SIGTERM to what still runs, SIGKILL after a while: it also ends a process that is stopped."""
        self._send_all(signal.SIGTERM)
        deadline = time.monotonic() + GRACE_SECONDS
        while any(rank.poll() is None for rank in self._ranks) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        for rank in self._ranks:
            if rank.poll() is None:
                rank.kill()
                rank.wait()


def run_local(arguments: Sequence[str], *, num_processes: int) -> int:
    """Train with ``num_processes`` ranks; returns the exit code of the job."""
    with Launcher() as launcher:
        return launcher.run(arguments, num_processes=num_processes).code


def rank_environments(
    num_processes: int, meeting: socket.socket | Place, *, devices: Sequence[str] | None = None
) -> list[dict[str, str]]:
    """What tells each rank of this host its place, over this process' own environment. ``meeting``: the socket that
    rank 0 will listen on, for a job of this host alone, or the place of this host among several.
    """
    place = Place(0, 1, "127.0.0.1", meeting.getsockname()[1]) if isinstance(meeting, socket.socket) else meeting
    environment: Mapping[str, str] = {
        # Without this, every rank starts a thread per core and they fight over the same ones.
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // num_processes)),
        **os.environ,
        "MASTER_ADDR": place.master_address,
        "MASTER_PORT": str(place.master_port),
        **({LISTENER: str(meeting.fileno())} if isinstance(meeting, socket.socket) else {}),
        "WORLD_SIZE": str(place.num_hosts * num_processes),
        "LOCAL_WORLD_SIZE": str(num_processes),
        "LOCAL_SIZE": str(num_processes),  # DeepSpeed's name for it
        LAUNCHER_PID: str(os.getpid()),
        **({"CUDA_VISIBLE_DEVICES": ",".join(devices)} if devices else {}),
    }
    first = place.host * num_processes
    return [{**environment, "RANK": str(first + rank), "LOCAL_RANK": str(rank)} for rank in range(num_processes)]


def end_with_launcher() -> None:
    """Called by a rank at its start: it is sent SIGTERM when the launcher that started it dies, by the kernel, or,
    where that launcher may be on another host, by a thread that sees the connection end.
    """
    if os.environ.pop(CHANNEL, None):
        threading.Thread(target=_end_with_channel, name="launcher's end", daemon=True).start()
    launcher = os.environ.pop(LAUNCHER_PID, None)  # not for processes that the rank starts
    if launcher is None or sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
    if os.getppid() != int(launcher):  # it died before that
        signal.raise_signal(signal.SIGTERM)


def _end_with_channel() -> None:
    """Standard input comes from the launcher, over ssh and DeepSpeed's launcher: it hangs up when that is gone."""
    poll = select.poll()
    poll.register(0, 0)  # a hang-up is told without being asked for
    poll.poll()
    silent = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # nobody listens any more: writing there would fail, in the middle of a step or of the save
        os.dup2(silent, stream)
    os.kill(os.getpid(), signal.SIGTERM)


def seconds_before() -> float:
    """How long the job had been at work before this rank was started: a supervisor may have started it before."""
    return float(os.environ.pop(JOB_SECONDS, "0"))


def _first_failure(codes: Sequence[int | None]) -> int | None:
    """The rank that failed first, as far as can be told: one that was killed, before those that fell over its loss."""
    failed = [rank for rank, code in enumerate(codes) if code not in (None, 0, EXIT_STOPPED)]
    return min(failed, key=lambda rank: (int(codes[rank] or 0) > 0, rank), default=None)


def _how(rank: subprocess.Popen[bytes]) -> str:
    code = int(rank.returncode)
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"

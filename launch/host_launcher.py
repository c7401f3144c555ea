"""Start the ranks of a job on hosts, through DeepSpeed's launcher, and end all of them when one host is lost.

The counterpart of ``launch.local.Launcher`` for machines that are reached by ssh, with the same verbs, so that one
supervisor serves both. Ctrl-C or SIGTERM becomes a file STOP in the run folder: DeepSpeed's launcher would kill the
ranks half a minute after a signal, in the middle of a long save. A second one kills, on every host. The launcher's own
exit code tells little; how each host ended is told by its ssh, or by what pdsh says of it. A host that failed leaves
the others some seconds to say what they saw.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, Self

import psutil

from cpt.heartbeats import read_beats
from cpt.rundir import RunDir
from launch.answer import Present
from launch.cluster import HostsCluster
from launch.deepspeed_command import Start, host_command, launcher_environment
from launch.devices import Usable
from launch.host_start import build_start, commands_of, write_files
from launch.hostfile import Host
from launch.local import EXIT_STOPPED, JOB_SECONDS, PASSED_ON, Ended, exit_code
from launch.record import Launched, LaunchJob, write_record
from launch.roll_call import call

PDSH_SAYS = re.compile(r"pdsh@\S+: (\S+): ssh exited with exit code (\d+)")
SSH_FAILED = 255
KILLED = 128  # and the number of the signal
POLL_SECONDS = 0.1
LAST_WORDS_SECONDS = 15.0  # for ranks to tell who is lost, and for DeepSpeed's launchers to notice
REPEAT_SECONDS = 5.0  # signals that come this soon after the first are the same request
NOBODY_WAITS = (5.0, 10.0, 20.0, 40.0, 80.0)  # between calls that no host answered: a switch that restarts


@dataclass(frozen=True)
class HostEnd:
    """How a host ended: the exit code of its ssh, which is that of DeepSpeed's launcher on it; and when."""

    host: str
    code: int
    at: float = 0.0

    @property
    def is_failure(self) -> bool:
        return self.code not in (0, EXIT_STOPPED)

    @property
    def told(self) -> int:
        """DeepSpeed ends with the code of a rank; of one that signal n killed with -n, which is 256 - n here."""
        if self.code == SSH_FAILED:
            return 3
        return exit_code(self.code - 256) if self.code > 256 - 65 else self.code

    @property
    def words(self) -> str:
        if self.code == SSH_FAILED:
            return f"lost: host {self.host}, the connection by ssh has ended"
        return f"host {self.host} ended with exit code {self.told}"


def judge(ends: Sequence[HostEnd]) -> HostEnd:
    """The end that tells how the job ended: what a person must mend (2), a host that was lost or whose rank was killed
    before those that fell over its loss, else the first failure; else a stop.
    """
    failures = [end for end in ends if end.is_failure]
    if not failures:
        return max(ends, key=lambda end: end.code)
    return min(failures, key=lambda end: (end.told != 2, end.code != SSH_FAILED and end.told < KILLED, end.at))


class HostsLauncher:
    """Runs starts of one job, one after the other. Inside ``with`` signals ask the one at work to save and stop."""

    def __init__(
        self, cluster: HostsCluster, job: LaunchJob, hosts: Sequence[Host], *, node_rank: int | None = None
    ) -> None:
        """``node_rank``: only this host's ranks are started, where every host starts its own (no_ssh)."""
        self.asked: str | None = None  # the signal that asked to stop
        self._cluster, self._job, self._hosts, self._node_rank = cluster, job, tuple(hosts), node_rank
        self._since = time.monotonic()
        self._asked, self._asked_at = threading.Event(), 0.0
        self._kill = False
        self._stop_file = RunDir(job.run_dir).stop_file
        self._present: dict[str, Present] = {}
        self._is_fresh = False  # they were asked, and nothing was started since
        self._previous: dict[int, Callable[[int, FrameType | None], object] | int | None] = {}

    def __enter__(self) -> Self:
        self._previous = {number: signal.signal(number, self._hear) for number in PASSED_ON}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def require_all(self) -> Usable:
        """The places on all hosts.

        Raises:
            OSError: some do not answer; it names them.
        """
        absent = self._call()
        if absent:
            named = "".join(f"\n  {host}: {why}" for host, why in absent.items())
            raise OSError(f"{len(absent)} of {len(self._hosts)} hosts do not answer; --exclude leaves one out:{named}")
        self._is_fresh = True
        return self._places()

    def available(self, wanted: int) -> Usable:
        """The places on hosts that answer now, with nothing of an earlier start left on them. Where none answers, they
        are called again for some minutes.
        """
        if self._is_fresh:
            self._is_fresh = False
            return self._places()
        for wait in (*NOBODY_WAITS, 0.0):
            for host, why in self._call().items():
                _say(f"host {host} does not answer: {why}")
            if self._present or self.asked:
                break
            self.wait(wait)
        return self._places()

    def _places(self) -> Usable:
        places = tuple(host.name for host in self._hosts if host.name in self._present for _ in host.slots)
        return Usable(len(places), places)

    def _call(self) -> dict[str, str]:
        """Ask all hosts, ending what is left of earlier starts; returns those that are not there, and why."""
        directory, run_dir = self._job.directory, self._job.run_dir
        answers = call(self._cluster, self._hosts, directory=directory, run_dir=run_dir, end=True)
        self._present = {host: each for host, each in answers.items() if isinstance(each, Present)}
        for host, each in self._present.items():
            if each.ended:
                _say(f"host {host}: {each.ended} processes of this run were killed")
        return {host: each for host, each in answers.items() if isinstance(each, str)}

    def run(
        self,
        arguments: Sequence[str],
        *,
        num_processes: int,
        devices: Sequence[str] | None = None,
        verdict: Callable[[], str | None] = lambda: None,
    ) -> Ended:
        """Train with ``num_processes`` ranks on the hosts that ``devices`` names, once per rank, all of them of those
        that answered last. ``verdict`` as for ranks of this machine.

        Raises:
            ConfigError: the ranks cannot be started so.
        """
        assert devices and len(devices) == num_processes, "whole hosts, a name per rank"
        start = self._build(arguments, tuple(host for host in self._hosts if host.name in devices))
        write_files(start)
        log_file = start.folder / ("log" if self._node_rank is None else f"log_{self._node_rank}")
        if not self._node_rank:
            self._record(start, log_file)
        if self.asked:
            return Ended(3, "it was asked to stop before anything was started")
        with log_file.open("a", encoding="utf-8", errors="replace") as log:
            voices = self._start_all(start, log)
            try:
                return self._wait(voices, start, verdict)
            finally:
                for voice in voices:
                    voice.close()
                if self.asked:  # what did not come to obey it must not stop the next start
                    self._stop_file.unlink(missing_ok=True)

    def _build(self, arguments: Sequence[str], hosts: tuple[Host, ...]) -> Start:
        cluster = self._cluster
        if hosts[0] != self._hosts[0]:  # the address that the file states is that of another host
            cluster = cluster.model_copy(update={"master_address": None})
        start = build_start(cluster, self._job, hosts, arguments=arguments, present=self._present)
        seconds = time.monotonic() - self._since
        return replace(start, environment={**start.environment, JOB_SECONDS: f"{seconds:.3f}"})

    def _start_all(self, start: Start, log: IO[str]) -> "list[Voice]":
        cluster, hosts = self._cluster, start.hosts
        if self._node_rank is not None:
            own = {**os.environ, **start.environment}
            return [Voice(host_command(start, self._node_rank), own, log, hosts[self._node_rank].name)]
        commands = commands_of(cluster, start)
        if cluster.launcher == "pdsh":
            keeper = [sys.executable, "-m", "launch.keeper"]
            return [Voice([*keeper, *commands[0]], launcher_environment(cluster, start, os.environ), log, "")]
        return [Voice(command, None, log, host.name) for command, host in zip(commands, hosts, strict=True)]

    def wait(self, seconds: float) -> None:
        """Do nothing for so long; returns at once when asked to stop."""
        self._asked.wait(seconds)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self.asked is None:
            self.asked, self._asked_at = signal.Signals(number).name, time.monotonic()
            self._asked.set()
        elif time.monotonic() - self._asked_at > REPEAT_SECONDS:
            self._kill = True

    def _wait(self, voices: "Sequence[Voice]", start: Start, verdict: Callable[[], str | None]) -> Ended:
        failed_at: float | None = None
        told = False
        while [voice for voice in voices if not voice.poll()]:  # every one is asked: by that its end is noted
            if self.asked and not told:
                _say(f"{self.asked}: all ranks save and stop; once more kills them")
                self._ask()
                told = True
            if self._kill:
                return self._end_all("killed on request, nothing was saved")
            if judged := verdict():
                return self._end_all(judged)
            ends = [end for voice in voices for end in voice.ends]
            if failed_at is None and any(end.is_failure for end in ends):
                failed_at = time.monotonic()
                _say(f"{judge(ends).words}; ending the other hosts")
            if failed_at is not None and time.monotonic() - failed_at > LAST_WORDS_SECONDS:
                break
            time.sleep(POLL_SECONDS)
        ends = [end for voice in voices for end in voice.final_ends()]
        if not ends:
            return Ended(3, "DeepSpeed's launcher ended before any host did; see its output")
        end = judge(ends)
        if end.is_failure:
            self._call()  # ends what is left, on hosts that answer
        words = {0: "all ranks ended", EXIT_STOPPED: "all ranks saved and stopped"}.get(end.code, end.words)
        return Ended(end.told, words, _failed_rank(start, end, self._job.run_dir))

    def _ask(self) -> None:
        try:
            self._stop_file.touch()
        except OSError as error:
            _say(f"the ranks cannot be asked: {error}; once more kills them")

    def _end_all(self, words: str) -> Ended:
        _say(f"{words}; killing the job on every host")
        self._call()
        return Ended(3, words)

    def _record(self, start: Start, log: Path) -> None:
        details = {
            "run_dir": str(self._job.run_dir),
            "host": socket.gethostname(),
            "launcher": self._cluster.launcher,
            "master": f"{start.master_address}:{start.master_port}",
            "interface": start.environment.get("GLOO_SOCKET_IFNAME", ""),
        }
        launched = Launched(
            kind="hosts",
            id=str(os.getpid()),
            hosts=tuple(host.name for host in start.hosts),
            command=tuple(commands_of(self._cluster, start)[0]),
            log=str(log),
            started=datetime.now(UTC).isoformat(timespec="seconds"),
            details=details,
        )
        write_record(self._job.run_dir, launched)


class Voice:
    """A process of this machine that speaks for one host or for all of them; its output goes to terminal and log."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str] | None, log: IO[str], host: str) -> None:
        """``host``: whom it speaks for; empty: pdsh, which names the host in every line."""
        self.ends: list[HostEnd] = []  # as they come
        self._host, self._log = host, log
        self._silent: set[str] = set()  # streams that could not be written to
        self._process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,  # held open as long as this process lives: by it the ranks know
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C in the terminal is for this process alone
        )
        self._reader = threading.Thread(target=self._listen, daemon=True)
        self._reader.start()

    def poll(self) -> bool:
        """Whether it has ended; if so, how its host did is noted."""
        code = self._process.poll()
        if code is not None and self._host and not self.ends:
            self.ends.append(HostEnd(self._host, code if code >= 0 else SSH_FAILED, time.monotonic()))
        return code is not None

    def final_ends(self) -> list[HostEnd]:
        """With those that pdsh told last; hosts that it does not name ended with 0."""
        if self.poll():
            self._reader.join(timeout=5.0)
        code = self._process.returncode
        if not self.ends and code == 0:
            return [HostEnd(self._host, 0)]
        return self.ends

    def close(self) -> None:
        """Kill what is left of it here."""
        if self._process.poll() is None:
            below = _descendants(self._process.pid)  # pdsh puts each ssh into a session of its own
            with suppress(ProcessLookupError):  # it ended meanwhile
                os.killpg(self._process.pid, signal.SIGKILL)
            for process in below:
                with suppress(psutil.Error):
                    process.kill()
            self._process.wait()
        self._reader.join(timeout=5.0)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe and not self._reader.is_alive():
                pipe.close()

    def _listen(self) -> None:
        assert self._process.stdout is not None, "it is a pipe"
        for line in self._process.stdout:
            if not self._host and (said := PDSH_SAYS.match(line)):
                self.ends.append(HostEnd(said[1], int(said[2]), time.monotonic()))
            text = f"{self._host}: {line}" if self._host else line
            for name, stream in (("terminal", sys.stdout), ("log", self._log)):
                self._write(name, stream, text)

    def _write(self, name: str, stream: IO[str], text: str) -> None:
        """Where nobody can be told, the ranks are listened to all the same: they would wait for it, in a print."""
        try:
            stream.write(text)
            stream.flush()
        except (OSError, ValueError) as error:  # a pipe that was closed, a disk that is full
            if name not in self._silent:
                _say(f"{name}: {error}; the job goes on")
            self._silent.add(name)


def _descendants(pid: int) -> list[psutil.Process]:
    try:
        return list(psutil.Process(pid).children(recursive=True))
    except psutil.Error:  # it ended meanwhile
        return []


def _failed_rank(start: Start, end: HostEnd, run_dir: Path) -> int | None:
    """The first rank of that host that said itself that it failed."""
    number = next((number for number, host in enumerate(start.hosts) if host.name == end.host), 0)
    per_host = len(start.hosts[0].slots)
    ranks = range(number * per_host, (number + 1) * per_host)
    beats = read_beats(RunDir(run_dir).heartbeats)
    return next((rank for rank in ranks if rank in beats and beats[rank].state == "failed"), None)


def _say(words: str) -> None:
    with suppress(OSError, ValueError):  # nobody reads it: no reason to leave the ranks alone
        print(f"launch: {words}", file=sys.stderr, flush=True)

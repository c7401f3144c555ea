"""Start the ranks of a job on hosts, through DeepSpeed's launcher, and end all of them when one host is lost.

The counterpart of ``launch.local.ranks.Launcher`` for machines that are reached by ssh, with the same verbs, so that
one supervisor serves both. Ctrl-C or SIGTERM becomes a file STOP in the run folder: DeepSpeed's launcher would kill the
ranks half a minute after a signal, in the middle of a long save. A second one kills, on every host. A host that failed
leaves the others some seconds to say what they saw.
"""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, Self

from cpt.exit_codes import EXIT_DONE, EXIT_ENVIRONMENT, EXIT_STOPPED
from cpt.heartbeats import read_beats
from cpt.rundir import RunDir
from launch.cluster import HostsCluster
from launch.hostfile import Host
from launch.hosts.answer import Present
from launch.hosts.deepspeed_command import Start, host_command, launcher_environment
from launch.hosts.one_start import build_start, commands_of, write_files
from launch.hosts.roll_call import call
from launch.hosts.voice import HostEnd, Voice, judge, say
from launch.local.devices import Usable
from launch.local.ranks import JOB_SECONDS, PASSED_ON, Ended
from launch.record import Launched, LaunchJob, write_record
from launch.run_folder import patiently, plain_file

POLL_SECONDS = 0.1
LAST_WORDS_SECONDS = 15.0  # for ranks to tell who is lost, and for DeepSpeed's launchers to notice
ASK_SECONDS = 5.0  # between two tries to ask the ranks, where the run folder has no answer
REPEAT_SECONDS = 5.0  # signals that come this soon after the first are the same request
NOBODY_WAITS = (5.0, 10.0, 20.0, 40.0, 80.0)  # between calls that no host answered: a switch that restarts


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
        self._kill = self._is_told = False
        self._ask_next = 0.0
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
                say(f"host {host} does not answer: {why}")
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
        answers = call(self._cluster, self._hosts, directory=directory, run_dir=run_dir)
        self._present = {host: each for host, each in answers.items() if isinstance(each, Present)}
        for host, each in self._present.items():
            if each.ended:
                say(f"host {host}: {each.ended} processes of this run were killed")
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
        log = patiently(lambda: self._prepare(start), pause=self.wait)
        try:
            if self.asked:
                return Ended(EXIT_ENVIRONMENT, "it was asked to stop before anything was started")
            return self._run(start, log, verdict)
        finally:
            _close(log)

    def _run(self, start: Start, log: IO[str], verdict: Callable[[], str | None]) -> Ended:
        voices = self._start_all(start, log)
        try:
            return self._wait(voices, start, verdict)
        finally:
            for voice in voices:
                voice.close()
            if self.asked:
                self._withdraw()

    def _prepare(self, start: Start) -> IO[str]:
        """What stands in the run folder before a start; returns the log, to be added to."""
        write_files(start)
        log_file = start.folder / ("log" if self._node_rank is None else f"log_{self._node_rank}")
        if not self._node_rank:
            self._record(start, log_file)
        return open(log_file, "a", encoding="utf-8", errors="replace", opener=plain_file)

    def _build(self, arguments: Sequence[str], hosts: tuple[Host, ...]) -> Start:
        cluster = self._cluster
        if hosts[0] != self._hosts[0]:  # the address that the file states is that of another host
            cluster = cluster.model_copy(update={"master_address": None})
        start = build_start(cluster, self._job, hosts, arguments=arguments, present=self._present)
        seconds = time.monotonic() - self._since
        return replace(start, environment={**start.environment, JOB_SECONDS: f"{seconds:.3f}"})

    def _start_all(self, start: Start, log: IO[str]) -> list[Voice]:
        cluster, hosts = self._cluster, start.hosts
        if self._node_rank is not None:
            own = {**os.environ, **start.environment}
            return [Voice(host_command(start, self._node_rank), own, log, hosts[self._node_rank].name)]
        commands = commands_of(cluster, start)
        if cluster.launcher == "pdsh":
            keeper = [sys.executable, "-m", "launch.hosts.keeper"]
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

    def _wait(self, voices: Sequence[Voice], start: Start, verdict: Callable[[], str | None]) -> Ended:
        failed_at: float | None = None
        while [voice for voice in voices if not voice.poll()]:  # every one is asked: by that its end is noted
            if self.asked:
                self._ask()
            if self._kill:
                return self._end_all("killed on request, nothing was saved")
            if judged := verdict():
                return self._end_all(judged)
            ends = [end for voice in voices for end in voice.ends]
            if failed_at is None and any(end.is_failure for end in ends):
                failed_at = time.monotonic()
                say(f"{judge(ends).words}; ending the other hosts")
            if failed_at is not None and time.monotonic() - failed_at > LAST_WORDS_SECONDS:
                break
            time.sleep(POLL_SECONDS)
        ends = [end for voice in voices for end in voice.final_ends()]
        if not ends:
            return Ended(EXIT_ENVIRONMENT, "DeepSpeed's launcher ended before any host did; see its output")
        end = judge(ends)
        if end.is_failure:
            self._call()  # ends what is left, on hosts that answer
        words = {EXIT_DONE: "all ranks ended", EXIT_STOPPED: "all ranks saved and stopped"}.get(end.code, end.words)
        return Ended(end.told, words, _failed_rank(start, end, self._job.run_dir))

    def _ask(self) -> None:
        """Once; where the run folder has no answer, again and again."""
        now = time.monotonic()
        if self._is_told or now < self._ask_next:
            return
        if not self._ask_next:
            say(f"{self.asked}: all ranks save and stop; once more kills them")
        self._ask_next = now + ASK_SECONDS
        try:
            self._stop_file.touch()
            self._is_told = True
        except OSError as error:
            say(f"the ranks cannot be asked: {error}; trying again in {ASK_SECONDS:g} s; once more kills them")

    def _withdraw(self) -> None:
        """What did not come to obey the request must not stop the next start."""
        try:
            patiently(lambda: self._stop_file.unlink(missing_ok=True))
        except OSError as error:
            say(f"{self._stop_file} is left: {error}; remove it")

    def _end_all(self, words: str) -> Ended:
        say(f"{words}; killing the job on every host")
        self._call()
        return Ended(EXIT_ENVIRONMENT, words)

    def _record(self, start: Start, log: Path) -> None:
        details = {
            "run_dir": str(self._job.run_dir),
            "host": socket.gethostname(),
            "master": f"{start.master_address}:{start.master_port}",
        }
        launched = Launched(
            kind="hosts",
            id=str(os.getpid()),
            hosts=tuple(host.name for host in start.hosts),
            log=str(log),
            started=datetime.now(UTC).isoformat(timespec="seconds"),
            details=details,
        )
        write_record(self._job.run_dir, launched)


def _close(log: IO[str]) -> None:
    """What could not be written is tried again here, and fails again: no reason to forget how the job ended."""
    try:
        log.close()
    except OSError as error:
        say(f"log: {error}; its end is missing")


def _failed_rank(start: Start, end: HostEnd, run_dir: Path) -> int | None:
    """The first rank of that host that said itself that it failed."""
    number = next((number for number, host in enumerate(start.hosts) if host.name == end.host), 0)
    per_host = len(start.hosts[0].slots)
    ranks = range(number * per_host, (number + 1) * per_host)
    beats = read_beats(RunDir(run_dir).heartbeats)
    return next((rank for rank in ranks if rank in beats and beats[rank].state == "failed"), None)

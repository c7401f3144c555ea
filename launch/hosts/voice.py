"""What is heard of hosts at work: their output, through ssh or pdsh, and how each of them ended.

Owns the processes of this machine that speak for hosts. The exit code of DeepSpeed's launcher tells little; how each
host ended is told by its ssh, or by what pdsh says of it. Refuses to decide what becomes of the job
(``launch.hosts.launcher``).
"""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import IO

import psutil

from cpt.exit_codes import EXIT_DONE, EXIT_ENVIRONMENT, EXIT_STOPPED, EXIT_USER, KILLED, exit_code
from launch.hosts.remote import SSH_FAILED

PDSH_SAYS = re.compile(r"pdsh@\S+: (\S+): ssh exited with exit code (\d+)")


@dataclass(frozen=True)
class HostEnd:
    """How a host ended: the exit code of its ssh, which is that of DeepSpeed's launcher on it; and when."""

    host: str
    code: int
    at: float = 0.0

    @property
    def is_failure(self) -> bool:
        return self.code not in (EXIT_DONE, EXIT_STOPPED)

    @property
    def told(self) -> int:
        """DeepSpeed ends with the code of a rank; of one that signal n killed with -n, which is 256 - n here."""
        if self.code == SSH_FAILED:
            return EXIT_ENVIRONMENT
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
    return min(failures, key=lambda end: (end.told != EXIT_USER, end.code != SSH_FAILED and end.told < KILLED, end.at))


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
                say(f"{name}: {error}; the job goes on")
            self._silent.add(name)


def _descendants(pid: int) -> list[psutil.Process]:
    try:
        return list(psutil.Process(pid).children(recursive=True))
    except psutil.Error:  # it ended meanwhile
        return []


def say(words: str) -> None:
    """To whoever started the job."""
    with suppress(OSError, ValueError):  # nobody reads it: no reason to leave the ranks alone
        print(f"launch: {words}", file=sys.stderr, flush=True)

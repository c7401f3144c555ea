"""One command on many hosts at once: over ssh, or as processes of this machine where the hosts are this machine.

Owns the command line of ssh, the time each host is given, and how much of its output is kept. Refuses to ask for
passwords or to wait for a host for ever. A transport turns a host and a command into the argument list that runs it
there; the rest is the same for all of them:

    over_ssh(cluster, "n2", ["env", "-C", "/data", "python", "-m", "launch.preflight.facts"], lost_after=16)
    -> ssh -p 2222 -o BatchMode=yes ... -- n2 'env -C /data python -m launch.preflight.facts'
"""

import asyncio
import json
import os
import shlex
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.cluster import HostsCluster

CONNECT_SECONDS = 8
AT_ONCE = 64
OUTPUT_BYTES = 1 << 20  # kept of each stream; whoever says more is not answering the question
END_SECONDS = 5.0  # after SIGKILL; what has left the session may hold the pipes for longer
LOOPBACK = ("localhost", "127.0.0.1", "::1")
SSH_FAILED = 255
QUESTION_LOST_SECONDS = 16

Transport = Callable[[str, Sequence[str]], list[str]]


@dataclass(frozen=True)
class Answer:
    """What a host said. ``code``: None where it did not end in time or could not be asked; ``first_output``: when this
    machine's clock heard the first of it, in seconds since 1970.
    """

    host: str
    code: int | None
    output: str
    errors: str
    seconds: float
    first_output: float | None = None

    @property
    def why(self) -> str:
        """Why there is no result, in words; "" where there is one."""
        if self.code == 0:
            return ""
        said = next((line.strip() for line in reversed(self.errors.splitlines()) if line.strip()), "")
        if self.code is None:
            return said or f"no answer within {self.seconds:.0f} s"
        if self.code == SSH_FAILED:
            return said or "ssh could not connect"
        return f"{said or 'it said nothing'} (exit code {self.code})"


def ssh_arguments(cluster: HostsCluster, *, lost_after: int) -> list[str]:
    """What every ssh of a launch is given before the host. The user's come first: of an option that is given twice ssh
    takes the first. ``lost_after``: so many seconds without a word from the other side end the connection.
    """
    alive = (f"ServerAliveInterval={lost_after // 4}", "ServerAliveCountMax=4")
    settings = ("BatchMode=yes", f"ConnectTimeout={CONNECT_SECONDS}", *alive)
    port = ["-p", str(cluster.ssh_port)] if cluster.ssh_port else []
    return [*cluster.ssh_options, *port, *(word for setting in settings for word in ("-o", setting))]


def over_ssh(cluster: HostsCluster, host: str, command: Sequence[str], *, lost_after: int) -> list[str]:
    """ssh's argument list, for a command that arrives word by word as it is."""
    return ["ssh", *ssh_arguments(cluster, lost_after=lost_after), "--", host, shlex.join(command)]


def as_process(host: str, command: Sequence[str]) -> list[str]:
    """The host is this machine."""
    return list(command)


def transport_for(cluster: HostsCluster) -> Transport:
    """ssh with the cluster's port and options; this machine's own names need none, unless a port says otherwise."""
    if cluster.launcher == "no_ssh":
        return as_process

    def run(host: str, command: Sequence[str]) -> list[str]:
        if host in LOOPBACK and cluster.ssh_port is None:
            return as_process(host, command)
        return over_ssh(cluster, host, command, lost_after=QUESTION_LOST_SECONDS)

    return run


def in_folder(folder: Path, environment: Mapping[str, str], arguments: Sequence[str]) -> list[str]:
    """A command that runs in ``folder`` with further variables, without a shell of ours."""
    return ["env", "-C", str(folder), *(f"{name}={value}" for name, value in environment.items()), *arguments]


def last_object(output: str) -> dict[str, Any] | None:
    """The JSON object on the last line that is one: shells of a login print words of their own around it."""
    for line in reversed(output.splitlines()):
        if line.startswith("{"):
            with suppress(ValueError):
                return dict(json.loads(line))
    return None


def run_everywhere(
    commands: Mapping[str, Sequence[str]], transport: Transport, *, seconds: float, at_once: int = AT_ONCE
) -> dict[str, Answer]:
    """Run each host's command, ``at_once`` of them at a time, each for ``seconds`` at most; answers in the order given.

    Never raises for a host: its answer says why it failed.
    """
    return asyncio.run(_run_everywhere(commands, transport, seconds, at_once))


async def _run_everywhere(
    commands: Mapping[str, Sequence[str]], transport: Transport, seconds: float, at_once: int
) -> dict[str, Answer]:
    turns = asyncio.Semaphore(at_once)

    async def ask(host: str, command: Sequence[str]) -> Answer:
        async with turns:
            return await _ask(host, transport(host, command), seconds)

    answers = await asyncio.gather(*(ask(host, command) for host, command in commands.items()))
    return {answer.host: answer for answer in answers}


async def _ask(host: str, command: Sequence[str], seconds: float) -> Answer:
    began = time.monotonic()
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,  # killed with whatever it has started
        )
    except OSError as error:
        return Answer(host, None, "", f"{command[0]} cannot be started here: {error}", 0.0)
    assert process.stdout and process.stderr, "both are pipes"

    def end() -> None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    output, errors = _Kept(process.stdout, end), _Kept(process.stderr, end)
    code, said = None, ""
    try:
        async with asyncio.timeout(seconds):
            await asyncio.gather(output.read(), errors.read())
            code, said = await process.wait(), errors.text
    except TimeoutError:
        pass  # said by the missing code
    finally:
        end()
        # asyncio tells the end of a process only when its pipes have been read to theirs.
        with suppress(TimeoutError):
            async with asyncio.timeout(END_SECONDS):
                await asyncio.gather(process.stdout.read(), process.stderr.read())
                await process.wait()
        process._transport.close()  # type: ignore[attr-defined]  # pipes that others still hold; it has no public name
        await asyncio.sleep(0)
    if output.is_full or errors.is_full:
        code, said = None, f"more than {OUTPUT_BYTES:,} bytes of output"
    return Answer(host, code, output.text, said, time.monotonic() - began, output.first)


class _Kept:
    """A stream's bytes, up to a limit, and when it began. Beyond the limit ``end`` is called, and the rest dropped."""

    def __init__(self, stream: asyncio.StreamReader, end: Callable[[], None]) -> None:
        self.first: float | None = None
        self.is_full = False
        self._stream, self._end = stream, end
        self._kept = bytearray()

    async def read(self) -> None:
        while piece := await self._stream.read(1 << 16):
            self.first = self.first or time.time()
            if not self.is_full:
                self._kept += piece
            if len(self._kept) > OUTPUT_BYTES and not self.is_full:
                self.is_full = True
                self._end()

    @property
    def text(self) -> str:
        return self._kept.decode("utf-8", "replace")

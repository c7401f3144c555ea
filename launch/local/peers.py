"""How the hosts of a job find each other again when no supervisor stands above them, and notice the loss of one.

A scheduler that replaces one host of a job leaves the others waiting in a collective call for a rank that is gone, and
the new one at a meeting that was held long ago. So every start of a host has an id in a small file of the run folder,
and says which ids it sees. Ranks are started when all hosts say the same, which no leftover of an earlier start can:
it does not know the new ids. From then on, whoever sees one of these starts replaced or failed ends its own ranks, and
all meet again. A start that ended well, saved or finished, is no loss. No clock is compared.
"""

import hashlib
import json
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from cpt.exit_codes import EXIT_DONE, EXIT_ENVIRONMENT, EXIT_STOPPED
from cpt.rundir import write_atomic
from launch.local.ranks import Ended

MEET_SECONDS, LOOK_SECONDS = 0.25, 2.0  # between two looks, and longer by a second for every 32 hosts
SAY_SECONDS = 60.0  # between two lines about who is waited for


@dataclass(frozen=True)
class Sign:
    """What a host last said. ``start`` tells one start of it from the next; ``sees``: a hash of those of all hosts."""

    start: str
    sees: str = ""
    state: Literal["running", "ended", "failed"] = "running"
    words: str = ""


class Peers:
    """The other hosts of a job, as seen from one."""

    def __init__(self, folder: Path, *, host: int, num_hosts: int) -> None:
        self._folder = folder
        self._host = host
        self._num_hosts = num_hosts
        self._own = Sign(uuid.uuid4().hex)
        self._met: dict[int, str] = {}  # the starts that this job's ranks were started with, but for our own
        self._next = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None:
            self.conclude(Ended(EXIT_ENVIRONMENT, f"its starter failed: {error}"))

    def meet(self, *, pause: Callable[[float], None], enough: Callable[[], bool]) -> None:
        """Wait until all hosts are there and know it, or until ``enough``.

        Raises:
            OSError: the run folder cannot be written.
        """
        if self._num_hosts == 1:
            return
        said = time.monotonic()
        self._say(self._own)
        while not enough():
            signs = {other: sign for other in self._others() if (sign := self._read(other)) is not None}
            starts = {other: sign.start for other, sign in signs.items() if sign.state == "running"}
            sees = self._hash(starts) if len(starts) == self._num_hosts - 1 else ""
            if sees != self._own.sees:
                self._say(replace(self._own, sees=sees))
            if sees and all(sign.sees == sees for sign in signs.values()):
                self._met = starts
                return
            if time.monotonic() - said > SAY_SECONDS:
                said = time.monotonic()
                missing = ", ".join(str(other) for other in self._others() if other not in starts)
                print(f"waits for host {missing}" if missing else "waits until all hosts see each other", flush=True)
            pause(MEET_SECONDS + self._num_hosts / 32)

    def lost(self) -> str | None:
        """Which of the hosts that were met was lost, in words; None while none was. May be asked all the time."""
        if time.monotonic() < self._next:
            return None
        self._next = time.monotonic() + LOOK_SECONDS + self._num_hosts / 32
        return next((words for host in list(self._met) if (words := self._judge(host))), None)

    def conclude(self, ended: Ended) -> None:
        """Say how this host's ranks ended."""
        if self._num_hosts == 1:
            return
        state: Literal["ended", "failed"] = "ended" if ended.code in (EXIT_DONE, EXIT_STOPPED) else "failed"
        try:
            self._say(replace(self._own, state=state, words=ended.words))
        except OSError as error:  # the others will notice when this host is started again
            print(f"WARNING: {self._file(self._host)}: {error}", file=sys.stderr, flush=True)

    def _judge(self, host: int) -> str | None:
        now = self._read(host)
        if now is None:
            return None
        if now.start != self._met[host]:
            return f"host {host} was started again: the one that this job was joined with is gone"
        if now.state == "ended":
            del self._met[host]  # whatever it does next is of no concern to these ranks
        return f"host {host} failed: {now.words}" if now.state == "failed" else None

    def _others(self) -> list[int]:
        return [host for host in range(self._num_hosts) if host != self._host]

    def _hash(self, starts: dict[int, str]) -> str:
        everybody = sorted({**starts, self._host: self._own.start}.items())
        return hashlib.sha256(json.dumps(everybody).encode()).hexdigest()

    def _file(self, host: int) -> Path:
        return self._folder / f"host_{host:05d}.json"

    def _say(self, sign: Sign) -> None:
        self._own = sign
        self._folder.mkdir(parents=True, exist_ok=True)
        write_atomic(self._file(self._host), json.dumps(asdict(sign)))

    def _read(self, host: int) -> Sign | None:
        try:
            return Sign(**json.loads(self._file(host).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

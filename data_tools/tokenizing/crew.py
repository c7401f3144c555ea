"""Jobs through worker processes, results in the order of the jobs, and nothing copied through pipes but a few numbers.

Every job goes through a *slot*, a piece of memory shared with the workers: texts in, tokens out. Slots are used in
turn, so at most ``_SLOTS_PER_WORKER`` jobs per worker are on their way and memory does not grow with the input:

    job 0 1 2 3 ... -> slot 0 1 2 3 ... -> worker 0 1 0 1 ...      collected in the same turn

Processes and not threads: `tokenizers` and `sentencepiece` make Python objects under the interpreter lock, and a
`gigatoken` tokenizer serves one thread at a time. Workers are forked, so the encoder is loaded once; a worker keeps no
open file but its pipe, so neither a lock nor a pipe outlives a killed parent. A worker is replaced after
``_RECYCLE_BYTES`` of text, because such libraries were seen to keep memory. A worker that dies is an error, not a hang.
"""

import contextlib
import mmap
import multiprocessing
import os
import signal
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from data_tools.tokenizing.documents import Encoded, Halves
from data_tools.tokenizing.jobs import BATCH_BYTES, BATCH_TEXTS, LONG_TEXT, Job, Piece

Work = Callable[[Sequence[bytes], Piece | None], Halves]
Reply = tuple[tuple[int, int, int], tuple[int, int, int]]  # per half: tokens, documents, bytes of text

_SLOTS_PER_WORKER = 3
_RECYCLE_BYTES = 1 << 30
_TEXT_BYTES = BATCH_BYTES + 4 * LONG_TEXT  # a batch ends behind the document that fills it
_TOKENS = _TEXT_BYTES + 4 * BATCH_TEXTS


def in_order(jobs: Iterable[Job], work: Work, workers: int) -> Iterator[tuple[Job, Halves]]:
    """Every job with its result, in order; the arrays are good until the next one is asked for.

    Raises:
        RuntimeError: a worker process died, or failed.
    """
    if workers == 1:
        for job in jobs:
            yield job, work(job.texts, job.piece)
        return
    with _Crew(work, workers) as crew:
        waiting: deque[_Ticket] = deque()
        for number, job in enumerate(jobs):
            if len(waiting) == crew.num_slots:
                yield crew.collect(waiting.popleft())
            waiting.append(crew.submit(number, job))
        while waiting:
            yield crew.collect(waiting.popleft())


class _Slot:
    """Shared memory for one job: [sizes of texts | texts] written by the parent, [tokens | lengths] by a worker."""

    def __init__(self, dtype: np.dtype[Any]) -> None:
        sizes = 8 * BATCH_TEXTS
        self._memory = mmap.mmap(-1, 2 * sizes + _TEXT_BYTES + _TOKENS * dtype.itemsize)  # untouched pages cost nothing
        self._sizes = np.frombuffer(self._memory, np.int64, BATCH_TEXTS)
        self._lengths = np.frombuffer(self._memory, np.int64, BATCH_TEXTS, sizes)
        self._text_start = 2 * sizes
        self._tokens = np.frombuffer(self._memory, dtype, _TOKENS, self._text_start + _TEXT_BYTES)

    def put_texts(self, texts: Sequence[bytes]) -> bool:
        """False where they do not fit."""
        if len(texts) > BATCH_TEXTS or sum(map(len, texts)) > _TEXT_BYTES:
            return False
        self._sizes[: len(texts)] = [len(text) for text in texts]
        position = self._text_start
        for text in texts:
            self._memory[position : position + len(text)] = text
            position += len(text)
        return True

    def texts(self, count: int) -> list[bytes]:
        ends = self._text_start + self._sizes[:count].cumsum()
        starts = [self._text_start, *ends.tolist()]
        return [self._memory[start:end] for start, end in zip(starts, ends.tolist(), strict=False)]

    def put_halves(self, halves: Halves) -> Reply | None:
        """What ``halves`` needs to find them again; None where they do not fit."""
        if sum(len(half.tokens) for half in halves) > _TOKENS:
            return None
        first, second = halves
        for store, left, right in (
            (self._tokens, first.tokens, second.tokens),
            (self._lengths, first.lengths, second.lengths),
        ):
            store[: len(left)] = left
            store[len(left) : len(left) + len(right)] = right
        return _facts(first), _facts(second)

    def halves(self, reply: Reply) -> Halves:
        (tokens, documents, _), _ = reply
        return self._half(0, 0, reply[0]), self._half(tokens, documents, reply[1])

    def _half(self, token: int, document: int, facts: tuple[int, int, int]) -> Encoded:
        num_tokens, num_documents, utf8_bytes = facts
        # lengths are kept by the writer until the shard ends, so they are copied
        lengths: NDArray[np.int64] = self._lengths[document : document + num_documents].copy()
        return Encoded(self._tokens[token : token + num_tokens], lengths, utf8_bytes)


def _facts(half: Encoded) -> tuple[int, int, int]:
    return len(half.tokens), len(half.lengths), half.utf8_bytes


@dataclass
class _Worker:
    process: Any
    connection: Connection
    given_bytes: int = 0


@dataclass(frozen=True)
class _Ticket:
    """A job on its way; ``worker`` None: it does not fit into a slot, so this process does it when its turn comes."""

    job: Job
    slot: _Slot
    worker: _Worker | None


class _Crew:
    """The workers and slots of one build."""

    def __init__(self, work: Work, workers: int) -> None:
        self._work = work
        dtype = work([], None)[0].tokens.dtype  # an empty job costs nothing
        self._slots = [_Slot(dtype) for _ in range(workers * _SLOTS_PER_WORKER)]
        self._workers = [self._start() for _ in range(workers)]
        self._retired: list[_Worker] = []
        self.num_slots = len(self._slots)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for worker in (*self._workers, *self._retired):
            worker.process.kill()
            worker.process.join()
            worker.connection.close()

    def _start(self) -> _Worker:
        context = multiprocessing.get_context("fork")
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, self._slots, self._work), daemon=True)
        process.start()
        theirs.close()
        return _Worker(process, ours)

    def submit(self, number: int, job: Job) -> _Ticket:
        """Give a job to the worker whose turn it is; its slot must be free."""
        turn, slot = number % len(self._workers), number % self.num_slots
        if not self._slots[slot].put_texts(job.texts):
            return _Ticket(job, self._slots[slot], None)
        worker = self._workers[turn]
        try:
            if worker.given_bytes > _RECYCLE_BYTES:
                worker = self._workers[turn] = self._replace(worker)
            worker.connection.send((slot, len(job.texts), job.piece))
        except OSError:
            raise _death(worker) from None
        worker.given_bytes += sum(map(len, job.texts))
        return _Ticket(job, self._slots[slot], worker)

    def _replace(self, worker: _Worker) -> _Worker:
        """A fresh worker; the old one ends after the jobs it has, whose answers wait in its pipe."""
        worker.connection.send(None)
        self._retired = [old for old in self._retired if old.process.is_alive()] + [worker]
        return self._start()

    def collect(self, ticket: _Ticket) -> tuple[Job, Halves]:
        """Wait for a job's answer."""
        job = ticket.job
        if ticket.worker is None:
            return job, self._work(job.texts, job.piece)
        try:
            reply = ticket.worker.connection.recv()
        except (EOFError, OSError):
            raise _death(ticket.worker) from None
        if isinstance(reply, str):
            raise RuntimeError(f"a tokenizing worker failed:\n{reply}")
        return job, ticket.slot.halves(reply) if reply else self._work(job.texts, job.piece)


def _death(worker: _Worker) -> RuntimeError:
    worker.process.join()
    code = worker.process.exitcode
    how = f"was killed by signal {-code} ({signal.strsignal(-code)})" if code < 0 else f"ended with exit code {code}"
    return RuntimeError(
        f"tokenizing worker {worker.process.pid} {how}; if memory was short (dmesg says so), use fewer --workers; the "
        "same command goes on behind the last finished segment"
    )


def _serve(connection: Connection, slots: Sequence[_Slot], work: Work) -> None:
    """A worker's life: jobs until the parent says None, or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its thread pool did not survive the fork
    os.closerange(3, connection.fileno())
    os.closerange(connection.fileno() + 1, os.sysconf("SC_OPEN_MAX"))
    with contextlib.suppress(EOFError, ConnectionResetError, BrokenPipeError):  # the parent is gone
        while (order := connection.recv()) is not None:
            slot, count, piece = order
            connection.send(_answer(slots[slot], work, count, piece))


def _answer(slot: _Slot, work: Work, count: int, piece: Piece | None) -> Reply | str | None:
    """Where the result lies; a traceback where there is none; None where it does not fit."""
    try:
        return slot.put_halves(work(slot.texts(count), piece))
    except Exception:
        return traceback.format_exc()

"""Independent units of work, each done once: in worker processes, by one of many tasks, again only if it never ended.

A unit is a number; what it reads and writes is its worker's. When it is done, ``FOLDER/done/00012.json`` says so, with
what came of it. A job that was killed starts again with the units that have no marker. Task i of n does the units u
with ``u % n == i``, on any machine that sees the folder.

    work = partial(count_words, files)          # picklable; sent to each worker process once
    run_units(folder, len(files), work, workers=4)
    results = read_markers(folder, len(files))
"""

import ctypes
import json
import multiprocessing
import signal
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

from cpt.rundir import DataError, write_atomic

Work = Callable[[int], dict[str, Any]]
Progress = Callable[[int], None]
_POLL_SECONDS = 0.25
_PR_SET_PDEATHSIG = 1


@dataclass
class _Process:
    """What this process works with; a worker process gets it once, when it starts."""

    work: Work
    folder: Path
    count: Progress


_here: list[_Process] = []  # module state, because a process pool hands its workers nothing else to keep


def run_units(
    folder: Path,
    num_units: int,
    work: Work,
    *,
    workers: int = 1,
    task: tuple[int, int] = (0, 1),
    progress: Progress | None = None,
) -> None:
    """Do every unit of the task that has no marker yet; ``progress(amount)`` follows what ``work`` told ``advance``.

    Raises:
        RuntimeError: a worker process died, for instance for want of memory.
        Exception: what ``work`` raised, first come; units that are done stay done.
    """
    (folder / "done").mkdir(parents=True, exist_ok=True)
    left = [unit for unit in range(task[0], num_units, task[1]) if not _marker(folder, unit).is_file()]
    report = progress or (lambda amount: None)
    if workers == 1 or len(left) <= 1:
        _run_here(_Process(work, folder, _throttled(report)), left)
        return
    advanced = multiprocessing.get_context("spawn").Value("q", 0)
    # spawn: the caller's threads (a progress bar, arrow's pool) and their locks must not be copied into workers
    pool = ProcessPoolExecutor(
        min(workers, len(left)),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(work, folder, advanced),
    )
    try:
        waiting = {pool.submit(_run_one, unit) for unit in left}
        while waiting:
            done, waiting = wait(waiting, _POLL_SECONDS, FIRST_COMPLETED)
            report(advanced.value)
            for future in done:
                future.result()  # raises what the worker raised
    except BaseException as error:
        for process in list(pool._processes.values()):  # a unit may take hours, and is done again from its start
            process.kill()
        if not isinstance(error, BrokenProcessPool):
            raise
        raise RuntimeError(
            f"{folder}: a worker process died, perhaps out of memory; fix: run the same command again with fewer "
            "--workers, it goes on with what is not done"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        del pool, advanced  # their semaphores go now, and not with the traceback that would keep them


def advance(amount: int) -> None:
    """Called by ``work`` as it goes on: so many more bytes, documents or whatever the caller's bar counts."""
    if _here:
        _here[-1].count(amount)


def read_markers(folder: Path, num_units: int) -> list[dict[str, Any]]:
    """What each unit gave, in order.

    Raises:
        DataError: units that are not done yet, a marker that is no JSON.
    """
    missing = [unit for unit in range(num_units) if not _marker(folder, unit).is_file()]
    if missing:
        shown = ", ".join(map(str, missing[:10])) + (" ..." if len(missing) > 10 else "")
        raise DataError(
            f"{folder}: {len(missing)} of {num_units} units are not done ({shown}); fix: run the command again, with "
            "the --task of those units where it was split"
        )
    return [_read_marker(_marker(folder, unit)) for unit in range(num_units)]


def parse_task(text: str) -> tuple[int, int]:
    """``"3/16"`` -> (3, 16): task 3 of 16, counted from 0.

    Raises:
        DataError: anything else.
    """
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise DataError(f"--task is {text!r}; it must be i/n with 0 <= i < n, e.g. 3/16 for the fourth of 16 tasks")
    return int(index), int(count)


def _marker(folder: Path, unit: int) -> Path:
    return folder / "done" / f"{unit:05d}.json"


def _read_marker(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{file}: not JSON ({error}); fix: delete it and run the command again") from None
    if not isinstance(content, dict):
        raise DataError(f"{file}: a JSON {type(content).__name__}, not an object; fix: delete it and run again")
    return content


def _run_here(process: _Process, units: Sequence[int]) -> None:
    """Without worker processes, for the sake of a debugger and of small inputs."""
    _here.append(process)
    try:
        for unit in units:
            _run_one(unit)
            process.count(0)
    finally:
        _here.pop()


def _throttled(report: Progress) -> Progress:
    """Sums up what it is told; passes the sum on a few times a second, and whenever it is told of 0."""
    total, following = 0, 0.0

    def count(amount: int) -> None:
        nonlocal total, following
        total += amount
        if not amount or time.monotonic() >= following:
            report(total)
            following = time.monotonic() + _POLL_SECONDS

    return count


def _start_worker(work: Work, folder: Path, advanced: "Synchronized[int]") -> None:
    # The kernel ends the worker with its parent: none writes on beside the run that continues a killed one.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides

    def count(amount: int) -> None:
        with advanced.get_lock():
            advanced.value += amount

    _here.append(_Process(work, folder, count))


def _run_one(unit: int) -> None:
    process = _here[-1]
    write_atomic(_marker(process.folder, unit), json.dumps(process.work(unit), indent=1) + "\n")

"""The quickstart's forks: their exit codes, their messages, and what a signal does to them."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cpt.quickstart_crew import Fork, in_fork, launch_fork, train_all
from cpt.rundir import DataError


def end_with_a_data_error() -> None:
    raise DataError("corpus.jsonl: no document with text")


def end_with_seven() -> None:
    raise SystemExit(7)


def sleep_long() -> None:
    time.sleep(30)


@pytest.mark.parametrize(("work", "code"), [(end_with_a_data_error, 2), (end_with_seven, 7)])
def test_a_fork_that_fails_ends_this_process_with_its_exit_code(work: Callable[[], None], code: int) -> None:
    with pytest.raises(SystemExit) as ended:
        in_fork(work)
    assert ended.value.code == code


def test_a_stop_request_goes_on_to_the_fork_and_the_way_on_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
    started = time.monotonic()
    with pytest.raises(SystemExit) as ended:
        in_fork(sleep_long)
    assert ended.value.code == 143 and time.monotonic() - started < 10
    assert "the same command goes on from here" in capsys.readouterr().out


def test_a_fork_is_told_to_stop_even_before_it_has_handlers_of_its_own() -> None:
    taken: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: taken.append(number))
    try:
        fork = Fork(sleep_long)
        fork.send_signal(signal.SIGTERM)
        assert fork.wait() == -signal.SIGTERM and not taken
        fork.send_signal(signal.SIGTERM)  # ended: nothing happens
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_command_runs_in_a_fork_as_python_would_run_it_with_its_output_in_the_log(tmp_path: Path) -> None:
    log, command = tmp_path / "log", [sys.executable, "-m", "cpt.cli", "train", "missing.yaml"]
    fork = launch_fork(command, log, {"OMP_NUM_THREADS": "1"})
    assert fork.wait() == 2
    assert "missing.yaml" in log.read_text() and "no such file" in log.read_text()


def test_without_anything_to_train_nothing_is_imported_or_started() -> None:
    train_all([])

"""One task of many: its commands in order, its exit code, a signal passed on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


def start(tmp_path: Path, number: str, *programs: str) -> subprocess.Popen[str]:
    """``programs``: one-line Python programs, the commands of task 1 of two."""
    file = tmp_path / "tasks.json"
    commands = [[sys.executable, "-c", program, str(tmp_path)] for program in programs]
    file.write_text(json.dumps([[["/nonexistent"]], commands]))
    return subprocess.Popen(
        [sys.executable, "-m", "launch.kube.tasks", str(file)],
        cwd=ROOT,
        env={**os.environ, "JOB_COMPLETION_INDEX": number},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_the_commands_of_a_task_run_in_order_and_stop_at_the_first_that_fails(tmp_path: Path) -> None:
    task = start(tmp_path, "1", "print('one', flush=True)", "import sys; sys.exit(5)", "print('three')")
    assert task.communicate(timeout=30)[0] == "one\n" and task.returncode == 5


@pytest.mark.parametrize("number", ["2", "-1", "x", ""])
def test_a_number_that_is_no_task_is_refused(tmp_path: Path, number: str) -> None:
    task = start(tmp_path, number, "pass")
    assert "must be the number of a task, from 0 to 1" in task.communicate(timeout=30)[0] and task.returncode == 2


SAVES = """
import pathlib, signal, sys
signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))
pathlib.Path(sys.argv[1], 'up').touch()
signal.pause()
"""
DOES_NOT_LISTEN = """
import pathlib, signal, sys
pathlib.Path(sys.argv[1], 'up').touch()
signal.pause()
"""


@pytest.mark.parametrize("program", [SAVES, DOES_NOT_LISTEN])
def test_sigterm_reaches_the_command_and_no_other_is_begun(tmp_path: Path, program: str) -> None:
    task = start(tmp_path, "1", program, "print('another')")
    deadline = time.monotonic() + 30
    while not (tmp_path / "up").exists():
        assert time.monotonic() < deadline and task.poll() is None
        time.sleep(0.02)
    task.send_signal(signal.SIGTERM)
    assert "another" not in task.communicate(timeout=30)[0] and task.returncode == 143

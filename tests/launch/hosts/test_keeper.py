"""A command that ends with the process that started it."""

import subprocess
import sys
import time

import psutil
import pytest

KEEPER = [sys.executable, "-m", "launch.hosts.keeper"]


@pytest.mark.parametrize(("words", "code"), [("sys.exit(7)", 7), ("os.kill(os.getpid(), 9)", 137), ("", 0)])
def test_it_ends_as_its_command_does(words: str, code: int) -> None:
    command = [*KEEPER, sys.executable, "-c", f"import os, sys; {words}"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    assert process.wait(timeout=30) == code
    process.communicate()


def test_when_its_standard_input_is_closed_all_of_its_group_is_killed() -> None:
    program = "import subprocess, sys; subprocess.call([sys.executable, '-c', 'import time; print(flush=True); time.sleep(60)'])"
    process = subprocess.Popen(
        [*KEEPER, sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    )
    assert process.stdin and process.stdout and process.stdout.readline() == b"\n"
    below = psutil.Process(process.pid).children(recursive=True)
    assert len(below) == 2
    process.stdin.close()
    assert process.wait(timeout=30) == -9
    deadline = time.monotonic() + 10
    while any(each.is_running() and each.status() != psutil.STATUS_ZOMBIE for each in below):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.stdout.close()

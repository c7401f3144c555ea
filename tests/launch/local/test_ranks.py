"""Starting ranks on this machine: their environment, exit codes, signals, and the end of all when one is lost.

With stand-ins for the trainer, which start in a tenth of a second; real training is in the end-to-end tests.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from launch.local.ranks import LAUNCHER_PID, LISTENER, rank_environments

ROOT = Path(__file__).resolve().parents[3]


def test_every_rank_gets_its_place_the_port_that_is_held_for_it_and_its_devices(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RANK", "7")  # of a job that this one is started from
    with socket.create_server(("127.0.0.1", 0)) as listener:
        first, second = rank_environments(2, listener, devices=["0", "3"])
        assert first["MASTER_PORT"] == str(listener.getsockname()[1]) and first["MASTER_ADDR"] == "127.0.0.1"
        assert first[LISTENER] == str(listener.fileno())
    assert [(each["RANK"], each["LOCAL_RANK"], each["WORLD_SIZE"]) for each in (first, second)] == [
        ("0", "0", "2"),
        ("1", "1", "2"),
    ]
    assert first["CUDA_VISIBLE_DEVICES"] == "0,3" and first[LAUNCHER_PID] == str(os.getpid())


PARENT = """
import sys
from launch.local import ranks
ranks.TRAIN_MODULE = "standin"
ranks.GRACE_SECONDS = 1.0
with ranks.Launcher() as launcher:
    ended = launcher.run(sys.argv[2:], num_processes=int(sys.argv[1]))
print(ended.words, flush=True)
sys.exit(ended.code)
"""
SETUP = """
import os, signal, sys, time
from pathlib import Path
from launch.local.ranks import end_with_launcher
end_with_launcher()
out, rank, received = Path(sys.argv[1]), os.environ["RANK"], []
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, frame: received.append(number))
out.joinpath(f"pid{rank}").write_text(str(os.getpid()))
out.joinpath(f"ready{rank}").touch()
"""
SAVES_WHEN_ASKED = """
while not received:
    time.sleep(0.01)
time.sleep(0.3)  # saving; a signal that came twice would be seen here
out.joinpath(f"signals{rank}").write_text(",".join(map(str, received)))
sys.exit(143)
"""
RANK_1_FAILS = """
while not out.joinpath("ready" + str(1 - int(rank))).exists():
    time.sleep(0.01)
if rank == "1":
    sys.exit(7)
time.sleep(60)  # in a collective that will never end; SIGTERM is noted and nothing comes of it
"""
Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """Starts a launcher over ranks that run ``body``, in a process group of its own, and waits until they are up."""

    def start(body: str, *, num_ranks: int = 2) -> subprocess.Popen[str]:
        (tmp_path / "standin.py").write_text(SETUP + body)
        command = [sys.executable, "-c", PARENT, str(num_ranks), str(tmp_path)]
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
        parent = subprocess.Popen(
            command,
            env=environment,
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        await_files([tmp_path / f"ready{rank}" for rank in range(num_ranks)])
        return parent

    return start


def await_files(paths: Sequence[Path]) -> None:
    deadline = time.monotonic() + 20
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_gone(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"


def test_sigterm_to_the_parent_reaches_every_rank_and_their_143_comes_back(tmp_path: Path, start: Start) -> None:
    parent = start(SAVES_WHEN_ASKED)
    parent.send_signal(signal.SIGTERM)
    assert parent.wait(timeout=20) == 143
    assert [(tmp_path / f"signals{rank}").read_text() for rank in (0, 1)] == ["15", "15"]


def test_ctrl_c_in_a_terminal_reaches_each_rank_once_so_that_it_saves_instead_of_dying(
    tmp_path: Path, start: Start
) -> None:
    parent = start(SAVES_WHEN_ASKED)
    os.killpg(parent.pid, signal.SIGINT)  # what a terminal does: the whole foreground group gets it
    assert parent.wait(timeout=20) == 143
    assert [(tmp_path / f"signals{rank}").read_text() for rank in (0, 1)] == ["2", "2"]


def test_when_a_rank_fails_the_others_are_ended_even_if_they_do_not_listen(tmp_path: Path, start: Start) -> None:
    parent = start(RANK_1_FAILS)
    out, _ = parent.communicate(timeout=20)
    assert parent.returncode == 7  # the first failure's, whatever the others then end with
    assert "rank 1" in out and "ended with exit code 7; ending the other 1" in out
    assert is_gone(int((tmp_path / "pid0").read_text()))


@pytest.mark.parametrize(
    ("number", "code", "words"), [(signal.SIGKILL, 137, "SIGKILL"), (signal.SIGSEGV, 139, "SIGSEGV")]
)
def test_a_rank_that_is_killed_is_named_and_a_stopped_one_beside_it_is_killed(
    tmp_path: Path, start: Start, number: int, code: int, words: str
) -> None:
    parent = start("time.sleep(60)")
    pids = [int((tmp_path / f"pid{rank}").read_text()) for rank in (0, 1)]
    os.kill(pids[1], signal.SIGSTOP)
    os.kill(pids[0], number)
    out, _ = parent.communicate(timeout=20)
    assert parent.returncode == code and f"rank 0 (process {pids[0]}) was killed by {words}" in out
    assert is_gone(pids[1])


def test_ranks_whose_launcher_is_killed_are_told_to_save(tmp_path: Path, start: Start) -> None:
    parent = start(SAVES_WHEN_ASKED)
    parent.kill()
    await_files([tmp_path / f"signals{rank}" for rank in (0, 1)])
    assert [(tmp_path / f"signals{rank}").read_text() for rank in (0, 1)] == ["15", "15"]

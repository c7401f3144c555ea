"""Starting ranks on this machine: the argument list, exit codes, and signals, with a stand-in for the deepspeed launcher.

The real launcher with real training is covered by the end-to-end test.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.local import TRAIN_MODULE, exit_code, launcher_command

ROOT = Path(__file__).resolve().parents[2]


def test_the_launcher_is_an_argument_list_with_the_module_and_the_number_of_ranks() -> None:
    command = launcher_command(["run.yaml", "run.name=$(touch hacked); x"], num_processes=3, port=12345)
    assert command[:3] == [sys.executable, "-m", "deepspeed.launcher.runner"]
    assert command[command.index("--num_gpus") + 1] == "3" and command[command.index("--master_port") + 1] == "12345"
    assert command[-4:] == ["--module", TRAIN_MODULE, "run.yaml", "run.name=$(touch hacked); x"]
    assert "--hostfile=" in command  # no hostfile of the machine turns a local run into a remote one


@pytest.mark.parametrize(
    ("found", "told"),
    [(0, 0), (1, 1), (2, 2), (3, 3), (143, 143), (-15, 3), (-9, 137), (-2, 130), (256 - 9, 137), (256 - 15, 3)],
)
def test_what_a_signal_killed_never_ends_with_0_nor_with_143_which_promises_a_save(found: int, told: int) -> None:
    assert exit_code(found) == told


RANK = """
import signal, sys, time
from pathlib import Path
out, received = Path(sys.argv[1]), []

def stop(number, frame):
    received.append(number)

for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, stop)
out.with_suffix(".ready").touch()
while not received:
    time.sleep(0.01)
time.sleep(0.3)  # saving; a signal that came twice would be seen here
out.write_text(",".join(map(str, received)))
sys.exit(143)
"""
LAUNCHER = """
import signal, subprocess, sys, time
from pathlib import Path
folder, num_ranks = Path(sys.argv[1]), int(sys.argv[2])
ranks = [
    subprocess.Popen([sys.executable, str(folder / "rank.py"), str(folder / f"rank{r}"), "cpt.train.main", f"--local_rank={r}"])
    for r in range(num_ranks)
]
(folder / "launcher.ready").touch()
if not ranks:
    time.sleep(30)
sys.exit(max(rank.wait() for rank in ranks))
"""
PARENT = """
import sys
from launch import local
folder, num_ranks = sys.argv[1:]
local.launcher_command = lambda arguments, **_: [sys.executable, f"{folder}/launcher.py", folder, num_ranks]
sys.exit(local.run_local([], num_processes=2))
"""


@pytest.fixture
def start(tmp_path: Path) -> Callable[[int], subprocess.Popen[bytes]]:
    """Starts ``run_local`` over the stand-in, in a process group of its own, and waits until everything is up."""
    (tmp_path / "rank.py").write_text(RANK)
    (tmp_path / "launcher.py").write_text(LAUNCHER)

    def start(num_ranks: int) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", PARENT, str(tmp_path), str(num_ranks)]
        parent = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
        awaited = [tmp_path / "launcher.ready", *(tmp_path / f"rank{rank}.ready" for rank in range(num_ranks))]
        deadline = time.monotonic() + 20
        while not all(path.exists() for path in awaited):
            assert parent.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        return parent

    return start


def test_sigterm_to_the_parent_reaches_every_rank_and_their_143_comes_back(
    tmp_path: Path, start: Callable[[int], subprocess.Popen[bytes]]
) -> None:
    parent = start(2)
    parent.send_signal(signal.SIGTERM)
    assert parent.wait(timeout=20) == 143
    assert [(tmp_path / f"rank{rank}").read_text() for rank in (0, 1)] == ["15", "15"]


def test_ctrl_c_in_a_terminal_reaches_each_rank_once_so_that_it_saves_instead_of_dying(
    tmp_path: Path, start: Callable[[int], subprocess.Popen[bytes]]
) -> None:
    parent = start(2)
    os.killpg(parent.pid, signal.SIGINT)  # what a terminal does: the whole foreground group gets it
    assert parent.wait(timeout=20) == 143
    assert [(tmp_path / f"rank{rank}").read_text() for rank in (0, 1)] == ["2", "2"]


def test_sigterm_before_there_are_ranks_stops_the_launcher(start: Callable[[int], subprocess.Popen[bytes]]) -> None:
    parent = start(0)
    parent.send_signal(signal.SIGTERM)
    assert parent.wait(timeout=10) == 3  # nothing was saved

"""The container's health check, on real heartbeat files of real processes."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from cpt.heartbeats import Beat, beat_file, write_beat
from launch.local.health import find_hung, main


def beat_of(run_dir: Path, **fields: object) -> Path:
    """A heartbeat that this process has just written, as rank 0 of this host unless fields say otherwise."""
    folder = run_dir / "heartbeats"
    folder.mkdir(parents=True, exist_ok=True)
    facts = {"rank": 0, "host": socket.gethostname(), "pid": os.getpid(), "step": 7, "phase": "backward", **fields}
    beat = Beat(**facts)  # type: ignore[arg-type]
    write_beat(folder, beat)
    return beat_file(folder, beat.rank)


def grow_old(path: Path, seconds: float) -> None:
    os.utime(path, (time.time() - seconds, time.time() - seconds))


@pytest.fixture
def old_process() -> subprocess.Popen[bytes]:
    """A living process that a test may take to have started long ago."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(30)"])
    yield process  # type: ignore[misc]
    process.kill()
    process.wait()


def test_a_rank_that_beats_is_well(tmp_path: Path) -> None:
    beat_of(tmp_path)
    assert find_hung([tmp_path]) == []


def test_a_rank_that_is_silent_is_named_with_its_place(tmp_path: Path) -> None:
    written = beat_of(tmp_path)
    age = 0.5 * (time.time() - psutil.Process().create_time())
    grow_old(written, age)
    assert find_hung([tmp_path], silent_seconds=2 * age) == []
    (told,) = find_hung([tmp_path], silent_seconds=0.5 * age)
    assert "rank 0" in told and "step 7, backward" in told and f"no sign of life for {age:.0f} s" in told


def test_a_rank_that_says_it_is_stuck_is_named_at_once(tmp_path: Path) -> None:
    beat_of(tmp_path, state="stuck", message="rank 3 has not come")
    (told,) = find_hung([tmp_path])
    assert told.endswith("stuck: rank 3 has not come")


def test_a_beat_of_a_container_before_this_one_is_nobodys(tmp_path: Path, old_process: subprocess.Popen[bytes]) -> None:
    written = beat_of(tmp_path, pid=old_process.pid)  # the number of a process that started after it was written
    grow_old(written, 3600.0)
    assert find_hung([tmp_path]) == []


def test_other_hosts_and_ended_processes_are_not_this_containers(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for fields in ({"host": "elsewhere", "state": "stuck"}, {"rank": 1, "pid": ended.pid, "state": "stuck"}):
        beat_of(tmp_path, **fields)
    assert find_hung([tmp_path]) == []


def test_without_arguments_it_looks_at_every_run_of_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([]) == 0 and capsys.readouterr().out == "well\n"
    beat_of(tmp_path / "runs" / "one")
    assert main([]) == 0
    beat_of(tmp_path / "runs" / "two", state="stuck")
    assert main([]) == 1 and "runs/two: rank 0" in capsys.readouterr().out
    assert main(["runs/one"]) == 0

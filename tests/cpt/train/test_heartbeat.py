"""The watchdog: real threads and processes, with limits of fractions of a second."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cpt.heartbeats import Beat, Observer, read_beats, write_beat
from cpt.rundir import RunDir
from cpt.train.heartbeat import Heartbeat, interval_of, suspect

# A rank of a job of two whose other rank is drawn by the test: it trains one step, and waits for ever.
STUCK = """
import sys, time
from pathlib import Path
from cpt.rundir import RunDir
from cpt.train.heartbeat import Heartbeat
with Heartbeat(RunDir(Path(sys.argv[1])), rank=0, world_size=2, hang_seconds=float(sys.argv[2])) as heartbeat:
    heartbeat.at_step(7)
    heartbeat.enter("backward")
    {body}
print("went on")
"""
WAITS = "time.sleep(60)"


@pytest.fixture
def rundir(tmp_path: Path) -> RunDir:
    found = RunDir(tmp_path)
    found.heartbeats.mkdir()
    return found


def run_stuck(rundir: RunDir, body: str = WAITS, *, hang_seconds: float = 1.0) -> subprocess.Popen[str]:
    program = STUCK.format(body=body)
    command = [sys.executable, "-c", program, str(rundir.root), str(hang_seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def events(rundir: RunDir) -> list[dict[str, object]]:
    return [json.loads(line) for line in rundir.events.read_text().splitlines()] if rundir.events.exists() else []


def test_beats_go_on_while_the_main_thread_works_and_end_with_the_last_word(rundir: RunDir) -> None:
    with Heartbeat(rundir, rank=2, world_size=1, hang_seconds=30.0) as heartbeat:
        heartbeat.enter("data")
        heartbeat.enter("forward")
        time.sleep(0.7)
        beat = read_beats(rundir.heartbeats)[2]
        assert (beat.state, beat.phase, beat.entered, beat.pid) == ("running", "forward", 2, os.getpid())
        assert beat.sequence >= 2 and 0.2 < beat.phase_seconds < 5
        heartbeat.at_step(1)
    last = read_beats(rundir.heartbeats)[2]
    assert (last.state, last.step, last.entered) == ("ended", 1, 0)
    assert not rundir.stacks.exists()  # nothing empty is left lying about


def test_a_rank_that_fails_says_why_in_its_last_beat(rundir: RunDir) -> None:
    with pytest.raises(ZeroDivisionError), Heartbeat(rundir, rank=0, world_size=1, hang_seconds=30.0):
        1 / 0  # noqa: B018
    last = read_beats(rundir.heartbeats)[0]
    assert (last.state, last.message) == ("failed", "ZeroDivisionError: division by zero")


def test_where_the_other_rank_is_silent_it_is_named_and_this_one_leaves_with_its_stacks(rundir: RunDir) -> None:
    write_beat(rundir.heartbeats, Beat(1, "node9", 4711, step=6, phase="data", phase_seconds=2.0))
    process = run_stuck(rundir)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 3 and "went on" not in out
    assert "HANG: rank 1 (host node9, process 4711): no sign of life for" in err
    assert "last seen 2 s into data after step 6" in err
    (hang,) = events(rundir)
    assert hang["event"] == "hang" and hang["step"] == 7 and hang["behind"] == []
    assert hang["silent"][0]["host"] == "node9"  # type: ignore[index]
    assert "<module>" in (rundir.stacks / "rank_00000.txt").read_text()
    assert read_beats(rundir.heartbeats)[0].state == "stuck"


def test_a_rank_that_never_came_is_named_too(rundir: RunDir) -> None:
    process = run_stuck(rundir)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 3 and "rank 1 (host unknown, process 0): has shown no life" in err


def test_while_another_rank_gets_on_this_one_waits_beyond_the_limit(rundir: RunDir) -> None:
    process = run_stuck(rundir, "time.sleep(2.5)")
    for progress in range(200):
        write_beat(rundir.heartbeats, Beat(1, "node9", 4711, sequence=progress, step=8, progress=progress))
        time.sleep(0.05)
        if process.poll() is not None:
            break
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0 and "went on" in out and "HANG" not in err


def test_a_living_rank_that_does_not_get_on_is_named_as_behind(rundir: RunDir) -> None:
    process = run_stuck(rundir)
    sequence = 0
    while process.poll() is None:
        sequence += 1
        write_beat(rundir.heartbeats, Beat(1, "node9", 4711, sequence=sequence, step=6, phase="data"))
        time.sleep(0.05)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 3 and "rank 1 (host node9, process 4711): is behind" in err
    (hang,) = events(rundir)
    assert hang["silent"] == [] and len(hang["behind"]) == 1  # type: ignore[arg-type]


def test_time_in_which_the_process_was_suspended_is_no_hang(rundir: RunDir) -> None:
    """A scheduler may stop a whole job and let it go on hours later."""
    process = run_stuck(rundir, "time.sleep(2.5)", hang_seconds=2.0)
    while not (beats := read_beats(rundir.heartbeats)) or beats[0].phase != "backward":
        time.sleep(0.02)
    process.send_signal(signal.SIGSTOP)
    time.sleep(2.1)
    process.send_signal(signal.SIGCONT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 0 and "HANG" not in err, err


def test_a_silent_rank_of_this_host_is_asked_for_its_stacks_even_if_it_never_lets_go_of_the_interpreter(
    rundir: RunDir,
) -> None:
    holding = "import re; time.sleep(0.6); re.match('(a+)+$', 'a' * 40 + 'b')"  # one call into C, for years
    other = run_stuck(rundir, holding)
    time.sleep(2.0)
    assert read_beats(rundir.heartbeats)[0].phase == "backward"
    os.rename(rundir.heartbeats / "rank_00000.json", rundir.heartbeats / "rank_00001.json")
    text = (rundir.heartbeats / "rank_00001.json").read_text()
    (rundir.heartbeats / "rank_00001.json").write_text(text.replace('"rank": 0', '"rank": 1'))
    process = run_stuck(rundir)
    _, err = process.communicate(timeout=30)
    stacks, asked = rundir.stacks / "rank_00000.txt", time.monotonic()
    while "re/__init__.py" not in stacks.read_text() and time.monotonic() - asked < 30:
        time.sleep(0.05)  # it was asked, and answers when this busy machine lets it
    other.kill()
    other.communicate()
    assert process.returncode == 3 and f"process {other.pid}): no sign of life" in err
    assert "re/__init__.py" in stacks.read_text()


def test_only_one_rank_says_what_all_of_them_see(rundir: RunDir) -> None:
    (rundir.heartbeats / "hang.json").touch()  # another was first
    process = run_stuck(rundir)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 3 and "HANG" not in err and not rundir.events.exists()


def test_a_disk_that_takes_no_beats_is_said_once_and_ends_nothing(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    with Heartbeat(RunDir(tmp_path / "gone"), rank=0, world_size=1, hang_seconds=30.0) as heartbeat:
        heartbeat.enter("data")
        time.sleep(1.2)
    assert capfd.readouterr().err.count("cannot write its heartbeat") == 1


def test_a_process_of_this_host_that_is_gone_is_said_to_be_gone(rundir: RunDir) -> None:
    import socket

    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    write_beat(rundir.heartbeats, Beat(1, socket.gethostname(), ended.pid))
    write_beat(rundir.heartbeats, Beat(2, "far", 1, state="failed", message="OSError: no space"))
    observer = Observer(rundir.heartbeats)
    observer.look(0.0)
    observer.look(9.0)
    assert suspect(1, observer, "").why == "no sign of life for 9 s; its process is gone"
    assert suspect(2, observer, "").why == "failed (OSError: no space)"


@pytest.mark.parametrize(("hang_seconds", "seconds"), [(1.0, 0.25), (60.0, 1.0), (1800.0, 5.0)])
def test_a_shorter_limit_beats_faster(hang_seconds: float, seconds: float) -> None:
    assert interval_of(hang_seconds) == seconds

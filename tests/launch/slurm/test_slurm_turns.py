"""Between two starts of a Slurm job: when it is queued again, and when it is given up; and a rank's place."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from cpt.rundir import RunDir
from launch import run_folder
from launch.cluster import hosts_of
from launch.preflight.checks import Check, Report
from launch.slurm import turns
from launch.slurm.node import command, hostfile_text
from launch.slurm.preflight import cluster_of, over_srun, without_ssh
from launch.slurm.rank import cores_of, place_of
from launch.slurm.turns import MAX_FRUITLESS, Verdict, begin, end, judge, main, note_request

START, RESUME, FINISH = ({"event": name, "step": 0} for name in ("start", "resume", "finish"))


def stopped(by: str, step: int = 7) -> dict[str, Any]:
    return {"event": "sigterm", "signal": by, "step": step}


@pytest.mark.parametrize(
    ("events", "code", "asked", "verdict"),
    [
        ([START, FINISH], 0, False, (0, False)),
        ([START, stopped("SIGTERM")], 0, True, (143, True)),
        ([START, stopped("SIGTERM")], 1, False, (143, True)),  # the deepspeed launcher's code for everything
        ([START, stopped("time limit")], 0, False, (143, True)),
        ([START, stopped("stop file")], 0, False, (143, False)),  # a person's
        ([START, stopped("stop file")], 0, True, (143, True)),  # the node's, for Slurm
        ([START, stopped("SIGINT")], 0, False, (143, False)),
        ([START], 0, False, (3, False)),  # a launcher that was killed ends with 0
        ([START], 3, True, (3, False)),
        ([START], 137, False, (137, False)),
        ([], 0, True, (143, True)),  # asked before the trainer had begun
        ([], 143, False, (143, True)),
        ([], 2, False, (2, False)),
    ],
)
def test_what_becomes_of_a_job(events: list[dict[str, Any]], code: int, asked: bool, verdict: tuple[int, bool]) -> None:
    found = judge(events, 0, code, asked=asked)
    assert (found.code, found.again) == verdict


def test_only_what_was_noted_in_this_start_counts() -> None:
    before = [START, stopped("SIGTERM")]
    assert judge(before, len(before), 137, asked=False) == Verdict(
        137, False, "failed with exit code 137, and did not finish"
    )
    assert judge([*before, RESUME, FINISH], len(before), 0, asked=False).code == 0
    assert judge([START, FINISH], 2, 0, asked=False) == Verdict(0, False, "finished")  # it was finished already


def save(run_dir: Path, step: int) -> None:
    folder = run_dir / f"checkpoints/step_{step:08d}"
    folder.mkdir(parents=True)
    (folder / "COMPLETE").touch()


def test_starts_without_a_new_checkpoint_are_bounded_and_those_with_one_are_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    notes, run_dir = tmp_path / "notes", tmp_path / "run"
    codes = [begin(notes, run_dir, restarts=number) for number in range(MAX_FRUITLESS + 2)]
    assert codes == [0] * (MAX_FRUITLESS + 1) + [3]
    assert "11 starts in a row without a new complete checkpoint" in capsys.readouterr().err
    assert begin(notes, run_dir, restarts=0) == 0  # submitted anew by a person
    for number in range(2 * MAX_FRUITLESS):
        save(run_dir, number)
        assert begin(notes, run_dir, restarts=number + 1) == 0
    assert not (run_dir / "launch").exists()  # a pilot's folder is the pilot's to make


def test_a_request_of_slurm_ends_with_the_start_that_it_was_made_of(tmp_path: Path) -> None:
    notes = tmp_path / "launch"
    begin(notes, tmp_path, restarts=0)
    (tmp_path / "events.jsonl").write_text('{"event": "start"}\n{"event": "sigterm", "signal": "stop file", "st')
    note_request(tmp_path)
    (tmp_path / "STOP").touch()  # made by the node, too late to be seen
    assert end(notes, tmp_path, 0).again
    begin(notes, tmp_path, restarts=1)
    assert not (tmp_path / "STOP").exists() and not end(notes, tmp_path, 1).again
    (tmp_path / "STOP").touch()  # a person's
    begin(notes, tmp_path, restarts=2)
    assert (tmp_path / "STOP").exists()


def test_the_word_for_the_script_stands_alone_on_stdout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["begin", str(tmp_path / "launch"), str(tmp_path)]) == 0
    (tmp_path / "events.jsonl").write_text('{"event": "sigterm", "signal": "SIGTERM", "step": 7}\n')
    assert main(["end", str(tmp_path / "launch"), str(tmp_path), "0"]) == 143
    out, err = capsys.readouterr()
    assert out == "again\n" and "stopped after step 7, saved" in err


def test_a_job_is_not_lost_because_its_folder_had_no_answer_for_a_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    read, turn = turns.read_events, [False]

    def every_other_time(run: RunDir) -> list[dict[str, Any]]:
        turn[0] = not turn[0]
        if turn[0]:
            raise OSError(errno.ESTALE, "Stale file handle")
        return read(run)

    monkeypatch.setattr(run_folder, "WAITS", (0.0,))
    monkeypatch.setattr(turns, "read_events", every_other_time)
    notes = tmp_path / "launch"
    notes.mkdir()
    for name in (notes / "asked", tmp_path / "STOP"):  # a request that was made of the start before
        name.touch()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert main(["begin", str(notes), str(tmp_path)]) == 0
    assert not (notes / "asked").exists() and not (tmp_path / "STOP").exists()
    (tmp_path / "events.jsonl").write_text('{"event": "sigterm", "signal": "SIGTERM", "step": 7}\n')
    assert main(["end", str(notes), str(tmp_path), "0"]) == 143
    out, err = capsys.readouterr()
    assert out == "again\n" and err.count("trying again") == 2


def test_a_task_of_srun_becomes_a_rank() -> None:
    slurm = {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8", "SLURM_CPUS_PER_TASK": "6"}
    assert place_of(slurm) == {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8"}


def test_where_slurm_states_no_cpus_the_ranks_of_a_node_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    assert [cores_of({"LOCAL_WORLD_SIZE": "4"}, ranks=ranks) for ranks in (1, 4)] == [3, 3]
    assert cores_of({"LOCAL_WORLD_SIZE": "16"}, ranks=1) == 1


def test_the_deepspeed_launcher_of_a_node_gets_the_nodes_number_and_the_sizes_of_all() -> None:
    slurm = {"SLURM_NODEID": "1", "SLURM_STEP_NUM_NODES": "2", "LOCAL_WORLD_SIZE": "4"}
    slurm |= {"MASTER_ADDR": "n1", "MASTER_PORT": "29541"}
    assert hostfile_text(slurm) == "node0 slots=4\nnode1 slots=4\n"
    words = command(slurm, Path("hosts"), "RUN", ["RUN.yaml", "a=b c"])
    assert words[words.index("--node_rank") + 1] == "1"
    assert words[-5:] == ["--module", "launch.slurm.rank", "RUN", "RUN.yaml", "a=b c"]


def test_preflight_sees_the_nodes_of_the_job_as_hosts_and_reaches_them_by_srun() -> None:
    found = {"LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29541"}
    cluster = cluster_of({**found, "GLOO_SOCKET_IFNAME": "ib0"}, ["n1", "n2"])
    assert [(host.name, host.slots) for host in hosts_of(cluster)] == [("n1", (0, 1)), ("n2", (0, 1))]
    assert (cluster.master_address, cluster.master_port, cluster.interface) == ("10.0.0.1", 29541, "ib0")
    assert over_srun("n2", ["a", "b c"])[-3:] == ["--export=ALL", "a", "b c"]
    report = Report([Check("launcher", "fail", "no ssh"), Check("code", "pass", "")])
    assert without_ssh(report).exit_code == 0


# Ends with the code it is told to, when it is asked to.
TRAINER = """
import os, signal, sys, time
from pathlib import Path
NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "OMP_NUM_THREADS")
def leave(number, frame):
    Path(sys.argv[1], "asked_to_stop").touch()
    sys.exit(143)
signal.signal(signal.SIGTERM, leave)
Path(sys.argv[1], "place").write_text(" ".join(os.environ[name] for name in NAMES))
time.sleep(30 if sys.argv[2] == "wait" else 0)
sys.exit(int(sys.argv[2]))
"""
RANK = "import sys; from launch.slurm import rank; rank.TRAIN_MODULE = 'standin'; sys.exit(rank.main())"


def start_rank(folder: Path, word: str, *before: str) -> "subprocess.Popen[bytes]":
    (folder / "standin.py").write_text(TRAINER)
    (folder / "launch").mkdir()
    slurm = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "2", "PYTHONPATH": str(folder)}
    slurm |= {"LOCAL_WORLD_SIZE": "2", "SLURM_CPUS_PER_TASK": "6"}
    given = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}  # by the deepspeed launcher
    command = [sys.executable, "-c", RANK, *before, str(folder), str(folder), word]
    shell = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    return subprocess.Popen(command, env={**shell, **given, **slurm})


@pytest.mark.parametrize(("before", "place"), [((), "0 0 2 6"), (("--local_rank=1",), "1 1 4 3")])
def test_a_rank_takes_its_place_from_srun_or_from_the_deepspeed_launcher_and_its_share_of_the_cores(
    tmp_path: Path, before: tuple[str, ...], place: str
) -> None:
    assert start_rank(tmp_path, "3", *before).wait(timeout=30) == 3
    assert (tmp_path / "place").read_text() == place


def test_a_rank_that_saved_and_stopped_has_not_failed_for_slurm(tmp_path: Path) -> None:
    rank = start_rank(tmp_path, "wait")
    deadline = time.monotonic() + 20
    while not (tmp_path / "place").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    rank.send_signal(signal.SIGTERM)
    assert rank.wait(timeout=20) == 0
    assert (tmp_path / "asked_to_stop").exists() and (tmp_path / "launch/asked").exists()


def test_a_request_that_an_earlier_job_did_not_obey_does_not_stop_a_new_one(tmp_path: Path) -> None:
    (tmp_path / "STOP").touch()
    assert begin(tmp_path / "launch", tmp_path, restarts=0) == 0
    assert not (tmp_path / "STOP").exists()

"""Ranks on hosts: exit codes, lost hosts, stops and restarts, with stand-ins for ssh, DeepSpeed's launcher and the
trainer, which start in a tenth of a second. The real ones are in tests/multinode.
"""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from cpt.rundir import DataError
from launch import run_folder
from launch.cluster import HostsCluster, hosts_of
from launch.hosts import deepspeed_command, launcher, verbs
from launch.hosts.answer import TAG, end_leftovers
from launch.hosts.verbs import Care
from launch.local import ranks, supervise
from launch.record import Launched, LaunchJob, read_record

ROOT = Path(__file__).resolve().parents[3]

# ssh to a host runs the command here, unless a file says that the host is down.
SSH = """#!/bin/sh
for word; do host="$command"; command="$word"; done
[ -e "$DOWN/$host" ] && echo "ssh: connect to host $host: no route" >&2 && exit 255
exec sh -c "$command"
"""
# DeepSpeed's launcher on one host: one rank, and its exit code.
RUNNER = """
import os, subprocess, sys
words = sys.argv[1:]
number = words[words.index("--node_rank") + 1]
hosts = [line.split()[0] for line in open(words[words.index("--hostfile") + 1])]
place = {"RANK": number, "WORLD_SIZE": str(len(hosts)), "HOST": hosts[int(number)]}
after = words[words.index("--module") + 1:]
code = subprocess.call([sys.executable, "-m", *after], env={**os.environ, **place})
sys.exit(code)
"""
# A trainer that does at its n-th start what the n-th word for its host says; a:finish,b:crash;finish
TRAINER = """
import json, os, sys, time
from pathlib import Path
from launch.local.ranks import end_with_launcher
end_with_launcher()
folder, plan = Path(sys.argv[1]), sys.argv[2]
host, rank = os.environ["HOST"], os.environ["RANK"]
number = len(list(folder.glob(f"start_{host}_*")))
facts = {"rank": rank, "world": os.environ["WORLD_SIZE"], "arguments": sys.argv[3:], "pid": os.getpid(), "note": os.environ.get("NOTE")}
words = dict(part.split(":") for part in plan.split(","))[host].split(";")
word = words[min(number, len(words) - 1)]
(folder / "config.yaml").touch()
(folder / f"new_{host}").write_text(json.dumps(facts))
os.replace(folder / f"new_{host}", folder / f"start_{host}_{number}")
print("rank", rank, word, flush=True)
def note(event):
    if rank == "0":
        with (folder / "events.jsonl").open("a") as file:
            print(json.dumps({"event": event, "step": 1}), file=file)
note("start" if number == 0 else "resume")
if word == "sleep":
    time.sleep(20)
if word == "short":
    time.sleep(1.5)
    word = "finish"
if word == "down":
    (Path(os.environ["DOWN"]) / host).touch()
    word = "crash"
if word == "train":
    for _ in range(1000):
        time.sleep(0.02)
        if (folder / "STOP").exists():
            break
    time.sleep(0.3)
    note("sigterm")
    sys.exit(143)
if word == "finish":
    note("finish")
sys.exit({"finish": 0, "nothing": 0, "user": 2, "bug": 1, "stopped": 143}.get(word, 4))
"""
Start = Callable[..., int]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in (("ssh", SSH), ("standin_runner.py", RUNNER), ("standin.py", TRAINER)):
        (tmp_path / name).write_text(text)
    (tmp_path / "ssh").chmod(0o755)
    (tmp_path / "down").mkdir()
    (tmp_path / "run").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("DOWN", str(tmp_path / "down"))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    monkeypatch.setattr(deepspeed_command, "RUNNER", "standin_runner")
    monkeypatch.setattr(ranks, "TRAIN_MODULE", "standin")
    monkeypatch.setattr(launcher, "LAST_WORDS_SECONDS", 0.5)
    monkeypatch.setattr(launcher, "NOBODY_WAITS", (0.01,))
    monkeypatch.setattr(supervise, "FIRST_WAIT", 0.01)
    return tmp_path


@pytest.fixture
def start(folder: Path) -> Start:
    """Starts the trainer above on hosts a and b; ``restarts``: under the supervisor."""

    def start(plan: str, *, restarts: int | None = None, hosts: str = "a slots=1,b slots=1", **fields: Any) -> int:
        cluster = HostsCluster(hosts=hosts.split(","), launcher="ssh", interface="lo", **fields)
        run = str(folder / "run")
        job = LaunchJob("run", folder / "run", (run, plan, "first"), (run, plan, "again"), folder)
        care = Care(lambda number: True, 60.0, restarts, "cpt launch ...")
        return verbs.start(cluster, job, care, hosts=hosts_of(cluster))

    return start


def starts(folder: Path) -> dict[str, dict[str, Any]]:
    return {path.name: json.loads(path.read_text()) for path in sorted((folder / "run").glob("start_*"))}


def is_gone(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = (folder / "run/events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def test_every_host_runs_its_ranks_and_what_they_print_is_told_and_kept(
    start: Start, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert start("a:finish,b:finish", env={"NOTE": "it's $5; 50%"}) == 0
    found = starts(folder)
    assert [(each["rank"], each["world"]) for each in found.values()] == [("0", "2"), ("1", "2")]
    assert {each["note"] for each in found.values()} == {"it's $5; 50%"}
    assert "b: rank 1 finish" in capfd.readouterr().out
    record = read_record(folder / "run")
    assert record.hosts == ("a", "b") and record.id == str(os.getpid())
    assert sorted(Path(record.log).read_text().splitlines()) == ["a: rank 0 finish", "b: rank 1 finish"]


@pytest.mark.parametrize(
    ("plan", "code"),
    [
        ("a:user,b:user", 2),
        ("a:stopped,b:stopped", 143),
        ("a:nothing,b:nothing", 1),
        ("a:finish,b:crash", 4),
        ("a:bug,b:bug", 1),
    ],
)
def test_the_exit_code_is_that_of_the_ranks_and_never_0_without_a_finish(start: Start, plan: str, code: int) -> None:
    assert start(plan) == code


def test_a_host_that_does_not_answer_is_an_error_before_anything_is_started(start: Start, folder: Path) -> None:
    (folder / "down/b").touch()
    with pytest.raises(OSError, match=r"1 of 2 hosts do not answer(.|\n)*b: ssh: connect to host b: no route"):
        start("a:finish,b:finish")
    assert not starts(folder)


def test_an_interface_that_a_host_has_not_is_refused(start: Start) -> None:
    with pytest.raises(ValueError, match="interface = 'nope': has no IPv4 address there: a has lo"):
        cluster = HostsCluster(hosts=["a slots=1"], launcher="ssh", interface="nope")
        job = LaunchJob("run", Path.cwd(), (), (), Path.cwd())
        verbs.start(cluster, job, Care(lambda number: True, 60.0, None, ""), hosts=hosts_of(cluster))


def test_when_one_host_fails_the_ranks_of_the_others_are_ended(
    start: Start, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert start("a:sleep,b:crash") == 4
    assert is_gone(starts(folder)["start_a_0"]["pid"])
    assert "host b ended with exit code 4; ending the other hosts" in capfd.readouterr().err


def test_the_supervisor_goes_on_with_the_hosts_that_still_answer(
    start: Start, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert start("a:sleep;finish,b:down", restarts=3) == 0
    assert starts(folder)["start_a_1"]["world"] == "1" and starts(folder)["start_a_1"]["arguments"] == ["again"]
    (restart,) = events(folder, "restart")
    assert (restart["hosts"], restart["processes"], restart["exit_code"]) == (["a"], 1, 4)
    told = capfd.readouterr().err
    assert "host b does not answer: ssh: connect to host b" in told and "supervisor: 1 of 2 processes" in told


def test_where_the_first_host_is_lost_rank_0_moves_to_the_next(start: Start, folder: Path) -> None:
    assert start("a:down,b:sleep;finish", restarts=3, master_address="127.0.0.9") == 0
    assert starts(folder)["start_b_1"]["rank"] == "0"
    assert read_record(folder / "run").details["master"] == "127.0.0.1:29500"  # not the one stated for host a


def test_the_supervisor_gives_up_where_no_host_answers(
    start: Start, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert start("a:down,b:down", restarts=3) == 4
    assert "of 0 usable places on hosts" in capfd.readouterr().err and events(folder, "gave_up")


def test_sigterm_has_all_ranks_save_and_leaves_no_stop_file(start: Start, folder: Path) -> None:
    def ask() -> None:
        while len(starts(folder)) < 2:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=ask, daemon=True).start()
    assert start("a:train,b:train") == 143
    assert not (folder / "run/STOP").exists() and events(folder, "sigterm")


def test_a_second_signal_kills_on_every_host(
    start: Start, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launcher, "REPEAT_SECONDS", 0.2)

    def ask() -> None:
        while len(starts(folder)) < 2:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=ask, daemon=True).start()
    assert start("a:sleep,b:sleep") == 3
    assert all(is_gone(each["pid"]) for each in starts(folder).values())
    assert "killed on request" in capfd.readouterr().err


def test_ranks_whose_launcher_is_killed_are_told_by_their_standard_input(folder: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from launch.hosts import deepspeed_command, verbs\n"
        "from launch.cluster import HostsCluster, hosts_of; from launch.local import ranks\n"
        "from launch.record import LaunchJob\n"
        "deepspeed_command.RUNNER, ranks.TRAIN_MODULE = 'standin_runner', 'standin'\n"
        "cluster = HostsCluster(hosts=['a slots=1', 'b slots=1'], launcher='ssh', interface='lo')\n"
        "words = (sys.argv[1], 'a:sleep,b:sleep'); folder = Path(sys.argv[1])\n"
        "job = LaunchJob('run', folder, words, words, folder.parent)\n"
        "verbs.start(cluster, job, verbs.Care(lambda n: True, 60.0, None, ''), hosts=hosts_of(cluster))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(folder / "run")])
    deadline = time.monotonic() + 30
    while len(starts(folder)) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.wait()
    while not all(is_gone(each["pid"]) for each in starts(folder).values()):
        assert time.monotonic() < deadline, "orphans"
        time.sleep(0.05)


def test_only_processes_of_this_run_are_leftovers() -> None:
    tag = {**os.environ, TAG: "/runs/mine"}
    sleep = [sys.executable, "-c", "import time; print(flush=True); time.sleep(60)"]
    mine = subprocess.Popen(sleep, env=tag, stdout=subprocess.PIPE)
    other = subprocess.Popen(sleep, env={**tag, TAG: "/runs/mine2"}, stdout=subprocess.PIPE)
    try:
        for process in (mine, other):
            assert process.stdout and process.stdout.readline()  # it has its environment now
        assert end_leftovers("/runs/mine") == 1
        assert is_gone(mine.pid) and not is_gone(other.pid)
    finally:
        other.kill()
        for process in (mine, other):
            process.communicate()


def test_a_request_that_an_earlier_launch_did_not_obey_does_not_stop_a_new_one(start: Start, folder: Path) -> None:
    (folder / "run/STOP").touch()
    assert start("a:finish,b:finish") == 0
    assert not (folder / "run/STOP").exists()


def test_ranks_that_cannot_be_asked_are_not_killed_for_it(
    start: Start, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def ask() -> None:
        while len(starts(folder)) < 2:
            time.sleep(0.02)
        monkeypatch.setattr(Path, "touch", refuse)
        os.kill(os.getpid(), signal.SIGTERM)

    def refuse(path: Path) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    threading.Thread(target=ask, daemon=True).start()
    assert start("a:short,b:short") == 0
    assert "the ranks cannot be asked" in capfd.readouterr().err


def test_ranks_are_asked_again_where_the_run_folder_had_no_answer(
    start: Start, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    touch, refused = Path.touch, []
    monkeypatch.setattr(launcher, "ASK_SECONDS", 0.1)

    def ask() -> None:
        while len(starts(folder)) < 2:
            time.sleep(0.02)
        monkeypatch.setattr(Path, "touch", refuse_twice)
        os.kill(os.getpid(), signal.SIGTERM)

    def refuse_twice(path: Path) -> None:
        if len(refused) == 2:
            return touch(path)
        refused.append(path)
        raise OSError(errno.ESTALE, "Stale file handle")

    threading.Thread(target=ask, daemon=True).start()
    assert start("a:train,b:train") == 143
    assert len(refused) == 2 and capfd.readouterr().err.count("Stale file handle") == 2
    assert not (folder / "run/STOP").exists()


def test_what_a_start_leaves_in_the_run_folder_is_written_again_where_it_had_no_answer(
    start: Start, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    write, refused = launcher.write_record, []
    monkeypatch.setattr(run_folder, "WAITS", (0.0,))

    def refuse_once(*arguments: Any) -> None:
        if refused:
            return write(*arguments)
        refused.append(arguments)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(launcher, "write_record", refuse_once)
    assert start("a:finish,b:finish") == 0
    assert "Input/output error; trying again in 0 s" in capfd.readouterr().err
    assert read_record(folder / "run").hosts == ("a", "b")


def test_a_log_on_a_full_disk_does_not_change_how_the_job_ended(
    start: Start, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launcher, "plain_file", lambda path, flags: os.open("/dev/full", os.O_WRONLY))
    assert start("a:finish,b:finish") == 0
    told = capfd.readouterr().err
    assert "No space left on device; the job goes on" in told and "its end is missing" in told


def test_a_log_that_leads_elsewhere_is_neither_written_nor_shown(start: Start, folder: Path) -> None:
    mine, log = folder / "authorized_keys", folder / "run/launch/log"
    mine.write_text("ssh-ed25519 AAAA\n")
    log.parent.mkdir()
    log.symlink_to(mine)
    with pytest.raises(DataError, match="is a link"):
        start("a:finish,b:finish")
    assert mine.read_text() == "ssh-ed25519 AAAA\n" and not starts(folder)
    launched = Launched("hosts", "1", ("a",), str(log), "2026-01-01T00:00:00+00:00", {"host": "x"})
    with pytest.raises(DataError, match="is a link"):
        list(verbs.logs(launched, follow=False))

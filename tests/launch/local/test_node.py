"""Two hosts of a job, each a real ``launch.local.node`` on this machine: joined, stopped, killed, started again.

Hosts and ranks are processes with their own numbers, signals and environment, but forks of one that has imported what
a training needs: a start costs a second and not ten. One test starts ``python -m launch.local.node`` as a scheduler does.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cpt.config import ConfigError
from launch.local.node import is_over, main, place_of
from launch.local.ranks import Place, rank_environments

ROOT = Path(__file__).resolve().parents[3]
Workshop = Any  # the fixtures of tests/conftest.py
STEPS = 12
LOOK_SECONDS, GRACE_SECONDS = 0.5, 1.0  # of the forks; less than the product gives
FIELDS = {"train.tokens": STEPS * 256, "checkpoint.every_steps": 4, "checkpoint.keep_last": 10}
HERE = {"MASTER_ADDR": "a-0.a", "MASTER_PORT": "29500"}


def test_ranks_of_the_second_host_follow_those_of_the_first() -> None:
    first, second = rank_environments(2, Place(1, 2, "a-0.a", 29500))
    assert [(each["RANK"], each["LOCAL_RANK"], each["WORLD_SIZE"]) for each in (first, second)] == [
        ("2", "0", "4"),
        ("3", "1", "4"),
    ]
    assert first["MASTER_ADDR"] == "a-0.a" and first["MASTER_PORT"] == "29500" and "CPT_LISTENER" not in first


@pytest.mark.parametrize("name", ["JOB_COMPLETION_INDEX", "OMPI_COMM_WORLD_RANK", "PMI_RANK"])
def test_which_host_this_is_is_what_the_scheduler_says(name: str) -> None:
    assert place_of({**HERE, name: "3"}, num_hosts=4) == Place(3, 4, "a-0.a", 29500)


def test_everything_that_is_wrong_with_the_place_is_told_at_once(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError) as refused:
        place_of({"JOB_COMPLETION_INDEX": "4", "MASTER_PORT": "http"}, num_hosts=4)
    assert [problem.field for problem in refused.value.problems] == [
        "JOB_COMPLETION_INDEX",
        "MASTER_ADDR",
        "MASTER_PORT",
    ]
    monkeypatch.delenv("JOB_COMPLETION_INDEX", raising=False)
    assert main(["--hosts", "2", "--processes", "1", "--run-dir", "runs/a", "--", "a.yaml"]) == 2
    assert "JOB_COMPLETION_INDEX" in capfd.readouterr().err


# Answers a request per line: a start with the number of the process, any other with the exit code of one, if it has.
FORKS = """
import importlib, json, os, signal, sys, traceback, types
os.environ["DS_ACCELERATOR"] = "cpu"
from cpt.quickstart_crew import PRELOADED
for name in (*PRELOADED, "cpt.train.main"):
    importlib.import_module(name)
import torch
from cpt.failures import leave
from cpt.train.main import main as train
from launch.local import node, peers, ranks
peers.LOOK_SECONDS, ranks.GRACE_SECONDS = map(float, sys.argv[1:])
HEARD = {signal.SIGTERM, signal.SIGINT}

def fork(work, environment, output=None):
    before = signal.pthread_sigmask(signal.SIG_BLOCK, HEARD)
    pid = os.fork()
    if pid == 0:
        os.setsid()
        os.environ.clear()
        os.environ.update(environment)
        if output:
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            for number in (1, 2):
                os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        for number in HEARD:
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    if pid:
        return pid
    try:
        leave(work())
    except SystemExit as end:
        leave(end.code)
    except BaseException:
        traceback.print_exc()
        leave(1)

class Popen:
    def __init__(self, command, env=None, start_new_session=True, pass_fds=()):
        self.returncode = None
        self.pid = fork(lambda: self._work(command), env)

    def _work(self, command):
        assert command[:3] == [sys.executable, "-m", "cpt.train.main"], command
        torch.set_num_threads(1)
        return train(command[3:])

    def poll(self, options=os.WNOHANG):
        if self.returncode is None and (found := os.waitpid(self.pid, options))[0]:
            self.returncode = os.waitstatus_to_exitcode(found[1])
        return self.returncode

    def wait(self):
        return self.poll(0)

    def kill(self):
        os.kill(self.pid, signal.SIGKILL)

ranks.subprocess = types.SimpleNamespace(Popen=Popen)
hosts = {}
print("ready", flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    if "start" in asked:
        words, environment, output = asked["start"]
        answer = fork(lambda: node.main(words), environment, output)
        hosts[answer] = Popen.__new__(Popen)
        hosts[answer].pid, hosts[answer].returncode = answer, None
    else:
        answer = hosts[asked["poll"]].poll()
    print(json.dumps(answer), flush=True)
"""


class Forks:
    """The process that all hosts are forks of."""

    def __init__(self, shop: Workshop) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self._process = subprocess.Popen(
            [sys.executable, "-c", FORKS, str(LOOK_SECONDS), str(GRACE_SECONDS)],
            cwd=shop.root,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout and self._process.stdout.readline() == "ready\n"

    def ask(self, **request: Any) -> Any:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        self._process.communicate(timeout=20)


class Node:
    """One start of a host, with what its user needs of ``subprocess.Popen``."""

    def __init__(self, forks: Forks, words: list[str], environment: dict[str, str], output: Path) -> None:
        self._forks, self._output = forks, output
        self.pid = int(forks.ask(start=[words, environment, str(output)]))

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def poll(self) -> int | None:
        code = self._forks.ask(poll=self.pid)
        return None if code is None else int(code)

    def wait(self, timeout: float) -> int:
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(["launch.local.node"], timeout)
            time.sleep(0.02)
        return code

    def communicate(self, timeout: float = 20) -> tuple[str, str]:
        self.wait(timeout)
        return self._output.read_text(), ""

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


@pytest.fixture(scope="module")
def forks(shop: Workshop) -> Iterator[Forks]:
    made = Forks(shop)
    yield made
    made.close()


@pytest.fixture(scope="session")
def shop(made_once: Callable[..., Workshop]) -> Workshop:
    return made_once("nodes", lambda shop: shop.stores())


class Hosts:
    """Two hosts that run ``launch.local.node`` with one rank each, as two pods would."""

    def __init__(self, shop: Workshop, forks: Forks, name: str) -> None:
        self.shop, self.name, self.forks = shop, name, forks
        self.steps = 200 if "cut_off" in name else STEPS
        self.file = shop.run_file(name, {**FIELDS, "train.tokens": self.steps * 256})
        self.processes: dict[int, Node] = {}
        self.starts = 0
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.port = listener.getsockname()[1]

    def start(self, host: int, *, of: int = 2) -> Node:
        words = ["--hosts", str(of), "--processes", "1", "--run-dir", str(self.shop.run_dir(self.name))]
        words += ["--", str(self.file), "--or-resume"]
        place = {"JOB_COMPLETION_INDEX": str(host), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self.port)}
        self.starts += 1
        output = self.shop.root / f"{self.name}.{self.starts}.out"
        environment = {**os.environ, **place, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        self.processes[host] = Node(self.forks, words, environment, output)
        return self.processes[host]

    def ended(self) -> dict[int, tuple[int, str]]:
        """Exit code and output of each."""
        said = {host: process.communicate(timeout=120)[0] for host, process in self.processes.items()}
        return {host: (self.processes[host].returncode, said[host]) for host in said}

    def until_done(self, *, restarts: int) -> int:
        """What the job controller does: replace a host that has ended, until all ended with 0; how often it did.

        Neither 0 nor 2 come back; 143 is replaced without being counted.
        """
        counted, deadline = 0, time.monotonic() + 150
        while any(process.poll() != 0 for process in self.processes.values()):
            assert time.monotonic() < deadline
            for host, process in self.processes.items():
                if (code := process.poll()) is None or code == 0:
                    continue
                said = process.communicate(timeout=20)[0]
                counted += code != 143
                assert code != 2 and counted <= restarts, said
                self.start(host)
            time.sleep(0.1)
        return counted

    def rank_of(self, host: int) -> int:
        """The process that trains on a host."""
        pid = self.processes[host].pid
        (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return int(child)


@pytest.fixture
def hosts(shop: Workshop, forks: Forks, request: pytest.FixtureRequest) -> Iterator[Hosts]:
    made = Hosts(shop, forks, request.node.name)
    yield made
    for process in made.processes.values():
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.communicate(timeout=20)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.communicate(timeout=20)


def test_sigterm_to_one_host_saves_on_both_and_the_same_command_goes_on(shop: Workshop, hosts: Hosts) -> None:
    hosts.start(0)
    hosts.start(1)
    shop.wait_for_step(hosts.name, 2, hosts.processes[0])
    hosts.processes[1].send_signal(signal.SIGTERM)
    ended = hosts.ended()
    assert [code for code, _ in ended.values()] == [143, 143], ended
    assert shop.events(hosts.name)[-1]["event"] == "sigterm"
    hosts.start(1)
    hosts.start(0)
    ended = hosts.ended()
    assert [code for code, _ in ended.values()] == [0, 0], ended
    assert [event["event"] for event in shop.events(hosts.name)].count("resume") == 1
    assert sorted(shop.losses(hosts.name)) == list(range(1, STEPS + 1))
    hosts.start(0)  # a pod that was evicted at the last moment comes back alone
    code, said = hosts.ended()[0]
    assert code == 0 and "this run is finished" in said


def test_the_ranks_of_a_host_that_are_killed_end_the_other_host_too_and_both_go_on(
    shop: Workshop, hosts: Hosts
) -> None:
    hosts.start(0)
    hosts.start(1)
    shop.wait_for_step(hosts.name, 5, hosts.processes[0])  # there is a checkpoint after step 4
    began = time.monotonic()
    os.kill(hosts.rank_of(1), signal.SIGKILL)
    ended = hosts.ended()
    assert time.monotonic() - began < 40  # not guard.hang_seconds, half an hour
    assert ended[1][0] == 137 and "rank 1 (process" in ended[1][1], ended
    assert ended[0][0] not in (0, 2, 143), ended
    hosts.start(0)
    hosts.start(1)
    ended = hosts.ended()
    assert [code for code, _ in ended.values()] == [0, 0], ended
    events = [event["event"] for event in shop.events(hosts.name)]
    assert "resume" in events and events[-1] == "finish"
    assert sorted(shop.losses(hosts.name)) == list(range(1, STEPS + 1))


def test_a_host_that_is_cut_off_and_replaced_ends_the_other_which_waits_for_it(shop: Workshop, hosts: Hosts) -> None:
    """Stopped, it closes no connection: without a word from its successor the other would wait for half an hour."""
    hosts.start(0)
    lost = hosts.start(1)
    shop.wait_for_step(hosts.name, 5, hosts.processes[0])
    time.sleep(3 * LOOK_SECONDS)  # both have seen that the other lives
    if hosts.processes[0].poll() is not None:
        pytest.skip("the run was over before its host could be cut off")
    gone = [lost.pid, hosts.rank_of(1)]
    for pid in gone:
        os.kill(pid, signal.SIGSTOP)
    began = time.monotonic()
    try:
        hosts.start(1)
        assert hosts.processes[0].wait(timeout=60) == 3
        assert time.monotonic() - began < 40
        assert hosts.until_done(restarts=4) >= 1
    finally:
        for pid in gone:
            os.kill(pid, signal.SIGKILL)
        lost.communicate(timeout=20)
    assert sorted(shop.losses(hosts.name)) == list(range(1, hosts.steps + 1))


def test_a_host_that_does_not_see_the_run_folder_as_rank_0_does_is_refused(shop: Workshop, hosts: Hosts) -> None:
    """Rank 1's run file names a folder of its own, as on a disk that is not shared; rank 0 finds a run to continue."""
    hosts.file = shop.run_file(hosts.name, {**FIELDS, "train.tokens": 1024})
    hosts.start(0, of=1)
    assert hosts.ended()[0][0] == 0, hosts.ended()
    hosts.file = shop.run_file(hosts.name, FIELDS)
    (shop.run_dir(hosts.name) / "evals" / "step_00000004.json").unlink()  # not finished: rank 0 has something to do
    hosts.start(0)
    hosts.file = shop.run_file("elsewhere", {**FIELDS, "train.tokens": 1024})
    hosts.start(1)
    ended = hosts.ended()
    assert ended[1][0] == 3 and "rank 0 continues the run, rank 1 begins it" in ended[1][1], ended
    assert ended[0][0] not in (0, 2, 143), ended


def test_a_scheduler_is_told_that_a_person_must_mend_the_run_file(tmp_path: Path) -> None:
    """From the rank, through the process that the scheduler has started: else it would start it again for ever."""
    command = [
        sys.executable,
        "-m",
        "launch.local.node",
        "--hosts",
        "1",
        "--processes",
        "1",
        "--run-dir",
        str(tmp_path),
    ]
    environment = {**os.environ, **HERE, "JOB_COMPLETION_INDEX": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, "--", "absent.yaml"], cwd=tmp_path, env=environment, capture_output=True, text=True,
                          timeout=120, check=False)  # fmt: skip
    assert done.returncode == 2 and "absent.yaml: no such file" in done.stderr, done
    assert "host 0 of 1: rank 0" in done.stdout and "exit code 2" in done.stdout


def test_a_run_folder_that_cannot_be_written_is_an_error_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").touch()  # a file where the folder should be
    for name, value in {**HERE, "JOB_COMPLETION_INDEX": "0"}.items():
        monkeypatch.setenv(name, value)
    assert main(["--hosts", "2", "--processes", "1", "--run-dir", str(tmp_path / "run"), "--", "a.yaml"]) == 3
    assert "environment error" in capfd.readouterr().err


def test_a_run_is_over_when_its_last_word_is_that_it_finished(tmp_path: Path) -> None:
    events = tmp_path / "events.jsonl"
    assert not is_over(tmp_path)
    events.write_text('{"step": 4, "event": "start"}\n{"step": 8, "event": "finish"}\n')
    assert is_over(tmp_path)
    events.write_text(events.read_text() + '{"step": 8, "event": "extended"}\n')
    assert not is_over(tmp_path)
    events.write_text("")
    assert not is_over(tmp_path)

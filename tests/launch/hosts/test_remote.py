"""One command on many hosts: the line that ssh is given, and what becomes of hosts that fail, hang or babble."""

import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from launch.cluster import HostsCluster
from launch.hostfile import Host
from launch.hosts import remote, roll_call
from launch.hosts.answer import Present
from launch.hosts.deepspeed_command import Start, launcher_environment, ssh_command
from launch.hosts.remote import Answer, as_process, in_folder, over_ssh, run_everywhere, ssh_arguments, transport_for


def python(program: str) -> list[str]:
    return [sys.executable, "-c", program]


def test_ssh_is_never_asked_for_a_password_and_what_the_user_states_comes_first() -> None:
    stated = HostsCluster(ssh_port=2222, ssh_options=["-o", "ConnectTimeout=3"])
    line = over_ssh(stated, "n2", ["true"], lost_after=60)
    assert line[:5] == ["ssh", "-o", "ConnectTimeout=3", "-p", "2222"] and line[-3:] == ["--", "n2", "true"]
    assert {"BatchMode=yes", "ServerAliveInterval=15", "ServerAliveCountMax=4"} <= set(line)  # 60 s
    assert "-p" not in over_ssh(HostsCluster(), "n2", ["true"], lost_after=60)


def test_a_question_and_a_start_reach_a_host_by_the_same_arguments_but_for_their_patience() -> None:
    cluster = HostsCluster(hosts=["a slots=1"], ssh_port=2222, ssh_options=["-i", "/keys/id"])
    shared = {word for word in ssh_arguments(cluster, lost_after=60) if not word.startswith("ServerAliveInterval")}
    start = Start((Host("a", (0,)),), "a", 29500, (), {}, Path("/x"), Path("/x/launch"))
    by_pdsh = launcher_environment(cluster, start, {})["PDSH_SSH_ARGS_APPEND"].split()
    for line in (transport_for(cluster)("a", ["true"]), ssh_command(cluster, start, 0), by_pdsh):
        assert shared <= set(line)


@pytest.mark.parametrize("word", ["a b", "$HOME", "`id`", "x;y", "it's", '"', "*", "", "a\nb"])
def test_a_word_reaches_the_remote_program_as_it_is(word: str) -> None:
    """sshd hands the last argument to the user's shell."""
    command = [*python("import sys; sys.stdout.write(sys.argv[1])"), word]
    for_shell = over_ssh(HostsCluster(), "n2", command, lost_after=60)[-1]
    done = subprocess.run(["sh", "-c", for_shell], capture_output=True, text=True, timeout=20, check=True)
    assert done.stdout == word and shlex.split(for_shell)[-1] == word


def test_only_this_machines_own_names_need_no_ssh() -> None:
    run = transport_for(HostsCluster(ssh_options=["-i", "key"]))
    assert run("localhost", ["true"]) == ["true"] and run("n1", ["true"])[:3] == ["ssh", "-i", "key"]
    assert transport_for(HostsCluster(ssh_port=2222))("localhost", ["true"])[0] == "ssh"
    assert transport_for(HostsCluster(launcher="no_ssh"))("n1", ["true"]) == ["true"]


def test_a_command_runs_in_its_folder_with_its_variables(tmp_path: Path) -> None:
    program = "import os; print(os.getcwd(), os.environ['GREETING'])"
    command = in_folder(tmp_path, {"GREETING": "good day"}, python(program))
    assert run_everywhere({"n": command}, as_process, seconds=20)["n"].output == f"{tmp_path} good day\n"


def test_every_host_gets_an_answer_in_the_order_asked_whatever_becomes_of_it() -> None:
    commands: dict[str, Sequence[str]] = {
        "good": python("print('here')"),
        "bad": python("import sys; print('torn', file=sys.stderr); sys.exit(4)"),
        "absent": ["no-such-program"],
        "hung": ["sleep", "60"],
    }
    began = time.monotonic()
    answers = run_everywhere(commands, as_process, seconds=1.0)
    assert time.monotonic() - began < 10
    assert list(answers) == list(commands)
    assert (answers["good"].output, answers["good"].why) == ("here\n", "")
    assert answers["bad"].why == "torn (exit code 4)"
    assert "cannot be started" in answers["absent"].why
    assert answers["hung"].code is None and answers["hung"].why == "no answer within 1 s"


def test_what_ssh_says_of_a_host_it_cannot_reach_is_the_reason() -> None:
    said = "ssh: connect to host n3 port 22: No route to host"
    assert Answer("n3", 255, "", f"{said}\n\n", 0.1).why == said


def test_a_host_that_babbles_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "OUTPUT_BYTES", 1000)
    answer = run_everywhere({"n": ["yes"]}, as_process, seconds=20)["n"]
    assert answer.code is None and "more than 1,000 bytes" in answer.why and answer.seconds < 10


def test_a_host_that_is_given_up_is_killed_with_what_it_started(tmp_path: Path) -> None:
    program = f"import subprocess; p = subprocess.Popen(['sleep', '60']); open({str(tmp_path / 'pid')!r}, 'w').write(str(p.pid)); p.wait()"
    run_everywhere({"n": python(program)}, as_process, seconds=1.0)
    child = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 10
    while Path(f"/proc/{child}/stat").exists() and " Z " not in Path(f"/proc/{child}/stat").read_text():
        assert time.monotonic() < deadline, f"{child} still runs"
        time.sleep(0.02)


def test_no_more_hosts_are_asked_at_a_time_than_stated() -> None:
    """Each leaves when it started and ended; at no time are three between the two."""
    program = "import time; a = time.time(); time.sleep(0.1); print(a, time.time())"
    commands = {f"n{number}": python(program) for number in range(6)}
    answers = run_everywhere(commands, as_process, seconds=20, at_once=2)
    spans = [tuple(map(float, answer.output.split())) for answer in answers.values()]
    assert all(sum(start < end and a < start < b for a, b in spans) <= 1 for start, end in spans)


def test_the_time_of_the_first_output_is_by_this_machines_clock() -> None:
    answer = run_everywhere(
        {"n": python("import time; print(time.time(), flush=True); time.sleep(2)")}, as_process, seconds=20
    )["n"]
    assert answer.first_output is not None and abs(answer.first_output - float(answer.output)) < 1.5
    assert answer.seconds > 2


def test_a_host_that_babbles_or_holds_its_pipes_never_keeps_the_asker_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forty chances for output that nobody has read when the process is killed; asyncio would wait for it."""
    monkeypatch.setattr(remote, "OUTPUT_BYTES", 1000)
    monkeypatch.setattr(remote, "END_SECONDS", 0.5)
    answers = run_everywhere({f"n{number}": ["yes"] for number in range(40)}, as_process, seconds=20, at_once=8)
    assert all("more than 1,000 bytes" in answer.why for answer in answers.values())
    leaves = "import os, time; print('out', flush=True); os.fork() or (os.setsid(), time.sleep(60))"
    began = time.monotonic()
    assert run_everywhere({"n": python(leaves)}, as_process, seconds=0.8)["n"].code is None
    assert time.monotonic() - began < 30  # not the minute for which somebody holds the pipe


def test_an_answer_is_found_among_the_words_that_a_login_prints_around_it(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = 'Welcome!\n{"addresses": {"lo": "127.0.0.1"}, "cpus": 2, "ended": 0}\nbye\n'
    said = {"n1": answer, "n2": "[1]\n", "n3": ""}
    monkeypatch.setattr(roll_call, "transport_for", lambda cluster: lambda host, command: ["printf", "%s", said[host]])
    hosts = [Host(name, (0,)) for name in said]
    found = roll_call.call(HostsCluster(), hosts, directory=Path("/"), run_dir=Path("/runs/r"))
    assert found["n1"] == Present({"lo": "127.0.0.1"}, 2, 0)
    assert all("is it the same code?" in str(found[name]) for name in ("n2", "n3"))

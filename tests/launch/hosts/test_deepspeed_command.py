"""The commands that start ranks on hosts, word by word, and that what arrives there is what was meant."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpt.problems import ConfigError
from launch.cluster import HostsCluster
from launch.hostfile import Host
from launch.hosts.deepspeed_command import (
    Start,
    check_words,
    host_command,
    launcher_environment,
    pdsh_command,
    pdsh_word,
    rank_environment,
    render_environment,
    ssh_command,
)

START = Start(
    hosts=(Host("a", (0, 1)), Host("b", (0, 1))),
    master_address="10.0.0.1",
    master_port=29500,
    arguments=("run.yaml", "data.weights={a: 1}"),
    environment={"NCCL_DEBUG": "WARN", "NOTE": "two words"},
    directory=Path("/work dir"),
    folder=Path("/runs/x/launch"),
)
DEEPSPEED = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", "/runs/x/launch/hostfile"]
MEETING = ["--master_addr", "10.0.0.1", "--master_port", "29500", "--module", "cpt.train.main"]


def cluster(**fields: Any) -> HostsCluster:
    return HostsCluster(**{"hosts": ["a slots=2", "b slots=2"], **fields})


def test_with_pdsh_one_launcher_reaches_all_hosts_even_if_there_is_only_one() -> None:
    start = replace(START, arguments=("run.yaml", "a=$x"))
    words = ["--launcher", "pdsh", "--force_multi", "--no_ssh_check"]
    assert pdsh_command(start) == [*DEEPSPEED, *words, *MEETING, "run.yaml", "'a=$x'"]
    chosen = replace(start, hosts=(Host("a", (1, 3)), Host("b", (0, 2))))
    assert pdsh_command(chosen)[5:7] == ["--include", "a:1,3@b:0,2"]


def test_with_ssh_each_host_gets_its_number_the_folder_and_the_environment_as_one_quoted_word() -> None:
    command = ssh_command(cluster(ssh_port=2222, ssh_options=["-i", "/keys/id"]), START, 1)
    assert command[:5] == ["ssh", "-i", "/keys/id", "-p", "2222"] and command[-3:-1] == ["--", "b"]
    assert "ServerAliveInterval=15" in command and "BatchMode=yes" in command
    said = subprocess.run(["sh", "-c", f"printf '%s\\n' {command[-1]}"], capture_output=True, text=True, check=True)
    given = ["env", "-C", "/work dir", "NCCL_DEBUG=WARN", "NOTE=two words"]
    assert said.stdout.splitlines() == [*given, *host_command(START, 1)]


def test_without_ssh_every_host_is_told_its_number() -> None:
    command = [*DEEPSPEED, "--no_ssh", "--node_rank", "1", *MEETING, "run.yaml", "data.weights={a: 1}"]
    assert host_command(START, 1) == command


def test_deepspeed_is_kept_from_handing_on_what_was_not_allowed() -> None:
    shell = {"MLFLOW_TRACKING_PASSWORD": "x", "NCCL_DEBUG": "INFO", "UCX_A": "1", "PATH": "/bin"}
    shell["PDSH_SSH_ARGS_APPEND"] = "-q"
    found = launcher_environment(cluster(ssh_port=2222), START, shell)
    assert sorted(found) == ["DS_ENV_FILE", "NCCL_DEBUG", "PATH", "PDSH_SSH_ARGS_APPEND"]
    assert found["PDSH_SSH_ARGS_APPEND"].startswith("-q -p 2222 -o BatchMode=yes")
    assert found["DS_ENV_FILE"] == "/runs/x/launch/deepspeed_env"


def test_what_the_file_states_comes_before_the_shell_and_that_before_what_is_chosen() -> None:
    chosen = rank_environment(cluster(), {"NCCL_DEBUG": "INFO"}, interface="eth0", threads=4)
    assert chosen == {"OMP_NUM_THREADS": "4", "NCCL_SOCKET_IFNAME": "eth0", "GLOO_SOCKET_IFNAME": "eth0"}
    stated = cluster(export=["OMP_*", "NCCL_*"], env={"NCCL_DEBUG": "WARN"})
    shell = {"OMP_NUM_THREADS": "2", "NCCL_DEBUG": "INFO", "PYTHONPATH": "/code"}
    found = rank_environment(stated, shell, interface=None, threads=4)
    assert found == {"OMP_NUM_THREADS": "2", "PYTHONPATH": "/code", "NCCL_DEBUG": "WARN"}


@pytest.mark.parametrize("value", ["two\nlines", " before", "after ", "a\x0bb"])
def test_a_value_that_a_line_cannot_carry_is_refused_by_name(value: str) -> None:
    with pytest.raises(ConfigError, match=r"env.NOTE"):
        rank_environment(cluster(env={"NOTE": value}), {}, interface=None, threads=1)


@pytest.mark.parametrize("folder", ["/with space", "/cost$", "/a;b", "/50%"])
def test_a_folder_that_the_hosts_shell_would_not_take_as_it_is_is_refused(folder: str) -> None:
    with pytest.raises(ConfigError, match="working directory"):
        check_words(replace(START, directory=Path(folder)))
    check_words(replace(START, directory=Path("/data/code-1.2")))


def in_pdsh_and_shell(text: str) -> str:
    """What a remote shell makes of it: pdsh turns %% into % before."""
    assert not re.search(r"%(?!%)", text.replace("%%", "")), "pdsh would replace it"
    done = subprocess.run(["sh", "-c", text.replace("%%", "%")], capture_output=True, text=True, check=True)
    return done.stdout


TEXT = st.text(st.characters(codec="ascii", categories=["L", "N", "P", "S", "Zs"]), min_size=1, max_size=12)


@settings(max_examples=40, deadline=None)
@given(TEXT)
def test_an_argument_arrives_through_deepspeed_pdsh_and_shell_as_it_was(word: str) -> None:
    said = pdsh_word(word)
    if " " in said:  # DeepSpeed 0.19.8, PDSHRunner.parse_user_args
        said = '"{}"'.format(said.replace('"', '\\"'))
    assert in_pdsh_and_shell(f"printf %%s {said}") == word


@settings(max_examples=40, deadline=None)
@given(TEXT.map(str.strip))
def test_a_variable_arrives_through_its_file_deepspeed_pdsh_and_shell_as_it_was(value: str) -> None:
    (line,) = render_environment({"X": value}).splitlines(keepends=True)
    name, said = line.split("=", maxsplit=1)  # DeepSpeed 0.19.8, runner.main and MultiNodeRunner.add_export
    said = said.strip()
    if re.search(r"[^\w@%+=:,./-]", said):
        said = f'"{said}"'
    assert in_pdsh_and_shell(f'export {name}={said}; printf %%s "$X"') == value

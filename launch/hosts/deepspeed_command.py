"""The command lines that start the ranks of a job on its hosts, with DeepSpeed's launcher: text and lists only.

Owns what the ranks see of this shell, and the quoting. DeepSpeed (0.19.8) pastes arguments and variables into a string
for the remote shell, some of them quoted by half; pdsh replaces %h, %n, %u in that string. So words are written here
such that what arrives is what was meant. Refuses what cannot be written so: a value of several lines, a folder or
Python whose path a shell would not take for one word.

    pdsh     deepspeed --hostfile F --launcher pdsh --force_multi ... --module cpt.train.main ARGUMENTS     once
    ssh      ssh HOST 'deepspeed --hostfile F --no_ssh --node_rank I ... '                                  from here
    no_ssh   deepspeed --hostfile F --no_ssh --node_rank I ...                             on each host, by a person
"""

import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cpt.problems import ConfigError, Problem
from launch.cluster import HostsCluster, code_path, exported
from launch.hostfile import Host, include_of
from launch.hosts.remote import in_folder, over_ssh, ssh_arguments
from launch.local import ranks

RUNNER = "deepspeed.launcher.runner"  # what the command `deepspeed` calls
PASTED = re.compile(r"[\w@%+=:,./-]+", re.ASCII)  # DeepSpeed pastes such words as they are
CARRIED = ("MLFLOW", "PYTHON", "MV2", "UCX", "NCCL")  # DeepSpeed hands on what begins so, asked or not
LOST_SECONDS = 60  # a lost connection ends the job then: the watchdogs of the ranks would take half an hour


@dataclass(frozen=True)
class Start:
    """One start of a job: on which hosts, where they meet, what each rank runs and what it is given.

    ``folder``: RUN_DIR/launch, on storage that all hosts share; ``directory``: where the ranks run.
    """

    hosts: tuple[Host, ...]
    master_address: str
    master_port: int
    arguments: tuple[str, ...]
    environment: Mapping[str, str]
    directory: Path
    folder: Path

    @property
    def hostfile(self) -> Path:
        return self.folder / "hostfile"

    @property
    def environment_file(self) -> Path:
        return self.folder / "deepspeed_env"


def rank_environment(
    cluster: HostsCluster, shell: Mapping[str, str], *, interface: str | None, threads: int
) -> dict[str, str]:
    """What every rank is given; what the file or the shell states comes before what is chosen here.

    Raises:
        ConfigError: a value that no variable can carry through DeepSpeed's file of them.
    """
    chosen = {"OMP_NUM_THREADS": str(threads), **code_path(shell)}
    if interface:
        chosen |= {"NCCL_SOCKET_IFNAME": interface, "GLOO_SOCKET_IFNAME": interface}
    found = {**chosen, **exported(cluster, shell), **cluster.env}
    rule = "must be one line, without spaces around it: DeepSpeed reads variables from a file of lines"
    problems = [Problem(f"env.{name}", value, rule) for name, value in found.items() if not _is_a_line(value)]
    if problems:
        raise ConfigError(*problems)
    return found


def _is_a_line(value: str) -> bool:
    return value == value.strip() and len(value.splitlines()) <= 1 and "\0" not in value


def check_words(start: Start) -> None:
    """Raises ConfigError for a path that DeepSpeed would paste into the remote shell's string and the shell split."""
    paths = {"working directory": start.directory, "Python": Path(sys.executable)}
    rule = "has characters that the hosts' shell would not take as they are"
    problems = [
        Problem(name, str(path), rule, "use a path of letters, digits and _ - . / + @ , : =")
        for name, path in paths.items()
        if not PASTED.fullmatch(str(path)) or "%" in str(path)
    ]
    if problems:
        raise ConfigError(*problems)


def pdsh_command(start: Start) -> list[str]:
    """DeepSpeed's launcher on this machine, which reaches all hosts through pdsh, also where there is only one."""
    words = ["--launcher", "pdsh", "--force_multi", "--no_ssh_check"]  # its check knows nothing of ssh's arguments
    return _deepspeed(start, words, [pdsh_word(argument) for argument in start.arguments])


def host_command(start: Start, node_rank: int) -> list[str]:
    """DeepSpeed's launcher on one host, for its ranks alone."""
    return _deepspeed(start, ["--no_ssh", "--node_rank", str(node_rank)], start.arguments)


def _deepspeed(start: Start, words: Sequence[str], arguments: Sequence[str]) -> list[str]:
    include = include_of(start.hosts)
    return [
        *(sys.executable, "-m", RUNNER, "--hostfile", str(start.hostfile)),
        *(["--include", include] if include else []),
        *(*words, "--master_addr", start.master_address, "--master_port", str(start.master_port)),
        *("--module", ranks.TRAIN_MODULE, *arguments),
    ]


def ssh_command(cluster: HostsCluster, start: Start, node_rank: int) -> list[str]:
    """ssh from here to one host, which runs ``host_command`` in the same folder, by the same Python."""
    remote = in_folder(start.directory, start.environment, host_command(start, node_rank))
    return over_ssh(cluster, start.hosts[node_rank].name, remote, lost_after=LOST_SECONDS)


def launcher_environment(cluster: HostsCluster, start: Start, shell: Mapping[str, str]) -> dict[str, str]:
    """For ``pdsh_command``: this shell, but of what DeepSpeed would hand on by itself only what was allowed."""
    kept = {name: value for name, value in shell.items() if not name.startswith(CARRIED) or name in start.environment}
    given = " ".join([shell.get("PDSH_SSH_ARGS_APPEND", ""), *ssh_arguments(cluster, lost_after=LOST_SECONDS)]).strip()
    return {**kept, "PDSH_SSH_ARGS_APPEND": given, "DS_ENV_FILE": str(start.environment_file)}


def render_environment(environment: Mapping[str, str]) -> str:
    """The file that $DS_ENV_FILE names: NAME=value per line. DeepSpeed puts a value between double quotes where it
    holds anything but plain characters, and leaves to us what still means something there.
    """
    return "".join(f"{name}={_between_double_quotes(value)}\n" for name, value in environment.items())


def pdsh_word(word: str) -> str:
    """An argument such that DeepSpeed, pdsh and the remote shell make ``word`` of it. DeepSpeed puts one with a space
    between double quotes, and quotes double quotes in it; the rest it pastes.
    """
    if " " not in word:
        return shlex.quote(word).replace("%", "%%")
    return re.sub(r"([\\$`])", r"\\\1", word).replace("%", "%%")


def _between_double_quotes(value: str) -> str:
    return re.sub(r'([\\$`"])', r"\\\1", value).replace("%", "%%")

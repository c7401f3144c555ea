"""The typed cluster file: which machines, how ranks are started on them, and what they may see of this shell.

Owns the fields and reading them, every problem reported at once. Refuses unknown keys, unsafe YAML, and a variable
that looks like a secret on the allow-list.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError

from cpt.config import read_mapping
from cpt.problems import ConfigError, Problem, problem_of
from cpt.run_fields import LONGEST_NAME
from cpt.schedule_fields import Count, Section
from launch.hostfile import Host, choose_hosts, parse_hosts, read_hostfile

ADDRESS = re.compile(r"[A-Za-z0-9][A-Za-z0-9.:-]*")
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
SECRET = re.compile(
    r"SECRET|TOKEN(?!IZ)|PASSW(?:OR)?D|PASSPHRASE|CREDENTIAL|PRIVATE|API_?KEY|ACCESS_KEY|CONNECTION_STRING"
    r"|(?:^|_)(?:AUTH|DSN|KEY|PASS|PAT)$",
    re.IGNORECASE,
)


def _variable(name: str) -> str:
    if not VARIABLE.fullmatch(name.removesuffix("*")):
        raise ValueError("must be the name of a variable; only its end may be a *, as in NCCL_*")
    if SECRET.search(name):
        raise ValueError("looks like a secret: the launcher would write it to a file; put it on the hosts instead")
    return name


def _plain_variable(name: str) -> str:
    if name.endswith("*"):
        raise ValueError("must be the name of one variable")
    return _variable(name)


Variable = Annotated[str, AfterValidator(_variable)]
PlainVariable = Annotated[str, AfterValidator(_plain_variable)]
Interface = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.@-]{1,15}$")]
Port = Annotated[int, Field(ge=1, le=65535)]
DurationText = Annotated[str, Field(pattern=r"^(\d+-)?\d{1,3}:\d{2}(:\d{2})?$")]
Quantity = Annotated[str, Field(pattern=r"^\d+(\.\d+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$")]


class Mount(Section):
    """A folder or claim that the container sees."""

    source: str = Field(description="path on the host, or the name of a PersistentVolumeClaim in Kubernetes")
    target: str = Field(pattern=r"^/", description="path in the container")
    read_only: bool = Field(False, description="stores and weights can be")


class _Cluster(Section):
    processes_per_host: Count | None = Field(
        None, description="ranks on each host; default: its GPUs, or 1 without any"
    )
    interface: Interface | None = Field(
        None, description="network interface that ranks talk over, as in `ip link`, e.g. eth0"
    )
    master_port: Port = Field(29500, description="port of rank 0 on the first host")
    env: dict[PlainVariable, str] = Field(default_factory=dict, description="variables set on every rank")
    export: list[Variable] = Field(
        default_factory=list, description="variables of this shell handed to every rank; a name may end in *, as NCCL_*"
    )


class _ContainerCluster(_Cluster):
    image: str | None = Field(None, description="container image the ranks run in")
    mounts: list[Mount] = Field(default_factory=list, description="what the container sees of the cluster's storage")


class HostsCluster(_Cluster):
    """Machines reached by ssh, from a hostfile (``name slots=8`` per line, as DeepSpeed reads it) or a list."""

    kind: Literal["hosts"] = "hosts"
    processes_per_host: Count | None = Field(None, description="ranks on each host that states no slots=N")
    hostfile: Path | None = Field(None, description="file with `host slots=N` per line")
    hosts: list[str] = Field(default_factory=list, description="instead of a hostfile: `host` or `host slots=N` each")
    launcher: Literal["pdsh", "ssh", "no_ssh"] = Field(
        "pdsh", description="how ranks are started; no_ssh: the same command is run on every host by hand"
    )
    ssh_port: Port | None = Field(None, description="port of sshd on the hosts")
    ssh_options: list[str] = Field(default_factory=list, description="arguments of ssh, e.g. ['-i', '/keys/id']")
    master_address: str | None = Field(
        None, description="address of the first host; default: its address on `interface`, else its name"
    )


class SlurmCluster(_ContainerCluster):
    """A Slurm partition; one sbatch job per run."""

    kind: Literal["slurm"]
    nodes: Count = Field(description="hosts of the job")
    partition: str | None = Field(None, description="sbatch --partition")
    account: str | None = Field(None, description="sbatch --account")
    qos: str | None = Field(None, description="sbatch --qos")
    time_limit: DurationText = Field(description="sbatch --time, e.g. 24:00:00")
    stop_seconds: int = Field(300, ge=30, description="a save is asked for so long before the time limit")
    gpus_per_node: int = Field(0, ge=0, description="sbatch --gpus-per-node; 0: none is asked for")
    cpus_per_process: Count | None = Field(None, description="sbatch --cpus-per-task")
    form: Literal["srun", "deepspeed"] = Field(
        "srun", description="srun starts every rank, or one deepspeed launcher (--no_ssh) per node"
    )
    requeue: bool = Field(True, description="after preemption or the time limit, queue again and resume")
    preflight: bool = Field(
        False, description="compare code, versions, disks and network of the nodes before every start"
    )
    options: dict[str, str] = Field(default_factory=dict, description="further sbatch options, e.g. {constraint: h100}")


class KubernetesCluster(_ContainerCluster):
    """A namespace; one Indexed Job with a headless service, or an MPIJob, per run."""

    kind: Literal["kubernetes"]
    image: str = Field(description="container image the ranks run in")
    nodes: Count = Field(description="pods of the job; of many tasks, so many at a time")
    namespace: str = Field("default", description="namespace of everything that is made")
    form: Literal["job", "mpijob"] = Field(
        "job", description="Indexed Job with a headless service, or MPIJob (v2beta1)"
    )
    gpus_per_node: int = Field(0, ge=0, description="nvidia.com/gpu of each pod")
    cpu: Quantity = Field("4", description="CPU request of each pod")
    memory: Quantity = Field("16Gi", description="memory request and limit of each pod, e.g. 512Gi")
    shared_memory: Quantity = Field("8Gi", description="size of /dev/shm")
    scratch: Quantity = Field("10Gi", description="size of /tmp, the only other writable place")
    grace_seconds: int = Field(300, ge=30, description="between SIGTERM and the pod's end: the last save")
    user_id: int = Field(10001, ge=1, description="user and group of the processes; never root")
    node_selector: dict[str, str] = Field(default_factory=dict, description="labels of the nodes to run on")
    tolerations: list[dict[str, str]] = Field(default_factory=list, description="as in a pod's specification")
    restarts: int = Field(10, ge=0, description="of the job after a failure; evictions and stops do not count")


Cluster = HostsCluster | SlurmCluster | KubernetesCluster
KINDS: dict[str, type[HostsCluster] | type[SlurmCluster] | type[KubernetesCluster]] = {
    "hosts": HostsCluster,
    "slurm": SlurmCluster,
    "kubernetes": KubernetesCluster,
}


def load_cluster(path: Path) -> Cluster:
    """Read a cluster file. Paths in it are relative to its folder.

    Raises:
        ConfigError: with every problem found, also a hostfile that is not there.
    """
    raw = read_mapping(path, of="fields such as kind, hosts and env, see configs/clusters")
    kind = raw.get("kind", "hosts")
    if not isinstance(kind, str) or kind not in KINDS:
        raise ConfigError(Problem("kind", kind, f"must be one of {', '.join(KINDS)}", f"the file is {path}"))
    if isinstance(raw.get("hostfile"), str):
        raw["hostfile"] = path.absolute().parent / os.path.expanduser(raw["hostfile"])
    problems = _problems_of_hosts(raw) if kind == "hosts" else []
    try:
        cluster = KINDS[kind].model_validate(raw)
    except ValidationError as error:
        fields = {name: info.description or "" for name, info in KINDS[kind].model_fields.items()}
        raise ConfigError(*(_problem(detail, fields) for detail in error.errors()), *problems) from None
    if problems:
        raise ConfigError(*problems)
    return cluster


def _problem(detail: Any, fields: Mapping[str, str]) -> Problem:
    """``cpu: 4`` and ``NAME: 1`` are numbers to YAML where a text is wanted: a common mistake."""
    problem = problem_of(detail, fields)
    if detail["type"] != "string_type" or not isinstance(detail["input"], int | float):
        return problem
    return replace(problem, fix="; ".join(filter(None, ["put it in quotes", problem.fix])))


def hosts_of(cluster: HostsCluster, *, include: str = "", exclude: str = "") -> tuple[Host, ...]:
    """The hosts that take part, all with as many slots. Raises ConfigError (see ``launch.hostfile``)."""
    listed = _listed(cluster.hostfile, cluster.hosts, cluster.processes_per_host)
    return choose_hosts(listed, include=include, exclude=exclude)


def exported(cluster: Cluster, shell: Mapping[str, str]) -> dict[str, str]:
    """The variables of ``shell`` that the allow-list names and that are no secrets."""
    return {
        name: value
        for name, value in shell.items()
        if any(fnmatchcase(name, each) for each in cluster.export)
        and VARIABLE.fullmatch(name)  # lists of names and files of lines would be read otherwise
        and not SECRET.search(name)
    }


def code_path(shell: Mapping[str, str]) -> dict[str, str]:
    """PYTHONPATH where ``shell`` has it: what shares this machine's Python would run other code without it."""
    return {"PYTHONPATH": shell["PYTHONPATH"]} if "PYTHONPATH" in shell else {}


def name_problems(field: str, name: str) -> list[Problem]:
    """Of a name that becomes a folder, a Slurm job or objects in Kubernetes."""
    if len(name.encode()) <= LONGEST_NAME:
        return []
    return [Problem(field, name, f"has {len(name.encode())} characters; {LONGEST_NAME} at most", "a shorter one")]


def _listed(hostfile: Path | None, hosts: Sequence[str], slots: int | None) -> tuple[Host, ...]:
    if hostfile is not None:
        return read_hostfile(hostfile)
    return parse_hosts({f"hosts.{number}": line for number, line in enumerate(hosts)}, slots=slots)


def _problems_of_hosts(raw: Mapping[str, Any]) -> list[Problem]:
    """What pydantic does not see; of fields that have another type than they should, nothing is said here."""
    hostfile, hosts, slots = raw.get("hostfile"), raw.get("hosts", []), raw.get("processes_per_host")
    if not isinstance(hosts, list) or not all(isinstance(host, str) for host in hosts):
        return []
    if hostfile is not None and not isinstance(hostfile, Path):
        return []
    problems = []
    if (hostfile is None) == (not hosts):
        rule = "state one of the two, hostfile or hosts" if hosts else "is required, or hosts: the machines to run on"
        problems.append(Problem("hostfile", hostfile and str(hostfile), rule))
    else:
        try:
            _listed(hostfile, hosts, slots if isinstance(slots, int) else None)
        except ConfigError as error:
            problems += error.problems
    address, options = raw.get("master_address"), raw.get("ssh_options")
    if isinstance(address, str) and not ADDRESS.fullmatch(address):
        problems.append(Problem("master_address", address, "is no plain name or address", "e.g. 10.0.0.1"))
    for number, option in enumerate(options if isinstance(options, list) else []):
        if len(str(option).split()) != 1:
            rule = "must be one word: pdsh splits ssh's arguments at spaces"
            problems.append(Problem(f"ssh_options.{number}", option, rule, "['-o', 'Key=value'], or ~/.ssh/config"))
    return problems

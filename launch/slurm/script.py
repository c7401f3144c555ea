"""The sbatch script of a run, and of an array of independent tasks, as text.

Owns every line of it: what Slurm is asked for, what the ranks may see, and what happens when they were stopped. It is
written so that the same script, started again by whomever, goes on: a run folder that is there is resumed. Refuses to
run anything, and what sbatch cannot hold in one line. Everything from outside is quoted for the shell.

    Slurm's word             who hears it                what becomes of the job
    SIGTERM before the time  the ranks: they save, 143   queued again by the script, until the run is finished
      limit, or preemption
    killed, a node lost      nobody                      queued again by Slurm; the newest checkpoint is resumed
    scancel, a file STOP     the ranks: they save, 143   ends
"""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cpt.exit_codes import EXIT_ENVIRONMENT, EXIT_USER
from cpt.problems import ConfigError, Problem
from launch.cluster import SlurmCluster, name_problems
from launch.record import LaunchJob

PORTS = 1000  # so many, from master_port on: two jobs may share a node, and each needs its own
HIGHEST_PORT = 65535 - (PORTS - 1)
SOCKETS = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
OPTION = re.compile(r"[a-z][a-z0-9-]*")
# sbatch options that the script states itself, by the field that says so.
STATED = {
    **{name: name for name in ("nodes", "partition", "account", "qos")},
    **{"time": "time_limit", "signal": "stop_seconds", "requeue": "requeue", "no-requeue": "requeue"},
    **{"gpus-per-node": "gpus_per_node", "cpus-per-task": "cpus_per_process", "ntasks-per-node": "processes_per_host"},
    **{"ntasks": "processes_per_host", "export": "export"},
    **dict.fromkeys(("job-name", "output", "error", "open-mode", "array", "dependency", "chdir", "parsable"), ""),
}


@dataclass(frozen=True)
class Task:
    """One command of an array, which can be repeated; the run folder that it works in, and where notes are kept."""

    command: tuple[str, ...]
    run_dir: Path
    notes: Path


@dataclass(frozen=True)
class Shape:
    """What a job takes: nodes, and on each so many tasks and GPUs; and the CPUs of a task, None for Slurm's own."""

    nodes: int
    tasks: int
    gpus: int
    cpus: int | None


@dataclass(frozen=True)
class Submission:
    """What a script needs beside the cluster's fields. ``shell``: names of variables of this shell that the job may
    see; their values stay out of the script.
    """

    name: str
    directory: Path
    log: Path
    python: str
    shell: tuple[str, ...] = ()


def processes_per_node(cluster: SlurmCluster) -> int:
    return cluster.processes_per_host or cluster.gpus_per_node or 1


def seconds_of(time_limit: str) -> int:
    """As sbatch reads it: ``30:00`` is half an hour, ``24:00:00`` a day, and so is ``1-00:00``."""
    days, dash, clock = time_limit.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    if dash:  # days-hours:minutes[:seconds]
        parts = [*parts, 0] if len(parts) == 2 else parts
    hours, minutes, seconds = [0, *parts] if len(parts) == 2 else parts
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def shape_of_run(cluster: SlurmCluster) -> Shape:
    """In the deepspeed form the ranks of a node are one task."""
    processes, cpus = processes_per_node(cluster), cluster.cpus_per_process
    tasks = processes if cluster.form == "srun" else 1
    return Shape(cluster.nodes, tasks, cluster.gpus_per_node, cpus and cpus * processes // tasks)


def shape_of_task(cluster: SlurmCluster, processes: int) -> Shape:
    """One node's part, for a command that starts so many ranks itself, on a GPU each where the nodes have any."""
    cpus = cluster.cpus_per_process
    return Shape(1, 1, min(processes, cluster.gpus_per_node), cpus and cpus * processes)


def check(cluster: SlurmCluster, *, name: str, folder: Path) -> None:
    """Raises ConfigError with everything that sbatch would refuse, or misunderstand. ``folder``: of the run."""
    texts = _problems_of_texts(cluster, name, folder)
    problems = [*name_problems("run.name", name), *texts, *_problems_of_options(cluster)]
    if 2 * cluster.stop_seconds > (limit := seconds_of(cluster.time_limit)):
        rule = f"is more than half of time_limit ({cluster.time_limit}, {limit} s): nearly nothing would be trained"
        problems.append(Problem("stop_seconds", cluster.stop_seconds, rule, "raise time_limit"))
    if cluster.master_port > HIGHEST_PORT:
        rule = f"must be {HIGHEST_PORT} at most: each job takes one of {PORTS:,} from it on"
        problems.append(Problem("master_port", cluster.master_port, rule))
    if not cluster.image and cluster.mounts:
        problems.append(Problem("mounts", len(cluster.mounts), "only a container has mounts", "give image as well"))
    if cluster.image and cluster.preflight:
        problems.append(Problem("preflight", True, "asks the nodes, not the containers on them", "leave it out"))
    for mount in cluster.mounts:
        if {",", ":"} & set(mount.source + mount.target):
            problems.append(Problem("mounts", f"{mount.source}:{mount.target}", "a path with , or : cannot be mounted"))
    if problems:
        raise ConfigError(*problems)


def _problems_of_options(cluster: SlurmCluster) -> list[Problem]:
    problems = []
    for option, value in cluster.options.items():
        field = f"options.{option}"
        if not OPTION.fullmatch(option):
            problems.append(Problem(field, value, "must be the long name of an sbatch option, e.g. constraint"))
        elif option in STATED:
            fix = f"use {STATED[option]}" if STATED[option] else "leave it out"
            problems.append(Problem(field, value, "the script states this itself", fix))
    return problems


def _problems_of_texts(cluster: SlurmCluster, name: str, folder: Path) -> list[Problem]:
    """A second line of an #SBATCH line would be a command."""
    named = {"partition": cluster.partition, "account": cluster.account, "qos": cluster.qos}
    texts = {field: value for field, value in named.items() if value is not None}
    texts |= {f"options.{option}": value for option, value in cluster.options.items()}
    texts |= {f"env.{variable}": value for variable, value in cluster.env.items()}
    texts |= {"run.name": name, "run.dir": str(folder)}
    rule = "must be one line without control characters"
    problems = [Problem(field, value, rule) for field, value in texts.items() if not value.isprintable()]
    if {"%", "\\"} & set(str(folder)):
        problems.append(Problem("run.dir", str(folder), "% and backslash in a path mean something else to Slurm"))
    return problems


def run_script(cluster: SlurmCluster, job: LaunchJob, submission: Submission) -> str:
    """The script of one run over all nodes."""
    shape = shape_of_run(cluster)
    module = "launch.slurm.rank" if cluster.form == "srun" else "launch.slurm.node"
    ranks = [*_srun(cluster, shape), submission.python, "-m", module]
    preflight = shlex.join([submission.python, "-m", "launch.slurm.preflight"])
    return "\n".join(
        [
            *_options(cluster, shape, submission),
            *_beginning(cluster, submission),
            f"run_dir={shlex.quote(str(job.run_dir))}",
            'notes="$run_dir/launch"',
            *_meeting(cluster),
            "",
            "# Decided once, for all ranks: a run folder with a config goes on.",
            'if [ -e "$run_dir/config.yaml" ]; then',
            f"    arguments=({shlex.join(job.again)})",
            "else",
            f"    arguments=({shlex.join(job.first)})",
            "fi",
            "",
            *_guarded(
                cluster,
                submission,
                f'{shlex.join(ranks)} "$run_dir" "${{arguments[@]}}"',
                look=f'{preflight} "$run_dir" "${{arguments[@]}}" || exit' if cluster.preflight else "",
            ),
        ]
    )


def array_script(cluster: SlurmCluster, shape: Shape, tasks: Sequence[Task], submission: Submission) -> str:
    """A job for each of ``tasks``, as many at a time as Slurm finds room for."""
    cases = []
    for number, task in enumerate(tasks):
        folders = f"notes={shlex.quote(str(task.notes))} run_dir={shlex.quote(str(task.run_dir))}"
        cases += [f"{number})", f"    {folders}", f"    command=({shlex.join(task.command)})", "    ;;"]
    return "\n".join(
        [
            *_options(cluster, shape, submission, array=len(tasks)),
            *_beginning(cluster, submission),
            'case "$SLURM_ARRAY_TASK_ID" in',
            *cases,
            f'*) echo "no such task: $SLURM_ARRAY_TASK_ID" >&2; exit {EXIT_USER} ;;',
            "esac",
            "",
            *_guarded(cluster, submission, f'{shlex.join(_srun(cluster, shape))} "${{command[@]}}"'),
        ]
    )


def last_script(cluster: SlurmCluster, shape: Shape, command: Sequence[str], submission: Submission) -> str:
    """One command, e.g. after an array."""
    lines = [*_options(cluster, shape, submission), *_beginning(cluster, submission)]
    return "\n".join([*lines, f"exec {shlex.join([*_srun(cluster, shape), *command])}", ""])


def _options(cluster: SlurmCluster, shape: Shape, submission: Submission, *, array: int = 0) -> list[str]:
    stated: dict[str, object] = {
        "job-name": submission.name,
        "array": f"0-{array - 1}" if array else None,
        "nodes": shape.nodes,
        "ntasks-per-node": shape.tasks,
        "gpus-per-node": shape.gpus or None,
        "cpus-per-task": shape.cpus,
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "time": cluster.time_limit,
        "signal": f"TERM@{cluster.stop_seconds}",  # to the ranks, not to this script
        "output": submission.log,
        "open-mode": "append",
        "export": ",".join(submission.shell) or "NIL",
    }
    lines = [_option(name, str(value)) for name, value in stated.items() if value is not None]
    lines += [_option(name, value) for name, value in sorted(cluster.options.items())]
    return ["#!/bin/bash", *lines, f"#SBATCH --{'requeue' if cluster.requeue else 'no-requeue'}", ""]


def _option(name: str, value: str) -> str:
    """As Slurm reads such lines: quotes like a shell, but a backslash counts inside of them too."""
    value = value.replace("\\", "\\\\")
    return f"#SBATCH --{name}={shlex.quote(value)}" if value else f"#SBATCH --{name}"


def _beginning(cluster: SlurmCluster, submission: Submission) -> list[str]:
    names = {} if cluster.interface is None else dict.fromkeys(SOCKETS, cluster.interface)
    return [
        "set -uo pipefail",
        f"cd -- {shlex.quote(str(submission.directory))} || exit {EXIT_ENVIRONMENT}",
        *(f"export {name}={shlex.quote(value)}" for name, value in {**names, **cluster.env}.items()),
        "",
    ]


def _meeting(cluster: SlurmCluster) -> list[str]:
    """Where the ranks meet. This script runs on the first node."""
    per_node = processes_per_node(cluster)
    if cluster.interface is None:
        address = ['MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)']
        missing = "scontrol does not know the hosts of this job"
    else:
        shown = f"ip -o -4 address show dev {shlex.quote(cluster.interface)}"
        address = [f"MASTER_ADDR=$({shown} | awk '{{print $4; exit}}' | cut -d/ -f1)"]
        missing = f"$(hostname) has no IPv4 address on {cluster.interface}"
    return [
        *address,
        f'if [ -z "$MASTER_ADDR" ]; then echo "{missing}" >&2; exit {EXIT_ENVIRONMENT}; fi',
        f"MASTER_PORT=$(({cluster.master_port} + SLURM_JOB_ID % {PORTS}))  # jobs may share a node",
        f"LOCAL_WORLD_SIZE={per_node}",
        f"LOCAL_SIZE={per_node}",
        "export MASTER_ADDR MASTER_PORT LOCAL_WORLD_SIZE LOCAL_SIZE",
        'echo "job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, start $((${SLURM_RESTART_COUNT:-0} + 1)): '
        'rank 0 at $MASTER_ADDR:$MASTER_PORT"',
    ]


def _srun(cluster: SlurmCluster, shape: Shape) -> list[str]:
    """``--export=ALL``: of what this script has, which Slurm has filtered; ``--wait=0``: rank 0 may be at work long
    after the others have left; a rank that fails ends the others.
    """
    words = ["srun", f"--nodes={shape.nodes}", f"--ntasks={shape.nodes * shape.tasks}", "--distribution=block"]
    words += ["--export=ALL", "--wait=0", "--kill-on-bad-exit=1"]
    words += [f"--cpus-per-task={shape.cpus}"] if shape.cpus else []  # not taken over from sbatch since Slurm 22.05
    if cluster.image:
        mounts = [f"{mount.source}:{mount.target}{':ro' if mount.read_only else ''}" for mount in cluster.mounts]
        words += [f"--container-image={cluster.image}"]
        words += [f"--container-mounts={','.join(mounts)}"] if mounts else []
    return words


def _guarded(cluster: SlurmCluster, submission: Submission, step: str, *, look: str = "") -> list[str]:
    """The step between two looks at the run folder: whether to start it, and whether to queue it again."""
    one = _srun(cluster, Shape(1, 1, 0, None)) if cluster.image else []  # the code is in the container
    turns = shlex.join([*one, submission.python, "-m", "launch.slurm.turns"])
    # The number of an array is also the number of its last task: by the number alone, all of it would be meant.
    again = [
        "job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}",
        "job=${job:-$SLURM_JOB_ID}",
        "# After scancel the job is no longer RUNNING, and stays where it is.",
        'if [ "$word" = again ] && [ "$(squeue --noheader --jobs="$job" --format=%T)" = RUNNING ]; then',
        '    scontrol requeue "$job"',
        "fi",
    ]
    return [
        "trap '' TERM",
        f'{turns} begin "$notes" "$run_dir" || exit',
        *([look] if look else []),
        "trap : TERM  # the ranks hear it from Slurm; this script stays to see how they end",
        step,
        "code=$?",
        "trap '' TERM",
        f'word=$({turns} end "$notes" "$run_dir" "$code")',
        "code=$?",
        *(again if cluster.requeue else []),
        'exit "$code"',
        "",
    ]

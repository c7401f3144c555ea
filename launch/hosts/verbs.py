"""Runs on hosts that are reached by ssh: what would be started, starting it, and afterwards status, logs and stop.

Owns the verbs of ``cpt launch`` for this kind. Refuses to start on fewer hosts than were asked for.
"""

import os
import shlex
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from cpt.heartbeats import read_beats
from cpt.problems import ConfigError, Problem
from cpt.rundir import DataError, RunDir
from launch.cluster import HostsCluster, exported, hosts_of
from launch.hostfile import Host
from launch.hosts.deepspeed_command import LOST_SECONDS, launcher_environment
from launch.hosts.launcher import HostsLauncher
from launch.hosts.one_start import build_start, check_tools, commands_of
from launch.hosts.remote import ssh_arguments
from launch.local.devices import Usable
from launch.local.supervise import Job, start_once, supervise
from launch.record import Launched, LaunchJob
from launch.run_folder import patiently, plain_file

TAIL_LINES = 200
LOOK_SECONDS = 0.5
LINE_LENGTH = 76
HEADS = ("host", "ranks", "slots (GPUs)")
CLOCK_SECONDS = 3600.0  # so far a clock may be set while a job runs


@dataclass(frozen=True)
class Care:
    """How a run is looked after. ``fits``: whether a step's rows divide into so many ranks; ``max_restarts``: None: it
    is started once; ``command``: for a person, to go on with.
    """

    fits: Callable[[int], bool]
    hang_seconds: float
    max_restarts: int | None
    command: str


def describe(cluster: HostsCluster, job: LaunchJob, hosts: Sequence[Host] = ()) -> dict[str, Any]:
    """What a start would do, as plain JSON; asks no host, starts nothing. ``hosts``: default: all of the cluster's.

    Raises:
        ConfigError: it could not be started so.
    """
    hosts = tuple(hosts) or hosts_of(cluster)
    start = build_start(cluster, job, hosts, arguments=job.arguments, present={})
    per_host, first = len(hosts[0].slots), hosts[0].name
    given = {"MASTER_ADDR": start.master_address, "MASTER_PORT": str(start.master_port), **start.environment}
    world = {"WORLD_SIZE": str(len(hosts) * per_host), "LOCAL_SIZE": str(per_host)}
    at_start = {} if cluster.master_address else {"master_address": f"that of {first} on the interface"}
    if not cluster.interface:
        at_start["interface"] = "the one that the names of all hosts lead to, else left to NCCL and gloo"
    if "OMP_NUM_THREADS" not in {**cluster.env, **exported(cluster, os.environ)}:
        at_start["OMP_NUM_THREADS"] = "cores of the smallest host / its ranks"
    ssh = {"PDSH_SSH_ARGS_APPEND": launcher_environment(cluster, start, os.environ)["PDSH_SSH_ARGS_APPEND"]}
    return {
        "kind": "hosts",
        "name": job.name,
        "run_dir": str(job.run_dir),
        "continues": job.arguments == job.again,
        "launcher": cluster.launcher,
        "world_size": len(hosts) * per_host,
        "hosts": [
            {
                "host": host.name,
                "ranks": [number * per_host + rank for rank in range(per_host)],
                "slots": list(host.slots),
                "environment": {**given, **world, "CROSS_RANK": str(number)},
            }
            for number, host in enumerate(hosts)
        ],
        "master": f"{start.master_address}:{start.master_port}",
        "interface": cluster.interface,
        "decided_at_start": at_start,
        "directory": str(start.directory),
        "python": sys.executable,
        "commands": commands_of(cluster, start),
        "command_environment": {
            "pdsh": {**ssh, "DS_ENV_FILE": str(start.environment_file)},
            "ssh": {},
            "no_ssh": dict(start.environment),
        }[cluster.launcher],
        "ssh": ["ssh", *ssh_arguments(cluster, lost_after=LOST_SECONDS)],
    }


def start(
    cluster: HostsCluster, job: LaunchJob, care: Care, *, hosts: Sequence[Host], node_rank: int | None = None
) -> int:
    """Start the job and stay with it to its end; returns its exit code.

    Raises:
        ConfigError: it cannot be started so.
        OSError: a host does not answer, or what starts the ranks is not installed.
    """
    check_tools(cluster)
    if not node_rank:
        patiently(partial(_remove_old_request, RunDir(job.run_dir).stop_file))
    launcher = HostsLauncher(cluster, job, hosts, node_rank=node_rank)
    places = tuple(host.name for host in hosts for _ in host.slots)
    task = Job(
        run_dir=job.run_dir,
        arguments=job.arguments,
        again=job.again,
        num_processes=len(places),
        fits=lambda number: number % len(hosts[0].slots) == 0 and care.fits(number),
        hang_seconds=care.hang_seconds,
        max_restarts=care.max_restarts or 0,
        places="places on hosts",
        command=care.command,
    )
    usable = launcher.require_all() if node_rank is None else Usable(len(places), places)
    if care.max_restarts is None:
        return start_once(task, usable, launcher)
    return supervise(task, available=launcher.available, launcher=launcher)


def _remove_old_request(stop_file: Path) -> None:
    """Of a job that ended without obeying it."""
    if stop_file.exists():
        print(f"launch: {stop_file} was made before this start: removed", file=sys.stderr, flush=True)
        stop_file.unlink(missing_ok=True)


def check_node_rank(cluster: HostsCluster, hosts: Sequence[Host], node_rank: int, *, supervised: bool) -> None:
    """Raises ConfigError where no host of the cluster file starts its own ranks, or not one of this number."""
    if cluster.launcher != "no_ssh":
        fix = "leave it out: one command starts all hosts"
        raise ConfigError(Problem("--node-rank", node_rank, "is for launcher: no_ssh", fix))
    if not 0 <= node_rank < len(hosts):
        raise ConfigError(Problem("--node-rank", node_rank, f"must be from 0 to {len(hosts) - 1}"))
    if supervised:
        fix = "leave restarts to what runs this command on the hosts; the same command goes on with the run"
        raise ConfigError(Problem("--supervise", None, "with launcher no_ssh no host can start the others", fix))


def status(launched: Launched) -> dict[str, Any]:
    """Whether the launcher is there: ``running``, ``ended``, or ``unknown`` where it is a process of another host."""
    host, pid = launched.details.get("host", ""), int(launched.id)
    state = "unknown" if host != socket.gethostname() else "running" if _is_launcher(pid, launched) else "ended"
    return {"state": state, "launcher": f"process {pid} on {host}", "master": launched.details.get("master", "")}


def _is_launcher(pid: int, launched: Launched) -> bool:
    """Another launch may have been given its number since: that one is younger than the record."""
    latest = datetime.fromisoformat(launched.started).timestamp() + CLOCK_SECONDS
    try:
        process = psutil.Process(pid)
        is_alive = process.status() != psutil.STATUS_ZOMBIE and process.create_time() <= latest
        return is_alive and "launch" in process.cmdline()
    except psutil.Error:
        return False


def logs(launched: Launched, follow: bool) -> Iterator[str]:
    """The last lines of the output; ``follow``: and what comes, until the launcher ends or somebody interrupts.

    Raises:
        DataError: there is none, or it is a link.
    """
    log = Path(launched.log)
    if not os.path.lexists(log):
        raise DataError(f"{log}: not there; nothing was printed, or the folder was moved")
    with open(log, encoding="utf-8", errors="replace", opener=plain_file) as file:
        last = deque(file, maxlen=TAIL_LINES)
        rest = last.pop() if follow and last and not last[-1].endswith("\n") else ""  # its end is still to come
        yield from (line.rstrip("\n") for line in last)
        while follow:
            is_over = status(launched)["state"] == "ended"
            *lines, rest = (rest + file.read()).split("\n")
            yield from lines
            if is_over:
                yield from filter(None, [rest])
                return
            time.sleep(LOOK_SECONDS)


def stop(launched: Launched) -> str:
    """Ask all ranks to save and end, from any host that sees the run folder; returns what was done, in words."""
    rundir = RunDir(Path(launched.details["run_dir"]))
    beats = read_beats(rundir.heartbeats)
    over = bool(beats) and all(beat.state in ("ended", "failed") for beat in beats.values())
    state = status(launched)["state"]
    if state == "ended":
        return "nothing to stop: its launcher has ended"
    if state == "unknown" and over:
        there = f"on {launched.details['host']} it is known whether a supervisor waits to start them again"
        return f"nothing to stop: its ranks have ended; {there}"
    rundir.stop_file.touch()  # a launcher that lives may wait to start ranks again: they obey it then
    return "asked: all ranks save and end after the step they are in; see cpt launch status"


def render(facts: Mapping[str, Any]) -> str:
    """``describe`` for people: the world, what each host is given, and the commands as a shell takes them."""
    first, commands = facts["hosts"][0]["environment"], facts["commands"]
    rows = [(host["host"], _span(host["ranks"]), _span(host["slots"])) for host in facts["hosts"]]
    widths = [max(map(len, column)) for column in zip(HEADS, *rows, strict=True)]
    variables = [f"{name}={shlex.quote(value)}" for name, value in facts["command_environment"].items()]
    parts = [
        [
            f"run folder  {facts['run_dir']}{' (goes on with it)' if facts['continues'] else ''}",
            f"world       {facts['world_size']} ranks on {len(rows)} hosts, {facts['launcher']}, "
            f"interface {facts['interface'] or 'to be chosen'}; rank 0 meets at {facts['master']}",
            f"runs in     {facts['directory']}",
        ],
        ["  ".join(map(str.ljust, row, widths)).rstrip() for row in (HEADS, *rows)],
        [
            "environment of every rank (RANK, LOCAL_RANK and CROSS_RANK differ):",
            *(f"  {name}={value}" for name, value in first.items() if name != "CROSS_RANK"),
        ],
        ["asked of the hosts at the start:", *(f"  {name}: {how}" for name, how in facts["decided_at_start"].items())],
        [
            "command:" if len(commands) == 1 else "commands, one per host:",
            *(_over_lines([*variables, *map(shlex.quote, command)]) for command in commands),
        ],
    ]
    return "\n\n".join("\n".join(part) for part in parts if len(part) > 1)


def _over_lines(words: Sequence[str]) -> str:
    """A command as a shell takes it, broken where a line gets too long for a terminal."""
    lines = [""]
    for word in words:
        if lines[-1] and len(lines[-1]) + len(word) > LINE_LENGTH:
            lines.append(f"    {word}")
        else:
            lines[-1] += f" {word}" if lines[-1] else word
    return " \\\n".join(lines)


def _span(numbers: Sequence[int]) -> str:
    if list(numbers) == list(range(numbers[0], numbers[-1] + 1)) and len(numbers) > 2:
        return f"{numbers[0]} to {numbers[-1]}"
    return ", ".join(map(str, numbers))

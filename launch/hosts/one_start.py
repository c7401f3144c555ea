"""One start of a job on its hosts, put together: what the cluster file says and what the hosts answered.

Owns the choice of network interface, master address and threads, and the files that DeepSpeed's launcher reads. What
only the hosts know is left open where they were not asked, as in a dry run.
"""

import os
import shutil
from collections.abc import Mapping, Sequence

from cpt.problems import ConfigError, Problem
from cpt.rundir import RunDir, write_atomic
from launch.cluster import HostsCluster
from launch.hostfile import Host, render_hostfile
from launch.hosts.answer import TAG, Present
from launch.hosts.deepspeed_command import (
    Start,
    check_words,
    host_command,
    pdsh_command,
    rank_environment,
    render_environment,
    ssh_command,
)
from launch.hosts.roll_call import common_interface
from launch.local.ranks import CHANNEL
from launch.record import LaunchJob


def build_start(
    cluster: HostsCluster,
    job: LaunchJob,
    hosts: tuple[Host, ...],
    *,
    arguments: Sequence[str],
    present: Mapping[str, Present],
) -> Start:
    """One start. What only the hosts know, their addresses and cores, is left open where they were not asked.

    Raises:
        ConfigError: they have no such interface, or a word that cannot be handed to them.
    """
    interface = cluster.interface or (common_interface(hosts, present) if present else None)
    without = [host for host in hosts if present and interface and interface not in present[host.name].addresses]
    if without:
        seen = "; ".join(f"{host.name} has {', '.join(present[host.name].addresses)}" for host in without[:4])
        raise ConfigError(Problem("interface", interface, f"has no IPv4 address there: {seen}"))
    cores = min((each.cpus for each in present.values()), default=os.cpu_count() or 1)
    threads = max(1, cores // len(hosts[0].slots))
    environment = rank_environment(cluster, os.environ, interface=interface, threads=threads)
    run_dir = str(job.run_dir)
    start = Start(
        hosts=hosts,
        master_address=_master_address(cluster, hosts[0], present, interface),
        master_port=cluster.master_port,
        arguments=tuple(arguments),
        environment={**environment, TAG: run_dir, CHANNEL: "1"},
        directory=job.directory,
        folder=RunDir(job.run_dir).launch,
    )
    check_words(start)
    return start


def _master_address(cluster: HostsCluster, first: Host, present: Mapping[str, Present], interface: str | None) -> str:
    if cluster.master_address:
        return cluster.master_address
    return present[first.name].addresses[interface] if present and interface else first.name


def commands_of(cluster: HostsCluster, start: Start) -> list[list[str]]:
    """What is run, on this machine or, for no_ssh, on each of the hosts."""
    numbers = range(len(start.hosts))
    if cluster.launcher == "pdsh":
        return [pdsh_command(start)]
    if cluster.launcher == "ssh":
        return [ssh_command(cluster, start, number) for number in numbers]
    return [host_command(start, number) for number in numbers]


def write_files(start: Start) -> None:
    """What DeepSpeed reads: the hostfile, and the file of variables."""
    start.folder.mkdir(parents=True, exist_ok=True)
    write_atomic(start.hostfile, render_hostfile(start.hosts))
    write_atomic(start.environment_file, render_environment(start.environment))


def check_tools(cluster: HostsCluster) -> None:
    """Raises OSError where what starts the ranks is not installed here."""
    for tool in {"pdsh": ("pdsh", "ssh"), "ssh": ("ssh",), "no_ssh": ()}[cluster.launcher]:
        if shutil.which(tool) is None:
            fix = "install it, or set launcher: ssh" if tool == "pdsh" else "install an OpenSSH client"
            raise OSError(f"launcher: {cluster.launcher} needs {tool}, which is not installed here: {fix}")

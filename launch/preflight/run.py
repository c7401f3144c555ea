"""Before a job is started on its hosts: ask all of them at once what they are, compare, and try the network.

Owns the order of things and what is asked of a host: ``facts`` first, judged by ``rules``; then, where nothing failed,
``bandwidth`` over the interface and port of the job, judged by ``slow_hosts``. Starts nothing of the job and leaves
nothing behind. Refuses to go on to the network where a host is wrong already: the others would wait for it.
"""

import contextlib
import os
import shlex
import shutil
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from launch.cluster import HostsCluster, code_path
from launch.hostfile import Host
from launch.hosts.answer import Present
from launch.hosts.remote import (
    LOOPBACK,
    SSH_FAILED,
    Answer,
    Transport,
    in_folder,
    last_object,
    run_everywhere,
    transport_for,
)
from launch.hosts.roll_call import common_interface
from launch.preflight.checks import Check, Report
from launch.preflight.facts import PROGRAMS, code_hash, job_facts
from launch.preflight.rules import Asked, ByHost, judge, same_code
from launch.preflight.slow_hosts import Link, Links, best_links, late_links, rate, slow_hosts
from launch.record import LaunchJob

FACTS_SECONDS = 60.0
NETWORK_SECONDS = 60.0
SHOWN_RATES = 8
BLOCKED = {
    "join": "not every host reaches rank 0",
    "group": "hosts reach the port of rank 0, but not each other at ports that the kernel chooses",
    "links": "a connection between two hosts broke off or stood still",
    "gpu": "a GPU does not compute",
}


def run_preflight(
    cluster: HostsCluster,
    job: LaunchJob,
    hosts: Sequence[Host],
    *,
    environment: Mapping[str, str] | None = None,
    transport: Transport | None = None,
) -> Report:
    """Every check, of one host or of many. ``environment``: what the ranks will be given, of the cluster file and of
    this shell; ``transport``: how a host is reached, by default as the cluster file says.

    ``details["master_address"]`` of the report is the first host's address, on the interface where one is stated.

    Raises:
        OSError: nothing can be written beside the run folder.
    """
    given = {**code_path(os.environ), **(environment or {})}
    run = _Run(cluster, job, tuple(hosts), given, transport or transport_for(cluster))
    began = time.monotonic()
    with _left_in(job.run_dir) as shared:
        answers = run.everywhere(partial(run.facts_command, shared), FACTS_SECONDS)
    facts, failures = read_facts(answers)
    asked = run.asked()
    alike = same_code(asked.code, facts)
    interface = interface_of(cluster, hosts, alike)
    checks = [answer_check(cluster, answers, failures), *judge(replace(asked, interface=interface), facts)]
    details: dict[str, Any] = {"facts": facts, "facts_seconds": round(time.monotonic() - began, 2)}
    details["master_address"] = master = master_address(cluster, hosts[0].name, interface, alike)
    if all(check.status != "fail" for check in checks):
        began = time.monotonic()
        network, figures = run.network(master, interface)
        checks.append(network)
        details |= {"network": figures, "network_seconds": round(time.monotonic() - began, 2)}
    return Report(checks, details)


@dataclass(frozen=True)
class _Run:
    cluster: HostsCluster
    job: LaunchJob
    hosts: tuple[Host, ...]
    environment: Mapping[str, str]
    transport: Transport

    def asked(self) -> Asked:
        """What this machine says itself."""
        with contextlib.chdir(self.job.directory):
            config = job_facts(self.job.arguments)["config"]
        programs = frozenset(name for name in PROGRAMS if shutil.which(name))
        own = config.get("hash", config.get("error", ""))
        return Asked(self.cluster, self.hosts, code_hash(), own, programs)

    def everywhere(self, command: Any, seconds: float, at_once: int = 64) -> dict[str, Answer]:
        commands = {host.name: command(rank) for rank, host in enumerate(self.hosts)}
        return run_everywhere(commands, self.transport, seconds=seconds, at_once=at_once)

    def facts_command(self, shared: Path, rank: int) -> list[str]:
        options = ["--shared", str(shared)]
        options += ["--port", str(self.cluster.master_port)] if rank == 0 else []
        command = [sys.executable, "-m", "launch.preflight.facts", *options, "--", *self.job.arguments]
        return in_folder(self.job.directory, self.environment, command)

    def network_command(self, master: str, interface: str | None, rank: int) -> list[str]:
        given = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, self.hosts[rank].slots))}
        given |= {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface} if interface else {}
        options = {"rank": rank, "hosts": len(self.hosts), "master": master, "port": self.cluster.master_port}
        words = [word for option, value in options.items() for word in (f"--{option}", str(value))]
        command = [sys.executable, "-m", "launch.preflight.bandwidth", *words]
        return in_folder(self.job.directory, {**given, **self.environment}, command)

    def network(self, master: str, interface: str | None) -> tuple[Check, dict[str, Any]]:
        if len(self.hosts) == 1:
            return Check("network", "pass", "one host: nothing to cross"), {}
        if self.cluster.launcher == "no_ssh":
            return Check("network", "warn", "not tried: hosts are started by hand", "see that all have started"), {}
        answers = self.everywhere(partial(self.network_command, master, interface), NETWORK_SECONDS, len(self.hosts))
        return network_check(answers, master, self.cluster.master_port)


@contextlib.contextmanager
def _left_in(run_dir: Path) -> Iterator[Path]:
    """A file beside the run's files that holds its own name: a host that reads it sees the same folder."""
    folder = run_dir if run_dir.is_dir() else run_dir.parent
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f".preflight-{uuid.uuid4().hex}"
    path.write_text(path.name, encoding="utf-8")
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def read_facts(answers: Mapping[str, Answer]) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Facts of the hosts that gave them, with ``skew_seconds`` of their clocks; and why the others gave none."""
    facts, failures = {}, {}
    for host, answer in answers.items():
        found = last_object(answer.output)
        if answer.why or found is None or not {"code", "clock"} <= found.keys():
            failures[host] = answer.why or "it answered with something else than facts"
            continue
        # Printed and heard at almost the same time: the way back is all that lies between.
        found["skew_seconds"] = round(found["clock"] - (answer.first_output or found["clock"]), 3)
        facts[host] = found
    return facts, failures


def answer_check(cluster: HostsCluster, answers: Mapping[str, Answer], failures: Mapping[str, str]) -> Check:
    """A host that was reached but has no such Python or package is the user's to fix; any other is not."""
    if not failures:
        slowest = max(answers.values(), key=lambda answer: answer.seconds)
        found = f"{len(answers)} of {len(answers)}, the last, {slowest.host}, after {slowest.seconds:.1f} s"
        return Check("hosts answer", "pass", found)
    found = f"{len(answers) - len(failures)} of {len(answers)}"
    reached = all(answers[host].code not in (None, SSH_FAILED) for host in failures)
    if reached:
        fix = f"install cpt there as here ({sys.executable}), and the run's files at the same paths"
        return Check("hosts answer", "fail", found, fix, failures, "user")
    first = next(host for host in failures if answers[host].code in (None, SSH_FAILED))
    command = transport_for(cluster)(first, ["true"])
    return Check("hosts answer", "fail", found, f"this must work without a password: {shlex.join(command)}", failures)


def interface_of(cluster: HostsCluster, hosts: Sequence[Host], facts: ByHost) -> str | None:
    """What ranks will talk over: as stated, else the one that the names of all hosts lead to, if all answered."""
    if cluster.interface or len(facts) < len(hosts):
        return cluster.interface
    return common_interface(hosts, {host: Present(its["addresses"], its["cpus"], 0) for host, its in facts.items()})


def master_address(cluster: HostsCluster, first: str, interface: str | None, facts: ByHost) -> str:
    """Where rank 0 listens: as stated, else the first host's address on the interface, else its name."""
    on_interface = facts.get(first, {}).get("addresses", {}).get(interface)
    return str(cluster.master_address or on_interface or ("127.0.0.1" if first in LOOPBACK else first))


def network_check(answers: Mapping[str, Answer], master: str, port: int) -> tuple[Check, dict[str, Any]]:
    """Rates by host, slow hosts named; or which hosts did not come through and what is in their way."""
    names = list(answers)
    told = {host: last_object(answer.output) or {} for host, answer in answers.items()}
    failed = {
        host: f"{told[host].get('stage', 'start')}: {told[host].get('error') or answer.why or 'it did not finish'}"
        for host, answer in answers.items()
        if told[host].get("stage") != "done"
    }
    if failed:
        stages = {told[host].get("stage", "start") for host in failed}
        found = next((words for stage, words in BLOCKED.items() if stage in stages), "no all-reduce over all hosts")
        fix = f"open TCP port {port} on {names[0]} ({master}), and all ports between the hosts on their interface"
        return Check("network", "fail", found, fix, failed), {}
    links: Links = {
        host: {names[int(rank)]: Link(**link) for rank, link in told[host]["links"].items()} for host in names
    }
    best, slow = best_links(links), slow_hosts(links)
    total = float(told[names[0]]["all_reduce_bytes_per_second"])
    backend = told[names[0]]["backend"]
    figures = {"all_reduce_bytes_per_second": total, "backend": backend, "links": {h: told[h]["links"] for h in names}}
    found = f"all-reduce {rate(total)} at each host ({backend})"
    shown = {host: rate(link.bytes_per_second) for host, link in best.items()} if len(names) <= SHOWN_RATES else {}
    if slow:
        found += f"; slow: {', '.join(slow)}"
        fix = "look at its link (ethtool, cable, switch port), or leave it out with --exclude"
        return Check("network", "warn", found, fix, {**shown, **slow}), figures
    if late_links(links):
        return Check("network", "warn", f"{found}; long ways between hosts", "place the hosts together", shown), figures
    return Check("network", "pass", found, "", shown), figures

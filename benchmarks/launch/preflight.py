"""Claim: preflight of 64 hosts takes at most 10 s, its memory grows with the number of hosts alone, and it names the
host that is wrong.

    python -m benchmarks.launch.preflight      writes benchmarks/results/launch_preflight.json

The hosts are described: a transport waits as long as ssh does (0.2 to 0.6 s to log in, drawn once per host and command,
and the start of Python or torch besides) and then says what a host would. Two of the hosts run the real program of
facts, whose answer also stands for the others; 64 real ones would compete for one machine's cores. The network's
figures are described for all. What runs here for real: 64 processes at a time, their output, every rule, the naming of
the slow host, the table. Memory is Python's own peak; an ssh client beside it takes 5 to 10 MB per host asked at once,
of which there are 64 at most.
"""

import json
import random
import socket
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.engine.result import write_result
from launch.cluster import HostsCluster
from launch.hostfile import Host
from launch.hosts.remote import CONNECT_SECONDS, Transport
from launch.preflight.checks import Report, render_report
from launch.preflight.facts import collect
from launch.preflight.run import run_preflight
from launch.record import LaunchJob

NUM_HOSTS, REAL = 64, 2
LOGIN_SECONDS = (0.2, 0.6)
FACTS_SECONDS, NETWORK_SECONDS = 0.6, 4.0  # Python, or torch from a cold disk and a few megabytes, on a host of its own
MEMORY_HOSTS = (16, 64, 256)
BAR_SECONDS = 10.0
# Waits, then the described answer with the clock of now; or what ssh says of a host that drops packets.
ANSWER = """sleep "$1"; printf '%s"clock": %s}\\n' "$(cat "$2")" "$(date +%s.%N)" """
DEAD = """sleep "$1"; echo "ssh: connect to host $2 port 22: Connection timed out" >&2; exit 255"""


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        job = write_job(folder)
        lab = Lab(folder, job)
        cases = {
            "slow_host": lab.measure(NUM_HOSTS, slow=41),
            "other_code": lab.measure(NUM_HOSTS, wrong=17),
            "dead_host": lab.measure(NUM_HOSTS, dead=23),
        }
        peaks = {hosts: lab.peak_bytes(hosts) for hosts in MEMORY_HOSTS}
    small, usual, large = MEMORY_HOSTS
    result = {
        "hosts": NUM_HOSTS,
        "real_facts": REAL,
        "seconds": max(case["seconds"] for case in cases.values()),
        "bar_seconds": BAR_SECONDS,
        "cases": cases,
        "peak_kilobytes": {str(hosts): round(peak / 1e3) for hosts, peak in peaks.items()},
        "kilobytes_per_host": round((peaks[usual] - peaks[small]) / (usual - small) / 1e3, 1),
        "kilobytes_per_host_of_more": round((peaks[large] - peaks[usual]) / (large - usual) / 1e3, 1),
    }
    write_result("launch_preflight.json", result)
    missed = [name for name, case in cases.items() if not case["named"] or case["seconds"] > BAR_SECONDS]
    if missed or result["kilobytes_per_host_of_more"] > 1.5 * result["kilobytes_per_host"]:
        raise SystemExit(f"missed: {missed or 'memory'}")


def write_job(folder: Path) -> LaunchJob:
    """A run over two tiny stores."""
    from cpt.data.token_store import StoreLabel, TokenizerFacts, write_split

    for source, domain in (("prose", "general"), ("code", "code")):
        for split in ("train", "heldout"):
            label = StoreLabel(source, domain, split, 64, 0, TokenizerFacts("tiny", "tiny" * 8, "tiny"))
            write_split(folder / source / split, label, [[[1, 2, 3, 0]] * 100])
    run = {
        "run": {"name": "r", "dir": str(folder / "runs")},
        "model": {"fresh": {"model_type": "llama"}},
        "data": {"stores": {source: str(folder / source) for source in ("prose", "code")}, "seq_len": 32},
        "train": {"tokens": 2048, "global_batch_tokens": 256, "micro_batch_size": 4, "peak_lr": 0.01},
    }
    (folder / "r.yaml").write_text(yaml.safe_dump(run))
    return LaunchJob("r", folder / "runs" / "r", (str(folder / "r.yaml"),), (), Path.cwd())


class Lab:
    """Described hosts n0, n1, ...; the first ones run the real program of facts."""

    def __init__(self, folder: Path, job: LaunchJob) -> None:
        self._folder, self._job = folder, job
        with socket.create_server(("", 0)) as listener:
            self._port = listener.getsockname()[1]

    def measure(self, num_hosts: int, **faults: int) -> dict[str, Any]:
        """Seconds of preflight and whether it named the host at fault, of ``slow``, ``wrong`` and ``dead``."""
        transport = self._transport(num_hosts, waits=True, **faults)
        began = time.monotonic()
        report = self._run(num_hosts, transport)
        seconds = time.monotonic() - began
        render_report(report)
        culprit = f"n{next(iter(faults.values()))}"
        named = sorted({host for check in report.checks if check.status != "pass" for host in check.hosts})
        return {"seconds": round(seconds, 2), "exit_code": report.exit_code, "named": named == [culprit]}

    def peak_bytes(self, num_hosts: int) -> int:
        transport = self._transport(num_hosts, waits=False)
        tracemalloc.start()
        report = self._run(num_hosts, transport)
        render_report(report)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert report.ok, [(check.name, check.found) for check in report.failed]
        return peak

    def _run(self, num_hosts: int, transport: Transport) -> Report:
        cluster = HostsCluster(launcher="ssh", master_port=self._port, master_address="10.0.0.1", interface="lo")
        return run_preflight(cluster, self._job, hosts_of(num_hosts), transport=transport)

    def _transport(
        self, num_hosts: int, *, waits: bool, slow: int = -1, wrong: int = -1, dead: int = -1
    ) -> Callable[[str, Sequence[str]], list[str]]:
        draw, own = random.Random(0), {**collect(self._job.arguments), "shared": True}
        for rank in range(num_hosts):
            changes: dict[str, Any] = {"code": "0ther"} if rank == wrong else {}
            changes |= {"addresses": {"lo": f"10.0.0.{rank + 1}"}}
            changes |= {"port": {"number": self._port} if rank == 0 else None}
            self._describe(f"n{rank}.facts", {**own, **changes})
            self._describe(f"n{rank}.network", network_of(rank, num_hosts, slow))

        def run(host: str, command: Sequence[str]) -> list[str]:
            login = draw.uniform(*LOGIN_SECONDS) if waits else 0.0
            network = "launch.preflight.bandwidth" in command
            if host == f"n{dead}":
                return ["sh", "-c", DEAD, "sh", str(CONNECT_SECONDS), host]
            if host in [f"n{rank}" for rank in range(REAL)] and not network:
                return ["sh", "-c", 'sleep "$1"; shift; exec "$@"', "sh", f"{login:.3f}", *command]
            work = (NETWORK_SECONDS if network else FACTS_SECONDS) if waits else 0.0
            file = self._folder / f"{host}.{'network' if network else 'facts'}"
            return ["sh", "-c", ANSWER, "sh", f"{login + work:.3f}", str(file)]

        return run

    def _describe(self, name: str, answer: dict[str, Any]) -> None:
        """JSON whose last brace is left open, for the clock."""
        (self._folder / name).write_text(json.dumps(answer)[:-1] + ", ")


def hosts_of(num_hosts: int) -> list[Host]:
    return [Host(f"n{rank}", (0,)) for rank in range(num_hosts)]


def network_of(rank: int, num_hosts: int, slow: int) -> dict[str, Any]:
    """What a host of 25 Gbit/s measures to its neighbours, and one whose link fell back to 1 Gbit/s."""
    links = {}
    for peer in {(rank - 1) % num_hosts, (rank + 1) % num_hosts}:
        rate = 1.1e8 if slow in (rank, peer) else 2.9e9
        links[str(peer)] = {"bytes_per_second": rate, "round_trip_seconds": 2e-4}
    return {"stage": "done", "backend": "gloo", "links": links, "all_reduce_bytes_per_second": 1.1e8}


if __name__ == "__main__":
    main()

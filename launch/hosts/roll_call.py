"""Before and after every start: which hosts answer, where they can be reached, and nothing of another start is left.

All hosts are asked at once, for a bounded time; each answers by ``launch.hosts.answer``. One that does not is told with
the reason, never left out in silence.
"""

import os
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from launch.cluster import HostsCluster, code_path
from launch.hostfile import Host
from launch.hosts.answer import Present
from launch.hosts.remote import in_folder, last_object, run_everywhere, transport_for

CALL_SECONDS = 20.0


def call(cluster: HostsCluster, hosts: Sequence[Host], *, directory: Path, run_dir: Path) -> dict[str, Present | str]:
    """Ask every host, in parallel and for a bounded time; a host that is not there gives the reason in words. What
    earlier starts of this run have left there is killed.
    """
    words = [sys.executable, "-m", "launch.hosts.answer", str(run_dir)]
    command = in_folder(directory, code_path(os.environ), words)
    answers = run_everywhere({host.name: command for host in hosts}, transport_for(cluster), seconds=CALL_SECONDS)
    return {host: answer.why or _parse(answer.output) for host, answer in answers.items()}


def _parse(output: str) -> Present | str:
    try:
        return Present(**(last_object(output) or {}))
    except TypeError:
        return f"answered with {output.strip()[-200:]!r}: is it the same code?"


def common_interface(hosts: Sequence[Host], present: Mapping[str, Present]) -> str | None:
    """The interface that every host's name leads to, if it has one name on all of them."""
    found = {_interface_of(host.name, present[host.name]) for host in hosts}
    return found.pop() if len(found) == 1 else None


def _interface_of(name: str, present: Present) -> str | None:
    try:
        address = socket.gethostbyname(name)
    except OSError:
        return None
    return next((interface for interface, own in present.addresses.items() if own == address), None)

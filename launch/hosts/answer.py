"""What one host answers when it is called (``python -m launch.hosts.answer RUN_DIR``): its place, and nothing is left.

What a start has left here, ranks and DeepSpeed's launchers, is known by a variable that all of it was given (``TAG``),
so that no other job of this user is touched. Processes of another network namespace belong to another host. Imports
little: a host that is called may be slow, and all wait for it.
"""

import argparse
import json
import os
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass

import psutil

TAG = "CPT_LAUNCH"  # in the environment of all that a launch starts on a host: the run's folder
END_SECONDS = 5.0


@dataclass(frozen=True)
class Present:
    """A host that answered. ``addresses``: IPv4, by network interface; ``ended``: processes of an earlier start."""

    addresses: Mapping[str, str]
    cpus: int
    ended: int


def addresses() -> dict[str, str]:
    """IPv4, by network interface."""
    found = psutil.net_if_addrs()
    return {name: each.address for name, entries in found.items() for each in entries if each.family == socket.AF_INET}


def end_leftovers(run_dir: str) -> int:
    """SIGKILL to every process that a launch of this run has started on this host; how many there were."""
    ended: set[int] = set()
    deadline = time.monotonic() + END_SECONDS
    while (left := list(_started_by(run_dir))) and time.monotonic() < deadline:
        for process in left:
            with suppress(psutil.Error):
                process.kill()
                ended.add(process.pid)
        psutil.wait_procs(left, timeout=0.5)
    return len(ended)


def _started_by(run_dir: str) -> list[psutil.Process]:
    here, found = _network(os.getpid()), []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            is_own = process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE
            if is_own and process.environ().get(TAG) == run_dir and _network(process.pid) == here:
                found.append(process)
    return found


def _network(pid: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/ns/net")
    except OSError:  # not Linux, or not ours
        return ""


def main() -> None:
    parser = argparse.ArgumentParser(prog="launch.hosts.answer", description="Answer for this host.")
    parser.add_argument("run_dir", metavar="RUN_DIR", help="what launches of this run have left here is killed")
    run_dir = parser.parse_args().run_dir
    print(json.dumps(asdict(Present(addresses(), os.cpu_count() or 1, end_leftovers(run_dir)))), flush=True)


if __name__ == "__main__":
    main()

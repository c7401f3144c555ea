"""Start several ranks on this machine through the deepspeed launcher, and pass signals on to them.

The launcher itself, when terminated, leaves its ranks running or kills them after 30 seconds; so a signal that arrives here goes straight
to the ranks, which save and end with 143, a code that the launcher hands up.
"""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from types import FrameType

import psutil

TRAIN_MODULE = "cpt.train.main"


def launcher_command(arguments: Sequence[str], *, num_processes: int, port: int) -> list[str]:
    """The deepspeed launcher's argument list for ``num_processes`` ranks on this machine."""
    local_only = ["--hostfile="]  # a hostfile lying about must not turn a local run into a remote one
    ranks = ["--num_gpus", str(num_processes), "--master_port", str(port), "--log_level", "error"]
    return [sys.executable, "-m", "deepspeed.launcher.runner", *local_only, *ranks, "--module", TRAIN_MODULE, *arguments]


def run_local(arguments: Sequence[str], *, num_processes: int) -> int:
    """Train with ``num_processes`` ranks; returns their exit code."""
    environment = dict(os.environ)
    # Without this, every rank starts a thread per core and they fight over the same ones.
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_processes)))
    command = launcher_command(arguments, num_processes=num_processes, port=_free_port())
    process = subprocess.Popen(command, env=environment)

    def pass_on(number: int, frame: FrameType | None) -> None:
        for rank in _ranks_under(process.pid):
            rank.send_signal(number)

    previous = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        code = process.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return code if code >= 0 else 128 - code  # killed by a signal: the shell's convention, never 0


def _ranks_under(pid: int) -> list[psutil.Process]:
    """The training processes among the launcher's descendants: those that the launcher gave a rank."""
    ranks = []
    for child in psutil.Process(pid).children(recursive=True):
        try:
            command = child.cmdline()
        except psutil.NoSuchProcess:
            continue
        if TRAIN_MODULE in command and any(part.startswith("--local_rank") for part in command):
            ranks.append(child)
    return ranks


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

"""Start several ranks on this machine through the deepspeed launcher, and pass signals on to them.

The launcher itself, when terminated, leaves its ranks running or kills them after 30 seconds; so a signal that arrives
here goes straight to the ranks, which save and end with 143, a code that the launcher hands up. Before there are ranks
there is nothing to save, and the launcher is stopped. The ranks get it from here alone: they are not in the terminal's
process group, where Ctrl-C would reach them twice, and the second signal kills.
"""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType

import psutil

TRAIN_MODULE = "cpt.train.main"
PASSED_ON = (signal.SIGTERM, signal.SIGINT)


def launcher_command(arguments: Sequence[str], *, num_processes: int, port: int) -> list[str]:
    """The deepspeed launcher's argument list for ``num_processes`` ranks on this machine."""
    local_only = ["--hostfile="]  # a hostfile lying about must not turn a local run into a remote one
    ranks = ["--num_gpus", str(num_processes), "--master_port", str(port), "--log_level", "error"]
    return [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        *local_only,
        *ranks,
        "--module",
        TRAIN_MODULE,
        *arguments,
    ]


def run_local(arguments: Sequence[str], *, num_processes: int) -> int:
    """Train with ``num_processes`` ranks; returns their exit code."""
    environment = dict(os.environ)
    # Without this, every rank starts a thread per core and they fight over the same ones.
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_processes)))
    command = launcher_command(arguments, num_processes=num_processes, port=_free_port())
    process = subprocess.Popen(command, env=environment, start_new_session=True)

    def pass_on(number: int, frame: FrameType | None) -> None:
        _signal_job(process.pid, number)

    previous = {number: signal.signal(number, pass_on) for number in PASSED_ON}
    try:
        code = process.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return exit_code(code)


def exit_code(code: int) -> int:
    """The shell's convention, 128 + n, for what signal n killed: the launcher (-n here) or a rank (256 - n by the
    launcher). But 143 is what a rank says itself after a complete save, so one that SIGTERM killed unsaved gives 3.
    """
    killed_by = -code if code < 0 else 256 - code if code > 256 - signal.NSIG else None
    if killed_by is None:
        return code
    return 3 if killed_by == signal.SIGTERM else 128 + killed_by


def _signal_job(pid: int, number: int) -> None:
    """Signal the ranks under the launcher ``pid``; while it has started none, itself and whatever it has started."""
    with suppress(psutil.NoSuchProcess):
        launcher = psutil.Process(pid)
        below = launcher.children(recursive=True)
        for process in [child for child in below if _is_rank(child)] or [*below, launcher]:
            with suppress(psutil.NoSuchProcess):  # it may end by itself in this moment
                process.send_signal(number)


def _is_rank(process: psutil.Process) -> bool:
    """The launcher gives each training process its rank on the command line."""
    with suppress(psutil.NoSuchProcess):
        command = process.cmdline()
        return TRAIN_MODULE in command and any(part.startswith("--local_rank") for part in command)
    return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

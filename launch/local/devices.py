"""Which GPUs of this machine work now. Asked in processes of their own: the asker needs no torch, and a broken GPU that
hangs or kills its process must not take the supervisor with it.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

PROBE = "import torch; torch.ones(1024, device='cuda').sum().item()"
PROBE_SECONDS = 120.0


@dataclass(frozen=True)
class Usable:
    """How many processes this machine can run now, and on which devices (None: on no GPU in particular)."""

    count: int
    devices: tuple[str, ...] | None = None


def usable_devices(wanted: int) -> Usable:
    """The GPUs that compute now; on a machine without any, as many processes as are ``wanted``."""
    names = visible_gpus()
    if not names:
        return Usable(wanted)
    working = tuple(name for name, works in zip(names, probe(names), strict=True) if works)
    return Usable(len(working), working)


def visible_gpus(list_gpus: Callable[[], str] | None = None) -> list[str]:
    """CUDA_VISIBLE_DEVICES, or an index for each line of ``nvidia-smi -L``."""
    stated = os.environ.get("CUDA_VISIBLE_DEVICES")
    if stated is not None:
        return [name.strip() for name in stated.split(",") if name.strip() not in ("", "-1")]
    lines = (list_gpus or _nvidia_smi)().splitlines()
    return [str(index) for index, _ in enumerate(line for line in lines if line.startswith("GPU "))]


def probe(names: Sequence[str], command: Sequence[str] = (sys.executable, "-c", PROBE)) -> list[bool]:
    """Whether each device adds up some numbers, all asked at once."""
    asked = [
        subprocess.Popen(
            command,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": name},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for name in names
    ]
    return [_answer(process) for process in asked]


def _answer(process: subprocess.Popen[bytes]) -> bool:
    try:
        return process.wait(timeout=PROBE_SECONDS) == 0
    except subprocess.TimeoutExpired:
        process.kill()  # not waited for: a process in the grip of a broken driver may not even die
        return False


def _nvidia_smi() -> str:
    with suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=PROBE_SECONDS, check=False)
        return done.stdout
    return ""

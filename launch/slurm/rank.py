"""One rank of a Slurm job: ``srun python -m launch.slurm.rank RUN_DIR RUN.yaml ...`` or ``... --resume RUN_DIR``.

Tells the trainer its place by the names that torch knows, and Slurm that a rank which saved and stopped has not failed:
srun, like the deepspeed launcher, would end the others for that, rank 0 at its last words among them. How a job ended
is read from the run folder (``launch.slurm.turns``). Started by the deepspeed launcher it keeps the place it was given.
"""

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

from cpt.exit_codes import EXIT_STOPPED, exit_code
from launch.local.ranks import LAUNCHER_PID, TRAIN_MODULE
from launch.slurm.turns import note_request

PLACES = {"RANK": "SLURM_PROCID", "LOCAL_RANK": "SLURM_LOCALID", "WORLD_SIZE": "SLURM_NTASKS"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Train as one rank; the trainer's exit code, and 0 where it was asked to stop and did."""
    parser = argparse.ArgumentParser(prog="launch.slurm.rank", description="One rank of a Slurm job.")
    parser.add_argument("--local_rank", type=int, help="given by the deepspeed launcher")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("trainer", nargs=argparse.REMAINDER, help="arguments of cpt.train.main")
    options = parser.parse_args(arguments)
    given, by_srun = dict(os.environ), options.local_rank is None
    place = place_of(given) if by_srun else {}
    threads = cores_of(given, ranks=1 if by_srun else int(given["LOCAL_WORLD_SIZE"]))
    environment = {"OMP_NUM_THREADS": str(threads), **given, **place}
    rank = _Rank(options.run_dir if environment["RANK"] == "0" else None)
    return rank.run([sys.executable, "-m", TRAIN_MODULE, *options.trainer], environment)


def place_of(slurm: Mapping[str, str]) -> dict[str, str]:
    """The place of a task in its step."""
    return {name: slurm[theirs] for name, theirs in PLACES.items()}


def cores_of(slurm: Mapping[str, str], *, ranks: int) -> int:
    """A rank's share: of the cores of its task, which has so many ``ranks``, else of the node's. Without it every rank
    starts a thread per core, and they fight over the same ones.
    """
    if "SLURM_CPUS_PER_TASK" in slurm:
        return max(1, int(slurm["SLURM_CPUS_PER_TASK"]) // ranks)
    return max(1, (os.cpu_count() or 1) // int(slurm["LOCAL_WORLD_SIZE"]))


class _Rank:
    """The trainer, and whether it was asked to stop."""

    def __init__(self, noted_in: Path | None) -> None:
        self._noted_in = noted_in
        self._trainer: subprocess.Popen[bytes] | None = None
        self._asked = False

    def run(self, command: Sequence[str], environment: Mapping[str, str]) -> int:
        signal.signal(signal.SIGTERM, self._pass_on)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])  # see launch.slurm.node
        if self._asked:
            return 0
        self._trainer = subprocess.Popen(command, env={**environment, LAUNCHER_PID: str(os.getpid())})
        if self._asked:  # the signal came in between
            self._trainer.terminate()
        code = self._trainer.wait()
        stopped = code == EXIT_STOPPED or (self._asked and code == -signal.SIGTERM)  # before it could listen
        return 0 if stopped else exit_code(code)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        if self._noted_in is not None:
            note_request(self._noted_in)
        if self._trainer is not None and self._trainer.returncode is None:
            self._trainer.send_signal(number)


if __name__ == "__main__":
    sys.exit(main())

"""One node of a Slurm job in the deepspeed form: ``srun python -m launch.slurm.node RUN_DIR RUN.yaml ...``.

Runs one deepspeed launcher without ssh. It must not hear SIGTERM, for it kills its ranks half a minute later, whatever
they are saving. So this process hears it for all of them, and asks the run to stop by the file that every run looks
for.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

from cpt.exit_codes import exit_code
from cpt.rundir import RunDir, write_atomic
from launch.slurm.turns import note_request


def main(arguments: Sequence[str] | None = None) -> int:
    """Train with this node's ranks; returns the launcher's exit code, which may be 0 where it was killed."""
    run_dir, *trainer = sys.argv[1:] if arguments is None else arguments
    hostfile = RunDir(Path(run_dir)).launch / f"hostfile.{os.environ['SLURM_NODEID']}"
    hostfile.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(hostfile, hostfile_text(os.environ))

    def ask_to_stop(number: int, frame: FrameType | None) -> None:
        if os.environ["SLURM_NODEID"] == "0":
            note_request(Path(run_dir))
            RunDir(Path(run_dir)).stop_file.touch()

    # A blocked signal stays blocked in the processes that are started; launch.slurm.rank lets it through again.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    launcher = subprocess.Popen(command(os.environ, hostfile, run_dir, trainer))
    signal.signal(signal.SIGTERM, ask_to_stop)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    return exit_code(launcher.wait())


def hostfile_text(slurm: Mapping[str, str]) -> str:
    """As many hosts as the step has nodes. Their names serve to be counted: nothing is reached by them."""
    slots = slurm["LOCAL_WORLD_SIZE"]
    return "".join(f"node{number} slots={slots}\n" for number in range(int(slurm["SLURM_STEP_NUM_NODES"])))


def command(slurm: Mapping[str, str], hostfile: Path, run_dir: str, trainer: Sequence[str]) -> list[str]:
    """The deepspeed launcher for this node."""
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(hostfile), "--no_ssh"]
    place = ["--node_rank", slurm["SLURM_NODEID"]]
    place += ["--master_addr", slurm["MASTER_ADDR"], "--master_port", slurm["MASTER_PORT"]]
    return [*launcher, *place, "--module", "launch.slurm.rank", run_dir, *trainer]


if __name__ == "__main__":
    sys.exit(main())

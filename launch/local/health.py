"""A container's health check: do the ranks that run here still give signs of life?

    python -m launch.local.health [RUN_DIR...]    exit code 0: well, or nothing trains here; 1: hung, which ones and why

Without a run folder: those in ``runs/`` of the working folder. A rank's thread writes its heartbeat at least every five
seconds whatever its main thread does; one that is silent for a minute is stopped, starved or holds Python's lock. Only
processes of this host count, and of those only what they wrote themselves: a file that an earlier container left is
nobody's. Ends nothing: that is done by the ranks' own watchdog, by launchers and by who reads this.
"""

import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from cpt.heartbeats import Beat, beat_file, read_beats
from cpt.rundir import RunDir

SILENT_SECONDS = 60.0


def find_hung(run_dirs: Sequence[Path], *, silent_seconds: float = SILENT_SECONDS) -> list[str]:
    """A line about every rank of this host that is stuck or silent."""
    found = []
    for run_dir in run_dirs:
        folder = RunDir(run_dir).heartbeats
        for rank, beat in sorted(read_beats(folder).items()):
            silent = _silence(beat, folder)
            if silent is None:
                continue
            where = f"{run_dir}: rank {rank} (process {beat.pid}), step {beat.step}, {beat.phase}"
            if beat.state == "stuck":
                found.append(f"{where}: stuck: {beat.message}")
            elif silent > silent_seconds:
                found.append(f"{where}: no sign of life for {silent:.0f} s")
    return found


def _silence(beat: Beat, folder: Path) -> float | None:
    """Seconds since a living process of this host wrote this beat; None where there is no such process."""
    if beat.host != socket.gethostname():
        return None
    try:
        started, written = psutil.Process(beat.pid).create_time(), beat_file(folder, beat.rank).stat().st_mtime
    except (psutil.Error, OSError):
        return None
    return time.time() - written if started <= written else None


def main(arguments: Sequence[str]) -> int:
    run_dirs = [Path(name) for name in arguments] or [path.parent for path in Path("runs").glob("*/heartbeats")]
    hung = find_hung(run_dirs)
    print("\n".join(hung) or "well")
    return int(bool(hung))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Run a command that is to end with the process that started it: ``python -m launch.hosts.keeper COMMAND ...``

pdsh does not notice when the launcher above it is killed, and the job would go on with nobody to look after it. The
keeper holds one end of a pipe; when the other end is closed it kills its process group, pdsh with it. ssh then closes
the ranks' standard input, by which they know: they save and end (``launch.local.ranks``).
"""

import os
import select
import signal
import subprocess
import sys
from collections.abc import Sequence

POLL_MILLISECONDS = 200


def keep(command: Sequence[str]) -> int:
    """Returns the command's exit code, 128 + n where signal n killed it."""
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    hang_up = select.poll()
    hang_up.register(0, 0)  # told without being asked for
    while child.poll() is None:
        if hang_up.poll(POLL_MILLISECONDS):
            os.killpg(0, signal.SIGKILL)
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


if __name__ == "__main__":
    sys.exit(keep(sys.argv[1:]))

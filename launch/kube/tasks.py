"""One of many independent tasks (``python -m launch.kube.tasks FILE``), where a scheduler gives each its number.

The file is a JSON list of tasks; a task is a list of commands, each a list of arguments, run one after the other until
one fails. Its exit code is the task's, SIGTERM and Ctrl-C are passed on. Commands must be fit to be repeated: a task
that is started again begins with its first. Refuses a number that is not in the file.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from cpt.exit_codes import EXIT_STOPPED, EXIT_USER, exit_code
from launch.local.ranks import PASSED_ON

NUMBER = "JOB_COMPLETION_INDEX"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the task of this process; returns the exit code of its first command that failed, else 0."""
    (file,) = sys.argv[1:] if arguments is None else arguments
    tasks: list[list[list[str]]] = json.loads(Path(file).read_text(encoding="utf-8"))
    number = os.environ.get(NUMBER, "")
    if not number.isdecimal() or int(number) >= len(tasks):
        print(f"{NUMBER} is {number!r}; it must be the number of a task, from 0 to {len(tasks) - 1}", file=sys.stderr)
        return EXIT_USER
    return _Task().run(tasks[int(number)])


class _Task:
    """The command at work, and whether it was asked to stop."""

    def __init__(self) -> None:
        self._running: subprocess.Popen[bytes] | None = None
        self._asked = False

    def run(self, commands: Sequence[Sequence[str]]) -> int:
        for number in PASSED_ON:
            signal.signal(number, self._pass_on)
        for command in commands:
            if self._asked:
                return EXIT_STOPPED
            self._running = subprocess.Popen(command)
            if self._asked:  # the signal came while it was being started
                self._running.terminate()
            code = exit_code(self._running.wait())
            if code:
                return EXIT_STOPPED if self._asked and code == exit_code(-signal.SIGTERM) else code
        return 0

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        if self._running is not None and self._running.returncode is None:
            self._running.send_signal(number)


if __name__ == "__main__":
    sys.exit(main())

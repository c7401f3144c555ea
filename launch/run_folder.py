"""A run folder as those see it who start a job: on storage that may have no answer for a moment, and to which others
may write as well.

Owns how often such storage is asked again before that is a failure, and how the file is opened that holds what ranks
print. Refuses a link in its place: whoever may write to the run folder could lead that output into any file of the user
who launches.
"""

import errno
import os
import stat
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from cpt.rundir import DataError, RunDir, step_of

WAITS = (1.0, 2.0, 5.0, 10.0, 20.0)  # seconds before each further try: a server that restarts takes half a minute
LASTING = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENAMETOOLONG})
NO_PLAIN_FILE = frozenset({errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.ENXIO})  # a link, a folder, a pipe

Result = TypeVar("Result")


def patiently(work: Callable[[], Result], *, pause: Callable[[float], None] = time.sleep) -> Result:
    """What ``work`` returns, which reads the run folder or writes to it and can be repeated; where it fails it is tried
    again some times, and that is said.

    Raises:
        OSError: of the last try, or one that waiting does not mend, such as a full disk.
    """
    for seconds in WAITS:
        try:
            return work()
        except OSError as error:
            if error.errno in LASTING:
                raise
            print(f"launch: {error}; trying again in {seconds:g} s", file=sys.stderr, flush=True)
        pause(seconds)
    return work()


def newest_step(run_dir: Path) -> int | None:
    """Step of the newest checkpoint with a completion marker."""
    steps = [step_of(marker.parent) for marker in RunDir(run_dir).checkpoints.glob("step_*/COMPLETE")]
    return max((step for step in steps if step is not None), default=None)


def plain_file(path: str, flags: int) -> int:
    """For ``open(..., opener=plain_file)``: neither the file nor the folder that it lies in is a link, and the file is
    none that somebody must be at the other end of.

    Raises:
        DataError: one of them is.
        OSError: it is not there, or cannot be opened.
    """
    folder, name = os.path.split(os.path.abspath(path))
    try:
        inside = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            handle = os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644, dir_fd=inside)
        finally:
            os.close(inside)
    except OSError as error:
        if error.errno in NO_PLAIN_FILE:
            raise _refused(path) from None
        raise
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise _refused(path)
    return handle


def _refused(path: str) -> DataError:
    return DataError(f"{path}: it, or its folder, is a link or no plain file; `cpt launch` made no such: remove it")

"""A build of one of DeepSpeed's extensions that was killed: torch leaves its lock, and later starts wait for ever.

Owns finding such a lock and taking it away. Refuses one whose build may still be at work.
"""

import time
from pathlib import Path

QUIET_SECONDS = 600.0  # a compiler that lives writes an object file more often than this


def clear_abandoned_build(folder: Path, *, now: float | None = None) -> str | None:
    """Remove the lock in an extension's build ``folder`` where nothing was written for long; says so, or None.

    torch's lock (``torch.utils.file_baton``) is a file without an owner, so that its age is all there is to go by.
    To be called by one rank of a host.
    """
    lock = folder / "lock"
    try:
        quiet = (time.time() if now is None else now) - max(file.stat().st_mtime for file in (lock, *folder.iterdir()))
    except FileNotFoundError:  # no lock, or its build ended meanwhile
        return None
    if quiet < QUIET_SECONDS:
        return None
    lock.unlink(missing_ok=True)
    return f"{lock}: left by a build that was killed (nothing written for {quiet:.0f} s); removed, it is built again"

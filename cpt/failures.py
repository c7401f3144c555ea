"""Exceptions to exit codes: 2 the user can fix it, 3 the environment is at fault, 1 our bug. Never 0."""

import os
import sys
import traceback
from pathlib import Path
from typing import NoReturn

from cpt.config import ConfigError
from cpt.exit_codes import EXIT_BUG, EXIT_ENVIRONMENT, EXIT_USER
from cpt.rundir import DataError

_OWN = Path(__file__).resolve().parent.parent


def leave(code: int) -> NoReturn:
    """End this process now, everything being written and closed.

    Threads of gloo, and DeepSpeed's module-level references to process groups, outlive a run; the interpreter's own
    shutdown, which takes them apart in any order, was seen to abort (SIGABRT) after a finished run.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def explain(error: Exception) -> tuple[int, str]:
    """Exit code and what to print: a considered message alone, or the traceback of what nobody considered."""
    if isinstance(error, ConfigError):
        return EXIT_USER, f"configuration error:\n{error}"
    if isinstance(error, DataError):
        return EXIT_USER, f"data error: {error}"
    trace = "".join(traceback.format_exception(error))
    if isinstance(error, OSError):
        return EXIT_ENVIRONMENT, f"environment error: {error}"
    if isinstance(error, RuntimeError):
        return EXIT_ENVIRONMENT, f"environment error: {error}" if _raised_here(error) else trace
    return EXIT_BUG, f"{trace}This is a bug in cpt; please report it with the lines above."


def _raised_here(error: Exception) -> bool:
    """Whether our own code raised it, with a message meant for people, rather than torch or DeepSpeed."""
    frames = traceback.extract_tb(error.__traceback__)
    last = Path(frames[-1].filename).resolve() if frames else Path()
    return any(last.is_relative_to(_OWN / package) for package in ("cpt", "data_tools", "launch"))

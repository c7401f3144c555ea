"""Every path inside a run folder, and the one way small files are written.

A run folder is readable by tools that know nothing of the code: YAML, JSON and JSON lines, one folder per checkpoint.
Small files appear whole or not at all: they are written beside their final name, flushed to disk, then renamed over
it.
"""

import json
import os
import re
import tempfile
import time
from pathlib import Path
from typing import Any

_STEP_NAME = re.compile(r"step_(\d{8})(\.json)?")


class DataError(ValueError):
    """An input or artifact that the user can fix: the message names the file, what is wrong with it, and the fix."""


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write ``content`` so that a reader, or a crash, sees either the old file or the new one, never a part.

    Raises:
        OSError: the folder is missing, read-only or full; the old file is then untouched.
    """
    raw = content.encode() if isinstance(content, str) else content
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes it private; a run folder is shared with evaluators and watchers
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


class RunDir:
    """The names of a run folder's parts; creates nothing by itself."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.config = root / "config.yaml"
        self.plan = root / "plan.json"
        self.plans = root / "plans"  # of a run whose mixture was changed: every plan it had
        self.recommendation = root / "recommendation.json"
        self.environment = root / "environment.json"
        self.metrics = root / "metrics.jsonl"
        self.events = root / "events.jsonl"
        self.skipped_rows = root / "skipped_rows.json"  # what the guard left out
        self.stop_file = root / "STOP"  # made by a person: save and stop
        self.checkpoints = root / "checkpoints"
        self.evals = root / "evals"
        self.report = root / "report"
        self.profile = root / "profile"
        self.heartbeats = root / "heartbeats"
        self.stacks = root / "stacks"  # of ranks that hung
        self.launch = root / "launch"  # how it was started on other machines, and their output

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / step_name(step)

    def plan_from(self, step: int) -> Path:
        """The plan that was made when the mixture was changed after ``step`` steps; 0: the first one."""
        return self.plans / f"{step_name(step)}.json"

    def eval_file(self, step: int) -> Path:
        return self.evals / f"{step_name(step)}.json"


def note_event(name: str, step: int, rundir: RunDir, **details: object) -> None:
    """Add a line to events.jsonl, which must be no link."""
    line = {"time": time.time(), "step": step, "event": name, **details}
    with open(rundir.events, "a", encoding="utf-8", opener=_no_link) as file:
        file.write(json.dumps(line) + "\n")


def read_events(rundir: RunDir) -> list[dict[str, Any]]:
    """Every event noted so far, oldest first. A line that a crash has cut is one without a name (``{}``): what was
    counted once keeps its place.

    Raises:
        OSError: the file is there and cannot be read now.
    """
    try:
        with open(rundir.events, "rb", opener=_no_link) as file:
            return parse_lines(file.read())
    except FileNotFoundError:  # nothing was noted yet
        return []


def _no_link(path: str, flags: int) -> int:
    """Whoever may write to the run folder must not lead what is noted into another file, nor hold a reader up."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)


def parse_lines(raw: bytes) -> list[dict[str, Any]]:
    """JSON lines, one mapping each; ``{}`` for a line that holds none."""
    found = []
    for line in raw.splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        found.append(value if isinstance(value, dict) else {})
    return found


def step_name(step: int) -> str:
    """``500`` -> ``"step_00000500"``."""
    return f"step_{step:08d}"


def step_of(path: Path) -> int | None:
    """``.../step_00000500[.json]`` -> ``500``; None for any other name."""
    match = _STEP_NAME.fullmatch(path.name)
    return int(match.group(1)) if match else None

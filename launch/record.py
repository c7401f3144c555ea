"""What was launched for a run, as a file in its folder: ``status``, ``logs`` and ``stop`` need no more than that.

Owns ``launch/record.json`` of a run folder. Refuses a folder that nothing was launched in.
"""

import json
import re
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import Any

from cpt.rundir import DataError, RunDir, write_atomic

LABEL = r"[a-z0-9][-a-z0-9]*"
# What the verbs hand to other programs, or to the kernel, by kind of cluster: the id, and what details must hold.
SHAPES = {
    "hosts": {"id": r"[1-9]\d{0,9}", "run_dir": r"/.*", "host": r".*"},
    "slurm": {"id": r"\d+(,\d+)*"},
    "kubernetes": {"id": LABEL, "namespace": LABEL, "form": r"job|mpijob"},
}


@dataclass(frozen=True)
class LaunchJob:
    """What is started: the trainer's arguments (``cpt.train.main``) for the first start and for every later one."""

    name: str
    run_dir: Path
    first: tuple[str, ...]  # RUN.yaml a.b=c ...
    again: tuple[str, ...]  # --resume RUN_DIR
    directory: Path  # where the command runs; relative paths of the run file start here

    @property
    def arguments(self) -> tuple[str, ...]:
        """For a start now: a run folder with a config is continued."""
        return self.again if RunDir(self.run_dir).config.exists() else self.first


@dataclass(frozen=True)
class Launched:
    """One launch. ``id``: process of the launcher, number of the Slurm job, or name of the Kubernetes job."""

    kind: str
    id: str
    hosts: tuple[str, ...]
    log: str  # path of the output, or of a folder of outputs; empty where the cluster keeps it
    started: str  # UTC, ISO 8601
    details: dict[str, str]  # what its kind needs besides: namespace, host that the launcher runs on, ...


def record_path(run_dir: Path) -> Path:
    return RunDir(run_dir).launch / "record.json"


def write_record(run_dir: Path, launched: Launched) -> None:
    path = record_path(run_dir)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(asdict(launched), indent=1) + "\n")


def read_record(run_dir: Path) -> Launched:
    """Raises DataError where nothing was launched, or the file is damaged."""
    path = record_path(run_dir)
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        known = {field.name: raw[field.name] for field in fields(Launched)}  # an earlier version may have noted more
        launched = Launched(**{**known, "hosts": tuple(raw["hosts"])})
        _check(launched)
    except FileNotFoundError:
        raise DataError(f"{path}: not there; the run was not started by `cpt launch`") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DataError(f"{path}: damaged ({error}); look for the job by hand") from None
    return launched


def _check(launched: Launched) -> None:
    """Raises an error for what ``write_record`` did not write: a record may be damaged, or somebody else's."""
    texts: list[Any] = [launched.log, *launched.hosts, *launched.details.values()]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("log, hosts or details are no text")
    datetime.fromisoformat(launched.started).timestamp()
    if launched.kind not in SHAPES:
        raise ValueError(f"kind is {launched.kind!r}")
    told = {**launched.details, "id": launched.id}
    for name, shape in SHAPES[launched.kind].items():
        if not re.fullmatch(shape, told[name]):
            raise ValueError(f"{name} is {told[name]!r}")

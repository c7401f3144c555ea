"""What was launched for a run, as a file in its folder: ``status``, ``logs`` and ``stop`` need no more than that.

Owns ``launch/record.json`` of a run folder. Refuses a folder that nothing was launched in.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from cpt.rundir import DataError, RunDir, write_atomic


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
    command: tuple[str, ...]
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
        return Launched(**{**raw, "hosts": tuple(raw["hosts"]), "command": tuple(raw["command"])})
    except FileNotFoundError:
        raise DataError(f"{path}: not there; the run was not started by `cpt launch`") from None
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path}: damaged ({error}); look for the job by hand") from None

"""The record of a launch: what was written comes back, and nothing else is believed."""

import json
from pathlib import Path
from typing import Any

import pytest

from cpt.rundir import DataError
from launch.record import Launched, read_record, record_path, write_record

STARTED = "2026-01-01T00:00:00+00:00"
HOSTS = Launched("hosts", "4711", ("a",), "/r/launch/log", STARTED, {"run_dir": "/r", "host": "a"})
SLURM = Launched("slurm", "41,42", (), "/r/launch", STARTED, {})
KUBERNETES = Launched("kubernetes", "cpt-r", ("cpt-r-0",), "", STARTED, {"namespace": "default", "form": "job"})


@pytest.mark.parametrize("launched", [HOSTS, SLURM, KUBERNETES])
def test_a_record_comes_back_as_it_was_written(launched: Launched, tmp_path: Path) -> None:
    write_record(tmp_path, launched)
    assert read_record(tmp_path) == launched


def test_a_job_that_an_earlier_version_started_can_still_be_looked_at_and_stopped(tmp_path: Path) -> None:
    """It noted the command as well, and details that nobody read."""
    write_record(tmp_path, SLURM)
    raw = json.loads(record_path(tmp_path).read_text())
    earlier = {**raw, "command": ["sbatch", "--parsable"], "details": {"run_dir": "/r", "requeue": "True"}}
    record_path(tmp_path).write_text(json.dumps(earlier))
    assert read_record(tmp_path).id == SLURM.id and read_record(tmp_path).details["run_dir"] == "/r"


@pytest.mark.parametrize(
    ("launched", "changes"),
    [
        (HOSTS, {"kind": "host"}),
        (HOSTS, {"id": "0"}),  # the process group of whoever asks
        (HOSTS, {"id": 4711}),
        (HOSTS, {"details": {}}),
        (HOSTS, {"details": "run_dir"}),
        (HOSTS, {"started": "yesterday"}),
        (HOSTS, {"started": "0001-01-01"}),  # before the time that a machine's clock can say
        (HOSTS, {"log": None}),
        (HOSTS, {"hosts": None}),
        (SLURM, {"id": "--user=me"}),  # scancel would take it for an option
        (SLURM, {"id": ""}),
        (SLURM, {"details": {"run_dir": 5}}),
        (KUBERNETES, {"id": "--all"}),
        (KUBERNETES, {"details": {"namespace": "default", "form": "pod"}}),
    ],
)
def test_what_no_launch_has_written_is_damaged_and_reaches_no_program(
    launched: Launched, changes: dict[str, Any], tmp_path: Path
) -> None:
    write_record(tmp_path, launched)
    raw = json.loads(record_path(tmp_path).read_text())
    record_path(tmp_path).write_text(json.dumps({**raw, **changes}))
    with pytest.raises(DataError, match="damaged"):
        read_record(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"kind": "hosts"', "null", "\x00", "[" * 100_000])
def test_a_file_that_is_no_record_is_damaged(text: str, tmp_path: Path) -> None:
    record_path(tmp_path).parent.mkdir()
    record_path(tmp_path).write_text(text)
    with pytest.raises(DataError, match="damaged"):
        read_record(tmp_path)

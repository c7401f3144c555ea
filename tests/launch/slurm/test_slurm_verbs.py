"""Slurm's answers, as its commands word them: refusals, jobs it has forgotten, accounts, and the output of many jobs."""

import stat
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from cpt.problems import ConfigError
from cpt.rundir import DataError
from launch.cluster import SlurmCluster
from launch.record import Launched, LaunchJob, read_record
from launch.slurm import verbs

FORGOTTEN = "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"
Commands = Callable[..., None]


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Commands:
    """Stand-ins for Slurm's commands: a line of shell for each; no others are found."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))

    def make(**lines: str) -> None:
        for name, line in lines.items():
            (folder / name).write_text(f"#!/bin/sh\n{line}\n")
            (folder / name).chmod(stat.S_IRWXU)

    return make


def cluster() -> SlurmCluster:
    return SlurmCluster.model_validate({"kind": "slurm", "nodes": 2, "time_limit": "1:00:00", "qos": "high"})


def job(folder: Path) -> LaunchJob:
    return LaunchJob("run", folder / "run", ("RUN.yaml",), ("--resume", "run"), folder)


def launched(folder: Path, number: str = "41", *, run_dir: Path | None = None) -> Launched:
    return Launched("slurm", number, (), str(folder), "", {"run_dir": str(run_dir)} if run_dir else {})


def test_a_submitted_job_is_on_record(tmp_path: Path, commands: Commands) -> None:
    commands(sbatch='[ "$1" = --parsable ] && [ -s "$2" ] && echo "41;cluster"')
    made = verbs.start(cluster(), job(tmp_path))
    assert made.id == "41" and made.log == str(tmp_path / "run/launch/slurm-41.out")
    assert read_record(tmp_path / "run") == made


@pytest.mark.parametrize(
    ("words", "field"),
    [
        ("Batch job submission failed: Invalid qos specification", "qos"),
        ("Batch job submission failed: Requested node configuration is not available", "cluster file"),
    ],
)
def test_a_refusal_names_the_field_and_keeps_slurms_words(
    tmp_path: Path, commands: Commands, words: str, field: str
) -> None:
    commands(sbatch=f"echo 'sbatch: error: {words}' >&2; exit 1")
    with pytest.raises(ConfigError, match=words) as refused:
        verbs.start(cluster(), job(tmp_path))
    assert refused.value.problems[0].field == field


def test_where_slurm_is_missing_or_down_that_is_said(tmp_path: Path, commands: Commands) -> None:
    with pytest.raises(RuntimeError, match="sbatch is not here: run this on a login node"):
        verbs.start(cluster(), job(tmp_path))
    down = "echo 'error: Unable to contact slurm controller (connect failure)' >&2; exit 1"
    commands(sbatch=down, squeue=down)
    with pytest.raises(RuntimeError, match="is slurmctld up"):
        verbs.start(cluster(), job(tmp_path))
    with pytest.raises(RuntimeError, match="Unable to contact"):
        verbs.status(launched(tmp_path))


def test_a_job_that_has_left_the_queue_is_looked_up_in_the_account(tmp_path: Path, commands: Commands) -> None:
    commands(squeue=FORGOTTEN, sacct="echo 'CANCELLED by 1000|0:15|00:10:00|n[1-2]'")
    assert verbs.status(launched(tmp_path)) == {
        **{"state": "CANCELLED", "exit_code": "0:15", "running": "00:10:00", "hosts": "n[1-2]"}
    }
    commands(sacct="echo 'Slurm accounting storage is disabled' >&2; exit 1")
    assert verbs.status(launched(tmp_path))["state"] == "UNKNOWN"
    assert "nothing to stop" in verbs.stop(launched(tmp_path))


def test_an_array_is_summed_up(tmp_path: Path, commands: Commands) -> None:
    rows = ["COMPLETED|None|n1|1:00|9:00", "RUNNING|None|n2|0:30|9:30", "PENDING|Dependency||0:00|10:00"]
    commands(squeue="\n".join(f"echo '{row}'" for row in rows))
    told = verbs.status(launched(tmp_path, "41,42"))
    assert told["state"] == "RUNNING" and told["hosts"] == "n1,n2"
    assert told["tasks"] == {"COMPLETED": 1, "PENDING": 1, "RUNNING": 1}


def test_a_run_at_work_is_asked_and_all_else_is_cancelled(tmp_path: Path, commands: Commands) -> None:
    commands(squeue="echo 'RUNNING|None|n1|1:00|9:00'", scancel=f'echo "$@" > {tmp_path}/cancelled')
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    assert "asked to save and end" in verbs.stop(launched(tmp_path, run_dir=run_dir))
    assert (run_dir / "STOP").exists() and not (tmp_path / "cancelled").exists()
    assert "cancelled" in verbs.stop(launched(tmp_path, "41,42"))  # an array: no one file would reach it
    assert (tmp_path / "cancelled").read_text() == "41 42\n"
    commands(scancel="echo 'Access/permission denied' >&2; exit 1")
    with pytest.raises(RuntimeError, match="permission denied"):
        verbs.stop(launched(tmp_path, "41"))


def test_the_output_of_many_jobs_says_whose_it_is(tmp_path: Path, commands: Commands) -> None:
    for name, text in {"41_0": "a\nb\n", "41_1": "c\n", "42": "d", "7": "of an earlier launch\n"}.items():
        (tmp_path / f"slurm-{name}.out").write_text(text)
    lines = [Path(line.strip("=> <")).name for line in verbs.logs(launched(tmp_path, "41,42"), follow=False)]
    assert lines == ["slurm-41_0.out", "a", "b", "slurm-41_1.out", "c", "slurm-42.out", "d"]


def test_following_goes_on_until_the_job_has_left_and_shows_whole_lines(
    tmp_path: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verbs, "POLL_SECONDS", 0.01)
    log = tmp_path / "slurm-41.out"
    log.write_text("one\ntw")
    commands(squeue=f"[ -e {tmp_path}/ended ] && exit 0; echo 'RUNNING|None|n1|1:00|9:00'")
    lines = verbs.logs(Launched("slurm", "41", (), str(log), "", {}), follow=True)
    assert next(lines) == "one"
    with log.open("a") as file:
        file.write("o\nthree")
    assert next(lines) == "two"
    (tmp_path / "ended").touch()
    assert list(lines) == ["three"]


def test_a_log_of_any_size_is_shown_line_by_line(tmp_path: Path, commands: Commands) -> None:
    log = tmp_path / "slurm-41.out"
    log.write_bytes(b"a step that went well\n" * 400_000)
    tracemalloc.start()
    lines = sum(1 for _ in verbs.logs(Launched("slurm", "41", (), str(log), "", {}), follow=False))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert lines == 400_000 and peak < 1 << 20


@pytest.mark.parametrize("place", ["launch", "launch/slurm-42.out"])
def test_a_link_that_would_lead_the_output_elsewhere_is_refused_and_nothing_submitted(
    tmp_path: Path, commands: Commands, place: str
) -> None:
    commands(sbatch=f": > {tmp_path}/submitted; echo 42")
    link = tmp_path / "run" / place
    link.parent.mkdir(parents=True)
    link.symlink_to(tmp_path / "theirs")
    with pytest.raises(DataError, match=f"{place}: is a link"):
        verbs.start(cluster(), job(tmp_path))
    array = verbs.ArrayJob("run", tmp_path / "run", tmp_path, [], ("true",))
    with pytest.raises(DataError, match=f"{place}: is a link"):
        verbs.start_array(cluster(), array)
    assert not (tmp_path / "submitted").exists()


def test_a_run_that_is_in_the_queue_is_not_submitted_again(tmp_path: Path, commands: Commands) -> None:
    commands(sbatch="echo 41", squeue="echo 'PENDING|Priority||0:00|10:00'")
    first = verbs.start(cluster(), job(tmp_path))
    commands(sbatch="echo 42")
    with pytest.raises(ConfigError, match="job 41 of it is still in the queue"):
        verbs.start(cluster(), job(tmp_path))
    assert read_record(tmp_path / "run") == first
    commands(squeue="echo 'FAILED|None|n1|0:00|10:00'")
    assert verbs.start(cluster(), job(tmp_path)).id == "42"
    commands(sbatch="echo 43", squeue=FORGOTTEN)
    assert verbs.start(cluster(), job(tmp_path)).id == "43"


def test_an_answer_without_a_number_is_no_job(tmp_path: Path, commands: Commands) -> None:
    commands(sbatch="true")  # as with options: {test-only: ""}
    with pytest.raises(RuntimeError, match="not the number of a job"):
        verbs.start(cluster(), job(tmp_path))


def test_a_machine_that_knows_no_cluster_is_at_fault_and_not_the_cluster_file(
    tmp_path: Path, commands: Commands
) -> None:
    commands(sbatch="echo 'sbatch: fatal: Could not establish a configuration source' >&2; exit 1")
    with pytest.raises(RuntimeError, match="this host part of the cluster"):
        verbs.start(cluster(), job(tmp_path))

"""The sbatch script: what it asks Slurm for, and what a real bash makes of it with stand-ins for Slurm's commands."""

import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cpt.problems import ConfigError
from launch.cluster import SlurmCluster, load_cluster
from launch.record import LaunchJob
from launch.slurm import verbs
from launch.slurm.script import Shape, Task, check, seconds_of, shape_of_run, shape_of_task
from launch.slurm.verbs import ArrayJob

ROOT = Path(__file__).resolve().parents[3]
FIELDS = {"kind": "slurm", "nodes": 2, "time_limit": "24:00:00"}

# Says what it was called with; `code` and `word` decide what becomes of it. The script cannot tell it from Slurm.
STAND_IN = """#!{python} -IS
import json, os, sys
from pathlib import Path
name, arguments = Path(sys.argv[0]).name, sys.argv[1:]
with open(os.environ["CALLS"], "a") as file:
    print(json.dumps([name, arguments, dict(os.environ)]), file=file)
answers = json.loads(os.environ["ANSWERS"])
print(answers.get(name, ""), end="")
if name == "python":
    print("again" if "end" in arguments and answers.get("again") else "", end="")
    sys.exit(answers.get("code", 0) if "end" in arguments else answers.get("begin", 0))
sys.exit(answers.get("srun_code", 0) if name == "srun" else 0)
"""
Called = list[tuple[str, list[str], dict[str, str]]]


def cluster(**changes: Any) -> SlurmCluster:
    return SlurmCluster.model_validate({**FIELDS, **changes})


def job(folder: Path, name: str = "run", first: Sequence[str] = ("RUN.yaml", "a.b=c")) -> LaunchJob:
    run_dir = folder / "runs" / name
    return LaunchJob(name, run_dir, tuple(first), ("--resume", str(run_dir)), folder)


def script_of(cluster: SlurmCluster, job: LaunchJob) -> str:
    (text,) = verbs.describe(cluster, job)["files"].values()
    return str(text)


def options_of(text: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")]


@pytest.fixture
def bash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, Called]]:
    """Runs a script as Slurm would; returns its exit code and every call of Slurm's commands and of Python."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("srun", "scontrol", "squeue", "python"):
        (folder / name).write_text(STAND_IN.format(python=sys.executable))
        (folder / name).chmod(stat.S_IRWXU)
    monkeypatch.setattr(verbs, "_python", lambda cluster: str(folder / "python"))

    def run(text: str, *, slurm: dict[str, str] | None = None, **answers: Any) -> tuple[int, Called]:
        calls = tmp_path / "calls"
        calls.write_text("")
        given = {"scontrol": "n1\nn2\n", "squeue": "RUNNING\n", **answers}
        environment = {"SLURM_JOB_ID": "41", "SLURM_JOB_NODELIST": "n[1-2]", "ANSWERS": json.dumps(given)}
        environment |= {"PATH": f"{folder}:{os.environ['PATH']}", "CALLS": str(calls), **(slurm or {})}
        done = subprocess.run(
            ["bash", "-s"], input=text, env=environment, capture_output=True, text=True, timeout=30, check=False
        )
        return done.returncode, [tuple(json.loads(line)) for line in calls.read_text().splitlines()]

    return run


def called(calls: Called, name: str) -> list[list[str]]:
    return [arguments for command, arguments, _ in calls if command == name]


def test_slurm_is_asked_for_what_the_cluster_file_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NCCL_DEBUG", "HF_HOME", "SECRET_KEY", "NCCL_API_KEY"):
        monkeypatch.setenv(name, "never in the script")
    text = script_of(
        cluster(
            **{"partition": "gpu", "account": "me", "qos": "high", "gpus_per_node": 4, "cpus_per_process": 6},
            **{"stop_seconds": 600, "export": ["NCCL_*"], "options": {"constraint": "a100|h100", "exclusive": ""}},
        ),
        job(tmp_path),
    )
    found = options_of(text)
    wanted = ["--job-name=run", "--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4", "--cpus-per-task=6"]
    wanted += ["--partition=gpu", "--account=me", "--qos=high", "--time=24:00:00", "--signal=TERM@600"]
    wanted += ["--open-mode=append", "--requeue", "--exclusive", "--constraint='a100|h100'"]
    assert set(wanted) <= set(found)
    (exported,) = [line for line in found if line.startswith("--export=")]
    assert {"NCCL_DEBUG", "PATH", "HOME"} <= set(exported.removeprefix("--export=").split(","))
    assert not {"HF_HOME", "SECRET_KEY", "NCCL_API_KEY"} & set(exported.removeprefix("--export=").split(","))
    assert "never in the script" not in text
    assert "--no-requeue" in options_of(script_of(cluster(requeue=False), job(tmp_path)))


def test_the_resolved_world_and_the_command_are_described(tmp_path: Path) -> None:
    facts = verbs.describe(cluster(gpus_per_node=8, form="deepspeed"), job(tmp_path))
    assert (facts["world"]["world_size"], facts["world"]["tasks_per_node"]) == (16, 1)
    assert facts["command"] == ["sbatch", "--parsable", str(tmp_path / "runs/run/launch/job.sbatch")]
    json.dumps(facts)


def test_jobs_run_the_code_that_this_shell_would_unless_an_image_brings_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exported(**changes: Any) -> set[str]:
        (line,) = [each for each in options_of(script_of(cluster(**changes), job(tmp_path))) if "--export=" in each]
        return set(line.removeprefix("--export=").split(","))

    monkeypatch.setenv("PYTHONPATH", "/shared/code")
    assert "PYTHONPATH" in exported() and "PYTHONPATH" not in exported(image="cpt.sqsh")
    assert "PYTHONPATH" in exported(image="cpt.sqsh", export=["PYTHONPATH"])  # asked for by name
    monkeypatch.delenv("PYTHONPATH")
    assert "PYTHONPATH" not in exported()


def test_a_name_that_slurms_accounts_could_not_hold_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    verbs.describe(cluster(), job(tmp_path, "n" * 128))
    for start in (verbs.describe, verbs.start):
        with pytest.raises(ConfigError, match="has 300 characters; 128 at most") as refused:
            start(cluster(), job(tmp_path, "n" * 300))
        assert refused.value.problems[0].field == "run.name"
    with pytest.raises(ConfigError, match="128 at most"):
        verbs.describe_array(cluster(), ArrayJob("n" * 300, tmp_path, tmp_path, (), ("last",)))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "shape"),
    [
        ({}, Shape(2, 1, 0, None)),
        ({"gpus_per_node": 8, "cpus_per_process": 4}, Shape(2, 8, 8, 4)),
        ({"gpus_per_node": 8, "cpus_per_process": 4, "form": "deepspeed"}, Shape(2, 1, 8, 32)),
        ({"gpus_per_node": 8, "processes_per_host": 4, "cpus_per_process": 3}, Shape(2, 4, 8, 3)),
    ],
)
def test_tasks_and_cpus_of_both_forms(changes: dict[str, Any], shape: Shape) -> None:
    assert shape_of_run(cluster(**changes)) == shape


def test_a_task_of_an_array_takes_what_its_processes_need_of_one_node() -> None:
    assert shape_of_task(cluster(gpus_per_node=8, cpus_per_process=4), 2) == Shape(1, 1, 2, 8)
    assert shape_of_task(cluster(), 2) == Shape(1, 1, 0, None)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30:00", 1800), ("24:00:00", 86400), ("1-00:00", 86400), ("2-01:30:10", 178210), ("0:30", 30)],
)
def test_a_time_limit_is_read_as_sbatch_reads_it(text: str, seconds: int) -> None:
    assert seconds_of(text) == seconds


def test_everything_that_sbatch_would_refuse_or_misread_is_told_at_once() -> None:
    wrong = cluster(
        **{"time_limit": "5:00", "options": {"time": "1:00", "array": "0-9", "-p": "x", "comment": "a\nb"}},
        **{"partition": "a\nb", "mounts": [{"source": "/a", "target": "/a"}], "master_port": 65000},
    )
    with pytest.raises(ConfigError) as refused:
        check(wrong, name="run", folder=Path("runs\necho injected"))
    fields = {problem.field for problem in refused.value.problems}
    assert fields == {"stop_seconds", "options.time", "options.array", "options.-p", "options.comment", "partition", "mounts", "master_port", "run.dir"}  # fmt: skip
    check(cluster(), name="run", folder=Path("runs"))


def test_a_path_that_slurm_would_read_otherwise_is_refused() -> None:
    for name in ("50%j", "a\\b"):
        with pytest.raises(ConfigError, match="mean something else to Slurm"):
            check(cluster(), name="run", folder=Path(name))


def test_the_example_is_right(tmp_path: Path) -> None:
    example = load_cluster(ROOT / "configs/clusters/slurm.yaml")
    assert isinstance(example, SlurmCluster)
    assert verbs.describe(example, job(tmp_path))["world"]["world_size"] == 16


def test_a_first_start_and_a_later_one_differ_by_the_run_folder_alone(
    tmp_path: Path, bash: Callable[..., tuple[int, Called]]
) -> None:
    this = job(tmp_path)
    text = script_of(cluster(env={"WORDS": "two words"}), this)
    code, calls = bash(text)
    ((_, arguments, environment),) = [call for call in calls if call[0] == "srun"]
    assert code == 0 and arguments[-3:] == [str(this.run_dir), "RUN.yaml", "a.b=c"]
    assert arguments[-5:-3] == ["-m", "launch.slurm.rank"]
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("n1", "29541")
    assert (environment["WORDS"], environment["LOCAL_WORLD_SIZE"]) == ("two words", "1")
    this.run_dir.mkdir(parents=True)
    (this.run_dir / "config.yaml").touch()
    _, calls = bash(text)
    assert called(calls, "srun")[0][-3:] == [str(this.run_dir), "--resume", str(this.run_dir)]


def test_it_is_queued_again_only_where_the_run_says_so_and_slurm_has_not_been_told_to_end_it(
    tmp_path: Path, bash: Callable[..., tuple[int, Called]]
) -> None:
    text = script_of(cluster(), job(tmp_path))

    def requeued(calls: Called) -> list[list[str]]:
        return [arguments for arguments in called(calls, "scontrol") if arguments[0] == "requeue"]

    code, calls = bash(text, code=143, again=True)
    assert code == 143 and requeued(calls) == [["requeue", "41"]]
    code, calls = bash(text, code=143)
    assert code == 143 and requeued(calls) == []
    code, calls = bash(text, code=143, again=True, squeue="COMPLETING\n")  # after scancel
    assert code == 143 and requeued(calls) == []
    code, calls = bash(script_of(cluster(requeue=False), job(tmp_path)), code=143, again=True)
    assert code == 143 and requeued(calls) == []


def test_the_code_of_srun_reaches_the_judge_and_a_start_too_many_is_not_made(
    tmp_path: Path, bash: Callable[..., tuple[int, Called]]
) -> None:
    text = script_of(cluster(), job(tmp_path))
    code, calls = bash(text, srun_code=137, code=3)
    assert code == 3 and called(calls, "python")[-1][-1] == "137"
    code, calls = bash(text, begin=3)
    assert code == 3 and called(calls, "srun") == []


def test_nodes_that_differ_are_not_trained_on(tmp_path: Path, bash: Callable[..., tuple[int, Called]]) -> None:
    text = script_of(cluster(preflight=True), job(tmp_path))
    _, calls = bash(text)
    assert [arguments[1] for arguments in called(calls, "python")] == [
        *("launch.slurm.turns", "launch.slurm.preflight", "launch.slurm.turns")
    ]
    code, calls = bash(text.replace("launch.slurm.preflight", "end"), code=3)  # the stand-in's way to fail
    assert code == 3 and called(calls, "srun") == []


def test_without_an_address_nothing_is_started(tmp_path: Path, bash: Callable[..., tuple[int, Called]]) -> None:
    code, calls = bash(script_of(cluster(interface="none0"), job(tmp_path)))
    assert code == 3 and called(calls, "srun") == []


def test_a_container_holds_every_command_that_needs_the_code(
    tmp_path: Path, bash: Callable[..., tuple[int, Called]]
) -> None:
    mounts = [{"source": "/shared", "target": "/data"}, {"source": "/w", "target": "/w", "read_only": True}]
    _, calls = bash(script_of(cluster(image="registry/cpt:1", mounts=mounts), job(tmp_path)))
    steps = called(calls, "srun")
    assert len(steps) == 3 and called(calls, "python") == []  # begin, the ranks, end
    for arguments in steps:
        assert {"--container-image=registry/cpt:1", "--container-mounts=/shared:/data,/w:/w:ro"} <= set(arguments)


def array_of(folder: Path, commands: Sequence[Sequence[str]]) -> ArrayJob:
    tasks = [
        Task(tuple(command), folder / f"run {number}", folder / f"notes/{number}")
        for number, command in enumerate(commands)
    ]
    return ArrayJob("pilots", folder / "grid", folder, (tasks,), ("collect", "all of it"))


def test_each_task_of_an_array_runs_its_own_command_and_is_queued_again_alone(
    tmp_path: Path, bash: Callable[..., tuple[int, Called]]
) -> None:
    facts = verbs.describe_array(cluster(), array_of(tmp_path, [["pilot", "a b"], ["pilot", "$HOME"]]))
    wave, last = facts["files"].values()
    assert "--array=0-1" in options_of(wave) and "--array" not in last
    for number, word in enumerate(("a b", "$HOME")):
        slurm = {"SLURM_ARRAY_JOB_ID": "41", "SLURM_ARRAY_TASK_ID": str(number)}
        code, calls = bash(wave, slurm=slurm, code=143, again=True)
        assert code == 143 and called(calls, "srun")[0][-2:] == ["pilot", word]
        assert called(calls, "scontrol") == [["requeue", f"41_{number}"]]
    assert bash(wave, slurm={"SLURM_ARRAY_TASK_ID": "7"})[0] == 2
    assert called(bash(last)[1], "srun")[0][-2:] == ["collect", "all of it"]
    assert facts["commands"][1][2] == "--dependency=afterany:JOB0"


HOSTILE = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12)
ONE_LINE = HOSTILE.filter(str.isprintable)
NAME = ONE_LINE.filter(lambda text: not set("%\\") & set(text))


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(words=st.lists(HOSTILE, max_size=3), value=ONE_LINE, name=NAME)
def test_whatever_stands_in_names_overrides_and_values_arrives_as_it_is(
    tmp_path: Path, bash: Callable[..., tuple[int, Called]], words: list[str], value: str, name: str
) -> None:
    path = tmp_path / 'it\'s; $(touch HERE) `x` "q"'
    path.mkdir(exist_ok=True)
    this = LaunchJob("run", path / name.replace("/", "_"), ("RUN.yaml", *words), ("--resume",), path)
    code, calls = bash(script_of(cluster(env={"WORDS": value}), this))
    ((_, arguments, environment),) = [call for call in calls if call[0] == "srun"]
    assert code == 0 and arguments[-2 - len(words) :] == [str(this.run_dir), "RUN.yaml", *words]
    assert environment["WORDS"] == value and os.path.samefile(environment["PWD"], path)
    assert not list(tmp_path.rglob("HERE"))

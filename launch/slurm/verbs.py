"""Runs on a Slurm cluster: the job is described, submitted, looked at and stopped by Slurm's own commands.

Owns the calls of sbatch, squeue, sacct and scancel, and what their answers mean; ``launch.slurm.script`` has the
script. Works without accounting: of what Slurm has forgotten it says so. Refuses what sbatch refuses, in its words.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cpt.problems import ConfigError, Problem
from cpt.rundir import DataError, RunDir, write_atomic
from launch.cluster import SlurmCluster, code_path, exported
from launch.record import Launched, LaunchJob, read_record, record_path, write_record
from launch.run_folder import plain_file
from launch.slurm.script import (
    Submission,
    Task,
    array_script,
    check,
    last_script,
    processes_per_node,
    run_script,
    shape_of_run,
    shape_of_task,
)

BASE_VARIABLES = ("HOME", "LANG", "LOGNAME", "PATH", "USER")  # without these hardly a program starts
POLL_SECONDS = 1.0
ANSWER_SECONDS = 60.0  # Slurm's own limit for an answer is 10 s, and it tries again
WAITING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD")
ENDED = (
    "COMPLETED",
    "CANCELLED",
    "FAILED",
    "TIMEOUT",
    "NODE_FAIL",
    "PREEMPTED",
    "OUT_OF_MEMORY",
    "BOOT_FAIL",
    "DEADLINE",
)
UNKNOWN = "UNKNOWN"
UNREACHABLE = ("contact slurm controller", "configuration source")
FIELDS = {"state": "%T", "reason": "%r", "hosts": "%N", "running": "%M", "left": "%L"}


@dataclass(frozen=True)
class ArrayJob:
    """Independent tasks, in waves: those of a wave may begin when the wave before has ended; and then ``last``.

    ``processes``: ranks that a task starts itself. ``folder`` holds the scripts, the logs and the record.
    """

    name: str
    folder: Path
    directory: Path
    waves: Sequence[Sequence[Task]]
    last: tuple[str, ...]
    processes: int = 1


def describe(cluster: SlurmCluster, job: LaunchJob) -> dict[str, Any]:
    """What ``start`` would write and run, and what the ranks will see.

    Raises:
        ConfigError: the cluster file asks for what sbatch would refuse or misunderstand.
    """
    check(cluster, name=job.name, folder=job.run_dir)
    shape, per_node = shape_of_run(cluster), processes_per_node(cluster)
    path = _script_path(job.run_dir)
    return {
        "kind": cluster.kind,
        "world": {
            "nodes": cluster.nodes,
            "processes_per_node": per_node,
            "world_size": cluster.nodes * per_node,
            "tasks_per_node": shape.tasks,
            "gpus_per_node": cluster.gpus_per_node,
            "form": cluster.form,
        },
        "environment": {"set": dict(cluster.env), "exported": _visible(cluster)},
        "command": ["sbatch", "--parsable", str(path)],
        "files": {str(path): run_script(cluster, job, _submission(cluster, job))},
    }


def render(facts: Mapping[str, Any]) -> str:
    """Every file as it would be written, after what it would be submitted with."""
    files = "".join(f"--- {path}\n{text.rstrip()}\n" for path, text in facts["files"].items())
    return json.dumps({name: value for name, value in facts.items() if name != "files"}, indent=1) + "\n" + files


def start(cluster: SlurmCluster, job: LaunchJob) -> Launched:
    """Write the script into the run folder, submit it, and leave a record there.

    Raises:
        ConfigError: sbatch refuses it, or what was submitted before is still in the queue.
        DataError: the place of the output is a link.
        RuntimeError: Slurm cannot be reached from here.
    """
    described = describe(cluster, job)
    _refuse_second(job.run_dir)
    _refuse_links(RunDir(job.run_dir).launch)
    (path, text), *_ = described["files"].items()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    number = _submit(cluster, Path(path), text)
    log = str(RunDir(job.run_dir).launch / f"slurm-{number}.out")
    launched = Launched(cluster.kind, number, (), log, _now(), {"run_dir": str(job.run_dir)})
    write_record(job.run_dir, launched)
    return launched


def describe_array(cluster: SlurmCluster, job: ArrayJob) -> dict[str, Any]:
    """Like ``describe``. Numbers of jobs that are not submitted yet stand as ``JOB0``, ``JOB1`` ..."""
    check(cluster, name=job.name, folder=job.folder)
    files, commands = {}, []
    for number, (path, text) in enumerate(_array_files(cluster, job)):
        files[str(path)] = text
        commands.append(["sbatch", "--parsable", *_after([f"JOB{number - 1}"] if number else []), str(path)])
    return {
        "kind": cluster.kind,
        "world": {"tasks": sum(map(len, job.waves)), "processes_per_task": job.processes, "nodes_per_task": 1},
        "environment": {"set": dict(cluster.env), "exported": _visible(cluster)},
        "commands": commands,
        "files": files,
    }


def start_array(cluster: SlurmCluster, job: ArrayJob) -> Launched:
    """Submit every wave and what comes last; where one is refused, those before are taken back. Raises as ``start``."""
    check(cluster, name=job.name, folder=job.folder)
    _refuse_second(job.folder)
    _refuse_links(RunDir(job.folder).launch)
    job.folder.mkdir(parents=True, exist_ok=True)
    numbers: list[str] = []
    try:
        for path, text in _array_files(cluster, job):
            path.parent.mkdir(parents=True, exist_ok=True)
            numbers.append(_submit(cluster, path, text, after=numbers[-1:]))
    except Exception:
        if numbers:
            _call("scancel", *numbers)
        raise
    launched = Launched(cluster.kind, ",".join(numbers), (), str(RunDir(job.folder).launch), _now(), {})
    write_record(job.folder, launched)
    return launched


def status(launched: Launched) -> dict[str, Any]:
    """State, hosts and times as squeue has them, or sacct where squeue has forgotten the job; of an array also the
    number of tasks in each state.

    Raises:
        RuntimeError: Slurm cannot be reached from here.
    """
    rows = _queue(launched)
    if not rows:
        return _accounted(launched)
    states = [row["state"] for row in rows]
    if len(rows) == 1:
        return dict(rows[0])
    counts = {state: states.count(state) for state in sorted(set(states))}
    return {
        "state": _summed(states),
        "tasks": counts,
        "hosts": ",".join(filter(None, (r["hosts"] for r in rows))),
    }


def logs(launched: Launched, follow: bool) -> Iterator[str]:
    """The output so far, line by line without its end; ``follow``: and what comes, until the job has left the queue.
    Where there are several files, a line with a file's name stands before what is of it, as `tail` does.

    Raises:
        RuntimeError: Slurm cannot be reached from here.
    """
    read: dict[Path, int] = {}
    shown: Path | None = None
    while True:
        live = follow and _is_live(launched)  # asked before reading: what was written before the end is not missed
        for path in _log_files(launched):
            for line in _new_lines(path, read, whole=live):
                if path != shown and Path(launched.log).is_dir():
                    yield f"==> {path} <=="
                shown = path
                yield line
        if not live:
            return
        time.sleep(POLL_SECONDS)


def stop(launched: Launched) -> str:
    """A run at work saves and ends, and is not queued again; one that waits, or an array, leaves the queue.

    Raises:
        RuntimeError: Slurm cannot be reached from here, or refuses.
    """
    live = [row["state"] for row in _queue(launched) if row["state"] not in ENDED]
    if not live:
        return f"job {launched.id}: not in the queue, nothing to stop"
    folder = launched.details.get("run_dir")
    if folder and any(state not in WAITING for state in live):
        RunDir(Path(folder)).stop_file.touch()
        return (
            f"job {launched.id}: asked to save and end; it is not queued again. To see it end: cpt launch logs "
            f"{folder} --follow; to end it within the cluster's KillWait, 30 s by default: scancel {launched.id}"
        )
    done = _call("scancel", *launched.id.split(","))
    if done.returncode:
        raise RuntimeError(f"scancel {launched.id}: {done.stderr.strip()}")
    return f"job {launched.id}: cancelled; what runs has the cluster's KillWait, 30 s by default, to save"


def _refuse_second(folder: Path) -> None:
    """Two jobs must not wait for one folder: the second would fail when it starts, and only it would be on record."""
    if not record_path(folder).exists():
        return
    before = read_record(folder)
    if before.kind == "slurm" and any(row["state"] not in (*ENDED, "COMPLETING") for row in _queue(before)):
        fix = f"cpt launch status {folder}; cpt launch stop {folder}"
        raise ConfigError(Problem("run.name", folder.name, f"job {before.id} of it is still in the queue", fix))


def _refuse_links(folder: Path) -> None:
    """Slurm opens the output itself and follows links: those that wait for it must not lead it to another file."""
    for path in (folder, *folder.glob("slurm-*")):
        if path.is_symlink():
            raise DataError(f"{path}: is a link, which Slurm would follow; `cpt launch` made no such: remove it")


def _script_path(run_dir: Path) -> Path:
    return RunDir(run_dir).launch / "job.sbatch"


def _submission(cluster: SlurmCluster, job: LaunchJob) -> Submission:
    log = RunDir(job.run_dir).launch / "slurm-%j.out"
    return Submission(job.name, job.directory, log, _python(cluster), _visible(cluster))


def _visible(cluster: SlurmCluster) -> tuple[str, ...]:
    """Names of the variables of this shell that the job is given."""
    found = {*exported(cluster, os.environ), *(name for name in BASE_VARIABLES if name in os.environ)}
    return tuple(sorted(found if cluster.image else {*found, *code_path(os.environ)}))  # an image has its own code


def _python(cluster: SlurmCluster) -> str:
    """This one, where the hosts share it; in an image its own."""
    return "python" if cluster.image else sys.executable


def _array_files(cluster: SlurmCluster, job: ArrayJob) -> list[tuple[Path, str]]:
    folder, names = RunDir(job.folder).launch, _visible(cluster)
    made = []
    for number, tasks in enumerate(job.waves):
        submission = Submission(job.name, job.directory, folder / "slurm-%A_%a.out", _python(cluster), names)
        text = array_script(cluster, shape_of_task(cluster, job.processes), tasks, submission)
        made.append((folder / f"wave_{number}.sbatch", text))
    submission = Submission(f"{job.name}-last", job.directory, folder / "slurm-%j.out", _python(cluster), names)
    text = last_script(cluster, shape_of_task(cluster, 1), job.last, submission)
    return [*made, (folder / "last.sbatch", text)]


def _after(numbers: Sequence[str]) -> list[str]:
    """Also after failures: a task whose predecessor is missing says so itself, and the others go on."""
    return [f"--dependency=afterany:{':'.join(numbers)}"] if numbers else []


def _submit(cluster: SlurmCluster, path: Path, text: str, *, after: Sequence[str] = ()) -> str:
    write_atomic(path, text)
    done = _call("sbatch", "--parsable", *_after(after), str(path))
    if done.returncode == 0:
        number = done.stdout.strip().split(";")[0]  # number;cluster where there are several
        if not number.isdecimal():
            raise RuntimeError(f"sbatch answers {done.stdout.strip()!r}, not the number of a job: was one submitted?")
        return number
    words = " ".join(line.removeprefix("sbatch: ").removeprefix("error: ") for line in done.stderr.strip().splitlines())
    if any(sign in words.lower() for sign in UNREACHABLE):
        raise RuntimeError(f"sbatch: {words}; is slurmctld up, and this host part of the cluster?")
    raise ConfigError(_refused(cluster, words))


def _refused(cluster: SlurmCluster, words: str) -> Problem:
    """The field that sbatch complains about, as far as its words tell."""
    named: dict[str, object] = {"partition": cluster.partition, "account": cluster.account, "qos": cluster.qos}
    field = next((name for name in named if name in words.lower()), None)
    fix = "`sinfo -s` lists partitions, their nodes and time limits; `sacctmgr show assoc user=$USER` your accounts"
    return Problem(field or "cluster file", named.get(field or ""), f"sbatch refuses it: {words}", fix)


def _queue(launched: Launched) -> list[dict[str, str]]:
    """What squeue has of the job, one row for each task of an array; none where it has forgotten it."""
    form = "|".join(FIELDS.values())
    command = ("squeue", "--noheader", "--array", "--states=all", f"--jobs={launched.id}", f"--format={form}")
    done = _call(*command)
    if done.returncode and "invalid job id" not in done.stderr.lower():
        raise RuntimeError(f"squeue: {done.stderr.strip()}")
    return [dict(zip(FIELDS, line.split("|"), strict=True)) for line in done.stdout.splitlines() if line.strip()]


def _accounted(launched: Launched) -> dict[str, Any]:
    """How a job that has left the queue ended, where the cluster keeps account of it."""
    form = "State,ExitCode,Elapsed,NodeList"
    try:
        done = _call("sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={launched.id}", f"--format={form}")
    except RuntimeError:
        done = subprocess.CompletedProcess((), 1, "", "no sacct")
    rows = [line.split("|") for line in done.stdout.splitlines() if line.strip()]
    if done.returncode or not rows:
        why = "it has left the queue, and this cluster keeps no account of it (sacct)"
        return {"state": UNKNOWN, "reason": f"{why}; the log and the run folder say more", "hosts": ""}
    states = [row[0].split()[0] for row in rows]  # "CANCELLED by 1000"
    return {"state": _summed(states), "exit_code": rows[-1][1], "running": rows[-1][2], "hosts": rows[-1][3]}


def _summed(states: Sequence[str]) -> str:
    """One word for many tasks: what still happens, or what went wrong, before what is done."""
    order = ("RUNNING", "COMPLETING", *WAITING)
    return next((state for state in order if state in states), next((s for s in states if s != "COMPLETED"), states[0]))


def _is_live(launched: Launched) -> bool:
    return any(row["state"] not in ENDED for row in _queue(launched))


def _log_files(launched: Launched) -> list[Path]:
    """Of many jobs those of this launch: the folder keeps the output of earlier ones."""
    log = Path(launched.log)
    if not log.is_dir():
        return [log]
    return [path for each in launched.id.split(",") for path in sorted(log.glob(f"slurm-{each}[_.]*"))]


def _new_lines(path: Path, read: dict[Path, int], *, whole: bool) -> Iterator[str]:
    """What was written since; ``whole``: a line without an end is left for later."""
    with suppress(FileNotFoundError), open(path, "rb", opener=plain_file) as file:  # nothing was printed yet
        file.seek(read.get(path, 0))
        for line in file:
            if whole and not line.endswith(b"\n"):
                return
            read[path] = read.get(path, 0) + len(line)
            yield line.decode(errors="replace").rstrip("\r\n")


def _call(*command: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_SECONDS, check=False)
    except FileNotFoundError:
        raise RuntimeError(f"{command[0]} is not here: run this on a login node of the Slurm cluster") from None
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{command[0]} has not answered within {ANSWER_SECONDS:.0f} s: is slurmctld up?") from None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")

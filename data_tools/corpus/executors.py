"""One verb split into tasks and run elsewhere: local processes, a Slurm array job, Ray, Kubernetes' pods; then merged.

A task is the verb's own command line with ``--task i/n``; on Slurm and Ray datatrove's executors start the tasks. Which
tasks are done is known from the verb's markers and from nothing else, so the same submission again does only what is
missing. A verb of several passes is sent once per pass: a task does what the passes of others allow. Refused: a
submission without ``--out``, options that the executor does not have.
"""

import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cpt.rundir import DataError

PASSES: Mapping[str, int] = {"dedup": 11}  # of verbs whose tasks need each other's results; all others have one


@dataclass(frozen=True)
class Submission:
    """``arguments``: the verb and its options, without ``--task``; ``workers``: tasks at a time, -1 for all.

    ``options`` go to the executor as they are: for Slurm keys of sbatch, for Ray those of datatrove's executor.
    """

    arguments: tuple[str, ...]
    out: Path
    tasks: int
    logs: Path
    workers: int = -1
    options: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"cpt-{self.arguments[0]}"

    @property
    def passes(self) -> int:
        return PASSES.get(self.arguments[0], 1)

    @property
    def last(self) -> "VerbTask":
        """What makes one of the parts: the merge, or the verb of several passes itself, which finds them all done."""
        return VerbTask(self.arguments if self.passes > 1 else ("merge", str(self.out)), split=False)


@dataclass(frozen=True)
class VerbTask:
    """A pipeline of one step, as datatrove calls it: rank ``i`` of ``n`` runs ``cpt data VERB ... --task i/n``."""

    arguments: tuple[str, ...]
    split: bool = True

    def __call__(self, data: object, rank: int = 0, world_size: int = 1) -> None:
        """Raises DataError (exit code 2: the user can fix it) or RuntimeError with what a failing command said last."""
        task = ("--task", f"{rank}/{world_size}") if self.split else ()
        command = [sys.executable, "-m", "cpt.cli", "data", *self.arguments, *task]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            kind = DataError if done.returncode == 2 else RuntimeError
            raise kind(
                f"{' '.join(command[2:])}\nended with exit code {done.returncode}: {done.stderr[-4000:].strip()}"
            )


def submit(executor: str, submission: Submission) -> str:
    """Run or submit all tasks and the merge; a sentence that says what was started, or done.

    Raises:
        DataError: an unknown executor, or an option it does not have.
        RuntimeError: a task failed, datatrove, ray or the cluster's commands are not there.
    """
    if executor not in EXECUTORS:
        raise DataError(f"--executor is {executor!r}; it must be one of {', '.join(EXECUTORS)}")
    return EXECUTORS[executor](submission)


def _run_local(submission: Submission) -> str:
    """The first failure is the submission's, once the tasks at work have ended; the others are not begun."""
    if submission.options:
        raise DataError(f"--executor local has no option {sorted(submission.options)[0]!r}; fix: leave --option out")
    for _ in range(submission.passes):
        _run_pass(submission)
    submission.last(None)
    return f"{submission.out}: {submission.tasks} tasks done and merged"


def _run_pass(submission: Submission) -> None:
    task = VerbTask(submission.arguments)
    workers = submission.workers if submission.workers > 0 else os.cpu_count()
    with ThreadPoolExecutor(workers) as pool:  # each thread waits for a process
        waiting = [pool.submit(task, None, rank, submission.tasks) for rank in range(submission.tasks)]
        try:
            for future in as_completed(waiting):
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _submit_slurm(submission: Submission) -> str:
    """An array job and, after it, a job that merges; both continue what an earlier submission left."""
    try:
        from datatrove.executor.slurm import SlurmPipelineExecutor
    except ImportError:
        raise RuntimeError("datatrove is not installed; fix: pip install 'cpt[data]', on every node") from None

    options = dict(submission.options)
    missing = [key for key in ("partition", "time") if key not in options]
    if missing:
        raise DataError(f"slurm needs {' and '.join(missing)}; fix: --option partition=NAME --option time=HH:MM:SS")
    shared: dict[str, Any] = {
        "partition": options.pop("partition"),
        "cpus_per_task": _whole("cpus-per-task", options.pop("cpus-per-task", "1")),
        "mem_per_cpu_gb": _whole("mem-per-cpu", options.pop("mem-per-cpu", "4G").removesuffix("G")),
        "qos": options.pop("qos", ""),
        # the tasks find the same Python as the submitting process, whatever shell the cluster starts
        "env_command": f"export PATH={Path(sys.executable).parent}:$PATH",
        "skip_completed": False,
        "randomize_start_duration": 0,
    }
    shared |= {"time": options.pop("time"), "sbatch_args": options}
    last = None
    for number in range(submission.passes):
        last = SlurmPipelineExecutor(
            [VerbTask(submission.arguments)],
            tasks=submission.tasks,
            workers=submission.workers,
            job_name=submission.name,
            logging_dir=str(submission.logs / f"pass_{number}"),
            depends=last,
            **shared,
        )
    merge = SlurmPipelineExecutor(
        [submission.last],
        tasks=1,
        job_name=f"{submission.name}-merge",
        logging_dir=str(submission.logs / "merge"),
        depends=last,
        **shared,
    )
    try:
        merge.run()
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        said = getattr(error, "output", None) or error
        raise RuntimeError(f"sbatch could not be run ({said}); fix: submit from a node of the cluster") from None
    return (
        f"{submission.out}: submitted {submission.tasks} tasks, and job {merge.job_id} that merges them when all "
        f"succeeded; logs in {submission.logs}. Should tasks fail, the same command again does only what is missing"
    )


def _run_ray(submission: Submission) -> str:
    try:
        from datatrove.executor.ray import RayPipelineExecutor
    except ImportError:
        raise RuntimeError(
            "ray or datatrove is not installed; fix: pip install 'cpt[data]' ray, on every node"
        ) from None
    options = _ray_options(submission.options)
    for number in range(submission.passes):
        RayPipelineExecutor(
            [VerbTask(submission.arguments)],
            tasks=submission.tasks,
            workers=submission.workers,
            logging_dir=str(submission.logs / f"pass_{number}"),
            skip_completed=False,
            **options,
        ).run()
    submission.last(None)
    return f"{submission.out}: {submission.tasks} tasks done and merged; logs in {submission.logs}"


def _submit_kubernetes(submission: Submission) -> str:
    """Paths in the arguments are those that the pods see, relative ones from their first mount."""
    from launch.cluster import KubernetesCluster, load_cluster
    from launch.kube.chains import data_tasks
    from launch.kube.verbs import describe_tasks, start_tasks

    options = dict(submission.options)
    cluster = load_cluster(Path(options.pop("cluster", "configs/clusters/k8s.yaml")))
    if options or not isinstance(cluster, KubernetesCluster):
        raise DataError("kubernetes has one option, cluster=FILE, a cluster file with kind: kubernetes")
    if submission.passes > 1:
        raise DataError(f"{submission.arguments[0]} takes {submission.passes} passes; submit it to slurm or ray")
    name = f"{submission.arguments[0]}-{submission.out.name}"
    tasks = data_tasks(name, submission.arguments, submission.last.arguments, count=submission.tasks)
    facts = describe_tasks(cluster, tasks)
    launched = start_tasks(cluster, tasks, submission.logs)
    return (
        f"{submission.out}: {submission.tasks} tasks in job {launched.id}; cpt launch status {submission.logs}. When "
        f"all are done, let the merge go:\n{shlex.join(facts['last'])}"
    )


def _ray_options(options: Mapping[str, str]) -> dict[str, Any]:
    names = {"cpus-per-task": "cpus_per_task", "mem-per-cpu": "mem_per_cpu_gb"}
    unknown = sorted(set(options) - set(names))
    if unknown:
        raise DataError(f"ray has no option {unknown[0]!r}; known are {', '.join(names)}")
    return {names[key]: _whole(key, value.removesuffix("G")) for key, value in options.items()}


def _whole(option: str, text: str) -> int:
    if not text.isdecimal() or not int(text):
        unit = " of gigabytes, e.g. 4G" if option == "mem-per-cpu" else ""
        raise DataError(f"--option {option} is {text!r}; it must be a whole number{unit}")
    return int(text)


def out_of(arguments: Sequence[str]) -> Path:
    """The folder that a verb's ``--out`` names.

    Raises:
        DataError: there is none.
    """
    for position, argument in enumerate(arguments):
        if argument == "--out" and position + 1 < len(arguments):
            return Path(arguments[position + 1])
        if argument.startswith("--out="):
            return Path(argument.removeprefix("--out="))
    raise DataError(f"{' '.join(arguments)}: names no --out; fix: give it, the tasks are merged there")


EXECUTORS: Mapping[str, Callable[[Submission], str]] = {
    "local": _run_local,
    "slurm": _submit_slurm,
    "ray": _run_ray,
    "kubernetes": _submit_kubernetes,
}

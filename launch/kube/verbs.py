"""Runs and tasks on Kubernetes: what would be sent, sending it, and afterwards status, logs and stop, through kubectl.

Owns what must hold before anything is sent; all problems are told at once. Refuses a run folder that no mount of the
pods holds, for nothing would be left of the run.
"""

import json
import os
import shlex
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from cpt.config import load_config
from cpt.problems import ConfigError, Problem
from launch.cluster import KubernetesCluster, name_problems
from launch.kube.manifests import (
    CONTAINER,
    INSTANCE,
    Content,
    Tasks,
    node_command,
    num_processes,
    run_manifests,
    task_manifests,
)
from launch.kube.mpijob import mpi_manifests
from launch.kube.rules import problems_of
from launch.kube.text import Manifest, object_name, to_text
from launch.record import Launched, LaunchJob, write_record

INDEX = "batch.kubernetes.io/job-completion-index"
WORKER = "training.kubeflow.org/replica-index"
SECONDS = 60  # for one answer of the API server
CONFIG_MAP_BYTES = 1_000_000
ENDED = ("Complete", "Succeeded", "Failed")  # conditions that do not pass
RESOURCES = {"job": "jobs.batch", "mpijob": "mpijobs.kubeflow.org"}


def describe(cluster: KubernetesCluster, job: LaunchJob) -> dict[str, Any]:
    """What would be sent, and the world that comes of it: hosts x processes.

    Raises:
        ConfigError: with everything that is wrong.
    """
    content = content_of(cluster, job, os.environ)
    manifests = manifests_of(cluster, content)
    name, processes = object_name(content.name), num_processes(cluster)
    return {
        "kind": "kubernetes",
        "name": name,
        "namespace": cluster.namespace,
        "form": cluster.form,
        "hosts": _hosts(cluster, name),
        "processes_per_host": processes,
        "world_size": cluster.nodes * processes,
        "run_dir": content.run_dir,
        "command": node_command(cluster, content),
        "send": _kubectl("apply", cluster.namespace, "--filename", "-"),
        "manifests": manifests,
    }


def render(facts: Mapping[str, Any]) -> str:
    """The manifests of a description, as the text that would be sent; and what is to be done after it."""
    after = [f"# {each}: {shlex.join(facts[each])}\n" for each in ("send", "wait", "last") if each in facts]
    return "".join(after) + to_text(facts["manifests"])


def start(cluster: KubernetesCluster, job: LaunchJob) -> Launched:
    """Send the manifests. A job that was stopped goes on; one that has ended is refused.

    Raises:
        ConfigError: with everything that is wrong; nothing was sent.
        RuntimeError: kubectl is missing, or the cluster refuses.
    """
    facts = describe(cluster, job)
    launched = _send(facts, cluster.form)
    write_record(job.run_dir, launched)
    return launched


def start_tasks(cluster: KubernetesCluster, tasks: Tasks, folder: Path) -> Launched:
    """Send the manifests of many tasks; the record goes to ``folder``.

    Raises:
        ConfigError, RuntimeError: as :func:`start`.
    """
    facts = describe_tasks(cluster, tasks)
    launched = _send(facts, "job")
    write_record(folder, launched)
    return launched


def status(launched: Launched) -> dict[str, Any]:
    """The job's state and one line per host: pod, node, phase, exit code, how often its pod was replaced."""
    job = json.loads(_answer(_kubectl("get", _namespace(launched), _job(launched), "--output", "json")))
    selector = ("--selector", f"{INSTANCE}={launched.id}", "--output", "json")
    pods = json.loads(_answer(_kubectl("get", _namespace(launched), "pods", *selector)))["items"]
    return {"namespace": _namespace(launched), "state": _state(job), "hosts": _by_host(pods)}


def logs(launched: Launched, follow: bool) -> Iterator[str]:
    """Lines of all pods, each behind its pod's name.

    Raises:
        RuntimeError: kubectl is missing or fails.
    """
    command = _kubectl("logs", _namespace(launched), "--selector", f"{INSTANCE}={launched.id}")
    command += ["--container", CONTAINER, "--prefix", "--tail=-1"]
    command += [f"--max-log-requests={len(launched.hosts) + 1}", *(["--follow"] if follow else [])]
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, errors="replace"
        )
    except FileNotFoundError:
        raise RuntimeError(_missing()) from None
    assert process.stdout is not None
    try:
        for line in process.stdout:
            yield line.rstrip("\n")
        if process.wait():
            raise RuntimeError(f"{' '.join(command)} ended with exit code {process.returncode}; what it said is above")
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()


def stop(launched: Launched) -> str:
    """Suspend the job: its pods get SIGTERM, save and end, and are not replaced. Returns what to do to go on."""
    paths = {"job": {"suspend": True}, "mpijob": {"runPolicy": {"suspend": True}}}
    patch = json.dumps({"spec": paths[launched.details["form"]]})
    namespace = _namespace(launched)
    _answer(_kubectl("patch", namespace, _job(launched), "--type", "merge", "--patch", patch))
    return (
        f"{launched.id} is suspended: its pods save and end. `cpt launch` with the same files goes on; "
        f"{' '.join(_kubectl('delete', namespace, _job(launched)))} removes the job, not the run folder"
    )


def describe_tasks(cluster: KubernetesCluster, tasks: Tasks) -> dict[str, Any]:
    """Many tasks as an Indexed Job: pilots, or parts of a tokenisation. ``last`` is what to run when all are done.

    Raises:
        ConfigError: with everything that is wrong.
    """
    manifests = task_manifests(cluster, tasks)
    problems = [*name_problems("name", tasks.name), *problems_of(cluster, tasks.shell)]
    problems += _too_large(manifests, "tasks")
    if problems:
        raise ConfigError(*problems)
    name = object_name(tasks.name)
    patch = json.dumps({"spec": {"suspend": False}})
    return {
        "kind": "kubernetes",
        "name": name,
        "namespace": cluster.namespace,
        "hosts": [f"{name}-{index}" for index in range(len(tasks.commands))],
        "tasks": len(tasks.commands),
        "send": _kubectl("apply", cluster.namespace, "--filename", "-"),
        "wait": _kubectl("wait", cluster.namespace, f"job/{name}", "--for=condition=complete", "--timeout=-1s"),
        "last": _kubectl("patch", cluster.namespace, f"job/{name}-last", "--type", "merge", "--patch", patch),
        "manifests": manifests,
    }


def manifests_of(cluster: KubernetesCluster, content: Content) -> list[Manifest]:
    return (mpi_manifests if cluster.form == "mpijob" else run_manifests)(cluster, content)


def content_of(cluster: KubernetesCluster, job: LaunchJob, shell: Mapping[str, str]) -> Content:
    """What the pods need of a run. Paths below the folder that the command was given in become relative: the pods
    resolve them at their first mount; others stay as they are.

    Raises:
        ConfigError: in the run file, or with everything that is wrong for Kubernetes.
    """
    run_file, *rest = job.first
    config = load_config(job.directory / run_file, rest)
    raw = _relative(config.model_dump(mode="json"), f"{job.directory}/")
    first = PurePosixPath(cluster.mounts[0].target if cluster.mounts else "/")
    run_dir = PurePosixPath(os.path.normpath(first / raw["run"]["dir"] / raw["run"]["name"]))
    content = Content(job.name, yaml.safe_dump(raw, sort_keys=False, width=120), str(run_dir), {**shell})
    holders = [mount for mount in cluster.mounts if run_dir.is_relative_to(mount.target)]
    problems = [*name_problems("run.name", job.name), *problems_of(cluster, shell)]
    holder = max(holders, key=lambda mount: len(mount.target), default=None)
    if holder is None or holder.read_only:
        targets = ", ".join(mount.target for mount in cluster.mounts if not mount.read_only) or "none"
        rule = f"must lie on a mount of the pods that they can write ({targets})"
        problems.append(
            Problem("run.dir", str(run_dir), rule, "name one in the cluster file's mounts, or another run.dir")
        )
    problems += _too_large(manifests_of(cluster, content), "the run file")
    if problems:
        raise ConfigError(*problems)
    return content


def _send(facts: Mapping[str, Any], form: str) -> Launched:
    """Raises ConfigError for a job that has ended: to send it again changes nothing, and Kubernetes does not say so."""
    details = {"namespace": facts["namespace"], "form": form}
    started = datetime.now(UTC).isoformat(timespec="seconds")
    launched = Launched("kubernetes", facts["name"], tuple(facts["hosts"]), "", started, details)
    place = _namespace(launched), _job(launched)
    found = _answer(_kubectl("get", *place, "--ignore-not-found", "--output", "json"))
    state = _state(json.loads(found)) if found else ""
    if state.startswith(ENDED):
        fix = f"first {shlex.join(_kubectl('delete', *place))}, which leaves the run folder as it is"
        raise ConfigError(
            Problem("run.name", launched.id, f"its job has ended ({state}) and would not start again", fix)
        )
    _answer(facts["send"], text=to_text(facts["manifests"]))
    return launched


def _relative(value: Any, folder: str) -> Any:
    if isinstance(value, dict):
        return {name: _relative(each, folder) for name, each in value.items()}
    if isinstance(value, list):
        return [_relative(each, folder) for each in value]
    return value.removeprefix(folder) if isinstance(value, str) else value


def _too_large(manifests: Sequence[Manifest], what: str) -> list[Problem]:
    size = max(len(json.dumps(each).encode()) for each in manifests)
    rule = f"makes an object of {size:,} bytes; Kubernetes takes {CONFIG_MAP_BYTES:,} in a config map"
    return [Problem(what, None, rule, "put it on a mount, in parts")] if size > CONFIG_MAP_BYTES else []


def _hosts(cluster: KubernetesCluster, name: str) -> list[str]:
    middle = "-worker" if cluster.form == "mpijob" else ""
    return [f"{name}{middle}-{index}.{name}" for index in range(cluster.nodes)]


def _state(job: Mapping[str, Any]) -> str:
    """``Complete``, ``Failed: why``, ``Suspended``, or ``Running``: of the conditions that hold the weightiest."""
    holding = {each["type"]: each for each in job.get("status", {}).get("conditions", []) if each["status"] == "True"}
    for kind in (*ENDED, "Suspended"):
        if kind in holding:
            reason = ": ".join(holding[kind][part] for part in ("reason", "message") if holding[kind].get(part))
            return f"{kind}: {reason}" if reason and kind == "Failed" else kind
    return "Running" if job.get("status", {}).get("active") or "Running" in holding else "Pending"


def _by_host(pods: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The newest pod of every index; its predecessors are counted."""
    newest: dict[str, list[Mapping[str, Any]]] = {}
    for pod in sorted(pods, key=lambda pod: str(pod["metadata"].get("creationTimestamp", ""))):
        labels = {**pod["metadata"].get("labels", {}), **pod["metadata"].get("annotations", {})}
        newest.setdefault(str(labels.get(INDEX, labels.get(WORKER, ""))), []).append(pod)
    order = sorted(newest, key=lambda index: (not index.isdecimal(), int(index) if index.isdecimal() else 0))
    return [_host(index, newest[index]) for index in order]


def _host(index: str, pods: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    pod = pods[-1]
    status = pod.get("status", {})
    states = [each.get("state", {}) for each in status.get("containerStatuses", [])]
    ended: dict[str, Any] = next((state["terminated"] for state in states if "terminated" in state), {})
    waiting = next((state["waiting"].get("reason") for state in states if "waiting" in state), None)
    return {
        "index": int(index) if index.isdecimal() else None,
        "pod": pod["metadata"]["name"],
        "node": pod.get("spec", {}).get("nodeName"),
        "phase": status.get("phase", "Unknown"),
        "reason": ended.get("reason") or waiting or status.get("reason"),
        "exit_code": ended.get("exitCode"),
        "restarts": len(pods) - 1,
    }


def _job(launched: Launched) -> str:
    return f"{RESOURCES[launched.details['form']]}/{launched.id}"


def _namespace(launched: Launched) -> str:
    return launched.details["namespace"]


def _kubectl(verb: str, namespace: str, *arguments: str) -> list[str]:
    return ["kubectl", verb, "--namespace", namespace, *arguments]


def _answer(command: Sequence[str], *, text: str = "") -> str:
    """What a command prints. Raises RuntimeError with what it complains of."""
    try:
        done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=SECONDS, check=False)
    except FileNotFoundError:
        raise RuntimeError(_missing()) from None
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{' '.join(command)}: no answer within {SECONDS} s; is the cluster reachable?") from None
    if done.returncode:
        complaint = done.stderr.strip()
        fix = ""
        if "immutable" in complaint:
            fix = "; the job is there already and was made otherwise: wait for it, or `kubectl delete job` it first"
        raise RuntimeError(f"{' '.join(command)} ended with exit code {done.returncode}: {complaint}{fix}")
    return done.stdout


def _missing() -> str:
    return "kubectl is not installed here, or not on PATH; `--dry-run` prints the manifests to apply elsewhere"

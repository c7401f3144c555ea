"""What is sent to Kubernetes for a run and for many independent tasks, as dictionaries.

A run is an Indexed Job: one pod per host, the completion index is the number of the host, a headless service gives pod
0 the name that all ranks meet at, a config map carries the resolved run file. Owns the security context (no root, no
capability, no token, a root file system that cannot be written), and what a pod's exit code leads to. Relative paths
of a run file start at the first mount.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cpt.exit_codes import EXIT_STOPPED, EXIT_USER
from launch.cluster import KubernetesCluster, exported
from launch.kube.text import Manifest, literal, object_name

FILES = "/etc/cpt"  # where the config map is mounted
RUN_FILE, TASK_FILE = "run.yaml", "tasks.json"
CONTAINER = "ranks"
INSTANCE = "app.kubernetes.io/instance"
# All that libraries write beside the run goes to the scratch volume: the root file system cannot be written.
WRITABLE = {
    "HOME": "/tmp",
    "TMPDIR": "/tmp",
    "XDG_CACHE_HOME": "/tmp/cache",
    "HF_HOME": "/tmp/cache/huggingface",
    "MPLCONFIGDIR": "/tmp/cache/matplotlib",
    "TORCH_EXTENSIONS_DIR": "/tmp/cache/torch_extensions",
    "TORCHINDUCTOR_CACHE_DIR": "/tmp/cache/inductor",
    "TRITON_CACHE_DIR": "/tmp/cache/triton",
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONUNBUFFERED": "1",
}


INTERFACE = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


@dataclass(frozen=True)
class Content:
    """What one run is: ``run_file`` and ``run_dir`` as the pods see them, ``shell`` the variables of this shell."""

    name: str
    run_file: str
    run_dir: str
    shell: Mapping[str, str]


@dataclass(frozen=True)
class Tasks:
    """Independent tasks: of each the commands, one after the other; ``last`` is for when all are done."""

    name: str
    commands: Sequence[Sequence[Sequence[str]]]
    last: Sequence[str]
    shell: Mapping[str, str]


def run_manifests(cluster: KubernetesCluster, content: Content) -> list[Manifest]:
    """Config map, headless service, network policy and Indexed Job of a run."""
    name = object_name(content.name)
    place = {"MASTER_ADDR": f"{name}-0.{name}", "MASTER_PORT": str(cluster.master_port)}
    pod = pod_template(
        cluster, name, command=node_command(cluster, content), variables=variables(cluster, content.shell, place)
    )
    pod["spec"]["subdomain"] = name
    failed = [
        {"action": "FailJob", "onExitCodes": _codes(EXIT_USER)},
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        {"action": "Ignore", "onExitCodes": _codes(EXIT_STOPPED)},
    ]
    counts = {"completions": cluster.nodes, "parallelism": cluster.nodes}
    # When one pod fails, so do the others: a restart of the job is a failure of each.
    limits = {"backoffLimit": cluster.restarts * cluster.nodes, "podFailurePolicy": {"rules": failed}}
    job = indexed_job(cluster, name, {**counts, **limits, "template": pod})
    files = config_map(cluster, name, {RUN_FILE: content.run_file})
    return [files, service(cluster, name), network_policy(cluster, name), job]


def task_manifests(cluster: KubernetesCluster, tasks: Tasks) -> list[Manifest]:
    """Config map, Indexed Job with a pod for each task, and the job that makes one of what they wrote: it is
    suspended, for Kubernetes knows no order among jobs.
    """
    name = object_name(tasks.name)
    environment = variables(cluster, tasks.shell, {})
    command = ["python", "-m", "launch.kube.tasks", f"{FILES}/{TASK_FILE}"]
    failed = [
        {"action": "FailIndex", "onExitCodes": _codes(EXIT_USER)},  # the other tasks can go on
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        {"action": "Ignore", "onExitCodes": _codes(EXIT_STOPPED)},
    ]
    count = len(tasks.commands)
    counts = {"completions": count, "parallelism": min(count, cluster.nodes)}
    limits = {"backoffLimitPerIndex": cluster.restarts, "podFailurePolicy": {"rules": failed}}
    pod = pod_template(cluster, name, command=command, variables=environment)
    last = pod_template(cluster, name, command=[literal(word) for word in tasks.last], variables=environment)
    return [
        config_map(cluster, name, {TASK_FILE: json.dumps(tasks.commands, indent=1) + "\n"}),
        indexed_job(cluster, name, {**counts, **limits, "template": pod}),
        {
            **head("batch/v1", "Job", cluster, name, suffix="-last"),
            "spec": {"suspend": True, "backoffLimit": cluster.restarts, "template": last},
        },
    ]


def indexed_job(cluster: KubernetesCluster, name: str, spec: Mapping[str, Any]) -> Manifest:
    """``suspend`` is stated so that applying the same manifest again continues a job that was stopped. A pod is
    replaced only when it has ended: two must not train in one run folder. No time to live: a job is its own record.
    """
    fixed = {"suspend": False, "completionMode": "Indexed", "podReplacementPolicy": "Failed"}
    return {**head("batch/v1", "Job", cluster, name), "spec": {**fixed, **spec}}


def service(cluster: KubernetesCluster, name: str) -> Manifest:
    """Names for the pods. Also of those that are not ready: rank 0 must be found before anything is."""
    ports = [{"name": "rendezvous", "port": cluster.master_port, "targetPort": cluster.master_port}]
    spec = {"clusterIP": "None", "publishNotReadyAddresses": True, "selector": {INSTANCE: name}, "ports": ports}
    return {**head("v1", "Service", cluster, name), "spec": spec}


def network_policy(cluster: KubernetesCluster, name: str) -> Manifest:
    """Only the pods of this job reach each other's ports: what ranks say to one another is not authenticated."""
    own = {"podSelector": {"matchLabels": {INSTANCE: name}}}
    spec = {**own, "policyTypes": ["Ingress"], "ingress": [{"from": [own]}]}
    return {**head("networking.k8s.io/v1", "NetworkPolicy", cluster, name), "spec": spec}


def config_map(cluster: KubernetesCluster, name: str, files: Mapping[str, str]) -> Manifest:
    return {**head("v1", "ConfigMap", cluster, name), "data": dict(files)}


def num_processes(cluster: KubernetesCluster) -> int:
    """Ranks of one pod."""
    return cluster.processes_per_host or cluster.gpus_per_node or 1


def node_command(cluster: KubernetesCluster, content: Content) -> list[str]:
    """What starts the ranks of one host; it continues the run where its folder is there already."""
    places = ["--hosts", str(cluster.nodes), "--processes", str(num_processes(cluster)), "--run-dir", content.run_dir]
    command = ["python", "-m", "launch.local.node", *places, "--", f"{FILES}/{RUN_FILE}", "--or-resume"]
    return [literal(word) for word in command]


def variables(cluster: KubernetesCluster, shell: Mapping[str, str], place: Mapping[str, str]) -> list[dict[str, str]]:
    """Of the container. The later wins: folders of caches, this shell's by the allow-list, the interface, ``env`` of
    the cluster file, the place in the job.
    """
    interface = dict.fromkeys(INTERFACE, cluster.interface) if cluster.interface else {}
    found = {**WRITABLE, **exported(cluster, shell), **interface, **cluster.env, **place}
    return [{"name": name, "value": literal(value)} for name, value in found.items()]


def pod_template(
    cluster: KubernetesCluster, name: str, *, command: Sequence[str], variables: Sequence[Mapping[str, str]]
) -> Manifest:
    """A pod that runs ``command`` as nobody in particular, and may write to its mounts, /tmp and /dev/shm only."""
    container = {
        "name": CONTAINER,
        "image": cluster.image,
        "command": list(command),
        "workingDir": cluster.mounts[0].target if cluster.mounts else "/tmp",
        "env": list(variables),
        "resources": _resources(cluster),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": _volume_mounts(cluster),
    }
    spec: Manifest = {
        "restartPolicy": "Never",  # the job replaces pods; a pod failure policy needs that
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": cluster.grace_seconds,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": cluster.user_id,
            "runAsGroup": cluster.user_id,
            "fsGroup": cluster.user_id,
            "fsGroupChangePolicy": "OnRootMismatch",  # not through millions of files at every start
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [container],
        "volumes": _volumes(cluster, name),
    }
    if cluster.node_selector:
        spec["nodeSelector"] = dict(cluster.node_selector)
    if cluster.tolerations:
        spec["tolerations"] = [dict(each) for each in cluster.tolerations]
    return {"metadata": {"labels": _labels(name)}, "spec": spec}


def _resources(cluster: KubernetesCluster) -> Manifest:
    """Memory is limited to what was asked for, CPU is not: a limit on it stalls the threads of every rank."""
    gpus = {"nvidia.com/gpu": str(cluster.gpus_per_node)} if cluster.gpus_per_node else {}
    asked = {"cpu": cluster.cpu, "memory": cluster.memory, "ephemeral-storage": cluster.scratch, **gpus}
    return {"requests": asked, "limits": {"memory": cluster.memory, **gpus}}


def _volumes(cluster: KubernetesCluster, files: str) -> list[Manifest]:
    claims = list(dict.fromkeys(mount.source for mount in cluster.mounts))
    return [
        {"name": "files", "configMap": {"name": files}},
        {"name": "scratch", "emptyDir": {"sizeLimit": cluster.scratch}},
        {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": cluster.shared_memory}},
        *(
            {"name": f"claim-{number}", "persistentVolumeClaim": {"claimName": claim}}
            for number, claim in enumerate(claims)
        ),
    ]


def _volume_mounts(cluster: KubernetesCluster) -> list[Manifest]:
    claims = list(dict.fromkeys(mount.source for mount in cluster.mounts))
    return [
        {"name": "files", "mountPath": FILES, "readOnly": True},
        {"name": "scratch", "mountPath": "/tmp"},
        {"name": "shared-memory", "mountPath": "/dev/shm"},
        *(
            {
                "name": f"claim-{claims.index(mount.source)}",
                "mountPath": mount.target,
                "readOnly": mount.read_only,
            }
            for mount in cluster.mounts
        ),
    ]


def _codes(code: int) -> Manifest:
    return {"containerName": CONTAINER, "operator": "In", "values": [code]}


def head(version: str, kind: str, cluster: KubernetesCluster, name: str, *, suffix: str = "") -> Manifest:
    """What every object begins with; the label INSTANCE is the same for all objects of a run."""
    metadata = {"name": name + suffix, "namespace": cluster.namespace, "labels": _labels(name)}
    return {"apiVersion": version, "kind": kind, "metadata": metadata}


def _labels(name: str) -> dict[str, str]:
    return {"app.kubernetes.io/name": "cpt", INSTANCE: name, "app.kubernetes.io/managed-by": "cpt"}

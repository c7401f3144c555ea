"""Every manifest is held against the schemas of Kubernetes' API, strictly; and hostile names and values against both.

An MPIJob is no part of that API and has no schema in ``kubernetes-validate``: MPI_JOB below states the fields of the
operator's public types (v2beta1, types.go) that may stand around its pods, and the pods are held against Kubernetes'.
"""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.cluster import KubernetesCluster, load_cluster
from launch.kube.chains import data_tasks, pilot_tasks
from launch.kube.manifests import INSTANCE, Content, Tasks, run_manifests, task_manifests
from launch.kube.mpijob import mpi_manifests
from launch.kube.rules import amount, problems_of
from launch.kube.text import LABEL, NAME_CHARS, literal, object_name, to_text

ROOT = Path(__file__).resolve().parents[3]
API = "1.34"
RUN = Content("8B run", "run:\n  name: x\n", "/data/runs/x", {})
TASKS = Tasks("pilots", [[["cpt", "one"]], [["cpt", "two"], ["cpt", "three"]]], ["cpt", "all"], {})
COUNT = {"type": "integer", "minimum": 0}
REPLICAS = {
    "type": "object",
    "properties": {
        "replicas": COUNT,
        "restartPolicy": {"enum": ["Always", "OnFailure", "Never", "ExitCode"]},
        "template": {"type": "object"},
    },
    "required": ["replicas", "template"],
    "additionalProperties": False,
}
RUN_POLICY = {
    "type": "object",
    "properties": {
        "cleanPodPolicy": {"enum": ["All", "Running", "None"]},
        "ttlSecondsAfterFinished": COUNT,
        "activeDeadlineSeconds": COUNT,
        "backoffLimit": COUNT,
        "schedulingPolicy": {"type": "object"},
        "suspend": {"type": "boolean"},
    },
    "additionalProperties": False,
}
MPI_JOB = {
    "type": "object",
    "properties": {
        "apiVersion": {"const": "kubeflow.org/v2beta1"},
        "kind": {"const": "MPIJob"},
        "metadata": {"type": "object"},
        "spec": {
            "type": "object",
            "properties": {
                "slotsPerWorker": COUNT,
                "runPolicy": RUN_POLICY,
                "sshAuthMountPath": {"type": "string"},
                "mpiImplementation": {"enum": ["OpenMPI", "Intel"]},
                "mpiReplicaSpecs": {
                    "type": "object",
                    "properties": {"Launcher": REPLICAS, "Worker": REPLICAS},
                    "required": ["Launcher", "Worker"],
                    "additionalProperties": False,
                },
            },
            "required": ["mpiReplicaSpecs"],
            "additionalProperties": False,
        },
    },
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "additionalProperties": False,
}


def a_cluster(**changes: Any) -> KubernetesCluster:
    fields: dict[str, Any] = {"kind": "kubernetes", "image": "registry.example/cpt:1", "nodes": 2}
    fields["mounts"] = [{"source": "training", "target": "/data"}, {"source": "w", "target": "/w", "read_only": True}]
    return KubernetesCluster(**{**fields, **changes})


def all_manifests(cluster: KubernetesCluster, run: Content = RUN, tasks: Tasks = TASKS) -> list[dict[str, Any]]:
    return [*run_manifests(cluster, run), *task_manifests(cluster, tasks), *mpi_manifests(cluster, run)]


def hold_against_the_api(manifest: dict[str, Any]) -> None:
    if manifest["kind"] != "MPIJob":
        kubernetes_validate.validate(manifest, API, strict=True)
        return
    jsonschema.validate(manifest, MPI_JOB)
    for replicas in manifest["spec"]["mpiReplicaSpecs"].values():
        spec = {"template": replicas["template"]}
        job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": manifest["metadata"], "spec": spec}
        kubernetes_validate.validate(job, API, strict=True)


def pods_of(manifests: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for manifest in manifests:
        spec = manifest.get("spec", {})
        holders = [spec, *spec.get("mpiReplicaSpecs", {}).values()]
        yield from (holder["template"]["spec"] for holder in holders if "template" in holder)


CLUSTERS = {
    "shipped": load_cluster(ROOT / "configs" / "clusters" / "k8s.yaml"),
    "least": KubernetesCluster(kind="kubernetes", image="cpt", nodes=1),
    "most": a_cluster(
        **{"gpus_per_node": 8, "processes_per_host": 4, "interface": "eth0", "env": {"A": "1e3", "B": ""}},
        node_selector={"nvidia.com/gpu.product": "H100"},
        tolerations=[{"key": "a", "operator": "Exists", "effect": "NoSchedule"}],
    ),
}


@pytest.mark.parametrize("name", CLUSTERS)
def test_every_manifest_fulfils_the_api_and_comes_back_from_its_text(name: str) -> None:
    cluster = CLUSTERS[name]
    assert isinstance(cluster, KubernetesCluster) and problems_of(cluster, {}) == []
    manifests = all_manifests(cluster)
    for manifest in manifests:
        hold_against_the_api(manifest)
    assert list(yaml.safe_load_all(to_text(manifests))) == manifests


def test_the_check_above_sees_a_wrong_field() -> None:
    *_, job = run_manifests(a_cluster(), RUN)
    with pytest.raises(kubernetes_validate.ValidationError):
        hold_against_the_api({**job, "spec": {**job["spec"], "completion": 2}})
    *_, mpi = mpi_manifests(a_cluster(), RUN)
    with pytest.raises(jsonschema.ValidationError):
        hold_against_the_api({**mpi, "spec": {**mpi["spec"], "workers": 2}})


def test_no_pod_can_be_root_write_its_root_file_system_or_ask_the_api_for_anything() -> None:
    pods = list(pods_of(all_manifests(a_cluster())))
    assert len(pods) == 5  # run, tasks, their last one, launcher and worker of MPI
    for pod in pods:
        (container,) = pod["containers"]
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == 10001
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        writable = [mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")]
        assert writable == ["/tmp", "/dev/shm", "/data"]
        assert {each["name"]: each["value"] for each in container["env"]}["HOME"] == "/tmp"


def test_the_pods_of_a_run_are_hosts_that_meet_at_pod_0() -> None:
    _, service, policy, job = run_manifests(a_cluster(gpus_per_node=8, master_port=29501), RUN)
    name, spec = job["metadata"]["name"], job["spec"]
    pod = spec["template"]["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 2, 2)
    environment = {each["name"]: each["value"] for each in pod["containers"][0]["env"]}
    assert environment["MASTER_ADDR"] == f"{name}-0.{name}" and environment["MASTER_PORT"] == "29501"
    assert pod["subdomain"] == service["metadata"]["name"] == name  # so that pod 0 has that name
    assert service["spec"]["publishNotReadyAddresses"] and service["spec"]["clusterIP"] == "None"
    labels = spec["template"]["metadata"]["labels"].items()
    assert service["spec"]["selector"].items() <= labels
    assert policy["spec"]["podSelector"]["matchLabels"].items() <= labels
    command = " ".join(pod["containers"][0]["command"])
    assert (
        "launch.local.node --hosts 2 --processes 8 --run-dir /data/runs/x -- /etc/cpt/run.yaml --or-resume" in command
    )
    assert pod["containers"][0]["resources"]["limits"] == {"memory": "16Gi", "nvidia.com/gpu": "8"}
    assert pod["volumes"][2]["emptyDir"] == {"medium": "Memory", "sizeLimit": "8Gi"}


def action(rules: list[dict[str, Any]], code: int, *, disrupted: bool = False) -> str:
    """What the first rule that holds says, as the job controller reads them."""
    for rule in rules:
        if code in rule.get("onExitCodes", {}).get("values", []) or (disrupted and "onPodConditions" in rule):
            return str(rule["action"])
    return "Count"


@pytest.mark.parametrize(
    ("code", "disrupted", "of_a_run", "of_a_task"),
    [
        (143, False, "Ignore", "Ignore"),  # saved: a new pod goes on
        (137, True, "Ignore", "Ignore"),  # evicted, and too slow
        (2, False, "FailJob", "FailIndex"),  # the user can fix it: no pod can
        (1, False, "Count", "Count"),
        (3, False, "Count", "Count"),
        (137, False, "Count", "Count"),
    ],
)
def test_what_an_exit_code_leads_to(code: int, disrupted: bool, of_a_run: str, of_a_task: str) -> None:
    *_, run = run_manifests(a_cluster(), RUN)
    _, tasks, _ = task_manifests(a_cluster(), TASKS)
    told = [job["spec"]["podFailurePolicy"]["rules"] for job in (run, tasks)]
    assert [action(rules, code, disrupted=disrupted) for rules in told] == [of_a_run, of_a_task]
    assert run["spec"]["backoffLimit"] == 2 * 10 and tasks["spec"]["backoffLimitPerIndex"] == 10


def test_tasks_are_dealt_out_by_number_and_the_last_one_waits_to_be_let_go() -> None:
    files, job, last = task_manifests(a_cluster(nodes=1), TASKS)
    assert json.loads(files["data"]["tasks.json"]) == [[["cpt", "one"]], [["cpt", "two"], ["cpt", "three"]]]
    assert (job["spec"]["completions"], job["spec"]["parallelism"]) == (2, 1)
    assert last["spec"]["suspend"] and last["metadata"]["name"] == f"{job['metadata']['name']}-last"
    assert last["spec"]["template"]["spec"]["containers"][0]["command"] == ["cpt", "all"]


def test_mpirun_starts_one_starter_on_each_worker_and_hands_it_every_variable() -> None:
    *_, job = mpi_manifests(a_cluster(gpus_per_node=8), RUN)
    launcher = job["spec"]["mpiReplicaSpecs"]["Launcher"]["template"]["spec"]["containers"][0]
    worker = job["spec"]["mpiReplicaSpecs"]["Worker"]["template"]["spec"]["containers"][0]
    command = launcher["command"]
    handed = {command[number + 1] for number, word in enumerate(command) if word == "-x"}
    assert handed == {"PATH", *(each["name"] for each in launcher["env"])}
    assert command[command.index("-n") + 1] == "2" and "launch.local.node" in command
    assert worker["command"][0] == "/usr/sbin/sshd" and worker["resources"]["limits"]["nvidia.com/gpu"] == "8"
    assert "nvidia.com/gpu" not in launcher["resources"]["limits"]


def test_a_trunk_and_its_branches_are_one_task_in_order() -> None:
    def job(name: str, *after: str) -> dict[str, Any]:
        command = ["/somewhere/python", "-m", "cpt.cli", "plan", "pilots", "/here/p.yaml", "--only", name]
        return {"name": name, "command": command, "after": list(after), "cwd": "/here"}

    jobs = [job("a"), job("b"), job("a-half", "a"), job("b-half", "b"), job("a-full", "a"), job("collect", "a", "b")]
    tasks = pilot_tasks("pilots", jobs, {})
    assert [[command[-1] for command in task] for task in tasks.commands] == [
        ["a", "a-half", "a-full"],
        ["b", "b-half"],
    ]
    assert tasks.commands[0][0] == ["python", "-m", "cpt.cli", "plan", "pilots", "p.yaml", "--only", "a"]
    assert tasks.last[-1] == "collect"


def test_a_tokenisation_is_as_many_tasks_and_then_a_merge() -> None:
    tasks = data_tasks("tokenize", ["tokenize", "--out", "stores/m"], ["merge", "stores/m"], count=3)
    assert [task[0][-2:] for task in tasks.commands] == [["--task", f"{number}/3"] for number in range(3)]
    assert tasks.last[-2:] == ["merge", "stores/m"]


def expanded(text: str) -> str:
    """What the kubelet makes of a value where no variable is known (k8s.io/kubernetes expansion.go)."""
    return re.sub(r"\$(\$|\([^)]*\))", lambda found: "$" if found[1] == "$" else f"<variable {found[1]}>", text)


# What a variable or an argument can hold: no NUL, no halves of surrogate pairs.
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=60)
HOSTILE = st.sampled_from(
    [
        "$(PATH)",
        "$$(A)",
        "a$",
        "\n---\nkind: Pod",
        '"}, {"name": "x',
        "{{ x }}",
        "1e3",
        "on",
        "=",
        "~",
        "0x1F",
        "| x\n ",
    ]
)


@settings(max_examples=25, deadline=None)
@given(value=TEXT | HOSTILE, name=TEXT | HOSTILE, word=TEXT | HOSTILE, lines=st.lists(TEXT, max_size=4))
def test_no_value_becomes_structure_and_none_is_changed(value: str, name: str, word: str, lines: list[str]) -> None:
    run = Content(name, "\n".join(lines), f"/data/{word}", {})
    tasks = Tasks(name, [[["cpt", word]]], ["cpt", word], {})
    cluster = a_cluster(env={"GIVEN": value})
    manifests = all_manifests(cluster, run, tasks)
    for manifest in manifests:
        assert LABEL.fullmatch(manifest["metadata"]["name"]) and len(manifest["metadata"]["name"]) <= 63
    assert list(yaml.safe_load_all(to_text(manifests))) == manifests
    for pod in pods_of(manifests):
        found = {each["name"]: each["value"] for each in pod["containers"][0]["env"]}
        assert expanded(found["GIVEN"]) == value
    *_, last = task_manifests(cluster, tasks)
    assert expanded(last["spec"]["template"]["spec"]["containers"][0]["command"][1]) == word
    assert manifests[0]["data"]["run.yaml"] == "\n".join(lines)


def test_the_api_takes_hostile_values_too() -> None:
    run = Content("$(X)\n---\n", "a: '\n---\nb: ${x}", "/data/$(HOME)", {})
    for manifest in all_manifests(a_cluster(env={"GIVEN": "$(HOME)\n---\n- x"}), run):
        hold_against_the_api(manifest)


def test_every_string_value_is_quoted_since_kubernetes_reads_plain_words_by_other_rules() -> None:
    for line in to_text(run_manifests(a_cluster(env={"A": "1e3", "B": "0o17", "C": "y"}), RUN)).splitlines():
        value = re.sub(r"^[ -]*[\w./-]+:( |$)", "", line.removeprefix("---")).strip().removeprefix("- ")
        assert value in ("", "|", "true", "false") or value.isdecimal() or value[0] == '"' or "name: x" in line, line


@given(TEXT | HOSTILE, TEXT | HOSTILE)
def test_names_are_names_of_hosts_and_differ_where_texts_do(first: str, second: str) -> None:
    for text in (first, second):
        assert LABEL.fullmatch(object_name(text)) and len(object_name(text)) <= NAME_CHARS
        assert object_name(text)[0].isalpha()  # of a service
        assert expanded(literal(text)) == text
    assert (object_name(first) == object_name(second)) == (first == second)


def test_a_name_that_is_one_stays_readable() -> None:
    assert object_name("law-8b") == "cpt-law-8b"
    assert re.fullmatch(r"cpt-law-8b-[0-9a-f]{8}", object_name("Law_8B"))


@pytest.mark.parametrize(
    ("text", "value"), [("8Gi", 8 * 2**30), ("500m", 0.5), ("1.5G", 1.5e9), ("4", 4), ("2k", 2e3), ("1Ki", 1024)]
)
def test_an_amount_is_read_with_its_unit(text: str, value: float) -> None:
    assert amount(text) == value


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"namespace": "Train_ing"}, "namespace"),
        ({"namespace": "a" * 64}, "namespace"),
        ({"image": "cpt latest"}, "image"),
        ({"mounts": [{"source": "../x", "target": "/data"}]}, "mounts.0.source"),
        ({"mounts": [{"source": "a", "target": "/tmp/x"}]}, "mounts.0.target"),
        ({"mounts": [{"source": "a", "target": "/a/../b"}]}, "mounts.0.target"),
        ({"mounts": [{"source": "a", "target": "/"}]}, "mounts.0.target"),
        ({"mounts": [{"source": "a", "target": "//tmp/./"}]}, "mounts.0.target"),
        ({"mounts": [{"source": "a", "target": "/etc"}]}, "mounts.0.target"),  # /etc/cpt lies in it
        ({"mounts": [{"source": "a", "target": "/a"}, {"source": "b", "target": "/a"}]}, "mounts.1.target"),
        ({"mounts": [{"source": "a", "target": "/a"}, {"source": "b", "target": "/a/"}]}, "mounts.1.target"),
        ({"node_selector": {"a b": "c"}}, "node_selector.a b"),
        ({"tolerations": [{"key": "a", "until": "b"}]}, "tolerations.0.until"),
        ({"shared_memory": "16Gi"}, "shared_memory"),
        ({"env": {"A": "x\0y"}}, "env.A"),
        ({"nodes": 100_001}, "nodes"),
    ],
)
def test_what_kubernetes_would_refuse_is_refused_here(changes: dict[str, Any], field: str) -> None:
    assert [problem.field for problem in problems_of(a_cluster(**changes), {})] == [field]


def test_all_problems_are_told_and_a_variable_of_the_shell_is_one() -> None:
    cluster = a_cluster(namespace="A", image="", export=["NCCL_*"])
    found = problems_of(cluster, {"NCCL_X": "\udc80", "OTHER": "\udc80"})
    assert [problem.field for problem in found] == ["namespace", "image", "env.NCCL_X"]


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs kubectl (a real one; no cluster)")
def test_kubectl_reads_the_text_as_it_was_meant(tmp_path: Path) -> None:
    """``label --local`` parses and prints what it is given, without a cluster."""
    given = {"GIVEN": "$(HOME)\n---\n- x\t\x85\u2028é \x07", "E": "1e3", "O": "0o17", "Y": "y", "S": "12:30:45"}
    run = Content("$(X)\n---\n", "a: '\n---\nb: ${x}", "/data/$(HOME)", {})
    manifests = [*run_manifests(a_cluster(env=given), run), *task_manifests(a_cluster(), TASKS)]
    alone = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "KUBECONFIG": os.devnull}
    command = ["kubectl", "label", "--local", "--overwrite", "-f", "-", f"{INSTANCE}=x", "-o", "json"]
    done = subprocess.run(
        command, input=to_text(manifests), env=alone, capture_output=True, text=True, timeout=60, check=True
    )
    read, rest = [], done.stdout.strip()
    while rest:
        found, end = json.JSONDecoder().raw_decode(rest)
        read, rest = [*read, found], rest[end:].strip()
    for manifest in manifests:
        manifest["metadata"]["labels"] = {**manifest["metadata"]["labels"], INSTANCE: "x"}
    assert read == manifests

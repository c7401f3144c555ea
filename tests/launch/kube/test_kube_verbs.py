"""From a run file and a cluster file to what kubectl is called with, and from its answers to a status.

No cluster is at hand: ``kubectl`` is a small program of this test, on PATH, which notes its arguments and its standard
input and answers with a file that the test laid out. What a real API server would say to the manifests is held against
its schemas in ``test_manifests``.
"""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from cpt.config import ConfigError, load_config
from cpt.rundir import DataError, RunDir
from data_tools.corpus.executors import Submission, submit
from launch.cluster import KubernetesCluster
from launch.kube.chains import data_tasks
from launch.kube.verbs import describe, describe_tasks, logs, render, start, start_tasks, status, stop
from launch.record import Launched, LaunchJob, read_record

RUN = {
    "run": {"name": "law", "dir": "runs"},
    "model": {"init_from": "base_hf"},
    "data": {"stores": {"general": "stores/prose", "domain": "/weights/code"}, "seq_len": 32},
    "replay": {"share_general": 0.25},
    "train": {"tokens": 2048, "global_batch_tokens": 256, "micro_batch_size": 4, "peak_lr": 0.01},
}
KUBECTL = """#!{python}
import json, pathlib, sys
here = pathlib.Path(__file__).parent
asked = "" if "logs" in sys.argv else sys.stdin.read()
with (here / "calls.jsonl").open("a") as calls:
    calls.write(json.dumps([sys.argv[1:], asked]) + "\\n")
answer = json.loads((here / "answers.json").read_text()).get(sys.argv[4] if sys.argv[1] == "get" else sys.argv[1], [0, ""])
(sys.stderr if answer[0] else sys.stdout).write(answer[1])
sys.exit(answer[0])
"""


class Kubectl:
    """The stand-in: its answers by verb (of ``get`` by what is asked for), and its calls."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "kubectl").write_text(KUBECTL.format(python=sys.executable))
        (folder / "kubectl").chmod(0o755)
        self.answer({})

    def answer(self, answers: dict[str, tuple[int, str]]) -> None:
        (self.folder / "answers.json").write_text(json.dumps(answers))

    @property
    def calls(self) -> list[tuple[list[str], str]]:
        return [(call, asked) for call, asked in map(json.loads, (self.folder / "calls.jsonl").open())]


@pytest.fixture
def kubectl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kubectl:
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return Kubectl(folder)


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LaunchJob:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "law.yaml").write_text(yaml.safe_dump(RUN))
    run_dir = tmp_path / "runs" / "law"
    return LaunchJob("law", run_dir, ("law.yaml", "train.peak_lr=0.02"), ("--resume", str(run_dir)), tmp_path)


def a_cluster(**changes: Any) -> KubernetesCluster:
    fields = {"kind": "kubernetes", "image": "cpt:1", "nodes": 2, "namespace": "training", "gpus_per_node": 4}
    fields["mounts"] = [{"source": "training", "target": "/data"}, {"source": "w", "target": "/w", "read_only": True}]
    return KubernetesCluster(**{**fields, **changes})


def launched(form: str = "job") -> Launched:
    return Launched("kubernetes", "cpt-law", ("a", "b"), "", "", {"namespace": "training", "form": form})


def test_a_dry_run_shows_the_world_the_command_and_what_would_be_sent(job: LaunchJob) -> None:
    facts = describe(a_cluster(), job)
    assert (facts["world_size"], facts["hosts"]) == (8, ["cpt-law-0.cpt-law", "cpt-law-1.cpt-law"])
    assert facts["run_dir"] == "/data/runs/law" and "launch.local.node" in facts["command"]
    assert json.loads(json.dumps(facts)) == facts
    assert [each["kind"] for each in yaml.safe_load_all(render(facts))] == [
        "ConfigMap",
        "Service",
        "NetworkPolicy",
        "Job",
    ]
    assert describe(a_cluster(form="mpijob"), job)["hosts"][0] == "cpt-law-worker-0.cpt-law"


def test_the_pods_run_file_is_whole_and_its_relative_paths_start_at_the_first_mount(
    job: LaunchJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = describe(a_cluster(), job)["manifests"][0]["data"]["run.yaml"]
    assert str(tmp_path) not in text
    data = tmp_path / "data"
    data.mkdir()
    monkeypatch.chdir(data)  # as a pod does
    (tmp_path / "run.yaml").write_text(text)
    config = load_config(tmp_path / "run.yaml")
    assert config.run_dir == data / "runs" / "law" and config.train.peak_lr == 0.02
    assert config.data.stores["general"] == data / "stores/prose"
    assert config.data.stores["domain"] == Path("/weights/code")


@pytest.mark.parametrize("directory", ["/elsewhere/runs", "/w/runs", "../runs"])
def test_a_run_folder_that_would_be_lost_with_its_pods_is_refused(job: LaunchJob, directory: str) -> None:
    changed = LaunchJob(job.name, job.run_dir, (*job.first, f"run.dir={directory}"), job.again, job.directory)
    with pytest.raises(ConfigError) as refused:
        describe(a_cluster(namespace="A"), changed)
    assert [problem.field for problem in refused.value.problems] == ["namespace", "run.dir"]
    with pytest.raises(ConfigError, match=r"run\.dir"):
        describe(a_cluster(mounts=[]), job)


def test_start_sends_the_manifests_and_leaves_a_record(job: LaunchJob, kubectl: Kubectl) -> None:
    kubectl.answer({"apply": (0, "job.batch/cpt-law created\n")})
    started = start(a_cluster(), job)
    _, (arguments, sent) = kubectl.calls  # first it asks for a job of this name
    assert arguments == ["apply", "--namespace", "training", "--filename", "-"]
    assert list(yaml.safe_load_all(sent)) == describe(a_cluster(), job)["manifests"]
    assert read_record(job.run_dir) == started and started.id == "cpt-law"
    assert started.details == {"namespace": "training", "form": "job"}
    assert not RunDir(job.run_dir).config.exists()  # else the trainer would take it for a run


def test_what_the_cluster_complains_of_is_told_and_nothing_is_recorded(job: LaunchJob, kubectl: Kubectl) -> None:
    kubectl.answer({"apply": (1, "spec.template: Invalid value: field is immutable")})
    with pytest.raises(RuntimeError, match=r"exit code 1: spec\.template.*kubectl delete job"):
        start(a_cluster(), job)
    assert not job.run_dir.exists()


@pytest.mark.parametrize("kind", ["Complete", "Failed"])
def test_a_job_that_has_ended_is_not_sent_again_for_that_would_change_nothing(
    job: LaunchJob, kubectl: Kubectl, tmp_path: Path, kind: str
) -> None:
    ended = json.dumps({"status": {"conditions": [{"type": kind, "status": "True"}]}})
    kubectl.answer({"jobs.batch/cpt-law": (0, ended)})
    for send in (
        lambda: start(a_cluster(), job),
        lambda: start_tasks(a_cluster(), data_tasks("law", ["tokenize"], ["merge"], count=2), tmp_path),
    ):
        with pytest.raises(
            ConfigError, match=f"has ended .{kind}.*kubectl delete --namespace training jobs.batch/cpt-law"
        ):
            send()
    assert [arguments[0] for arguments, _ in kubectl.calls] == ["get", "get"]
    kubectl.answer({"jobs.batch/cpt-law": (0, '{"status": {"conditions": [{"type": "Suspended", "status": "True"}]}}')})
    assert start(a_cluster(), job).id == "cpt-law"


def test_without_kubectl_the_message_says_so(job: LaunchJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for call in (lambda: start(a_cluster(), job), lambda: status(launched()), lambda: list(logs(launched(), False))):
        with pytest.raises(RuntimeError, match=r"kubectl is not installed here.*--dry-run"):
            call()


def a_pod(index: str, name: str, created: str, **status: Any) -> dict[str, Any]:
    labels = {"batch.kubernetes.io/job-completion-index": index}
    metadata = {"name": name, "labels": labels, "creationTimestamp": created}
    return {"metadata": metadata, "spec": {"nodeName": f"node-{name}"}, "status": status}


def test_status_tells_the_newest_pod_of_every_host_and_how_often_it_was_replaced(kubectl: Kubectl) -> None:
    ended = {"state": {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}}
    waiting = {"state": {"waiting": {"reason": "ImagePullBackOff"}}}
    pods = [
        a_pod("10", "k", "2026-01-01T00:00:00Z", phase="Pending", containerStatuses=[waiting]),
        a_pod("2", "b", "2026-01-01T00:01:00Z", phase="Running", containerStatuses=[{"state": {"running": {}}}]),
        a_pod("2", "a", "2026-01-01T00:00:00Z", phase="Failed", containerStatuses=[ended]),
        a_pod("3", "c", "2026-01-01T00:00:00Z", phase="Failed", containerStatuses=[ended]),
    ]
    kubectl.answer({"jobs.batch/cpt-law": (0, '{"status": {"active": 2}}'), "pods": (0, json.dumps({"items": pods}))})
    facts = status(launched())
    assert facts["state"] == "Running"
    assert [(each["index"], each["pod"], each["phase"], each["restarts"]) for each in facts["hosts"]] == [
        (2, "b", "Running", 1),
        (3, "c", "Failed", 0),
        (10, "k", "Pending", 0),
    ]
    assert (facts["hosts"][1]["exit_code"], facts["hosts"][1]["reason"]) == (137, "OOMKilled")
    assert facts["hosts"][2]["reason"] == "ImagePullBackOff" and facts["hosts"][0]["node"] == "node-b"


@pytest.mark.parametrize(
    ("conditions", "state"),
    [
        ([], "Pending"),
        ([("Suspended", "True", "JobSuspended")], "Suspended"),
        ([("Suspended", "False", "JobResumed"), ("Complete", "True", "")], "Complete"),
        ([("FailureTarget", "True", ""), ("Failed", "True", "PodFailurePolicy")], "Failed: PodFailurePolicy"),
    ],
)
def test_the_state_of_a_job_is_that_of_its_conditions(
    kubectl: Kubectl, conditions: list[tuple[str, str, str]], state: str
) -> None:
    found = [{"type": kind, "status": holds, "reason": reason} for kind, holds, reason in conditions]
    answers = {"jobs.batch/cpt-law": (0, json.dumps({"status": {"conditions": found}})), "pods": (0, '{"items": []}')}
    kubectl.answer(answers)
    assert status(launched())["state"] == state


@pytest.mark.parametrize(
    ("form", "resource", "patch"),
    [
        ("job", "jobs.batch/cpt-law", {"spec": {"suspend": True}}),
        ("mpijob", "mpijobs.kubeflow.org/cpt-law", {"spec": {"runPolicy": {"suspend": True}}}),
    ],
)
def test_stop_suspends_the_job_so_that_its_pods_save(
    kubectl: Kubectl, form: str, resource: str, patch: dict[str, Any]
) -> None:
    said = stop(launched(form))
    ((arguments, _),) = kubectl.calls
    assert arguments[:4] == ["patch", "--namespace", "training", resource]
    assert json.loads(arguments[-1]) == patch and "goes on" in said


def test_logs_are_those_of_all_pods_and_a_failure_is_not_silent(kubectl: Kubectl) -> None:
    kubectl.answer({"logs": (0, "[pod/a] one\n[pod/b] two\n")})
    assert list(logs(launched(), True)) == ["[pod/a] one", "[pod/b] two"]
    ((arguments, _),) = kubectl.calls
    assert {"--prefix", "--follow", "--max-log-requests=3", "app.kubernetes.io/instance=cpt-law"} <= {*arguments}
    kubectl.answer({"logs": (1, "no such thing")})
    with pytest.raises(RuntimeError, match="exit code 1"):
        list(logs(launched(), False))


def test_tasks_are_sent_the_same_way_and_how_to_let_the_last_one_go_is_told(kubectl: Kubectl, tmp_path: Path) -> None:
    tasks = data_tasks("tokenize-web", ["tokenize", "--out", "stores/web"], ["merge", "stores/web"], count=3)
    facts = describe_tasks(a_cluster(), tasks)
    assert (
        facts["tasks"] == 3 and "job/cpt-tokenize-web" in facts["wait"] and "job/cpt-tokenize-web-last" in facts["last"]
    )
    started = start_tasks(a_cluster(), tasks, tmp_path / "stores" / "web")
    assert read_record(tmp_path / "stores" / "web") == started and len(started.hosts) == 3
    assert list(yaml.safe_load_all(kubectl.calls[-1][1])) == facts["manifests"]
    many = data_tasks("web", ["tokenize", "--input", "x" * 1000], ["merge", "stores/web"], count=2000)
    with pytest.raises(ConfigError) as refused:
        describe_tasks(a_cluster(image=""), many)
    assert [problem.field for problem in refused.value.problems] == ["image", "tasks"]


def test_a_name_too_long_for_a_folder_is_refused_and_nothing_sent(
    job: LaunchJob, kubectl: Kubectl, tmp_path: Path
) -> None:
    """As a label it would be cut and told apart by a hash, and the pods would fail at making the folder."""
    kubectl.answer({"apply": (0, "")})
    long = replace(job, name="n" * 300, first=(*job.first, "run.name=" + "n" * 300))
    with pytest.raises(ConfigError, match=r"run\.name"):
        start(a_cluster(), long)
    with pytest.raises(ConfigError, match="has 305 characters; 128 at most"):
        start_tasks(a_cluster(), data_tasks("n" * 300 + "-last", ["tokenize"], ["merge"], count=2), tmp_path)
    assert not (kubectl.folder / "calls.jsonl").exists()


def test_a_tokenisation_is_submitted_with_the_command_for_its_merge(
    kubectl: Kubectl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    cluster = {**a_cluster().model_dump(exclude_defaults=True), "kind": "kubernetes"}
    (tmp_path / "k8s.yaml").write_text(yaml.safe_dump(cluster))
    web = Submission(
        ("tokenize", "--out", "stores/web"), Path("stores/web"), 3, tmp_path / "logs", options={"cluster": "k8s.yaml"}
    )
    assert "kubectl patch --namespace training job/cpt-tokenize-web-last" in submit("kubernetes", web)
    *_, job, last = yaml.safe_load_all(kubectl.calls[-1][1])
    assert job["spec"]["completions"] == 3 and last["spec"]["suspend"]
    assert last["spec"]["template"]["spec"]["containers"][0]["command"][-2:] == ["merge", "stores/web"]
    assert read_record(tmp_path / "logs").id == "cpt-tokenize-web"
    with pytest.raises(DataError, match="one option, cluster=FILE"):
        submit("kubernetes", replace(web, options={"queue": "x", "cluster": "k8s.yaml"}))
    with pytest.raises(DataError, match="dedup takes"):
        submit("kubernetes", replace(web, arguments=("dedup", "--out", "x")))

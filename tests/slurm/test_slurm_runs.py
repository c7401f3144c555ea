"""Runs on a real Slurm of two virtual nodes: the same losses as on one host, whatever Slurm does to them in between."""

import json
import os
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from cpt.problems import ConfigError
from launch.cluster import SlurmCluster
from launch.record import Launched, LaunchJob, read_record
from launch.run_folder import newest_step
from launch.slurm import verbs

Slurm = Any  # the fixture of tests/slurm/conftest.py
Workshop = Any  # the fixtures of tests/conftest.py
FAULTS = Path(__file__).resolve().parents[1] / "end_to_end"
STEPS = 60
FIELDS = {
    "train.tokens": STEPS * 2048,
    "train.global_batch_tokens": 2048,
    "train.micro_batch_size": 8,
    "checkpoint.every_steps": 10,
    "guard.spike_sigma": None,
}
CLUSTER = {"kind": "slurm", "nodes": 2, "partition": "main", "time_limit": "10:00", "stop_seconds": 60}
WITHIN = {"interface": "lo", "env": {"OMP_NUM_THREADS": "1"}, "export": ["PYTHONPATH"]}


@pytest.fixture(scope="session")
def shop(made_once: Callable[..., Workshop], slurm: Slurm) -> Workshop:
    """Stores, and ``whole``: two ranks of one host, that nothing happened to."""

    def make(shop: Workshop) -> None:
        shop.stores()
        process = shop.start("train", shop.run_file("whole", FIELDS), "--nproc", "2")
        try:
            out, _ = process.communicate(timeout=180)
        except subprocess.TimeoutExpired:
            process.kill()  # its ranks end with it
            raise
        assert process.returncode == 0, out
        # Every Python of a job takes the trainer with faults built in, where the job's environment asks for it.
        (shop.root / "sitecustomize.py").write_text(
            "import launch.local.ranks\nlaunch.local.ranks.TRAIN_MODULE = 'faulty_training'\n"
        )

    return made_once("slurm_runs", make)


@pytest.fixture(autouse=True)
def ask_this_cluster(slurm: Slurm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_CONF", slurm.environment["SLURM_CONF"])


def cluster(**changes: Any) -> SlurmCluster:
    return SlurmCluster.model_validate({**CLUSTER, **WITHIN, **changes})


def slow(shop: Workshop, name: str, *, steps: int, seconds: float) -> dict[str, Any]:
    """A cluster whose ranks take their time in each of the first steps, once."""
    marks = shop.root / f"{name}_slept"
    marks.mkdir()
    faults = [
        {"kind": "sleep", "step": step, "seconds": seconds, "once": str(marks / str(step))}
        for step in range(1, steps + 1)
    ]
    found_in = os.pathsep.join(filter(None, [str(shop.root), str(FAULTS), os.environ.get("PYTHONPATH")]))
    names = {"PYTHONPATH": found_in, "CPT_TEST_FAULTS": json.dumps(faults)}
    return {"env": {**WITHIN["env"], **names}}  # type: ignore[dict-item]


def start(shop: Workshop, name: str, cluster: SlurmCluster, fields: Mapping[str, Any] = FIELDS) -> Launched:
    run_dir = shop.run_dir(name)
    first = (str(shop.run_file(name, fields)),)
    return verbs.start(cluster, LaunchJob(name, run_dir, first, ("--resume", str(run_dir)), shop.root))


def wait_for_step(slurm: Slurm, shop: Workshop, name: str, step: int) -> None:
    slurm.wait(f"step {step}", lambda: any(record["step"] >= step for record in shop.records(name)))


def end_of(slurm: Slurm, launched: Launched) -> str:
    """The last state of a job, and its log where that is not COMPLETED."""
    slurm.wait("the end", lambda: slurm.state(launched.id) in verbs.ENDED)
    log = Path(launched.log)
    state = slurm.state(launched.id)
    return state if state == "COMPLETED" else f"{state}\n{log.read_text() if log.exists() else 'no log'}"


def kinds(shop: Workshop, name: str, *wanted: str) -> list[str]:
    begun = (shop.run_dir(name) / "events.jsonl").exists()
    return [event["event"] for event in shop.events(name) if event["event"] in wanted] if begun else []


@pytest.mark.parametrize("form", ["srun", "deepspeed"])
def test_two_nodes_train_to_the_losses_of_two_ranks_on_one_host(slurm: Slurm, shop: Workshop, form: str) -> None:
    launched = start(shop, form, cluster(form=form))
    assert read_record(shop.run_dir(form)) == launched
    said = list(verbs.logs(launched, follow=True))
    assert end_of(slurm, launched) == "COMPLETED"
    assert shop.losses(form) == shop.losses("whole")
    beats = [json.loads(path.read_text()) for path in (shop.run_dir(form) / "heartbeats").glob("rank_*.json")]
    assert sorted(beat["rank"] for beat in beats) == [0, 1]
    assert said[-1] == "job: finished" and f"job {launched.id} on n[1-2], start 1" in said[0]
    told = verbs.status(launched)
    assert (told["state"], told["hosts"]) == ("COMPLETED", "n[1-2]")


def test_nodes_are_compared_before_the_ranks_are_started_where_that_is_asked_for(slurm: Slurm, shop: Workshop) -> None:
    launched = start(shop, "compared", cluster(preflight=True), {**FIELDS, "train.tokens": 3 * 2048})
    assert end_of(slurm, launched) == "COMPLETED"
    said = Path(launched.log).read_text()
    assert " fail" in said and "0 fail" in said and said.index("0 fail") < said.index("step 1/3"), said


@pytest.mark.parametrize("form", ["srun", "deepspeed"])
def test_a_job_that_is_preempted_saves_and_goes_on_bit_identical(slurm: Slurm, shop: Workshop, form: str) -> None:
    name = f"preempted_{form}"
    launched = start(shop, name, cluster(form=form, **slow(shop, name, steps=30, seconds=0.4)))
    wait_for_step(slurm, shop, name, 3)
    urgent = slurm.ask("sbatch", "--parsable", "-purgent", "-N2", "-o/dev/null", "--wrap=sleep 1").stdout.strip()
    slurm.wait("the urgent job", lambda: slurm.state(urgent) in ("RUNNING", "COMPLETING", "COMPLETED"))
    stopped = newest_step(shop.run_dir(name))
    assert 3 <= stopped < STEPS and stopped % 10  # not one of those that it saves anyway
    assert end_of(slurm, launched) == "COMPLETED"
    assert kinds(shop, name, "start", "sigterm", "resume", "finish") == ["start", "sigterm", "resume", "finish"]
    assert shop.losses(name) == shop.losses("whole")


def test_before_its_time_is_over_a_job_saves_is_queued_again_and_goes_on(slurm: Slurm, shop: Workshop) -> None:
    launched = start(shop, "timed", cluster(stop_seconds=120, **slow(shop, "timed", steps=45, seconds=1.0)))
    wait_for_step(slurm, shop, "timed", 3)
    used = slurm.ask("squeue", "--noheader", f"--jobs={launched.id}", "--format=%M").stdout.strip().split(":")
    change = ("scontrol", "update", f"JobId={launched.id}")
    assert slurm.ask(*change, f"TimeLimit={int(used[-2]) + 2}").returncode == 0  # one to two minutes are left
    slurm.wait("the requeue", lambda: slurm.state(launched.id) == "PENDING")
    assert kinds(shop, "timed", "start", "sigterm", "finish") == ["start", "sigterm"]
    assert slurm.ask(*change, "TimeLimit=10").returncode == 0  # not all over again
    assert end_of(slurm, launched) == "COMPLETED"
    assert kinds(shop, "timed", "start", "sigterm", "resume", "finish") == ["start", "sigterm", "resume", "finish"]
    assert shop.losses("timed") == shop.losses("whole")
    assert "start 2: rank 0 at" in Path(launched.log).read_text()


def test_a_job_that_slurm_queues_again_unsaved_costs_the_steps_since_the_checkpoint(
    slurm: Slurm, shop: Workshop
) -> None:
    launched = start(shop, "requeued", cluster(**slow(shop, "requeued", steps=30, seconds=0.3)))
    wait_for_step(slurm, shop, "requeued", 12)
    assert slurm.ask("scontrol", "requeue", launched.id).returncode == 0
    assert end_of(slurm, launched) == "COMPLETED"
    assert kinds(shop, "requeued", "start", "resume", "finish") == ["start", "resume", "finish"]
    assert shop.losses("requeued") == shop.losses("whole")


@pytest.mark.parametrize("form", ["srun", "deepspeed"])
def test_stop_ends_a_run_after_a_save_and_it_is_not_queued_again(slurm: Slurm, shop: Workshop, form: str) -> None:
    name = f"stopped_{form}"
    launched = start(shop, name, cluster(form=form, **slow(shop, name, steps=STEPS, seconds=0.4)))
    wait_for_step(slurm, shop, name, 3)
    assert "not queued again" in verbs.stop(launched)
    assert end_of(slurm, launched).startswith("FAILED")  # Slurm's word for any exit code but 0
    assert "ExitCode=143:0" in slurm.ask("scontrol", "show", "job", launched.id).stdout
    event = shop.events(name)[-1]
    assert (event["event"], event["signal"]) == ("sigterm", "stop file")
    assert newest_step(shop.run_dir(name)) == event["step"] < STEPS
    assert not (shop.run_dir(name) / "STOP").exists()
    assert "nothing to stop" in verbs.stop(launched)


def test_scancel_lets_a_run_save_and_leave(slurm: Slurm, shop: Workshop) -> None:
    launched = start(shop, "cancelled", cluster(**slow(shop, "cancelled", steps=STEPS, seconds=0.4)))
    wait_for_step(slurm, shop, "cancelled", 3)
    assert slurm.ask("scancel", launched.id).returncode == 0
    assert end_of(slurm, launched).startswith("CANCELLED")
    time.sleep(1)
    assert slurm.state(launched.id) == "CANCELLED"
    assert newest_step(shop.run_dir("cancelled")) == shop.events("cancelled")[-1]["step"]


def test_a_job_that_waits_leaves_the_queue_and_a_forgotten_one_is_said_to_be(slurm: Slurm, shop: Workshop) -> None:
    launched = start(shop, "waiting", cluster(options={"begin": "now+1hour"}))
    told = verbs.status(launched)
    assert (told["state"], told["reason"]) == ("PENDING", "BeginTime")
    assert list(verbs.logs(launched, follow=False)) == []
    assert "cancelled" in verbs.stop(launched)
    assert end_of(slurm, launched).startswith("CANCELLED") and not (shop.run_dir("waiting") / "STOP").exists()
    forgotten = Launched("slurm", "999999", (), launched.log, launched.started, launched.details)
    assert "keeps no account" in verbs.status(forgotten)["reason"]


def test_the_verbs_of_cpt_launch_submit_show_and_stop(slurm: Slurm, shop: Workshop) -> None:
    file = shop.root / "later.yaml"
    file.write_text(json.dumps({**CLUSTER, **WITHIN, "options": {"begin": "now+1hour"}}))
    run_file, run_dir = shop.run_file("by_command", FIELDS), shop.run_dir("by_command")
    shown = shop.cpt("launch", run_file, "--cluster", file, "--dry-run")
    assert shown.code == 0 and "#SBATCH --nodes=2" in shown.out and not run_dir.exists(), shown.text
    done = shop.cpt("launch", run_file, "--cluster", file)
    assert done.code == 0 and f"cpt launch status {run_dir}" in done.out, done.text
    told = json.loads(shop.cpt("launch", "status", run_dir, "--json").out)
    assert told["launch"]["state"] == "PENDING" and shop.cpt("launch", "status", run_dir).code == 0
    assert shop.cpt("launch", "logs", run_dir).text == ""
    assert "cancelled" in shop.cpt("launch", "stop", run_dir).out
    assert end_of(slurm, read_record(run_dir)).startswith("CANCELLED")


def test_names_and_values_reach_slurm_as_they_are(slurm: Slurm, shop: Workshop) -> None:
    comment = 'it\'s 50% "done" # $(id) \\ `x`'
    run_dir = shop.root / 'it\'s a # "shop" $(id)' / "run"
    later = cluster(options={"begin": "now+1hour", "comment": comment})
    launched = verbs.start(later, LaunchJob("x'y", run_dir, ("RUN.yaml",), ("--resume",), shop.root))
    told = slurm.ask("scontrol", "show", "job", launched.id).stdout
    assert "JobName=x'y\n" in told and f"StdOut={launched.log}\n" in told
    assert f"Comment={comment}" in told
    assert "cancelled" in verbs.stop(launched)


def test_what_sbatch_refuses_is_told_in_its_words(slurm: Slurm, shop: Workshop) -> None:
    with pytest.raises(ConfigError, match="invalid partition specified: nowhere") as refused:
        start(shop, "refused", cluster(partition="nowhere"))
    assert refused.value.problems[0].field == "partition"
    assert not (shop.run_dir("refused") / "launch/record.json").exists()

"""`cpt launch`: what is refused before anything starts, what a dry run shows, and what is told of a run afterwards."""

import json
import os
import shlex
import socket
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from cpt.rundir import RunDir
from launch.record import Launched, write_record

Workshop = Any  # the fixtures of tests/conftest.py
TWO = {"hosts": ["a slots=1", "b slots=1"], "interface": "eth0", "master_address": "10.0.0.1", "master_port": 29501}


@pytest.fixture
def shop(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    monkeypatch.chdir(workshop.root)
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    workshop.run_file("run")
    return workshop


def cluster(shop: Workshop, **changes: Any) -> Path:
    path = Path(shop.root / "cluster.yaml")
    path.write_text(yaml.safe_dump({**TWO, **changes}))
    return path


def test_a_dry_run_shows_world_command_and_environment_and_touches_nothing(shop: Workshop) -> None:
    file = cluster(shop, export=["NCCL_*"], ssh_port=2222)
    done = shop.cpt("launch", "run.yaml", "log.every_steps=2", "--cluster", file, "--dry-run", "--json")
    assert done.code == 0, done.text
    facts = json.loads(done.out)
    assert (facts["world_size"], facts["master"], facts["continues"]) == (2, "10.0.0.1:29501", False)
    assert [(host["host"], host["ranks"]) for host in facts["hosts"]] == [("a", [0]), ("b", [1])]
    given = facts["hosts"][1]["environment"]
    assert given["GLOO_SOCKET_IFNAME"] == "eth0" and given["NCCL_DEBUG"] == "INFO" and given["CROSS_RANK"] == "1"
    (command,) = facts["commands"]
    assert command[1:3] == ["-m", "deepspeed.launcher.runner"] and command[-2:] == ["run.yaml", "log.every_steps=2"]
    assert "-p 2222" in facts["command_environment"]["PDSH_SSH_ARGS_APPEND"]
    assert not shop.run_dir("run").exists()
    shown = shop.cpt("launch", "run.yaml", "--cluster", file, "--dry-run")
    assert "2 ranks on 2 hosts, pdsh, interface eth0" in shown.out and "deepspeed.launcher.runner" in shown.out


def test_a_dry_run_needs_no_torch(shop: Workshop) -> None:
    file = cluster(shop)
    program = "import sys; sys.modules['torch'] = sys.modules['deepspeed'] = None; from cpt.cli import main; main()"
    command = [sys.executable, "-c", program, "launch", "run.yaml", "--cluster", str(file), "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=shop.root, timeout=60, check=False)
    assert done.returncode == 0 and "2 ranks on 2 hosts" in done.stdout, done.stderr


def test_problems_of_run_file_and_cluster_file_are_told_together(shop: Workshop) -> None:
    file = cluster(shop, hostfile="nothere", hosts=[], master_prt=1)
    done = shop.cpt("launch", "run.yaml", "train.micro_batch_size=0", "--cluster", file)
    assert done.code == 2
    for field in ("train.micro_batch_size", "master_prt", "hostfile"):
        assert f"- {field}" in done.err, done.err


def test_a_name_of_300_characters_is_refused_whatever_the_cluster(shop: Workshop) -> None:
    done = shop.cpt("launch", "run.yaml", "run.name=" + "n" * 300, "--cluster", cluster(shop), "--dry-run")
    assert done.code == 2 and "run.name" in done.err and "at most 128" in done.err, done.text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--include", "c"), "--include = 'c': no such host"),
        (("--include", "a", "--exclude", "b"), "only one of"),
        (("--node-rank", "0", "--skip-preflight"), "is for launcher: no_ssh"),
        (("--node-rank", "0", "--dry-run"), "is for launcher: no_ssh"),
    ],
)
def test_wrong_options_are_refused_by_name(shop: Workshop, options: tuple[str, ...], words: str) -> None:
    done = shop.cpt("launch", "run.yaml", "--cluster", cluster(shop), *options)
    assert done.code == 2 and words in done.err, done.text


def test_a_batch_that_the_ranks_do_not_divide_is_refused(shop: Workshop) -> None:
    done = shop.cpt("launch", "run.yaml", "--cluster", cluster(shop, hosts=["a slots=3"]), "--dry-run")
    assert done.code == 2 and "do not divide into 3 ranks" in done.err


def test_without_ssh_the_command_of_every_host_is_printed(shop: Workshop) -> None:
    done = shop.cpt("launch", "run.yaml", "--cluster", cluster(shop, launcher="no_ssh"), "--json")
    assert done.code == 0, done.text
    facts = json.loads(done.out)
    assert [command[command.index("--node_rank") + 1] for command in facts["commands"]] == ["0", "1"]
    assert facts["command_environment"]["GLOO_SOCKET_IFNAME"] == "eth0"
    refused = shop.cpt("launch", "run.yaml", "--cluster", cluster(shop, launcher="no_ssh"), "--node-rank", 2,
                       "--skip-preflight")  # fmt: skip
    assert refused.code == 2 and "must be from 0 to 1" in refused.err


def settled(shop: Workshop, *overrides: str) -> Path:
    """The folder of a run, as its start leaves it."""
    from cpt.config import load_config, to_yaml

    config = load_config(shop.root / "run.yaml", overrides)
    config.run_dir.mkdir(parents=True)
    RunDir(config.run_dir).config.write_text(to_yaml(config))
    return Path(config.run_dir)


def test_a_run_that_is_there_is_continued_with_what_may_change_and_nothing_else(shop: Workshop) -> None:
    run_dir, file = settled(shop), cluster(shop)
    for start in ("run.yaml", str(run_dir)):
        done = shop.cpt("launch", start, "guard.hang_seconds=60", "--cluster", file, "--dry-run", "--json")
        (command,) = json.loads(done.out)["commands"]
        assert command[-3:-1] == ["--resume", str(run_dir)] and command[-1].startswith("guard.hang_seconds=60")
    refused = shop.cpt("launch", "run.yaml", "train.peak_lr=0.5", "--cluster", file, "--dry-run")
    assert refused.code == 2 and "differs in train.peak_lr" in refused.err and "cpt launch" in refused.err


def launched(shop: Workshop, run_dir: Path, **changes: Any) -> None:
    details = {"run_dir": str(run_dir), "host": socket.gethostname()}
    log = str(run_dir / "launch/log")
    facts = {"kind": "hosts", "id": "999999999", "hosts": ("a", "b"), "log": log}
    write_record(run_dir, Launched(**{**facts, "started": "2026-01-01T00:00:00+00:00", "details": details, **changes}))


def beat(run_dir: Path, rank: int, host: str, **changes: Any) -> None:
    from cpt.heartbeats import Beat, write_beat

    (run_dir / "heartbeats").mkdir(exist_ok=True)
    write_beat(run_dir / "heartbeats", Beat(rank, host, 1, **{"step": 3, "phase": "forward", **changes}))


def test_status_tells_step_rate_checkpoint_hosts_and_who_is_silent(
    shop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.progress.PATIENCE_SECONDS", 0.5)
    run_dir = settled(shop)
    launched(shop, run_dir)
    (run_dir / "metrics.jsonl").write_text('{"step": 3, "tokens_per_second": 1234.5}\n{"step": 4, "tok')
    (run_dir / "events.jsonl").write_text('{"time": 0, "step": 0, "event": "start", "warnings": []}\n')
    (run_dir / "checkpoints/step_00000002").mkdir(parents=True)
    (run_dir / "checkpoints/step_00000002/COMPLETE").touch()
    beat(run_dir, 0, "a", state="ended")
    beat(run_dir, 1, "b")
    facts = json.loads(shop.cpt("launch", "status", run_dir, "--json").out)
    assert (facts["step"], facts["num_steps"], facts["tokens_per_second"], facts["checkpoint"]) == (3, 8, 1234.5, 2)
    assert facts["launch"]["state"] == "ended" and facts["launch"]["hosts"] == ["a", "b"]
    assert facts["hosts"]["b"]["silent"] == [1] and facts["hosts"]["a"]["silent"] == []
    shown = shop.cpt("launch", "status", run_dir).out
    assert "3 of 8, 1,234 tokens/s" in shown and "SILENT: rank 1 shows no life" in shown and "start" in shown


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("metrics.jsonl", '{"step": "x", "tokens_per_second": [1]}'),
        ("metrics.jsonl", f'{{"step": 1{"0" * 400}, "tokens_per_second": NaN}}'),
        ("events.jsonl", '{"time": "x", "event": "start"}'),
        ("events.jsonl", '{"time": NaN}\n{"time": 1e300}\n{"time": null}\n{}'),
        ("config.yaml", "train: {tokens: .inf, global_batch_tokens: 5}"),
        ("config.yaml", "[" * 5000),
    ],
)
def test_a_damaged_file_of_the_run_hides_nothing_else(shop: Workshop, file: str, text: str) -> None:
    run_dir = settled(shop)
    launched(shop, run_dir)
    (run_dir / "metrics.jsonl").write_text('{"step": 3, "tokens_per_second": 10}\n')
    (run_dir / file).write_text(text)
    for options in ((), ("--json",)):
        done = shop.cpt("launch", "status", run_dir, *options)
        assert done.code == 0 and "ended" in done.out, done.text


@pytest.mark.parametrize("name", ["metrics.jsonl", "events.jsonl"])
def test_status_waits_for_no_pipe_and_follows_no_link(shop: Workshop, name: str) -> None:
    run_dir = settled(shop)
    launched(shop, run_dir)
    os.mkfifo(run_dir / name)
    assert f"{name}: it, or its folder, is a link" in shop.cpt("launch", "status", run_dir).err
    (run_dir / name).unlink()
    (run_dir / name).symlink_to(shop.root / "run.yaml")
    assert shop.cpt("launch", "status", run_dir).code == 2
    (run_dir / name).unlink()
    (shop.root / "latest").symlink_to(run_dir)  # the folder itself may be one
    assert shop.cpt("launch", "status", shop.root / "latest").code == 0


def test_people_are_shown_every_pod_and_how_it_ended() -> None:
    from rich.console import Console

    from launch.progress_text import render_progress

    pod = {"index": 1, "pod": "cpt-r-1-x", "node": None, "phase": "Failed", "reason": "OOMKilled"}
    facts = {"launch": {"kind": "kubernetes", "hosts": [{**pod, "exit_code": 137, "restarts": 4}]}, "hosts": {}}
    facts |= {"run_dir": "r", "step": None, "num_steps": None, "tokens_per_second": None, "checkpoint": None}
    console = Console(width=120)
    with console.capture() as shown:
        console.print(render_progress({**facts, "events": []}))
    (line,) = [line for line in shown.get().splitlines() if "cpt-r-1-x" in line]
    assert "OOMKilled" in line and "137" in line and " 4" in line and "None" not in line


def test_logs_are_the_end_of_the_output_and_stop_leaves_a_word_for_the_ranks(shop: Workshop) -> None:
    run_dir = settled(shop)
    launched(shop, run_dir, details={"run_dir": str(run_dir), "host": "another"})
    assert shop.cpt("launch", "logs", run_dir).code == 2  # nothing yet
    (run_dir / "launch/log").write_text("a: one\nb: [two]\n")
    assert shop.cpt("launch", "logs", run_dir).out == "a: one\nb: [two]\n"
    beat(run_dir, 0, "a")
    assert "asked" in shop.cpt("launch", "stop", run_dir).out and (run_dir / "STOP").exists()


def test_what_has_ended_is_not_asked_to_stop_for_that_would_stop_the_next_start(shop: Workshop) -> None:
    run_dir = settled(shop)
    launched(shop, run_dir)
    assert "nothing to stop" in shop.cpt("launch", "stop", run_dir).out
    launched(shop, run_dir, id=str(os.getpid()), details={"run_dir": str(run_dir), "host": "another"})
    beat(run_dir, 0, "a", state="ended")
    assert "nothing to stop" in shop.cpt("launch", "stop", run_dir).out and not (run_dir / "STOP").exists()


def test_a_folder_that_nothing_was_launched_in_is_told(shop: Workshop) -> None:
    done = shop.cpt("launch", "status", shop.root)
    assert done.code == 2 and "was not started by `cpt launch`" in done.err


def test_a_run_folder_that_another_job_holds_is_left_alone(shop: Workshop) -> None:
    from cpt.runfolder import lock_folder

    run_dir = settled(shop)
    holder = lock_folder(RunDir(run_dir))
    try:
        done = shop.cpt("launch", "run.yaml", "--cluster", cluster(shop), "--skip-preflight")
    finally:
        holder.close()
    assert done.code == 3 and "another process is training in this run folder" in done.err


def test_a_verb_that_is_misspelt_is_not_taken_for_a_run_file(shop: Workshop) -> None:
    done = shop.cpt("launch", "stauts", "runs/run")
    assert done.code == 2 and "status" in done.err and "--cluster" not in done.err


def test_the_help_teaches_both_forms(shop: Workshop) -> None:
    done = shop.cpt("launch", "--help")
    assert done.code == 0 and "RUN.yaml" in done.out and "status" in done.out and "--dry-run" in done.out
    assert "--supervise" in shop.cpt("launch", "run", "--help").out


def test_a_second_launch_of_a_run_is_refused_before_the_first_one_has_ranks(shop: Workshop) -> None:
    from cpt.folder_lock import acquire

    run_dir = settled(shop)
    RunDir(run_dir).launch.mkdir()
    with acquire(RunDir(run_dir).launch / ".lock"):
        done = shop.cpt("launch", "run.yaml", "--cluster", cluster(shop, launcher="ssh"), "--skip-preflight")
    assert done.code == 3 and "another process" in done.err, done.text


def test_a_lock_that_leads_elsewhere_is_refused_and_what_it_leads_to_is_left_alone(shop: Workshop) -> None:
    run_dir, mine = settled(shop), shop.root / "mine"
    mine.write_text("kept")
    RunDir(run_dir).launch.mkdir()
    (RunDir(run_dir).launch / ".lock").symlink_to(mine)
    done = shop.cpt("launch", "run.yaml", "--cluster", cluster(shop, launcher="ssh"), "--skip-preflight")
    assert done.code == 3 and "the run folder cannot be written" in done.err and mine.read_text() == "kept"


def test_a_supervisor_that_waits_between_two_starts_is_asked_to_stop(shop: Workshop) -> None:
    """All its ranks have failed; it would start them again."""
    run_dir = settled(shop)
    waits = [sys.executable, "-c", "import time; print(flush=True); time.sleep(60)", "launch"]
    launcher = subprocess.Popen(waits, stdout=subprocess.PIPE)
    try:
        assert launcher.stdout and launcher.stdout.readline()
        launched(shop, run_dir, id=str(launcher.pid), started=datetime.now(UTC).isoformat())
        beat(run_dir, 0, "a", state="failed")
        assert "asked" in shop.cpt("launch", "stop", run_dir).out and (run_dir / "STOP").exists()
        launched(shop, run_dir, id=str(launcher.pid))  # in January: the number is another launch's now
        assert "nothing to stop" in shop.cpt("launch", "stop", run_dir).out
    finally:
        launcher.kill()
        launcher.communicate()


def test_lines_that_are_followed_are_whole(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    from launch.hosts import verbs
    from launch.record import read_record

    monkeypatch.setattr(verbs, "LOOK_SECONDS", 0.01)
    run_dir = settled(shop)
    launched(shop, run_dir, details={"run_dir": str(run_dir), "host": "another"})
    log = run_dir / "launch/log"
    log.write_text("a: one\na: tw")
    lines = verbs.logs(read_record(run_dir), follow=True)
    assert next(lines) == "a: one"
    with log.open("a") as file:
        file.write("o\na: thr")
    assert next(lines) == "a: two"
    monkeypatch.setattr(verbs, "status", lambda launched: {"state": "ended"})
    assert list(lines) == ["a: thr"]


def test_a_command_is_shown_on_lines_that_a_shell_takes(shop: Workshop) -> None:
    shown = shop.cpt("launch", "run.yaml", "--cluster", cluster(shop, env={"WORDS": "x " * 60 + "x"}), "--dry-run").out
    command = shown.partition("command:\n")[2].partition("\n\n")[0]
    given = json.loads(shop.cpt("launch", "run.yaml", "--cluster", cluster(shop), "--dry-run", "--json").out)
    variables = [f"{name}={value}" for name, value in given["command_environment"].items()]
    assert shlex.split(command.replace("\\\n", "")) == [*variables, *given["commands"][0]]


def test_the_kind_of_file_is_known_wherever_it_stands(shop: Workshop) -> None:
    (shop.root / "pilots.yaml").write_text("pilots: {}\n")
    for words in (["pilots.yaml", "--cluster", "no.yaml"], ["--cluster", "no.yaml", "pilots.yaml"]):
        assert "- pilots." in shop.cpt("launch", *words).err

"""Several watcher processes beside a training: each checkpoint once, none lost with a killed one, the best kept."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cpt.checkpoint.marker import is_usable
from cpt.checkpoint.retention import read_pins, survey
from cpt.eval.claims import holder_of
from cpt.eval.results import read_suite_record
from cpt.rundir import RunDir, step_name

Workshop = Any  # the fixtures of tests/conftest.py
ROOT = Path(__file__).resolve().parents[2]
BEST = 6  # of all steps: accuracy falls with the distance from it
# Reads every weight of a checkpoint, notes what it does, and takes its time.
WATCHER = """
import os, sys, time
from pathlib import Path
from safetensors import safe_open
from cpt.checkpoint.marker import is_state_shard, read_marker
from cpt.eval.best import Rule
from cpt.eval.results import Measured, SuiteRecord, TaskResult, group_scores, record_file, write_suite_record
from cpt.eval.watch import Pace, Work, watch
from cpt.eval.watched_run import LocalRun
from cpt.rundir import DataError, step_of

root, log, best = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])

def note(what, step):
    with open(log, "ab", buffering=0) as file:
        file.write(f"{os.getpid()} {what} {step}\\n".encode())

def evaluate(folder):
    step = step_of(folder)
    note("begin", step)
    numbers = 0
    for name in read_marker(folder):
        if name.endswith(".param.safetensors"):
            with safe_open(folder / name, "numpy") as shard:
                numbers += sum(shard.get_tensor(key).size for key in shard.keys())
    if not numbers:
        raise DataError(f"{folder}: no weights")
    time.sleep(0.3)
    value = 1 / (1 + abs(step - best))
    task = TaskResult("general", "cloze", "acc", True, value, 0.1, {"acc": Measured(value, 0.1)}, 1, 0, 0, value, 0.1,
                      0, "t", 0.1)
    record = SuiteRecord("tiny", "s", step, numbers, "w", "none", "fp32", "none", {"one": task},
                         group_scores({"one": task}))
    write_suite_record(record_file(run.results, step), record)
    note("end", step)

while not (root / "config.yaml").exists():
    time.sleep(0.05)
run = LocalRun(root, "tiny")
work = Work(evaluate, keep_best=Rule("general", "accuracy"))
sys.exit(watch(run, work, pace=Pace(0.1, (0.1, 0.1), 5.0)).problem or 0)
"""


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that are ended with the test, however it ends."""
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        process.kill()
        process.communicate()


def begun_by(log: Path, pid: int) -> list[str]:
    lines = log.read_text().splitlines() if log.exists() else []
    return [line for line in lines if line.split()[0] == str(pid)]


def test_three_watchers_share_a_training_and_a_killed_one_costs_nothing(
    workshop: Workshop, started: list[subprocess.Popen[str]]
) -> None:
    workshop.stores()
    fields = {"train.tokens": 256 * 24, "checkpoint.every_steps": 2, "checkpoint.keep_last": 2}
    file, rundir = workshop.run_file("watched", fields), RunDir(workshop.run_dir("watched"))
    log = workshop.root / "log"
    started.append(workshop.start("train", file))
    program = [sys.executable, "-c", WATCHER, str(rundir.root), str(log), str(BEST)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for _ in range(3):
        started.append(
            subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
        )
    training, killed, *others = started
    deadline = time.monotonic() + 120
    while not any("begin" in line for line in begun_by(log, killed.pid)[-1:]):
        assert time.monotonic() < deadline and killed.poll() is None and training.poll() in (None, 0)
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    assert training.wait(timeout=120) == 0
    told = [(each.communicate(timeout=60)[0], each.returncode) for each in others]
    assert [code for _, code in told] == [0, 0], told

    left = survey(rundir.checkpoints)
    records = [read_suite_record(path) for path in (rundir.evals / "tiny").glob("step_*.json")]
    found = [record.step for record in records]
    assert set(left) <= set(found)  # what is there was evaluated
    ended = Counter(line.split()[2] for line in log.read_text().splitlines() if line.split()[1] == "end")
    assert set(ended.values()) == {1} and {int(step) for step in ended} == set(found)
    assert all(holder_of(rundir.evals / "tiny", step) is None for step in found)
    best = min(found, key=lambda step: (abs(step - BEST), -step))
    pin = read_pins(rundir.checkpoints)["tiny"]
    assert pin.step == best and is_usable(rundir.checkpoint(best)) and set(left) >= {22, 24}
    failed = [event for event in workshop.events("watched") if event["event"] == "retention_failed"]
    assert failed == [], json.dumps(failed)
    pruned = {name for event in workshop.events("watched") for name in event.get("pruned", [])}
    assert step_name(best) not in pruned and len(pruned) >= 12 - len(left) > 0

"""Claim: of 30 checkpoints, shared by 3 watchers one of which is killed at random moments, each is evaluated exactly
once in the results, and none is lost.

    python -m benchmarks.eval.watchers      writes benchmarks/results/eval_watchers.json

A round is a run folder with 20 checkpoints, of which a training goes on to make 10 more, and 3 watcher processes. At
random moments one of them, drawn anew each time, gets SIGKILL and is started again. An evaluation reads the
checkpoint's weights, takes some tenths of a second, and writes a record that can be told right from wrong. Half of the
rounds are of one host; in the others every process believes to be on a host of its own and the kernel's locks are
switched off, as on a network disk without any (signs of life come ten times as often as in the product, and are waited
for a tenth as long).
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from benchmarks.engine.result import write_result
from cpt import folder_lock
from cpt.checkpoint.marker import FileFacts, content_hash, read_marker, write_marker
from cpt.eval.results import Measured, SuiteRecord, TaskResult, group_scores, read_suite_record, record_file
from cpt.eval.results import write_suite_record as write_record
from cpt.eval.watch import Pace, Work, watch
from cpt.eval.watched_run import LocalRun
from cpt.rundir import RunDir, note_event, step_of

ROOT = Path(__file__).resolve().parents[2]
SHARD, SUITE = "shard_00000-of-00001.param.safetensors", "tiny"
THERE, TO_COME, WATCHERS = 20, 10, 3
FASTER = 10.0
SECONDS = (0.1, 0.6)  # that an evaluation takes
LIMIT_SECONDS = 240.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--kills", type=int, default=8, help="in each round")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--worker", nargs=3, metavar=("RUN_DIR", "LOG", "HOST"), default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(Path(options.worker[0]), Path(options.worker[1]), options.worker[2])
        return
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        rounds = [
            play(Path(folder) / str(number), draw, options.kills, several_hosts=bool(number % 2))
            for number in range(options.rounds)
        ]
    keys = ("kills", "kills_in_an_evaluation", "evaluations_cut_short", "evaluated_twice", "lost", "wrong")
    result: dict[str, Any] = {"rounds": len(rounds), "checkpoints": THERE + TO_COME, "watchers": WATCHERS}
    for name, several in (("one_host", False), ("hosts_without_locks", True)):
        these = [each for each in rounds if each["several_hosts"] == several]
        result[name] = {"rounds": len(these)} | {key: sum(each[key] for each in these) for key in keys}
    write_result("eval_watchers.json", result)
    if any(each["lost"] or each["wrong"] or each["evaluated_twice"] for each in rounds):
        raise SystemExit("a checkpoint was lost, wrong, or evaluated twice")


def play(folder: Path, draw: random.Random, kills: int, *, several_hosts: bool) -> dict[str, Any]:
    """One round: what became of every checkpoint."""
    run, log = RunDir(folder / "run"), folder / "log"
    run.checkpoints.mkdir(parents=True)
    for path in (run.config, run.plan):
        path.write_text("{}")
    steps = [10 * (number + 1) for number in range(THERE + TO_COME)]
    for step in steps[:THERE]:
        save(run, step)
    hosts = [f"host{number}" if several_hosts else "" for number in range(WATCHERS)]
    workers = [start(run, log, host) for host in hosts]
    to_come, hit = list(steps[THERE:]), 0
    for number in range(kills):
        victim = await_victim(workers, log, draw)
        time.sleep(draw.uniform(0.0, 1.0))
        hit += is_evaluating(log, workers[victim].pid)
        workers[victim].send_signal(signal.SIGKILL)
        workers[victim].wait()
        workers[victim] = start(run, log, hosts[victim])
        while to_come and len(to_come) * kills > (kills - number - 1) * TO_COME:  # the training goes on meanwhile
            save(run, to_come.pop(0))
    note_event("finish", steps[-1], run)
    codes = [worker.wait(timeout=LIMIT_SECONDS) for worker in workers]
    if codes != [0] * WATCHERS:
        raise SystemExit(f"watchers ended with {codes}: {folder}")
    return judge(run, log, steps) | {"several_hosts": several_hosts, "kills": kills, "kills_in_an_evaluation": hit}


def await_victim(workers: list["subprocess.Popen[bytes]"], log: Path, draw: random.Random) -> int:
    """One of those that are at work: a process that still starts is not worth a kill."""
    while True:
        begun = {line["pid"] for line in read_log(log)}
        if at_work := [number for number, worker in enumerate(workers) if worker.pid in begun]:
            return draw.choice(at_work)
        time.sleep(0.05)


def judge(run: RunDir, log: Path, steps: list[int]) -> dict[str, int]:
    lines = read_log(log)
    begun, ended = (Counter(line["step"] for line in lines if line["what"] == what) for what in ("begin", "end"))
    found = {path.name for path in (run.evals / SUITE).glob("step_*.json")}
    files = {step: record_file(run.evals / SUITE, step) for step in steps}
    assert found <= {path.name for path in files.values()}, found
    right = {step for step, file in files.items() if file.is_file() and accuracy_of(file) == value_of(step)}
    return {
        "lost": sum(not file.is_file() for file in files.values()),
        "wrong": sum(file.is_file() for file in files.values()) - len(right),
        "evaluated_twice": sum(count > 1 for count in ended.values()),
        "evaluations_cut_short": sum((begun - ended).values()),
    }


def start(run: RunDir, log: Path, host: str) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "benchmarks.eval.watchers", "--worker", str(run.root), str(log), host]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)


def is_evaluating(log: Path, pid: int) -> bool:
    mine = [line["what"] for line in read_log(log) if line["pid"] == pid]
    return mine[-1:] == ["begin"]


def read_log(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def value_of(step: int) -> float:
    return float(np.float32(step / 1024))


def accuracy_of(file: Path) -> float | None:
    return read_suite_record(file).groups["general"].accuracy


def save(run: RunDir, step: int) -> None:
    """A complete checkpoint of one tensor that holds ``value_of(step)``."""
    folder = run.checkpoint(step)
    folder.mkdir()
    (folder / "meta.json").write_text("{}")
    save_file({"param|0|w": np.full(2**16, value_of(step), np.float32)}, folder / SHARD)
    write_marker(folder, {p.name: FileFacts(p.stat().st_size, content_hash(p)) for p in sorted(folder.iterdir())})


def work(root: Path, log: Path, host: str) -> None:
    """A watcher process."""
    if host:
        fake = root / f".{host}"
        fake.write_text(host)
        folder_lock._BOOT_ID = fake
        folder_lock.BEAT_SECONDS /= FASTER
        folder_lock.PATIENCE_SECONDS /= FASTER
        folder_lock.fcntl.flock = no_locks  # type: ignore[assignment]
    run = LocalRun(root, SUITE)

    def evaluate(folder: Path) -> None:
        step = step_of(folder) or 0
        note(log, "begin", step)
        read_marker(folder)
        accuracy = float(load_file(folder / SHARD)["param|0|w"].mean())
        time.sleep(random.Random(step).uniform(*SECONDS))
        write_record(record_file(run.results, step), record_of(step, accuracy))
        note(log, "end", step)

    outcome = watch(run, Work(evaluate), pace=Pace(poll_seconds=0.3, still_seconds=20.0))
    if outcome.problem:
        raise SystemExit(outcome.problem)


def no_locks(handle: int, how: int) -> None:
    raise OSError(next(iter(folder_lock.NO_FLOCK)), "no locks on this disk")


def note(log: Path, what: str, step: int) -> None:
    line = json.dumps({"what": what, "step": step, "pid": os.getpid()}) + "\n"
    with log.open("ab", buffering=0) as file:  # one write: lines of several processes do not mix
        file.write(line.encode())


def record_of(step: int, accuracy: float) -> SuiteRecord:
    task = TaskResult(
        group="general", kind="cloze", metric="acc", higher_is_better=True, value=accuracy, stderr=0.0,
        metrics={"acc": Measured(accuracy, 0.0)}, items=1, truncated=0, overlapping=0, value_without_overlap=accuracy,
        stderr_without_overlap=0.0, few_shot=0, task_hash="none", seconds=0.0,
    )  # fmt: skip
    return SuiteRecord(
        suite=SUITE, suite_hash="none", step=step, tokens_seen=step, weights_hash="none", tokenizer="none",
        dtype="fp32", harness="none", tasks={"one": task}, groups=group_scores({"one": task}),
    )  # fmt: skip


if __name__ == "__main__":
    main()

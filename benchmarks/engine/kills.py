"""Claims: killed at any moment, a run goes on bit for bit; told to stop at any moment, it saves and says 143.

    python -m benchmarks.engine.kills      writes benchmarks/results/engine_kills.json

A job of two ranks (ZeRO 2, fp32, a save every 4 steps, an evaluation every 5) gets SIGKILL, or SIGTERM, to all ranks at
20 random moments each, one in every twentieth of its time, and at more until a save, an evaluation and the first step
have each been hit. Ranks are forks that have imported everything: the tenths of a second in which Python starts, and
no handler is there yet, are not covered. Then the run is resumed on the same topology and left alone.

Bars. SIGKILL: every loss of every step, repeated ones too, and the held-out losses equal those of a run that nothing
happened to, bit for bit; 20 of 20. SIGTERM: all ranks end with 143 (0 where the run had finished first), the newest
checkpoint is complete and that of the last step logged, so that the resumed run repeats none; then as above.
"""

import argparse
import json
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.engine.ranks import Ranks, in_fork, preload, read_lines, write_run, write_stores
from benchmarks.engine.result import write_result

STEPS, WORLD = 40, 2
TO_HIT = {"a save", "an evaluation", "the first step"}
MORE = 3  # times as many moments at most
FIELDS = {
    "deepspeed__zero_stage": 2,
    "checkpoint__every_steps": 4,
    "eval__every_steps": 5,
    "eval__tokens_per_source": 16384,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    preload()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), options.moments, random.Random(options.seed))
    write_result("engine_kills.json", result)
    failed = [run for name in ("sigkill", "sigterm") for run in result[name]["failed"]]
    if failed:
        raise SystemExit(json.dumps(failed, indent=1))


def measure(folder: Path, moments: int, draw: random.Random) -> dict[str, Any]:
    stores = {name: str(folder / "stores" / name) for name in ("general", "domain")}
    in_fork(partial(write_stores, folder / "stores"))
    whole = write_run(folder / "whole.yaml", stores, steps=STEPS, **FIELDS)
    started = time.monotonic()
    assert Ranks([str(whole)], WORLD, folder / "log").start().wait() == [0] * WORLD, (folder / "log").read_text()
    duration = time.monotonic() - started
    result: dict[str, Any] = {
        "steps": STEPS,
        "world": WORLD,
        "zero_stage": 2,
        "seconds_uninterrupted": round(duration, 1),
    }
    for number in (signal.SIGKILL, signal.SIGTERM):
        runs: list[dict[str, Any]] = []
        while len(runs) < moments or (TO_HIT - {run["hit"] for run in runs} and len(runs) < MORE * moments):
            name = f"{number.name.lower()}_{len(runs)}"
            run_file = write_run(folder / f"{name}.yaml", stores, steps=STEPS, **FIELDS)
            moment = duration * (len(runs) % moments + draw.random()) / moments  # stratified: the whole run is covered
            found = interrupt(folder, run_file, number, moment)
            shutil.rmtree(folder / name, ignore_errors=True)
            if found is None:  # this one was faster, and had ended: draw again
                duration *= 0.95
                continue
            runs.append(found)
            print(name, found, flush=True)
        result[number.name.lower()] = {
            "moments": len(runs),
            "missed": sorted(TO_HIT - {run["hit"] for run in runs}),
            "passed": sum(run["ok"] for run in runs),
            "hit": dict(Counter(run["hit"] for run in runs)),
            "steps_repeated": sum(run["repeated"] for run in runs),
            "seconds_to_end": round(max(run["seconds_to_end"] for run in runs), 2),
            "failed": [run for run in runs if not run["ok"]],
        }
    return result


def interrupt(folder: Path, run_file: Path, number: signal.Signals, moment: float) -> dict[str, Any] | None:
    """What became of a run that got the signal; None where it had ended before."""
    run, whole, log = folder / run_file.stem, folder / "whole", folder / f"{run_file.stem}.log"
    job = Ranks([str(run_file)], WORLD, log).start()
    time.sleep(moment)
    if None not in job.codes():
        return None
    hit = what_was_hit(run)
    signalled = time.monotonic()
    job.send(number)
    codes = job.wait()
    seconds = time.monotonic() - signalled
    logged = [line["step"] for line in read_lines(run / "metrics.jsonl")]
    newest = newest_complete(run)
    problems = []
    if number == signal.SIGTERM:
        finished = (run / "events.jsonl").exists() and "finish" in (run / "events.jsonl").read_text()
        if codes != [0 if finished else 143] * WORLD:
            problems.append(f"exit codes {codes}")
        began = (run / "events.jsonl").exists()  # before that there is nothing to save
        if began and newest != (logged[-1] if logged else 0):
            problems.append(f"the newest checkpoint is of step {newest}, the last step logged {logged[-1:]}")
    go_on = ["--resume", str(run)] if (run / "config.yaml").exists() else [str(run_file)]
    again = Ranks(go_on, WORLD, log).start().wait()
    if again != [0] * WORLD:
        problems.append(f"resumed: exit codes {again}: {log.read_text()[-600:]}")
    problems += differences(run, whole)
    repeated = len(read_lines(run / "metrics.jsonl")) - STEPS
    if number == signal.SIGTERM and repeated:
        problems.append(f"{repeated} steps were repeated")
    return {"moment": round(moment, 2), "hit": hit, "repeated": repeated, "seconds_to_end": seconds,
            "ok": not problems, "problems": problems}  # fmt: skip


def what_was_hit(run: Path) -> str:
    """Read from the run folder just before the signal: the phase of rank 0's heartbeat."""
    if list(run.glob("checkpoints/step_*")) and any(
        not (folder / "COMPLETE").exists() for folder in run.glob("checkpoints/step_*")
    ):
        return "a save"
    try:
        heartbeat = json.loads((run / "heartbeats" / "rank_00000.json").read_text())
    except (OSError, ValueError):
        return "the start"
    if heartbeat["phase"] == "evaluation":
        return "an evaluation"
    return "the first step" if not read_lines(run / "metrics.jsonl") else "training"


def newest_complete(run: Path) -> int:
    return max((int(path.parent.name.removeprefix("step_")) for path in run.glob("checkpoints/*/COMPLETE")), default=-1)


def differences(run: Path, whole: Path) -> list[str]:
    """Where losses, training and held-out, are not the very same numbers."""
    expected = {line["step"]: line["loss_by_source"] for line in read_lines(whole / "metrics.jsonl")}
    found = read_lines(run / "metrics.jsonl")
    wrong = [line["step"] for line in found if line["loss_by_source"] != expected[line["step"]]]
    missing = sorted(expected.keys() - {line["step"] for line in found})
    problems = [f"other losses in steps {wrong}"] if wrong else []
    problems += [f"no metrics of steps {missing}"] if missing else []
    for path in sorted((whole / "evals").glob("step_*.json")):
        mine = run / "evals" / path.name
        if not mine.exists() or json.loads(mine.read_text())["groups"] != json.loads(path.read_text())["groups"]:
            problems.append(f"{path.name} differs or is missing")
    return problems


if __name__ == "__main__":
    main()

"""Claim: `cpt data tokenize`, killed at 20 random moments, goes on every time and ends with the same content hash.

Three ways to build one store of several files: one process with one worker, one with two, and an array of four tasks
with a merge. In each way the running command is killed (SIGKILL, its workers left to notice) at random moments, started
again, killed again; in the end it is left alone, and the store is verified and compared with one that was never killed.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import orjson

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "benchmarks" / "results" / "data_kills.json"
FILES, TASKS = 8, 4
# Small segments, so that every kill falls between or into some of them; the command line's own are of 128 MB.
PROGRAM = """
import sys
from pathlib import Path
from data_tools.corpus.units import parse_task
from data_tools.store_builder import StoreRequest, build_store, merge_store
if __name__ == "__main__":
    inputs, tokenizer, out, workers, task, megabytes = sys.argv[1:]
    if task == "merge":
        merge_store(Path(out))
    else:
        build_store(StoreRequest((inputs,), Path(tokenizer), Path(out), "kills", "general", workers=int(workers),
                                 segment_bytes=int(float(megabytes) * 2**20), task=parse_task(task)))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--megabytes", type=int, default=160, help="text in all files together")
    parser.add_argument("--segment-megabytes", type=float, default=2)
    parser.add_argument("--tokenizer", type=Path, default=ROOT.parent / "shared/data/tokenizers/gpt_neox_20b")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scratch", type=Path, default=None)
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        result = measure(arguments, Path(scratch))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    if result["stores_equal"] != result["stores"] or result["kills"] < arguments.kills:
        sys.exit("a killed build did not end as one that was left alone")


def measure(arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    draw = random.Random(arguments.seed)
    write_inputs(scratch, arguments.megabytes * 10**6, draw)
    start = time.perf_counter()
    expected = build(arguments, scratch, "whole", [("2", "0/1")], None)
    seconds = time.perf_counter() - start
    array = [("2", f"{task}/{TASKS}") for task in range(TASKS)] + [("1", "merge")]
    ways = {"one_worker": [("1", "0/1")], "two_workers": [("2", "0/1")], "four_tasks": array}
    kills, rows = 0, {}
    while kills < arguments.kills:
        for name, steps in ways.items():
            killer = Killer(draw, seconds / len(steps) ** 0.5, -(-arguments.kills // len(ways)))
            found = build(arguments, scratch, name, steps, killer)
            row = rows.setdefault(name, {"stores": 0, "equal": 0, "kills": 0})
            row["stores"] += 1
            row["equal"] += found == expected
            row["kills"] += killer.kills
            kills += killer.kills
    return {
        "claim": f"{arguments.kills} kills at random moments, every build goes on to the same content hash",
        "kills": kills,
        "stores": sum(row["stores"] for row in rows.values()),
        "stores_equal": sum(row["equal"] for row in rows.values()),
        "ways": rows,
        "seconds_unhurt": seconds,
    }


class Killer:
    """Kills a process after a random part of the time that it may need, at most so many times."""

    def __init__(self, draw: random.Random, seconds: float, most: int) -> None:
        self.draw, self.seconds, self.most, self.kills = draw, seconds, most, 0

    def strike(self, process: subprocess.Popen[bytes]) -> None:
        if self.kills >= self.most:
            process.wait()
            return
        try:
            process.wait(self.draw.random() * self.seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            self.kills += 1


def build(
    arguments: argparse.Namespace, scratch: Path, name: str, steps: list[tuple[str, str]], killer: Killer | None
) -> dict[str, str]:
    """Content hashes of a store built step by step, each step again and again until it is through."""
    out = scratch / name
    shutil.rmtree(out, ignore_errors=True)
    for workers, task in steps:
        command = [sys.executable, "-c", PROGRAM, str(scratch / "*.jsonl"), str(arguments.tokenizer), str(out)]
        while True:
            process = subprocess.Popen([*command, workers, task, str(arguments.segment_megabytes)], cwd=ROOT)
            if killer is None:
                process.wait()
            else:
                killer.strike(process)
            if process.returncode == 0:
                break
            if process.returncode != -signal.SIGKILL:
                sys.exit(f"{name} {task}: ended with {process.returncode}")
    subprocess.run(
        [sys.executable, "-m", "cpt.cli", "data", "verify", str(out)], cwd=ROOT, check=True, capture_output=True
    )
    return {
        split: json.loads((out / split / "manifest.json").read_text())["content_hash"] for split in ("train", "heldout")
    }


def write_inputs(folder: Path, text_bytes: int, draw: random.Random) -> None:
    words = ["".join(draw.choices("abcdefghijklmnoprstuvwäöü", k=draw.randint(1, 12))) for _ in range(20_000)]
    for number in range(FILES):
        written = 0
        with (folder / f"{number}.jsonl").open("wb") as file:
            while written < text_bytes / FILES:
                text = " ".join(draw.choices(words, k=draw.randint(1, 1500)))
                written += len(text.encode())
                file.write(orjson.dumps({"text": text}) + b"\n")
        os.sync()


if __name__ == "__main__":
    main()

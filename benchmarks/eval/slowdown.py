"""Claim: a watcher that evaluates on the other core slows training by at most 3%, against an idle process pinned there.

    python -m benchmarks.eval.slowdown      writes benchmarks/results/eval_slowdown.json

A training is pinned to one core and saves a checkpoint every few seconds; `cpt eval watch` on the same run folder is
pinned to the other, and so is an idle process. The watcher is suspended and woken in turn (A B B A ...), so that a
machine whose speed drifts slows both kinds of seconds. What counts is the time from one step's record to the next,
saves and all, of steps that lie wholly inside such a stretch. The watcher's share of its core while awake is given,
for one that rests proves nothing.
"""

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from benchmarks.engine.ranks import read_lines, write_run
from benchmarks.engine.result import write_result

ROOT = Path(__file__).resolve().parents[2]
BAR = 1.03
VOCAB_SIZE, WORDS, SEQ_LEN = 512, 500, 256
MODEL = {
    "model_type": "llama", "vocab_size": VOCAB_SIZE, "hidden_size": 256, "intermediate_size": 688,
    "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 8, "max_position_embeddings": SEQ_LEN,
    "tie_word_embeddings": True,
}  # fmt: skip
ROWS = 8
SETTLE_SECONDS = 0.5  # after each switch, which count for neither
PINNED = "import os, sys; os.sched_setaffinity(0, {int(sys.argv[1])}); os.execv(sys.executable, sys.argv[2:])"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=16, help="of stretches with and without")
    parser.add_argument("--seconds", type=float, default=8.0, help="of a stretch")
    options = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise SystemExit("needs two cores")
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), options, (cores[0], cores[1]))
    write_result("eval_slowdown.json", result)
    if result["ratio"] > BAR or result["watcher_share_of_its_core"] < 0.5:
        raise SystemExit(f"training took {result['ratio']:.4f} times as long, or the watcher rested")


def measure(folder: Path, options: argparse.Namespace, cores: tuple[int, int]) -> dict[str, Any]:
    run_file, suite = make_inputs(folder)
    run = folder / run_file.stem
    training = pinned(cores[0], folder / "training.log", "-m", "cpt.cli", "train", str(run_file))
    idle = pinned(cores[1], folder / "idle.log", "-c", "import time; time.sleep(36000)")
    watcher: subprocess.Popen[bytes] | None = None
    try:
        wait_for(lambda: len(list(run.glob("checkpoints/*/COMPLETE"))) >= 1, training)
        command = ("-m", "cpt.cli", "eval", "watch", str(run), "--suite", str(suite), "--device", "cpu")
        watcher = pinned(cores[1], folder / "watcher.log", *command, "--cache", str(folder / "cache"))
        wait_for(lambda: len(list(run.glob("evals/slow/step_*.json"))) >= 1, watcher, training)
        stretches = alternate(watcher, training, options)
    finally:
        for process in (watcher, idle, training):
            if process is not None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGCONT)
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    times = {line["step"]: line["time"] for line in read_lines(run / "metrics.jsonl")}
    return judge(stretches, times) | {
        "evaluations": len(list(run.glob("evals/slow/step_*.json"))),
        "training": {"hidden_size": MODEL["hidden_size"], "layers": MODEL["num_hidden_layers"], "rows": ROWS},
    }


def alternate(
    watcher: "subprocess.Popen[bytes]", training: "subprocess.Popen[bytes]", options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Stretches in turn: whether the watcher was awake, from when to when, and the CPU seconds that it took."""
    found = []
    for number in range(2 * options.pairs):
        awake = number % 4 in (0, 3)
        os.killpg(watcher.pid, signal.SIGCONT if awake else signal.SIGSTOP)
        time.sleep(SETTLE_SECONDS)
        since, before = time.time(), cpu_seconds(watcher.pid)
        time.sleep(options.seconds)
        found.append({"awake": awake, "since": since, "until": time.time(),
                      "cpu_seconds": cpu_seconds(watcher.pid) - before})  # fmt: skip
        if training.poll() is not None or watcher.poll() is not None:
            raise SystemExit("training or watcher has ended")
    return found


def judge(stretches: list[dict[str, Any]], times: dict[int, float]) -> dict[str, Any]:
    for each in stretches:
        inside = [
            times[step] - times[step - 1]
            for step in times
            if step - 1 in times and each["since"] <= times[step - 1] and times[step] <= each["until"]
        ]
        if not inside:
            raise SystemExit("not one step fits into a stretch: give more --seconds, on a machine that is at rest")
        each["step_seconds"], each["steps"] = statistics.fmean(inside), len(inside)
    ratios = []
    for first, second in zip(stretches[::2], stretches[1::2], strict=True):
        with_it, without = (first, second) if first["awake"] else (second, first)
        ratios.append(with_it["step_seconds"] / without["step_seconds"])
    awake = [each for each in stretches if each["awake"]]
    low, ratio, high = statistics.quantiles(ratios, n=4)
    share = sum(each["cpu_seconds"] for each in awake) / sum(each["until"] - each["since"] for each in awake)
    return {
        "ratio": round(ratio, 4),
        "bar": BAR,
        "quartiles": [round(low, 4), round(high, 4)],
        "stderr_of_mean": round(statistics.stdev(ratios) / len(ratios) ** 0.5, 4),
        "mean_ratio": round(statistics.fmean(ratios), 4),
        "pairs": len(ratios),
        "steps": sum(each["steps"] for each in stretches),
        "step_seconds_beside_an_idle_process": round(
            statistics.fmean(each["step_seconds"] for each in stretches if not each["awake"]), 4
        ),
        "watcher_share_of_its_core": round(share, 3),
    }


def cpu_seconds(pid: int) -> float:
    """Of a process, its living children, and those that have ended."""
    total, process = 0.0, psutil.Process(pid)
    for each in [process, *process.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            taken = each.cpu_times()
            total += taken.user + taken.system + taken.children_user + taken.children_system
    return total


def pinned(core: int, log: Path, *arguments: str) -> "subprocess.Popen[bytes]":
    """``python ARGUMENTS`` on one core, in a session of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    with log.open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-c", PINNED, str(core), sys.executable, *arguments],
            stdout=output, stderr=subprocess.STDOUT, start_new_session=True, env=environment, cwd=log.parent,
        )  # fmt: skip


def wait_for(ready: Any, *processes: "subprocess.Popen[bytes]", seconds: float = 240.0) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        ended = [process.args for process in processes if process.poll() is not None]
        if ended or time.monotonic() > deadline:
            raise SystemExit(f"ended, or not ready in {seconds:.0f} s: {ended}")
        time.sleep(0.1)


def make_inputs(folder: Path) -> tuple[Path, Path]:
    """A tokenizer of numbered words, stores and items in it, a run file, and a suite that takes a while."""
    import numpy as np
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from cpt.data.token_store import StoreLabel, TokenizerFacts, write_split
    from data_tools.encoders import tokenizer_fingerprint

    words = ["<eos>", "<unk>", *(f"w{number}" for number in range(WORDS))]
    plain = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = folder / "tokenizer"
    wrapped = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<eos>", unk_token="<unk>")
    wrapped.save_pretrained(str(tokenizer))
    facts = TokenizerFacts("words", tokenizer_fingerprint(tokenizer), "fast")
    stores, draw = {}, np.random.default_rng(0)
    for name in ("general", "domain"):
        for split, number in (("train", 2000), ("heldout", 40)):
            documents = [[*draw.integers(2, len(words), size=200).tolist(), 0] for _ in range(number)]
            write_split(folder / name / split, StoreLabel(name, name, split, VOCAB_SIZE, 0, facts), [documents],
                        utf8_bytes=800 * number)  # fmt: skip
        stores[name] = str(folder / name)
    fields = {
        "model__fresh": MODEL, "model__tokenizer": str(tokenizer), "data__seq_len": SEQ_LEN,
        "train__tokens": 10**5 * ROWS * SEQ_LEN, "train__global_batch_tokens": ROWS * SEQ_LEN,
        "train__micro_batch_size": 4, "data__max_epochs": 1e6, "checkpoint__every_steps": 10,
    }  # fmt: skip
    run_file = write_run(folder / "trained.yaml", stores, steps=1, **fields)
    rng = random.Random(0)
    with (folder / "items.jsonl").open("w") as file:
        for _ in range(1000):
            text = [rng.choice(words[2:]) for _ in range(40)]
            item = {"sentence_good": " ".join(text), "sentence_bad": " ".join([*text[:-1], rng.choice(words[2:])])}
            file.write(json.dumps(item) + "\n")
    task = {"name": "pairs", "file": "items.jsonl", "kind": "minimal_pairs"}
    suite = folder / "suite.yaml"
    suite.write_text(json.dumps({"name": "slow", "groups": {"general": [task]}}))  # JSON is YAML
    return run_file, suite


if __name__ == "__main__":
    main()

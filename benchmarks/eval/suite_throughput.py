"""How long a suite takes, against the plain ``lm_eval`` command over the same tasks, and with everything in the cache.

    python -m benchmarks.eval.suite_throughput       writes benchmarks/results/eval_suite_throughput.json

Whole processes are timed, from the start of Python to the written result, alternating (A B A B ...): of stories260K,
where the harness itself is most of the work, and of a random Llama of 12 million parameters, where the model is.
The plain command runs with its defaults, one call for all tasks. Bars: at least its throughput; a call whose results
are known takes less than 2 seconds. Needs ../shared/data.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.engine.result import write_result
from benchmarks.eval.plain_command import (
    BATCH_SIZE,
    WEIGHTS,
    Asked,
    asked_tasks,
    export_stories,
    run_plain,
    write_plain_tasks,
)

CALL = """
import sys
from pathlib import Path
from cpt.eval.harness import ModelOnDisk, run_suite
from cpt.eval.suite import load_suite
suite, model, cache = map(Path, sys.argv[1:])
found = run_suite(
    ModelOnDisk("bench", "bench", "fp32", lambda scratch: model), load_suite(suite), device="cpu", cache=cache
)
print(found.scored, found.items.num_rows)
"""


def random_llama(out: Path) -> Path:
    """12 million parameters over the vocabulary of stories260K."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 7, "num_attention_heads": 6}
    config = AutoConfig.for_model("llama", vocab_size=512, max_position_embeddings=512, **sizes)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(out)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(WEIGHTS / name, out / name)
    return out


def call_suite(suite: Path, model: Path, cache: Path, *, scored: int) -> float:
    """Seconds of one call in a process of its own."""
    command = [sys.executable, "-c", CALL, str(suite), str(model), str(cache)]
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    started = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3600)
    seconds = time.perf_counter() - started
    if done.returncode or int(done.stdout.split()[0]) != scored:
        raise RuntimeError(f"the suite ended with {done.returncode}: {done.stdout}{done.stderr[-2000:]}")
    return seconds


def measure(model: Path, tasks: list[Asked], scratch: Path, *, rounds: int, limit: int | None) -> dict[str, Any]:
    raw = {"name": "bench", "batch_size": BATCH_SIZE, "groups": {"all": [task.for_suite() for task in tasks]}}
    suite = scratch / "suite.yaml"
    suite.write_text(json.dumps(raw))
    ours, plain, warm = [], [], []
    for number in range(rounds):
        cache = scratch / f"cache_{model.name}_{number}"
        ours.append(call_suite(suite, model, cache, scored=len(tasks)))
        warm += [call_suite(suite, model, cache, scored=0) for _ in range(3)]
        folder = scratch / f"plain_{model.name}_{number}"
        write_plain_tasks(tasks, folder)
        started = time.perf_counter()
        run_plain(model, tasks, folder, limit=limit)
        plain.append(time.perf_counter() - started)
        print(model.name, number, ours[-1], plain[-1], warm[-3:], flush=True)
    ratios = [theirs / mine for mine, theirs in zip(ours, plain, strict=True)]
    return {
        "suite_seconds": round(statistics.median(ours), 2),
        "lm_eval_seconds": round(statistics.median(plain), 2),
        "throughput_ratio": round(statistics.median(ratios), 3),
        "throughput_ratio_min_max": [round(min(ratios), 3), round(max(ratios), 3)],
        "warm_seconds": round(statistics.median(warm), 2),
        "warm_seconds_max": round(max(warm), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit", type=int, default=300, help="items of each task; 20 of them generate")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        # One limit for all in the plain command; GSM8K has one of its own and is left out here.
        tasks = [task for task in asked_tasks(scratch, limit=options.limit) if task.task != "gsm8k"]
        models = [export_stories(scratch / "stories260K"), random_llama(scratch / "llama_12M")]
        found = {
            model.name: measure(model, tasks, scratch, rounds=options.rounds, limit=options.limit) for model in models
        }
    figures = {
        "bar": "throughput ratio >= 1, warm call < 2 s",
        "met": all(one["throughput_ratio"] >= 1 and one["warm_seconds_max"] < 2 for one in found.values()),
        "tasks": [task.task for task in tasks],
        "limit": options.limit,
        "rounds": options.rounds,
        "models": found,
    }
    write_result("eval_suite_throughput.json", figures)


if __name__ == "__main__":
    main()

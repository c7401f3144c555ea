"""Tokens per second and model FLOPs utilisation of the real trainer on the GPU of this machine.

    python -m benchmarks.gpu_throughput       writes benchmarks/results/gpu_throughput.json

Runs `cpt.train.main` as a user would, on a store of random documents, for each row of RUNS; reports the median over
the logged windows after the first. Utilisation is against the device's dense bf16 peak, with 6 FLOPs per parameter
and token plus attention (arXiv 2204.02311).
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from cpt.data.token_store import StoreLabel, TokenizerFacts, write_split

RESULT = Path(__file__).parent / "results" / "gpu_throughput.json"
VOCAB_SIZE = 32_000
LLAMA_1B = {
    "model_type": "llama",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
}
# name -> row length, rows per micro-batch, ZeRO stage, attention
RUNS = {
    "1.1B, 2048, ZeRO 0": (2048, 8, 0, "auto"),
    "1.1B, 2048, ZeRO 1": (2048, 8, 1, "auto"),
    "1.1B, 2048, ZeRO 1, sdpa": (2048, 8, 1, "sdpa"),
    "1.1B, 4096, ZeRO 3": (4096, 4, 3, "auto"),
}


def make_store(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for split, number in (("train", 4000), ("heldout", 40)):
        documents = [
            np.append(rng.integers(1, VOCAB_SIZE, size=rng.integers(200, 1800)), 0).tolist() for _ in range(number)
        ]
        label = StoreLabel("noise", "general", split, VOCAB_SIZE, 0, TokenizerFacts("none", "0" * 64, "none"))
        write_split(folder / split, label, [documents], utf8_bytes=4 * sum(map(len, documents)))


def measure(folder: Path, name: str, steps: int) -> dict[str, Any]:
    seq_len, micro, stage, attention = RUNS[name]
    batch = 4 * micro * seq_len
    config = {
        "run": {"name": f"run{len(list(folder.glob('*.yaml')))}", "dir": str(folder)},
        "model": {"fresh": LLAMA_1B, "attention": attention},
        "data": {"stores": {"noise": str(folder / "store")}, "seq_len": seq_len, "max_epochs": 1e6},
        "train": {"tokens": steps * batch, "global_batch_tokens": batch, "micro_batch_size": micro, "peak_lr": 1e-4},
        "deepspeed": {"zero_stage": stage},
        "eval": {"tokens_per_source": 4096},
        "log": {"every_steps": 4, "wandb": "disabled"},
    }
    file = folder / f"{config['run']['name']}.yaml"  # type: ignore[index]
    file.write_text(yaml.safe_dump(config))
    done = subprocess.run(
        [sys.executable, "-m", "cpt.train.main", str(file)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        return {"failed": done.returncode, "message": (done.stdout + done.stderr)[-1500:]}
    run = folder / config["run"]["name"]  # type: ignore[index]
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][1:]
    median = {key: statistics.median(r[key] for r in records) for key in ("tokens_per_second", "mfu", "step_seconds")}
    chosen = next(line for line in done.stdout.splitlines() if "attention" in line).rsplit(" ", 1)[-1]
    share = statistics.median(r["data_seconds"] / r["step_seconds"] for r in records)
    memory = max(r["memory_bytes"] for r in records) / 2**30
    return {**median, "data_waiting_share": share, "peak_memory_gib": round(memory, 2), "attention": chosen}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no GPU here: this benchmark needs one")
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        make_store(Path(folder) / "store")
        for name in RUNS:
            results[name] = measure(Path(folder), name, options.steps)
            print(name, results[name], flush=True)
    machine = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "python": platform.python_version()}
    options.out.write_text(json.dumps({"runs": results, "machine": machine}, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Claim: the loss in chunks takes less time and less memory than that of whole logits, on a CPU too.

    python -m benchmarks.engine.loss_memory       writes benchmarks/results/engine_loss_memory.json

A Llama with a vocabulary of 32,000 and a width of 512 on one row of 1024 tokens, forward and backward, each way in a
process of its own: peak resident memory above that before the first step, as the operating system counts it, and the
median CPU time of a step on one thread.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time

import torch

from benchmarks.engine.compile import build, rows
from benchmarks.engine.result import write_result
from cpt.model.attention import bare_model
from cpt.train.loss_head import forward_losses

SIZE = (512, 2, 8, 32_000, 1024, 1)


def one_way(name: str, steps: int) -> dict[str, float]:
    torch.set_num_threads(1)
    model, backend = build(SIZE, torch.device("cpu"))
    if name == "whole logits":
        del bare_model(model).get_output_embeddings().forward  # type: ignore[operator]
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)  # there all along in training
    before, seconds = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []
    for number in range(steps):
        batch, started = rows(SIZE, number), time.process_time()
        forward_losses(model, batch, backend).total.backward()
        seconds.append(time.process_time() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"peak_extra_mb": round((peak - before) / 1024), "step_ms": round(1e3 * statistics.median(seconds[1:]))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--way")
    options = parser.parse_args()
    if options.way:
        print(json.dumps(one_way(options.way, options.steps)))
        return
    found = {}
    for way in ("whole logits", "chunks"):
        command = [sys.executable, "-m", "benchmarks.engine.loss_memory", "--way", way, "--steps", str(options.steps)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600, env=environment)
        found[way] = json.loads(done.stdout.splitlines()[-1])
    write_result("engine_loss_memory.json", {"size": SIZE, "ways": found})


if __name__ == "__main__":
    main()

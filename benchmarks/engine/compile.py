"""What train.compile costs at the start and gains per step, on the machine that runs this.

    python -m benchmarks.engine.compile       writes benchmarks/results/engine_compile.json

The same Llama on the same packed rows, forward and backward, with its blocks compiled and not; steps alternate, medians
count, of CPU time on a CPU (one thread, so that other programs do not count) and of wall time on a GPU. The start is
wall time, for compilers are programs of their own: what the first two steps take beyond two later ones.
"""

import argparse
import statistics
import time
from typing import Any

import torch

from benchmarks.engine.result import write_result
from cpt.config import ModelSection
from cpt.data.batch import Batch
from cpt.model.build import Needs, build_model
from cpt.model.compiling import compile_blocks
from cpt.train.loss_head import attach_loss_head, forward_losses

# name -> hidden size, layers, heads, vocabulary, row length, rows
CPU_SIZES = {"12M": (320, 8, 10, 4096, 512, 2)}
GPU_SIZES = {"300M": (1024, 16, 16, 32_000, 2048, 8)}


def build(size: tuple[int, ...], device: torch.device) -> tuple[torch.nn.Module, str]:
    hidden, layers, heads, vocabulary, length, _ = size
    fresh = {
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": hidden * 8 // 3 // 8 * 8,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": length,
    }
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    loaded = build_model(ModelSection(fresh=fresh), Needs(length, vocabulary, seed=0), device=device, dtype=dtype)
    attach_loss_head(loaded.model, loaded.report.attention, vocab_size=vocabulary, device=device)
    return loaded.model.train(), loaded.report.attention


def rows(size: tuple[int, ...], number: int) -> Batch:
    """Rows of documents of about 300 tokens, other borders in every batch."""
    _, _, _, vocabulary, length, count = size
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(0, vocabulary, (count, length), generator=generator)
    starts = torch.rand(count, length, generator=generator) < 1 / 300
    starts[:, 0] = True
    place = torch.arange(length).expand(count, length)
    positions = place - torch.where(starts, place, 0).cummax(dim=1).values
    return Batch(ids, ids.roll(-1, dims=1), positions, starts.cumsum(1) - 1, torch.zeros(count, dtype=torch.int64))


def measure(size: tuple[int, ...], steps: int) -> dict[str, Any]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ways = {"eager": build(size, device), "compiled": build(size, device)}
    compile_blocks(ways["compiled"][0], device=device)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    wall: dict[str, list[float]] = {name: [] for name in ways}
    losses: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(steps):
        batch = rows(size, number).to(device)
        for name, (model, backend) in ways.items():
            began, started = time.perf_counter(), now(device)
            loss = forward_losses(model, batch, backend).total
            loss.backward()
            seconds[name].append(now(device) - started)
            wall[name].append(time.perf_counter() - began)
            losses[name].append(float(loss.detach()))
            model.zero_grad()
    steady = {name: statistics.median(times[2:]) for name, times in seconds.items()}
    start = {name: sum(times[:2]) - 2 * statistics.median(times[2:]) for name, times in wall.items()}
    return {
        "steady_ms": {name: round(1e3 * value, 1) for name, value in steady.items()},
        "steady_ratio": round(steady["compiled"] / steady["eager"], 4),
        "start_seconds": {name: round(value, 1) for name, value in start.items()},
        "largest_relative_difference_of_losses": max(
            abs(one / other - 1) for one, other in zip(*losses.values(), strict=True)
        ),
        "steps": steps,
    }


def now(device: torch.device) -> float:
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=14)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    sizes = GPU_SIZES if torch.cuda.is_available() else CPU_SIZES
    write_result("engine_compile.json", {"sizes": {name: measure(size, options.steps) for name, size in sizes.items()}})


if __name__ == "__main__":
    main()

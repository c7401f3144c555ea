"""Time and memory of the output layer with its loss: whole logits, our chunks, Liger's fused kernel.

    python -m benchmarks.gpu.linear_losses       writes benchmarks/results/gpu_linear_losses.json

One forward and backward pass over the hidden states of a micro-batch, in bf16, medians of repeated rounds; Liger's row
is left out where liger-kernel is not installed. Decides whether ``cpt.train.losses`` should use Liger's on a GPU.
"""

import argparse
import importlib
import importlib.util
import statistics
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.engine.result import write_result
from cpt.train.losses import linear_losses, losses_of_logits

# name -> tokens, width, vocabulary
SIZES = {
    "Llama 1B, vocabulary 32k": (16384, 2048, 32_000),
    "Llama 1B, vocabulary 128k": (16384, 2048, 128_256),
    "Llama 8B, vocabulary 128k": (8192, 4096, 128_256),
}


def whole(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return losses_of_logits(torch.nn.functional.linear(hidden, weight)[None], labels[None]).total


def chunks(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return linear_losses(hidden[None], weight, None, labels[None])[0]


def liger() -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    if importlib.util.find_spec("liger_kernel") is None:
        return None
    module = importlib.import_module("liger_kernel.transformers")
    fused = module.LigerFusedLinearCrossEntropyLoss(reduction="sum")
    return lambda hidden, weight, labels: fused(weight, hidden, labels)


def measure(
    way: Callable[[Tensor, Tensor, Tensor], Tensor], size: tuple[int, int, int], rounds: int
) -> dict[str, float]:
    tokens, width, vocabulary = size
    hidden = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(vocabulary, width, device="cuda") / 50).bfloat16().requires_grad_()
    labels = torch.randint(0, vocabulary, (tokens,), device="cuda")
    times = []
    for number in range(rounds + 3):
        hidden.grad = weight.grad = None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        way(hidden, weight, labels).backward()
        end.record()
        torch.cuda.synchronize()
        if number >= 3:
            times.append(begin.elapsed_time(end))
    return {
        "milliseconds": round(statistics.median(times), 3),
        "peak_extra_gib": round((torch.cuda.max_memory_allocated() - before) / 2**30, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no GPU here: this benchmark needs one")
    ways = {"whole logits": whole, "chunks": chunks, "liger": liger()}
    found = {
        name: {key: measure(way, size, options.rounds) for key, way in ways.items() if way is not None}
        for name, size in SIZES.items()
    }
    write_result("gpu_linear_losses.json", {"sizes": found})


if __name__ == "__main__":
    main()

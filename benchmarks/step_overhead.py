"""What a training step costs beyond the model: our step against a bare PyTorch loop, alternating in one process.

    python -m benchmarks.step_overhead        writes benchmarks/results/step_overhead.json

Both train the same Llama on the same packed rows with the same mask, in the same dtype, with clipping and fused
AdamW; world 1, ZeRO 0. Ours is what a run does: DeepSpeed's engine, the loader, the loss in chunks, sums per source
and the check for a finite loss.
Blocks of steps alternate (A B A B ...), so that a machine whose speed drifts slows both. Also measured there: the
time our loop waits for data. Bars: ratio <= 1.05, waiting < 1%.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cpt.config import ModelSection
from cpt.data.loader import Loader
from cpt.data.packing import concat_num_rows, concat_rows
from cpt.data.token_store import StoreLabel, TokenizerFacts, TokenStore, write_split
from cpt.model.build import Needs, build_model
from cpt.model.kernels import forward_logits
from cpt.plan import PlanSource, StageWish, build_plan
from cpt.train.deepspeed_config import EngineSpec
from cpt.train.engine import Engine, start_process_group, stop_process_group
from cpt.train.guard import StopFlag
from cpt.train.loss_head import attach_loss_head, forward_losses
from cpt.train.optim import OptimizerSpec, build_optimizer
from cpt.train.trainer import Job, Trainer

RESULT = Path(__file__).parent / "results" / "step_overhead.json"
# name -> hidden size, layers, row length, rows per step
SIZES = {"1M (quickstart)": (128, 4, 256, 4), "12M": (320, 8, 512, 2)}
GPU_SIZES = {"1M (quickstart)": (128, 4, 256, 64), "300M": (1024, 16, 2048, 16)}
VOCAB_SIZE, LR = 4096, 1e-4
ADAMW = OptimizerSpec("adamw", weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8)


def fresh_config(hidden: int, layers: int, seq_len: int) -> dict[str, Any]:
    heads = hidden // 32 if hidden < 1024 else hidden // 64
    return {
        "model_type": "llama",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": hidden,
        "intermediate_size": hidden * 8 // 3 // 8 * 8,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": seq_len,
        "tie_word_embeddings": True,
    }


def make_store(folder: Path, *, num_tokens: int) -> TokenStore:
    rng = np.random.default_rng(0)
    documents = [[*rng.integers(1, VOCAB_SIZE, size=400).tolist(), 0] for _ in range(num_tokens // 401 + 1)]
    label = StoreLabel("noise", "general", "train", VOCAB_SIZE, 0, TokenizerFacts("none", "0" * 64, "none"))
    write_split(folder, label, [documents])
    return TokenStore.open(folder)


def build(size: tuple[int, int, int, int], store: TokenStore, precision: str, total_steps: int) -> tuple[Any, ...]:
    """Our trainer and the bare loop's pieces, on equal models."""
    hidden, layers, seq_len, rows = size
    rows_available = concat_num_rows(store.num_tokens, seq_len)
    source = PlanSource("noise", "general", rows_available, store.num_tokens, store.manifest.content_hash)
    wish = StageWish(total_steps * rows * seq_len, 1.0)
    plan, _ = build_plan([source], [wish], seed=0, seq_len=seq_len, global_batch_rows=rows, max_epochs=1e9)
    topology = start_process_group()
    needs = Needs(seq_len=seq_len, vocab_size=VOCAB_SIZE, seed=0)
    section = ModelSection(fresh=fresh_config(hidden, layers, seq_len), attention="sdpa")
    ours, bare = (build_model(section, needs, device=topology.device) for _ in range(2))
    optimizers = [build_optimizer(m.model, ADAMW) for m in (ours, bare)]
    spec = EngineSpec(0, precision, rows, 1, 1.0, {})
    engine = Engine(ours.model, optimizers[0], spec=spec, topology=topology)
    loader = Loader(plan, {"noise": concat_rows(store, seq_len)}, rank=0, world_size=1, micro_batch_size=rows)
    job = Job(plan.num_steps, rows * seq_len, ["noise"], 0, lambda update: LR)
    attach_loss_head(engine.model, "sdpa", vocab_size=VOCAB_SIZE, device=topology.device)
    forward = lambda model, batch: forward_losses(model, batch, "sdpa")  # noqa: E731
    trainer = Trainer(engine, loader, forward=forward, job=job, stop=StopFlag())
    return trainer, bare.model, optimizers[1], loader


def bare_step(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, batches: list[Any], precision: str
) -> Callable[[int], float]:
    """The loop that anyone would write: forward, mean cross entropy, backward, clip, step."""
    device = next(model.parameters()).device

    def step(number: int) -> float:
        batch = batches[number % len(batches)].to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            logits = forward_logits(model, batch, "sdpa")
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), batch.labels_BT.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = LR
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def measure(
    size: tuple[int, int, int, int], store: TokenStore, precision: str, blocks: int, steps: int
) -> dict[str, Any]:
    trainer, model, optimizer, loader = build(size, store, precision, total_steps=max(8, (blocks + 1) * steps))
    batches = [loader.step(number)[0] for number in range(8)]
    bare = bare_step(model, optimizer, batches, precision)
    model.train()
    done, ratios, ours_seconds, bare_seconds, waiting = 0, [], [], [], []
    for block in range(blocks + 1):  # the first is warm-up
        started = time.perf_counter()
        infos = [trainer.step(done + number) for number in range(steps)]
        middle = time.perf_counter()
        for number in range(steps):
            bare(number)
        ended = time.perf_counter()
        done += steps
        if block:
            ours_seconds.append((middle - started) / steps)
            bare_seconds.append((ended - middle) / steps)
            ratios.append((middle - started) / (ended - middle))
            waiting.append(sum(info.seconds["data"] for info in infos) / (middle - started))
    loader.close()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {
        "precision": precision,
        "parameters": parameters,
        "tokens_per_step": size[2] * size[3],
        "ours_ms": round(1e3 * statistics.median(ours_seconds), 2),
        "bare_ms": round(1e3 * statistics.median(bare_seconds), 2),
        "ratio": round(statistics.median(ratios), 4),
        "ratio_min_max": [round(min(ratios), 4), round(max(ratios), 4)],
        "data_waiting_share": round(statistics.median(waiting), 5),
        "blocks": blocks,
        "steps_per_block": steps,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=15)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        store = make_store(Path(folder) / "store", num_tokens=2_000_000)
        for name, size in (GPU_SIZES if on_gpu else SIZES).items():
            precision = "bf16" if on_gpu else "fp32"
            results[name] = measure(size, store, precision, options.blocks, options.steps)
            print(name, results[name], flush=True)
    stop_process_group()
    machine = {
        "device": torch.cuda.get_device_name() if on_gpu else "CPU",
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    options.out.write_text(json.dumps({"sizes": results, "machine": machine}, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Claim: a step under ZeRO costs what plain PyTorch DDP costs, and a step of one process what a bare loop costs.

    python -m benchmarks.engine.zero_against_ddp      writes benchmarks/results/engine_zero_against_ddp.json

World 2 on CPU over gloo, one thread per process: in each rank our trainer (engine of ZeRO 1, 2 or 3) and a DDP loop of
the same model train on the same rows, in blocks of steps that alternate (A B A B ...), so that a machine whose speed
drifts slows both. Figures are medians of the ratios of neighbouring blocks. World 1 is ZeRO 0 against a loop without
any wrapper. Bars: 1.05, 1.05 and 1.25 for ZeRO 1, 2 and 3; 1.03 for world 1. Run it on an idle machine.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.engine.ranks import free_port
from benchmarks.engine.result import write_result
from benchmarks.step_overhead import VOCAB_SIZE, bare_step, fresh_config, make_store
from cpt.config import ModelSection
from cpt.data.loader import Loader
from cpt.data.packing import concat_num_rows, concat_rows
from cpt.data.token_store import TokenStore
from cpt.model.build import Needs, build_model
from cpt.plan import PlanSource, StageWish, build_plan
from cpt.train.deepspeed_config import EngineSpec
from cpt.train.engine import Engine, start_process_group, stop_process_group
from cpt.train.guard import StopFlag
from cpt.train.loss_head import attach_loss_head, forward_losses
from cpt.train.optim import OptimizerSpec, build_optimizer
from cpt.train.trainer import Job, Trainer

BARS = {"world 1, ZeRO 0": 1.03, "world 2, ZeRO 1": 1.05, "world 2, ZeRO 2": 1.05, "world 2, ZeRO 3": 1.25}
# Hidden size, layers, row length: 11M parameters. What a step computes against what it sends depends on the tokens per
# rank alone: 2048 at the 40 GFLOP/s of a core and the 2 GB/s of gloo are what 64k are at the 400 TFLOP/s of a GPU and
# the 300 GB/s of its links, 4 million tokens in a step of 64 GPUs; 1024 are half of that.
SIZE = (320, 8, 512)
ROWS = (2, 4)  # per rank and step
ADAMW = OptimizerSpec("adamw", weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8)


def trainer_of(stage: int, rows: int, store: TokenStore, total_steps: int) -> Trainer:
    topology = start_process_group()
    _, _, seq_len = SIZE
    source = PlanSource(
        "noise", "general", concat_num_rows(store.num_tokens, seq_len), store.num_tokens, store.manifest.content_hash
    )
    batch_rows = rows * topology.world_size
    wish = StageWish(total_steps * batch_rows * seq_len, 1.0)
    plan, _ = build_plan([source], [wish], seed=0, seq_len=seq_len, global_batch_rows=batch_rows, max_epochs=1e9)
    model = fresh_model(topology.device)
    spec = EngineSpec(stage, "fp32", rows, 1, 1.0, {})
    engine = Engine(model, build_optimizer(model, ADAMW), spec=spec, topology=topology)
    reader = {"noise": concat_rows(store, seq_len)}
    loader = Loader(plan, reader, rank=topology.rank, world_size=topology.world_size, micro_batch_size=rows)
    job = Job(plan.num_steps, batch_rows * seq_len, ["noise"], 0, lambda update: 1e-4)
    attach_loss_head(engine.model, "sdpa", vocab_size=VOCAB_SIZE, device=topology.device)
    forward = lambda model, batch: forward_losses(model, batch, "sdpa")  # noqa: E731
    return Trainer(engine, loader, forward=forward, job=job, stop=StopFlag())


def fresh_model(device: torch.device) -> torch.nn.Module:
    hidden, layers, seq_len = SIZE
    section = ModelSection(fresh=fresh_config(hidden, layers, seq_len), attention="sdpa")
    return build_model(section, Needs(seq_len=seq_len, vocab_size=VOCAB_SIZE, seed=0), device=device).model


def plain_step(world: int, batches: list[Any], device: torch.device) -> Callable[[int], float]:
    """The loop that anyone would write, in DDP where there are several ranks."""
    model = fresh_model(device)
    optimizer = build_optimizer(model, ADAMW)
    model.train()
    wrapped = torch.nn.parallel.DistributedDataParallel(model) if world > 1 else model
    return bare_step(wrapped, optimizer, batches, "fp32")


def rank_main(stage: int, rows: int, store: Path, *, blocks: int, steps: int) -> dict[str, Any]:
    trainer = trainer_of(stage, rows, TokenStore.open(store), total_steps=max(8, (blocks + 1) * steps))
    topology = trainer.engine.topology
    batches = [trainer.loader.step(number)[0] for number in range(8)]
    plain = plain_step(topology.world_size, batches, topology.device)
    trainer.engine.model.train()
    seconds: dict[str, list[float]] = {"ours": [], "plain": [], "ours cpu": [], "plain cpu": []}
    for block in range(blocks + 1):  # the first is warm-up
        marks = [_now()]
        for number in range(steps):
            trainer.step(block * steps + number)
        marks.append(_now())
        for number in range(steps):
            plain(number)
        marks.append(_now())
        for name, (before, after) in zip(("ours", "plain"), pairwise(marks), strict=True):
            if block:
                seconds[name].append((after[0] - before[0]) / steps)
                seconds[f"{name} cpu"].append((after[1] - before[1]) / steps)
    trainer.loader.close()
    stop_process_group()
    ratios = [ours / plain for ours, plain in zip(seconds["ours"], seconds["plain"], strict=True)]
    return {
        "ours_ms": round(1e3 * statistics.median(seconds["ours"]), 1),
        "plain_ms": round(1e3 * statistics.median(seconds["plain"]), 1),
        "ratio": round(statistics.median(ratios), 4),
        "ratio_min_max": [round(min(ratios), 4), round(max(ratios), 4)],
        "ratio_of_cpu_time": round(sum(seconds["ours cpu"]) / sum(seconds["plain cpu"]), 4),
        "blocks": blocks,
        "steps_per_block": steps,
    }


def _now() -> tuple[float, float]:
    """Wall-clock time when all ranks are here, and this process's CPU time, which other jobs do not lengthen."""
    dist.barrier()
    return time.perf_counter(), time.process_time()


def measure(stage: int, world: int, rows: int, store: Path, *, blocks: int, steps: int) -> dict[str, Any]:
    """Start the ranks and return what rank 0 measured. Raises RuntimeError if one of them fails."""
    shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    shared |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-m", __spec__.name, "--rank-of", str(stage), str(rows), "--store", str(store)]
    command += ["--blocks", str(blocks), "--steps", str(steps)]
    ranks = [
        subprocess.Popen(
            command, env={**os.environ, **shared, "RANK": str(n), "LOCAL_RANK": str(n)}, stdout=subprocess.PIPE
        )
        for n in range(world)
    ]
    outputs = [rank.communicate(timeout=1800)[0].decode() for rank in ranks]
    if any(rank.returncode for rank in ranks):
        raise RuntimeError(f"exit codes {[rank.returncode for rank in ranks]}: {outputs}")
    found: dict[str, Any] = json.loads(outputs[0].splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=15)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--only", type=int, nargs="*", help="ZeRO stages; default: all")
    parser.add_argument("--rank-of", type=int, nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--store", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_of is not None:
        from cpt.failures import leave

        torch.set_num_threads(1)
        found = rank_main(*options.rank_of, options.store, blocks=options.blocks, steps=options.steps)
        print(json.dumps(found), flush=True)
        leave(0)  # the interpreter's shutdown aborts now and then while gloo's threads live
    cases: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        make_store(Path(folder) / "store", num_tokens=2_000_000)
        for (name, bar), rows in product(BARS.items(), ROWS):
            world, stage = int(name[6]), int(name[-1])
            if options.only is None or stage in options.only:
                store, case = Path(folder) / "store", f"{name}, {rows * SIZE[2]} tokens per rank"
                cases[case] = measure(stage, world, rows, store, blocks=options.blocks, steps=options.steps)
                cases[case] |= {"bar": bar, "passed": cases[case]["ratio"] <= bar}
                print(case, cases[case], flush=True)
    hidden, layers, _ = SIZE
    parameters = sum(p.numel() for p in fresh_model(torch.device("cpu")).parameters())
    model = {"hidden_size": hidden, "layers": layers, "parameters": parameters, "precision": "fp32"}
    figures = {"cases": cases, "model": model, "threads_per_rank": 1}
    if options.only is None:
        write_result("engine_zero_against_ddp.json", figures)


if __name__ == "__main__":
    main()

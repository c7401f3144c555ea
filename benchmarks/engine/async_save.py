"""Claim: a checkpoint holds the training loop up for at most 5% of the time that torch.save of the same state takes.

    python -m benchmarks.engine.async_save      writes benchmarks/results/engine_async_save.json

A Llama of 60M parameters, fp32, world 1, ZeRO 0. In turns: weights and both moments with torch.save (no fsync, as it is
commonly used), then the same with our saver while training goes on. The stall is what the loop waits: to begin, and
before the next update until the copy is taken. Also told, because a background save is not free where the processor or
the memory is the bottleneck: by how much the steps beside it were slower. A save of ours is on the disk (fsync) and
hashed when it is complete. Run it on an idle machine. On a GPU the model has 300M parameters and the bar is 2%.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from benchmarks.engine.result import write_result
from benchmarks.step_overhead import VOCAB_SIZE, fresh_config
from cpt.checkpoint.background import Saved, Saver
from cpt.checkpoint.portable import Checkpoint, CheckpointMeta
from cpt.config import ModelSection
from cpt.model.build import Needs, build_model
from cpt.train.deepspeed_config import EngineSpec
from cpt.train.engine import Engine, start_process_group, stop_process_group
from cpt.train.optim import OptimizerSpec, build_optimizer

SIZE, GPU_SIZE = (768, 8, 256), (1024, 24, 2048)  # hidden size, layers, tokens per step
BAR, GPU_BAR = 0.05, 0.02


def build(size: tuple[int, int, int]) -> Engine:
    hidden, layers, seq_len = size
    topology = start_process_group()
    section = ModelSection(fresh=fresh_config(hidden, layers, seq_len), attention="sdpa")
    loaded = build_model(section, Needs(seq_len=seq_len, vocab_size=VOCAB_SIZE, seed=0), device=topology.device)
    optimizer = build_optimizer(loaded.model, OptimizerSpec("adamw", weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8))
    return Engine(loaded.model, optimizer, spec=EngineSpec(0, "fp32", 1, 1, 1.0, {}), topology=topology)


def step(engine: Engine, number: int, seq_len: int) -> float:
    """Seconds of one update."""
    started = time.perf_counter()
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(0, VOCAB_SIZE, (1, seq_len + 1), generator=generator).to(engine.topology.device)
    logits = engine.model(input_ids=ids[:, :-1]).logits.float()
    engine.backward(cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))
    engine.step(lr=1e-4)
    if engine.topology.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def torch_save(engine: Engine, path: Path) -> float:
    """Seconds that torch.save of weights and moments holds the loop up."""
    state = {fragment.name: dict(fragment.state) for fragment in engine.fragments()}
    started = time.perf_counter()
    torch.save(state, path)
    seconds = time.perf_counter() - started
    path.unlink()
    return seconds


def background_save(engine: Engine, saver: Saver, folder: Path, seq_len: int) -> tuple[Saved, list[float]]:
    """How the save went, and the seconds of the steps beside it."""
    shapes = {name: list(shape) for name, shape in engine.parameter_shapes().items()}
    meta = CheckpointMeta(1, 0, {}, engine.optimizer_steps, 0, "", shapes, {}, {}, {})
    saver.begin(folder, engine.owned_fragments(), meta)
    steps = []
    while saver.in_flight:
        steps.append(step(engine, len(steps), seq_len))
        if finished := saver.poll():
            assert not finished[0].error and not Checkpoint.open(folder).verify()
            return finished[0], steps
    raise AssertionError("a save was begun")


def measure(size: tuple[int, int, int], root: Path, rounds: int) -> dict[str, Any]:
    engine, seq_len, saver = build(size), size[2], Saver()
    engine.before_update = saver.wait_copied
    plain = [step(engine, number, seq_len) for number in range(8)][2:]
    rival: list[float] = []
    saves: list[tuple[Saved, list[float]]] = []
    for number in range(rounds + 1):  # the first is warm-up: memory is taken and touched
        rival.append(torch_save(engine, root / "state.pt"))
        saves.append(background_save(engine, saver, root / f"step_{number:08d}", seq_len))
        plain += [step(engine, index, seq_len) for index in range(2)]
    ours, usual = [saved for saved, _ in saves[1:]], statistics.median(plain)
    torch_seconds = statistics.median(rival[1:])
    stall = statistics.median(saved.stall_seconds for saved in ours)
    slower = [sum(steps) - len(steps) * usual - saved.stall_seconds for saved, steps in saves[1:]]
    return {
        "parameters": sum(parameter.numel() for parameter in engine.model.parameters()),
        "bytes": ours[0].bytes,
        "torch_save_seconds": round(torch_seconds, 3),
        "stall_seconds": round(stall, 4),
        "stall_of_torch_save": round(stall / torch_seconds, 4),
        "first_save_stall_seconds": round(saves[0][0].stall_seconds, 4),
        "copy_seconds": round(statistics.median(saved.copy_seconds for saved in ours), 3),
        "write_seconds": round(statistics.median(saved.write_seconds for saved in ours), 3),
        "step_seconds": round(usual, 3),
        "steps_beside_a_save": [len(steps) for _, steps in saves[1:]],
        "steps_beside_it_slower_by_seconds": round(statistics.median(slower), 3),
        "rounds": rounds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="on the disk to write to; default: the one for temporary files")
    options = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        figures = measure(GPU_SIZE if on_gpu else SIZE, Path(folder), options.rounds)
    stop_process_group()
    bar = GPU_BAR if on_gpu else BAR
    write_result("engine_async_save.json", figures | {"bar": bar, "met": figures["stall_of_torch_save"] <= bar})


if __name__ == "__main__":
    main()

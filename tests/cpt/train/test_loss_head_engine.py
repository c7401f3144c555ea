"""Losses in chunks under a real engine: every ZeRO stage and precision, one rank and two, gradients and weights alike."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cpt.data.batch import Batch
from cpt.model import kernels
from cpt.model.recompute import set_recompute
from cpt.train import losses
from cpt.train.engine import Engine, EngineSpec, Topology, start_process_group, stop_process_group
from cpt.train.loss_head import attach_loss_head, forward_losses
from cpt.train.optim import OptimizerSpec, build_optimizer

ROOT = Path(__file__).resolve().parents[3]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def topology() -> Iterator[Topology]:
    yield start_process_group()
    stop_process_group()


def build(topology: Topology, stage: int, precision: str, *, tied: bool) -> Engine:
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 16}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=tied))
    kernels.prepare_model(model, "sdpa")
    set_recompute(model, "selective")
    optimizer = build_optimizer(model, OptimizerSpec("adamw", weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8))
    spec = EngineSpec(stage, precision, 2 // topology.world_size, 2, max_grad_norm=1.0, extra={})
    return Engine(model, optimizer, spec=spec, topology=topology)


def batches(step: int, topology: Topology) -> Iterator[Batch]:
    """Two micro-batches of two rows with blank labels, each rank its own rows."""
    ids = torch.randint(0, 61, (4, 12), generator=torch.Generator().manual_seed(step))
    labels = ids.roll(-1, dims=1)
    labels[:, -1] = labels[1, 3:7] = -100
    positions = torch.cat([torch.arange(5), torch.arange(7)]).expand(4, 12)
    segments = (torch.arange(12) >= 5).long().expand(4, 12)
    own = topology.rank * 2 // topology.world_size  # ranks share the two rows of a micro-batch
    for first in (own, 2 + own):
        pick = slice(first, first + 2 // topology.world_size)
        parts = (x[pick] for x in (ids, labels, positions, segments))
        yield Batch(*parts, torch.zeros(2 // topology.world_size, dtype=torch.int64))


def curve(topology: Topology, stage: int, precision: str, *, chunked: bool, tied: bool) -> list[float]:
    """This rank's loss and the global gradient norm of three steps."""
    engine = build(topology, stage, precision, tied=tied)
    if chunked:
        assert attach_loss_head(engine.model, "sdpa", vocab_size=61, device="cpu").startswith("in chunks")
    found = []
    for step in range(3):
        for batch in batches(step, topology):
            result = forward_losses(engine.model, batch, "sdpa")
            engine.backward(result.total / 40)
            found.append(float(result.total.detach()))
        found.append(engine.step(lr=1e-2))
    return found


def check(topology: Topology, stage: int, precision: str, *, tied: bool) -> None:
    plain, chunked = (curve(topology, stage, precision, chunked=on, tied=tied) for on in (False, True))
    assert len(chunked) == 9
    assert chunked == pytest.approx(plain, rel=1e-5 if precision == "fp32" else 0.02), (stage, precision, tied)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_run_in_chunks_is_the_run_of_whole_logits(
    topology: Topology, stage: int, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "chunk_tokens", lambda vocab_size, device_type: 5)
    check(topology, stage, precision, tied=stage in (0, 3))


def test_two_ranks_do_the_same_under_every_stage() -> None:
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        printed = [process.communicate(timeout=240)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0, 0], "\n".join(printed)


if __name__ == "__main__":
    here = start_process_group()
    for zero_stage in (0, 1, 2, 3):
        check(here, zero_stage, "fp32", tied=True)
    check(here, 3, "bf16", tied=False)
    stop_process_group()

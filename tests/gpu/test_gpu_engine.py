"""The engine on a GPU: state on the card, on the host and in files is the same state; Muon there; the norm before the
update. One process over nccl; ZeRO++ needs several cards and is checked where there are two or more.
"""

import itertools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

ROOT = Path(__file__).resolve().parents[2]
PLACES: dict[str, dict[str, Any]] = {
    "0": {"zero_stage": 0},
    "1": {"zero_stage": 1},
    "2": {"zero_stage": 2},
    "3": {"zero_stage": 3},
    "1 on the host": {"zero_stage": 1, "offload": "cpu"},
    "2 on the host": {"zero_stage": 2, "offload": "cpu"},
    "3 on the host": {"zero_stage": 3, "offload": "cpu"},
}


@pytest.fixture(scope="module")
def topology() -> Iterator[Any]:
    from cpt.train.engine import start_process_group, stop_process_group

    yield start_process_group()
    stop_process_group()


def build(topology: Any, optimizer: str, seed: int = 0, **fields: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    from cpt.train.deepspeed_config import EngineSpec
    from cpt.train.engine import Engine
    from cpt.train.optim import OptimizerSpec, build_optimizer

    torch.manual_seed(seed)
    sizes = {"vocab_size": 64, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, max_position_embeddings=32))
    model = model if fields["zero_stage"] == 3 else model.to(topology.device)
    given = {"precision": "bf16", "micro_batch_size": 4, "grad_accum_steps": 1, "max_grad_norm": 1.0} | fields
    how = OptimizerSpec(optimizer, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8)
    return Engine(model, build_optimizer(model, how), spec=EngineSpec(**given), topology=topology)


def losses(engine: Any, steps: range) -> list[float]:
    found = []
    for step in steps:
        ids = torch.randint(0, 64, (4, 32), generator=torch.Generator().manual_seed(step)).to(engine.topology.device)
        logits = engine.model(input_ids=ids, use_cache=False).logits.float()
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        engine.backward(loss / engine.topology.world_size)
        engine.step(lr=1e-3)
        found.append(loss.item())
    return found


def handed_over(source: Any, target: Any) -> None:
    state = {
        (kind, f.name): tensor.detach().cpu().clone()
        for f in source.owned_fragments()
        for kind, tensor in f.state.items()
    }

    def fill(fragment: Any) -> None:
        for kind, tensor in fragment.state.items():
            tensor.copy_(state[kind, fragment.name][fragment.start : fragment.start + fragment.numel])

    target.restore(fill, optimizer_steps=source.optimizer_steps)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize(("saved", "loaded"), list(itertools.permutations(PLACES, 2)))
def test_state_moves_between_card_and_host_under_every_stage(
    topology: Any, saved: str, loaded: str, optimizer: str
) -> None:
    source = build(topology, optimizer, **PLACES[saved])
    losses(source, range(2))
    target = build(topology, optimizer, seed=1, **PLACES[loaded])
    handed_over(source, target)
    assert losses(target, range(2, 4)) == pytest.approx(losses(source, range(2, 4)), rel=2e-3)  # bf16


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_state_in_files_trains_like_state_on_the_card(topology: Any, optimizer: str, tmp_path: Path) -> None:
    from cpt.train.deepspeed_config import EngineSpec
    from cpt.train.engine import check_machine

    fields: dict[str, Any] = {"zero_stage": 3, "offload": "nvme", "nvme_dir": tmp_path}
    try:
        check_machine(EngineSpec(3, "bf16", 4, 1, 1.0, offload="nvme", nvme_dir=tmp_path), topology)
    except RuntimeError as error:
        pytest.skip(str(error))
    engine, plain = build(topology, optimizer, **fields), build(topology, optimizer, zero_stage=3)
    assert losses(engine, range(3)) == pytest.approx(losses(plain, range(3)), rel=2e-3)
    handed_over(engine, plain)
    assert losses(engine, range(3, 5)) == pytest.approx(losses(plain, range(3, 5)), rel=2e-3)


ZERO_PLUS_PLUS = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_gpu_engine import build, losses
from cpt.failures import leave
from cpt.train.engine import start_process_group
import torch

topology = start_process_group()
plain = losses(build(topology, "adamw", zero_stage=3), range(6))
hpz = losses(build(topology, "adamw", zero_stage=3, hpz_size=2), range(6))
assert all(abs(a - b) < 2e-3 * b for a, b in zip(hpz, plain)), (hpz, plain)
packed = losses(build(topology, "adamw", zero_stage=3, hpz_size=2, quantized_communication=True), range(6))
assert all(abs(a - b) < 5e-2 * b for a, b in zip(packed, plain)), (packed, plain)
leave(0)
"""


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_zero_plus_plus_trains_like_zero_3() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--no-python"]
    command += [sys.executable, "-c", ZERO_PLUS_PLUS, str(Path(__file__).parent)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr

"""DeepSpeed's own folders, written and read by DeepSpeed itself, against ours: the next losses are the same."""

import json
import os
import runpy
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

Workshop = Any  # the fixtures of tests/conftest.py
STAGES = (0, 2, 3)
MODEL = """
import json, os, sys, warnings
warnings.filterwarnings("ignore")
import torch, deepspeed
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM

def model():
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=True)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")

def optimizer(module):
    groups = [[p for p in module.parameters() if (p.ndim > 1) is wanted] for wanted in (True, False)]
    groups = [{"params": groups[0], "weight_decay": 0.1}, {"params": groups[1], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))

def batch(step):
    return torch.randint(1, 64, (4, 16), generator=torch.Generator().manual_seed(100 + step))
"""
ENGINE = (
    MODEL
    + """
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # a kernel that would be compiled first
deepspeed.init_distributed("gloo", verbose=False)
rank, world = dist.get_rank(), dist.get_world_size()

def engine(stage, **more):
    module = model()
    config = {"train_micro_batch_size_per_gpu": 4 // world, "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False, "gradient_clipping": 1.0,
        "steps_per_print": None, **more}
    return deepspeed.initialize(model=module, optimizer=optimizer(module), config=config)[0]

def train(built, steps):
    losses = []
    for step in steps:
        ids = batch(step)[rank * (4 // world):(rank + 1) * (4 // world)]
        loss = built(input_ids=ids, labels=ids).loss
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(float(mean) / world)
        built.backward(loss)
        built.step()
    return losses

out, stages, load = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else None
found = {}
for stage in stages:
    if load:
        built = engine(stage, checkpoint={"load_universal": True})
        built.load_checkpoint(load)
    else:
        built = engine(stage)
        train(built, range(3))
        built.save_checkpoint(f"{out}/zero{stage}")
    found[stage] = train(built, range(3, 6))
    built.destroy()
if rank == 0:
    built.module.config.save_pretrained(f"{out}/hf")
    open(f"{out}/losses.json", "w").write(json.dumps(found))
os._exit(0)
"""
)


def run_engine(out: Path, stages: tuple[int, ...], *more: object, ranks: int) -> dict[int, list[float]]:
    """Plain DeepSpeed in processes of its own; the losses of steps 4 to 6 by ZeRO stage."""
    out.mkdir(exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    command = [sys.executable, "-c", ENGINE, str(out), json.dumps(stages), *map(str, more)]
    started = [
        subprocess.Popen(
            command,
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        ended = [(process.communicate(timeout=280)[0], process.returncode) for process in started]
    finally:
        for process in started:
            process.kill()
    assert all(code == 0 for _, code in ended), ended
    return {int(stage): losses for stage, losses in json.loads((out / "losses.json").read_text()).items()}


@pytest.fixture(scope="session")
def shop(made_once: Callable[..., Workshop]) -> Workshop:
    """``zero0``, ``zero2`` and ``zero3``: saved by two ranks of plain DeepSpeed after three steps."""
    return made_once("deepspeed_folders", lambda shop: run_engine(shop.root, STAGES, ranks=2) and None)


@pytest.fixture(scope="session")
def losses(shop: Workshop) -> dict[int, list[float]]:
    return {int(stage): each for stage, each in json.loads((shop.root / "losses.json").read_text()).items()}


def steps_of(folder: Path) -> Iterator[float]:
    """Losses of the steps after a checkpoint of ours, by torch alone: AdamW on its masters and moments."""
    import torch

    from cpt.checkpoint.portable import Checkpoint

    file = folder.with_suffix(".py")
    file.write_text(MODEL.replace("import torch, deepspeed", "import torch"))
    scope = runpy.run_path(str(file))
    module, checkpoint = scope["model"](), Checkpoint.open(folder)
    adam = scope["optimizer"](module)
    for name, parameter in module.named_parameters():
        parameter.data.copy_(checkpoint.read(name))
        moments = {kind: checkpoint.read(name, kind) for kind in ("exp_avg", "exp_avg_sq")}
        adam.state[parameter] = {"step": torch.tensor(float(checkpoint.meta.optimizer_steps)), **moments}
    for step in range(3, 6):
        ids = scope["batch"](step)
        loss = module(input_ids=ids, labels=ids).loss
        yield float(loss)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        adam.step()
        adam.zero_grad()


@pytest.mark.parametrize("stage", STAGES)
def test_what_deepspeed_saved_goes_on_with_the_same_losses_as_a_checkpoint_of_ours(
    shop: Workshop, losses: dict[int, list[float]], stage: int, tmp_path: Path
) -> None:
    out = tmp_path / "ours"
    folder = shop.root / f"zero{stage}"
    done = shop.cpt("ckpt", "convert", folder, "--to", "cpt", "--out", out, "--model", shop.root / "hf", "--json")
    assert done.code == 0, done.text
    facts = json.loads(done.out)
    assert (facts["step"], facts["optimizer_steps"]) == (3, 3) and "every element equal" in facts["proof"]
    assert list(steps_of(out)) == pytest.approx(losses[stage], rel=1e-6)
    assert shop.cpt("ckpt", "verify", out).code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "ours.py"]


def test_a_checkpoint_of_ours_goes_on_in_deepspeed_under_every_sharded_stage(
    shop: Workshop, losses: dict[int, list[float]], tmp_path: Path
) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    model = ("--model", shop.root / "hf")
    assert shop.cpt("ckpt", "convert", shop.root / "zero2", "--to", "cpt", "--out", ours, *model).code == 0
    done = shop.cpt("ckpt", "convert", ours, "--to", "deepspeed", "--out", theirs)
    assert done.code == 0 and "load_universal" in done.out, done.text
    found = run_engine(tmp_path / "engine", (1, 2, 3), theirs, ranks=1)
    assert found[1] == found[2] == pytest.approx(losses[2], rel=1e-6)
    # DeepSpeed 0.19.8 gives all parameter groups one and the same step counter when ZeRO 3 reads a universal folder, so
    # torch's AdamW counts it up once per group: later updates have another bias correction, whoever wrote the folder.
    assert found[3][0] == pytest.approx(losses[2][0], rel=1e-6)
    again = tmp_path / "again"
    assert shop.cpt("ckpt", "convert", theirs, "--to", "cpt", "--out", again, *model).code == 0
    assert list(steps_of(again)) == list(steps_of(ours))


def test_a_run_starts_from_the_converted_weights(shop: Workshop, tmp_path: Path) -> None:
    ours = tmp_path / "ours"
    model = ("--model", shop.root / "hf")
    assert shop.cpt("ckpt", "convert", shop.root / "zero3", "--to", "cpt", "--out", ours, *model).code == 0
    own = type(shop)(tmp_path)
    own.stores()
    done = own.cpt(
        "train", own.run_file("on", {"model.fresh": None, "model.init_from": str(ours), "train.tokens": 256})
    )
    assert done.code == 0, done.text

"""The real trainer on a GPU: nccl, bf16, every ZeRO stage, save and resume."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from cpt.data.token_store import StoreLabel, TokenizerFacts, write_split

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

MODEL = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 512,
}


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two sources of counting sequences with different strides: a model learns them in a few steps."""
    root = tmp_path_factory.mktemp("stores")
    rng = np.random.default_rng(0)
    for name, domain, stride in (("general", "general", 1), ("code", "code", 3)):
        for split, number in (("train", 400), ("heldout", 40)):
            label = StoreLabel(name, domain, split, 512, 0, TokenizerFacts("t", "f" * 64, "BPE"))
            starts = rng.integers(1, 511, size=number)
            documents = [[*((start + stride * np.arange(200)) % 511 + 1).tolist(), 0] for start in starts]
            write_split(root / name / split, label, [documents], utf8_bytes=3 * 200 * number)
    return {name: str(root / name) for name in ("general", "code")}


def run_file(folder: Path, stores: dict[str, str], name: str, stage: int) -> Path:
    config = {
        "run": {"name": name, "dir": str(folder)},
        "model": {"fresh": MODEL},
        "data": {"stores": stores, "seq_len": 512},
        "train": {"tokens": 20 * 8192, "global_batch_tokens": 8192, "micro_batch_size": 8, "peak_lr": 2e-3},
        "deepspeed": {"zero_stage": stage},
        "checkpoint": {"every_steps": 10},
        "log": {"every_steps": 1, "wandb": "disabled"},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def train(*arguments: str) -> str:
    command = [sys.executable, "-m", "cpt.train.main", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def losses(run: Path) -> dict[int, float]:
    records: list[dict[str, Any]] = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record["loss"] for record in records}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_run_on_the_gpu_learns_and_resumes_where_it_was(stage: int, tmp_path: Path, stores: dict[str, str]) -> None:
    printed = train(str(run_file(tmp_path, stores, "whole", stage)))
    whole = losses(tmp_path / "whole")
    assert whole[20] < whole[1] - 1
    assert "attention" in printed
    (tmp_path / "whole" / "checkpoints" / "step_00000020" / "COMPLETE").unlink()  # the last save was cut short
    printed = train("--resume", str(tmp_path / "whole"))
    assert "resumes after step 10" in printed and "no COMPLETE" in printed
    again = losses(tmp_path / "whole")
    for step in range(11, 21):  # backward kernels on a GPU may add in another order
        assert again[step] == pytest.approx(whole[step], rel=2e-3)
    assert again[11] == pytest.approx(whole[11], rel=1e-5)

"""On a GPU: what a run's tensors take at most is what the formula says, to a tenth."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from cpt.config import load_config
from cpt.data.token_store import StoreLabel, TokenizerFacts, write_split
from cpt.fit_memory import read_model_mapping, setting_of
from cpt.model.memory import predict_memory

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

# 340M parameters, so that buffers of a fixed size do not decide
MODEL = {
    "model_type": "llama",
    "vocab_size": 32_000,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 22,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
# ZeRO stage, row length, micro-batch, activation checkpointing
RUNS = [(0, 2048, 4, "none"), (1, 4096, 2, "none"), (2, 4096, 8, "full")]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("store")
    rng = np.random.default_rng(0)
    for split, number in (("train", 1000), ("heldout", 20)):
        documents = [[*rng.integers(1, 32_000, size=rng.integers(200, 1800)).tolist(), 0] for _ in range(number)]
        label = StoreLabel("noise", "general", split, 32_000, 0, TokenizerFacts("none", "0" * 64, "none"))
        write_split(root / split, label, [documents], utf8_bytes=4 * sum(map(len, documents)))
    return root


@pytest.mark.parametrize(("stage", "seq_len", "micro", "checkpointing"), RUNS)
def test_the_peak_of_the_allocator_is_predicted(
    stage: int, seq_len: int, micro: int, checkpointing: str, tmp_path: Path, store: Path
) -> None:
    batch = 2 * micro * seq_len  # two micro-steps
    raw: dict[str, Any] = {
        "run": {"name": "run", "dir": str(tmp_path)},
        "model": {"fresh": MODEL},
        "data": {"stores": {"noise": str(store)}, "seq_len": seq_len, "max_epochs": 1e6},
        "train": {"tokens": 4 * batch, "global_batch_tokens": batch, "micro_batch_size": micro, "peak_lr": 1e-4},
        "deepspeed": {"zero_stage": stage},
        "eval": {"tokens_per_source": 4096},
        "log": {"every_steps": 1, "wandb": "disabled"},
    }
    raw["train"]["activation_checkpointing"] = checkpointing
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(raw))
    command = [sys.executable, "-m", "cpt.train.main", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    measured = max(record["memory"]["device_peak"] for record in records)
    config = load_config(file)
    model = read_model_mapping(config.model)
    predicted = predict_memory(model, setting_of(config, model, world_size=1, on_gpu=True))
    assert predicted is not None
    ratio = predicted.tensors / measured
    print(f"ZeRO {stage}, {micro} x {seq_len}, {checkpointing}: {ratio:.3f} of {measured / 2**30:.2f} GiB")
    assert ratio == pytest.approx(1.0, abs=0.10), (dict(predicted.terms), predicted.moment, measured)

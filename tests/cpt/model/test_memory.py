"""The memory formula against hand-computed values, against what autograd keeps, and against common sense."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from cpt.data.batch import Batch
from cpt.model import memory
from cpt.model.kernels import forward_logits, prepare_model
from cpt.model.memory import Setting, predict_memory
from cpt.model.size import num_parameters
from cpt.train.losses import chunk_tokens

LLAMA = {"model_type": "llama", "vocab_size": 320, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3}
LLAMA |= {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
BIG = {"model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336}
BIG |= {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
GIB = 2**30


def predict(config: dict[str, Any], setting: Setting) -> memory.Prediction:
    found = predict_memory(config, setting)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("stage", "precision", "weights", "masters", "moments"),
    [
        (0, "fp32", 4, 0, 8),
        (0, "bf16", 4, 0, 8),  # autocast: fp32 weights are their own masters
        (1, "fp32", 4, 1, 2),
        (1, "bf16", 2, 1, 2),
        (2, "bf16", 2, 1, 2),
        (3, "bf16", 0.5, 1, 2),
    ],
)
def test_state_per_parameter_on_four_ranks(
    stage: Any, precision: Any, weights: float, masters: float, moments: float
) -> None:
    parameters = num_parameters(LLAMA)
    assert parameters is not None
    found = predict(LLAMA, Setting(32, 1, zero_stage=stage, precision=precision, world_size=4, on_gpu=False, bucket=0))
    terms = [found.terms.get(name, 0) for name in ("weights", "fp32 masters", "optimizer moments")]
    assert terms == pytest.approx([parameters * each for each in (weights, masters, moments)], abs=4 * 8)


def test_an_unknown_family_has_no_prediction() -> None:
    assert predict_memory({"model_type": "mamba"}, Setting(32, 1)) is None


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_kept_activations_are_what_autograd_keeps(family: str, precision: Any) -> None:
    """bf16: weights in bf16, as under ZeRO 1-3. Measured over the blocks alone."""
    config = LLAMA | {"model_type": family, "head_dim": 16, "max_position_embeddings": 128}
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    given = {key: value for key, value in config.items() if key != "model_type"}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **given), dtype=torch.float32).to(dtype)
    prepare_model(model, "sdpa")
    rows, length = 2, 128
    ids = torch.arange(rows * length).remainder(320).view(rows, length)
    documents = torch.arange(length) // 32
    batch = Batch(ids, ids, (torch.arange(length) % 32).expand(rows, -1), documents.expand(rows, -1), ids[:, 0])
    kept: dict[int, int] = {}
    owned = {weight.untyped_storage().data_ptr() for weight in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = forward_logits(model, batch, "sdpa")
    setting = Setting(length, rows, zero_stage=1, precision=precision, on_gpu=False, attention="runs", bucket=0)
    shape = memory.model_shape(config)
    assert shape is not None and logits.shape[-1] == 320
    expected = memory.kept_activations(shape, setting)["activations"] + memory.final_norm(shape, setting)["final norm"]
    assert expected == pytest.approx(sum(kept.values()), rel=0.05)


SETTINGS = st.builds(
    Setting,
    seq_len=st.sampled_from([64, 512, 4096]),
    micro_batch_size=st.integers(1, 8),
    grad_accum_steps=st.integers(1, 3),
    zero_stage=st.sampled_from([0, 1, 2, 3]),
    world_size=st.sampled_from([1, 2, 8]),
    precision=st.sampled_from(["fp32", "bf16"]),
    checkpointing=st.sampled_from(["none", "selective", "full"]),
    on_gpu=st.booleans(),
    attention=st.sampled_from(["fused", "runs", "mask"]),
    loss_chunk=st.sampled_from([None, 512]),
    optimizer=st.sampled_from(["adamw", "muon"]),
    bucket=st.sampled_from([10**6, 10**8]),
)


@settings(max_examples=60, deadline=None)
@given(SETTINGS)
def test_less_work_never_needs_more(setting: Setting) -> None:
    now = predict(BIG, setting).total
    assert predict(BIG, replace(setting, micro_batch_size=setting.micro_batch_size + 1)).total >= now
    assert predict(BIG, replace(setting, seq_len=2 * setting.seq_len)).total >= now
    if setting.zero_stage:
        assert predict(BIG, replace(setting, world_size=2 * setting.world_size)).tensors <= now
    assert predict(BIG, replace(setting, checkpointing="none")).total >= predict(
        BIG, replace(setting, checkpointing="full")
    ).total - _gathered(setting)
    assert all(size >= 0 for size in predict(BIG, setting).terms.values())


def _gathered(setting: Setting) -> int:
    """Under ZeRO 3 what is kept gathered differs, by at most the whole model."""
    return 4 * 8_100_000_000 if setting.zero_stage == 3 else 0


def test_the_largest_moment_is_the_prediction() -> None:
    found = predict(BIG, Setting(4096, 1, zero_stage=2, world_size=8))
    assert found.tensors == max(found.moments.values()) == found.moments[found.moment]
    assert found.total == found.tensors + sum(found.overhead.values())
    assert set(found.overhead) == {"CUDA context", "fragmentation", "NCCL"}


def test_an_eight_billion_model_needs_what_everybody_knows() -> None:
    """16 bytes per parameter whole; an eighth of the state on each of eight ranks under ZeRO 3."""
    assert predict(BIG, Setting(2048, 1, zero_stage=0)).total > 16 * 8e9
    sharded = Setting(4096, 1, zero_stage=3, world_size=8, checkpointing="full", loss_chunk=4096, bucket=256_000_000)
    assert predict(BIG, sharded).total < 60 * GIB


def test_offload_moves_masters_and_moments_to_the_host() -> None:
    setting = Setting(2048, 1, zero_stage=2, world_size=4)
    here, there = predict(BIG, setting), predict(BIG, replace(setting, offload=True))
    assert there.total < here.total - 12 * 8e9 / 4 * 0.9
    assert here.host == 0 and there.host == pytest.approx((4 + 8 + 4 + 2) * num_parameters(BIG) / 4, rel=1e-6)


def test_muon_keeps_one_moment_of_the_blocks_matrices() -> None:
    setting = Setting(32, 1, zero_stage=1, bucket=0, on_gpu=False)
    terms = [predict(LLAMA, replace(setting, optimizer=name)).terms for name in ("adamw", "muon")]
    matrices = 3 * (64 * (2 * 64 + 2 * 32) + 3 * 64 * 160)
    assert terms[0]["optimizer moments"] - terms[1]["optimizer moments"] == 4 * matrices


def test_a_second_copy_of_the_weights_is_counted() -> None:
    setting = Setting(2048, 1, zero_stage=3, world_size=16, hpz_size=8)
    for mode in ("none", "full"):
        terms = predict(BIG, replace(setting, checkpointing=mode, loss_chunk=1024)).terms
        assert terms["second copy of weights (hpZ)"] == pytest.approx(2 * num_parameters(BIG) / 8, abs=1)  # type: ignore[operator]


def test_rows_shared_by_ranks_are_divided() -> None:
    shape = memory.model_shape(BIG)
    assert shape is not None
    whole, half = Setting(8192, 1), Setting(8192, 1, sequence_parallel=2)
    assert (
        memory.kept_activations(shape, whole)["activations"] == 2 * memory.kept_activations(shape, half)["activations"]
    )


@pytest.mark.parametrize("vocab_size", [100, 2048, 32_000, 151_936, 10**7])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_chunks_of_the_loss_are_those_of_the_loss(vocab_size: int, device: str) -> None:
    assert memory.loss_chunk_tokens(vocab_size, on_gpu=device == "cuda") == chunk_tokens(vocab_size, device)

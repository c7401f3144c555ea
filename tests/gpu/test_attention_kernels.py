"""The CUDA back-ends against single documents, in bf16; and the exact answer of the masked back-end in fp32."""

import dataclasses
import importlib.util
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from cpt.data.batch import Batch
from cpt.model import kernels

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

DTYPE = {"sdpa": torch.float32, "varlen": torch.bfloat16, "flash_attn": torch.bfloat16}
# bf16 keeps 8 bits: logits of a few units differ by hundredths where another kernel adds in another order.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.15}
SHAPE = {
    "vocab_size": 97,
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": SHAPE | {"model_type": "llama", "num_key_value_heads": 2},
    "qwen3": SHAPE | {"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 64},
    "gpt_neox": SHAPE | {"model_type": "gpt_neox"},
    "mistral-window": SHAPE | {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": 9},
}
LENGTHS = [[70, 1, 120, 9], [1, 199], [200]]


@pytest.fixture(params=["sdpa", "varlen", "flash_attn"])
def backend(request: pytest.FixtureRequest) -> str:
    name = str(request.param)
    if name == "flash_attn" and importlib.util.find_spec("flash_attn") is None:
        pytest.skip("flash-attn is not installed")
    if name == "varlen" and kernels.load_varlen_attn() is None:
        pytest.skip(f"torch {torch.__version__} has no variable-length attention with windows")
    return kernels.resolve_backend(name, device="cuda", dtype=DTYPE[name])


def build(family: str, backend: str, dtype: torch.dtype) -> torch.nn.Module:
    config = dict(FAMILIES[family])
    torch.manual_seed(3)
    model: torch.nn.Module = AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop("model_type"), **config))
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)
    kernels.prepare_model(model, backend)
    return model.eval().cuda()


def pack(lengths: list[list[int]]) -> Batch:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 97, (len(lengths), sum(lengths[0])), generator=generator)
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    segments = torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in lengths])
    batch = Batch(ids, torch.full_like(ids, -100), positions, segments, torch.zeros(len(lengths), dtype=torch.int64))
    return batch.to("cuda")


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_logits_equal_single_document_logits_on_the_gpu(family: str, backend: str) -> None:
    dtype = DTYPE[backend]
    packed, plain, batch = build(family, backend, dtype), build(family, "sdpa", dtype), pack(LENGTHS)
    with torch.no_grad():
        logits = kernels.forward_logits(packed, batch, backend)
        for row, lengths in enumerate(LENGTHS):
            start = 0
            for length in lengths:
                expected = plain(input_ids=batch.input_ids_BT[row : row + 1, start : start + length]).logits[0]
                assert (logits[row, start : start + length] - expected).abs().max() < TOLERANCE[dtype]
                start += length


@pytest.mark.parametrize("family", FAMILIES)
def test_a_perturbed_document_changes_no_bit_of_its_neighbours_on_the_gpu(family: str, backend: str) -> None:
    model, batch = build(family, backend, DTYPE[backend]), pack(LENGTHS[:1])
    inside = batch.segments_BT == 2
    other = dataclasses.replace(
        batch, input_ids_BT=torch.where(inside, (batch.input_ids_BT + 1) % 97, batch.input_ids_BT)
    )
    with torch.no_grad():
        before, after = (kernels.forward_logits(model, each, backend) for each in (batch, other))
    assert torch.equal(before[~inside], after[~inside])
    kernels.verify_packing(model, backend, vocab_size=97, device="cuda")


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_agree_with_the_masked_back_end(family: str, backend: str) -> None:
    dtype, batch = DTYPE[backend], pack(LENGTHS)
    grads = []
    for name in (backend, "sdpa"):
        model = build(family, name, dtype)
        kernels.forward_logits(model, batch, name).float().log_softmax(-1)[..., 0].mean().backward()
        grads.append(
            torch.cat([weight.grad.float().flatten() for weight in model.parameters() if weight.grad is not None])
        )
    assert torch.nn.functional.cosine_similarity(grads[0], grads[1], dim=0) > 0.999


def test_auto_does_not_choose_the_mask_in_half_precision_when_a_kernel_is_there() -> None:
    if kernels.load_varlen_attn() is None:
        pytest.skip("no kernel in this torch")
    assert kernels.resolve_backend("auto", device="cuda", dtype=torch.bfloat16) in ("varlen", "flash_attn")

"""The CUDA back-ends against single documents, in bf16; and the exact answer of the masked back-end in fp32."""

import dataclasses
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from cpt.config import ConfigError
from cpt.data.batch import Batch
from cpt.model import kernels
from cpt.model.liger import apply_liger
from cpt.model.recompute import set_recompute

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

BACKENDS = ("sdpa", "flex", "varlen", "flash_attn", "flash_attn_3", "flash_attn_4")
DTYPE = dict.fromkeys(BACKENDS, torch.bfloat16) | {"sdpa": torch.float32}
# bf16 keeps 8 bits: logits of a few units differ by hundredths where another kernel adds in another order.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.15}
SHAPE = {
    "vocab_size": 97,
    "hidden_size": 256,  # heads of 64: flex wants at least 16, FlashAttention 4 at least 64
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


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    name = str(request.param)
    try:
        return kernels.resolve_backend(name, device="cuda", dtype=DTYPE[name]).name
    except ConfigError as missing:
        pytest.skip(str(missing))


def build(family: str, backend: str, dtype: torch.dtype) -> torch.nn.Module:
    config = dict(FAMILIES[family])
    torch.manual_seed(3)
    model: torch.nn.Module = AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop("model_type"), **config))
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)
    kernels.prepare_model(model, backend, device="cuda")
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


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_logits_are_within_a_hundredth_of_fp32(family: str, backend: str) -> None:
    """Relative error of the whole tensor against the masked back-end in fp32, packed and not."""
    dtype = DTYPE[backend]
    model, exact = build(family, backend, dtype), build(family, "sdpa", torch.float32)
    for lengths in (LENGTHS, [[200], [200], [200]]):
        batch = pack(lengths)
        with torch.no_grad():
            found, wanted = (
                kernels.forward_logits(m, batch, b).float() for m, b in ((model, backend), (exact, "sdpa"))
            )
        assert (found - wanted).norm() / wanted.norm() < (1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_recomputed_blocks_have_the_gradients_of_kept_ones(backend: str, mode: str) -> None:
    dtype, batch, found = DTYPE[backend], pack(LENGTHS), []
    for each in ("none", mode):
        model = build("llama", backend, dtype).train()
        set_recompute(model, each)
        kernels.forward_logits(model, batch, backend).float().log_softmax(-1)[..., 0].mean().backward()
        found.append(
            torch.cat([weight.grad.float().flatten() for weight in model.parameters() if weight.grad is not None])
        )
    # kernels may add in another order from one backward pass to the next
    assert (found[0] - found[1]).norm() / found[0].norm() < (1e-6 if dtype == torch.float32 else 1e-2)


def test_liger_changes_logits_by_rounding_alone(backend: str) -> None:
    pytest.importorskip("liger_kernel")
    if backend == "sdpa":
        pytest.skip("Liger's own precision is 16 bits")
    batch, plain = pack(LENGTHS), build("qwen3", backend, torch.bfloat16)
    with torch.no_grad():
        wanted = kernels.forward_logits(plain, batch, backend).float()
    fused = build("qwen3", backend, torch.bfloat16)
    assert "rms_norm" in apply_liger(fused, "liger", device=torch.device("cuda"))
    with torch.no_grad():
        found = kernels.forward_logits(fused, batch, backend).float()
    assert (found - wanted).norm() / wanted.norm() < 2e-2
    kernels.verify_packing(fused, backend, vocab_size=97, device="cuda")


def test_auto_does_not_choose_the_mask_in_half_precision_when_a_kernel_is_there() -> None:
    if kernels.load_varlen_attn() is None:
        pytest.skip("no kernel in this torch")
    assert kernels.resolve_backend("auto", device="cuda", dtype=torch.bfloat16).name not in ("sdpa", "flex")

"""Every back-end must give a packed row the logits its documents have alone, and no document may see its neighbour."""

import dataclasses
import importlib.util
import itertools
import sys
import types
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from cpt.config import ConfigError
from cpt.data.batch import Batch, packed_layout
from cpt.model import attention, document_runs, kernels

CPU = torch.device("cpu")
SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": SHAPE | {"model_type": "llama", "num_key_value_heads": 2},
    "qwen2": SHAPE | {"model_type": "qwen2", "num_key_value_heads": 2},
    "qwen3": SHAPE | {"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 8},
    "gpt_neox": SHAPE | {"model_type": "gpt_neox"},
    "gpt2": {"model_type": "gpt2", "vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "mistral-window": SHAPE | {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": 5},
    "qwen2-mixed-windows": SHAPE
    | {
        "model_type": "qwen2",
        "num_key_value_heads": 2,
        "use_sliding_window": True,
        "sliding_window": 5,
        "layer_types": ["full_attention", "sliding_attention"],
    },
}
LENGTHS = [[7, 1, 12, 4], [1, 1, 22], [24]]  # documents of each row of 24 tokens


def build(family: str, backend: str = "sdpa") -> torch.nn.Module:
    if (family, backend) == ("gpt2", "varlen") and transformers.__version__ < "5":
        pytest.skip(
            "GPT-2 in transformers 4 keeps document borders from its attention function; verify_packing says so"
        )
    config = dict(FAMILIES[family])
    torch.manual_seed(3)
    model: torch.nn.Module = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(config.pop("model_type"), **config)
    ).eval()
    for weight in model.parameters():  # the usual init is so small that attention hardly matters
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.15)
    kernels.prepare_model(model, backend)
    return model


def pack(lengths: list[list[int]], *, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 97, (len(lengths), sum(lengths[0])), generator=generator)
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    segments = torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in lengths])
    return Batch(ids, torch.full_like(ids, -100), positions, segments, torch.zeros(len(lengths), dtype=torch.int64))


@torch.no_grad()
def alone(model: torch.nn.Module, ids: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids[None], use_cache=False).logits[0]
    return logits


def grouped_varlen_attn(
    query: Tensor, key: Tensor, value: Tensor, *borders: Any, enable_gqa: bool, **kwargs: Any
) -> Tensor:
    """The signature of torch 2.13: key and value may have fewer heads, if asked."""
    assert enable_gqa
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    return reference_varlen_attn(query, key, value, *borders, **kwargs)


def reference_varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    """What torch's kernel promises, document by document: stands in for it where there is no GPU."""
    out = torch.empty_like(query)
    borders = cu_seq_q.tolist()
    assert window_size[1] == 0
    assert max_q == max(end - start for start, end in itertools.pairwise(borders))
    for start, end in itertools.pairwise(borders):
        q, k, v = (x[start:end].transpose(0, 1) for x in (query, key, value))
        distance = torch.arange(end - start)[:, None] - torch.arange(end - start)[None]
        seen = (distance >= 0) & ((distance <= window_size[0]) if window_size[0] >= 0 else True)
        scores = (q @ k.transpose(1, 2) * scale).masked_fill(~seen, float("-inf"))
        out[start:end] = (scores.softmax(-1) @ v).transpose(0, 1)
    return out


@pytest.fixture(params=["sdpa", "sdpa-masked", "varlen", "flex"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """On a CPU sdpa means runs of documents; -masked is what other devices use."""
    monkeypatch.setattr(kernels, "load_varlen_attn", lambda: reference_varlen_attn)
    if request.param == "sdpa-masked":
        monkeypatch.setattr(document_runs, "mask_with_runs", document_runs.document_mask)
    else:
        monkeypatch.setattr(document_runs, "RUN_TOKENS", 9)  # rows of 24 tokens have several runs
    if request.param == "flex" and request.node.originalname.startswith(("test_gradients", "test_borders")):
        pytest.skip("FlexAttention has no backward pass on a CPU")
    return str(request.param).removesuffix("-masked")


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_logits_equal_single_document_logits(family: str, backend: str) -> None:
    packed, plain = build(family, backend), build(family)
    batch = pack(LENGTHS)
    with torch.no_grad():
        logits = kernels.forward_logits(packed, batch, backend)
    for row, lengths in enumerate(LENGTHS):
        start = 0
        for length in lengths:
            expected = alone(plain, batch.input_ids_BT[row, start : start + length])
            assert (logits[row, start : start + length] - expected).abs().max() < 1e-5
            start += length


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("document", [0, 2])
def test_a_perturbed_document_changes_no_bit_of_its_neighbours(family: str, backend: str, document: int) -> None:
    model, batch = build(family, backend), pack(LENGTHS[:1])
    inside = batch.segments_BT == document
    other = dataclasses.replace(
        batch, input_ids_BT=torch.where(inside, (batch.input_ids_BT + 1) % 97, batch.input_ids_BT)
    )
    with torch.no_grad():
        before, after = (kernels.forward_logits(model, each, backend) for each in (batch, other))
    assert torch.equal(before[~inside], after[~inside])
    assert not torch.equal(before[inside], after[inside])


def test_a_kernel_that_groups_heads_itself_is_given_them_ungrouped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "load_varlen_attn", lambda: grouped_varlen_attn)
    batch = pack(LENGTHS)
    with torch.no_grad():
        found = kernels.forward_logits(build("llama", "varlen"), batch, "varlen")
        expected = kernels.forward_logits(build("llama"), batch, "sdpa")
    assert (found - expected).abs().max() < 1e-5


def test_attention_dropout_is_refused_by_the_varlen_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "load_varlen_attn", lambda: reference_varlen_attn)
    model = build("llama", "varlen").train()
    for layer in model.model.layers:  # type: ignore[union-attr]
        layer.self_attn.attention_dropout = 0.5
    with pytest.raises(ConfigError, match="uses dropout, which this kernel lacks"):
        kernels.forward_logits(model, pack(LENGTHS), "varlen")


def test_gradients_of_a_packed_row_are_those_of_its_documents(backend: str) -> None:
    packed, plain = build("llama", backend), build("llama")
    batch = pack([[5, 9]])
    kernels.forward_logits(packed, batch, backend).square().sum().backward()
    for piece in (slice(0, 5), slice(5, 14)):
        plain(input_ids=batch.input_ids_BT[:, piece], use_cache=False).logits.square().sum().backward()
    for got, expected in zip(packed.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad, rtol=1e-4, atol=1e-4)


def test_borders_survive_gradient_checkpointing(backend: str) -> None:
    model = build("llama", backend)
    batch = pack([[5, 9]])
    kernels.forward_logits(model, batch, backend).square().sum().backward()
    expected = [weight.grad for weight in model.parameters()]
    model.zero_grad()
    model.train()
    model.gradient_checkpointing_enable()  # type: ignore[operator]
    kernels.forward_logits(model, batch, backend).square().sum().backward()
    for weight, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(weight.grad, grad)


def test_rows_of_one_document_each_run_without_a_mask() -> None:
    model = build("llama")
    assert kernels.ATTENTION_BACKENDS["sdpa"].inputs(model, pack([[24], [24]])) == {}
    assert "attention_mask" in kernels.ATTENTION_BACKENDS["sdpa"].inputs(model, pack(LENGTHS))


@pytest.mark.parametrize("family", FAMILIES)
def test_on_a_cpu_every_layer_attends_run_by_run(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows_seen = []
    real = document_runs._attend_row
    monkeypatch.setattr(document_runs, "_attend_row", lambda row, *rest: rows_seen.append(row) or real(row, *rest))
    with torch.no_grad():
        kernels.forward_logits(build(family), pack(LENGTHS), "sdpa")
    assert len(rows_seen) == 2 * len(LENGTHS)


def test_a_family_that_makes_its_own_mask_from_ours_is_exact_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = build("llama"), pack(LENGTHS)
    real = attention.sdpa_inputs

    def copied(*arguments: Any) -> dict[str, Any]:
        return {name: mask.clone() for name, mask in real(*arguments).items()}

    expected = kernels.forward_logits(model, batch, "sdpa")
    other = dataclasses.replace(kernels.ATTENTION_BACKENDS["sdpa"], inputs=copied)
    monkeypatch.setitem(kernels.ATTENTION_BACKENDS, "sdpa", other)
    monkeypatch.setattr(document_runs, "_attend_row", None)  # not come to
    torch.testing.assert_close(kernels.forward_logits(model, batch, "sdpa"), expected, rtol=1e-4, atol=1e-5)


def test_the_layout_of_the_worked_example() -> None:
    layout = packed_layout(torch.tensor([[0, 0, 0, 1], [0, 0, 1, 1]]))
    assert layout.cu_seqlens.tolist() == [0, 3, 4, 6, 8]
    assert layout.cu_seqlens.dtype == torch.int32
    assert (layout.max_length, layout.one_document_per_row) == (3, False)
    assert packed_layout(torch.zeros(2, 4, dtype=torch.int64)).one_document_per_row


def test_a_layout_computed_beforehand_gives_the_same_logits(backend: str) -> None:
    model, batch = build("llama", backend), pack(LENGTHS)
    with torch.no_grad():
        with_layout = kernels.forward_logits(
            model, dataclasses.replace(batch, layout=packed_layout(batch.segments_BT)), backend
        )
        assert torch.equal(with_layout, kernels.forward_logits(model, batch, backend))


@pytest.mark.parametrize("family", FAMILIES)
def test_verify_packing_accepts_an_exact_model(family: str, backend: str) -> None:
    model = build(family, backend).train()
    kernels.verify_packing(model, backend, vocab_size=97, device="cpu")
    assert model.training


def test_verify_packing_refuses_a_model_whose_documents_see_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    leaky = dataclasses.replace(kernels.ATTENTION_BACKENDS["sdpa"], inputs=lambda model, batch: {})
    monkeypatch.setitem(kernels.ATTENTION_BACKENDS, "sdpa", leaky)
    model = build("gpt2")
    monkeypatch.setattr(model, "forward", ignoring_positions(model.forward))
    with pytest.raises(ConfigError, match="documents in one row see each other under gpt2"):
        kernels.verify_packing(model, "sdpa", vocab_size=97, device="cpu")


def ignoring_positions(forward: Callable[..., Any]) -> Callable[..., Any]:
    return lambda position_ids, **kwargs: forward(**kwargs)


def test_auto_takes_sdpa_on_a_cpu_and_says_why() -> None:
    choice = kernels.resolve_backend("auto", device=CPU, dtype=torch.float32)
    faster = "flash_attn_3, flash_attn_4, flash_attn, varlen, flex"
    assert choice == kernels.Choice("sdpa", f"{faster}: it runs on CUDA only, and this run uses cpu")


def test_auto_prefers_the_kernels_on_cuda_in_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "load_varlen_attn", lambda: reference_varlen_attn)
    install(monkeypatch)
    half = kernels.resolve_backend("auto", device="cuda", dtype=torch.bfloat16)
    assert half.name == "varlen"
    assert "flash_attn_3: the flash-attn-3 package is not installed: build it" in half.passed_over
    assert kernels.resolve_backend("auto", device="cuda", dtype=torch.float32).name == "sdpa"


@pytest.mark.parametrize(
    ("distributions", "capability", "chosen"),
    [
        (("flash-attn", "flash-attn-3", "flash-attn-4"), (9, 0), "flash_attn_3"),
        (("flash-attn", "flash-attn-3", "flash-attn-4"), (10, 0), "flash_attn_4"),
        (("flash-attn", "flash-attn-3", "flash-attn-4"), (8, 0), "flash_attn"),
        (("flash-attn-4",), (8, 0), "varlen"),
        (("flash-attn",), (9, 0), "flash_attn"),
    ],
)
def test_auto_takes_the_package_that_suits_the_gpu(
    distributions: tuple[str, ...], capability: tuple[int, int], chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "load_varlen_attn", lambda: reference_varlen_attn)
    install(monkeypatch, *distributions)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert kernels.resolve_backend("auto", device="cuda", dtype=torch.bfloat16).name == chosen


def install(monkeypatch: pytest.MonkeyPatch, *distributions: str) -> None:
    """Only these flash packages, by the names of their distributions."""

    def version(name: str) -> str:
        if name not in distributions:
            raise PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(kernels, "version", version)


@pytest.mark.parametrize(
    ("name", "device", "dtype", "said"),
    [
        ("flash_attn", "cuda", torch.bfloat16, "pip install flash-attn"),
        ("varlen", "cpu", torch.bfloat16, "CUDA only, and this run uses cpu"),
        ("varlen", "cuda", torch.float32, "bf16 or fp16 only, and this run uses torch.float32"),
        ("flash_attn_3", "cuda", torch.bfloat16, "build it from the folder hopper"),
        ("flash_attn_4", "cuda", torch.bfloat16, "pip install flash-attn-4"),
        ("flash_attn_4", "cpu", torch.bfloat16, "CUDA only, and this run uses cpu"),
        ("flex", "cpu", torch.float32, "CUDA only, and this run uses cpu"),
        (
            "flash",
            "cpu",
            torch.float32,
            "must be one of auto, flash_attn_3, flash_attn_4, flash_attn, varlen, flex, sdpa",
        ),
    ],
)
def test_a_back_end_that_cannot_run_says_what_is_missing(
    name: str, device: str, dtype: torch.dtype, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch)
    with pytest.raises(ConfigError, match=said):
        kernels.resolve_backend(name, device=device, dtype=dtype)


def test_a_torch_without_the_varlen_module_names_the_version_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "load_varlen_attn", lambda: None)
    with pytest.raises(ConfigError, match=r"install torch >= 2\.11"):
        kernels.resolve_backend("varlen", device="cuda", dtype=torch.bfloat16)


def test_an_older_varlen_signature_counts_as_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    old = types.ModuleType("torch.nn.attention.varlen")
    old.varlen_attn = lambda query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False: query  # type: ignore[attr-defined]
    old.__spec__ = importlib.util.find_spec("json")
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", old)
    assert attention.load_varlen_attn() is None


@pytest.mark.parametrize(
    ("family", "said"),
    [
        (
            {"model_type": "bloom", "vocab_size": 97, "hidden_size": 32, "n_layer": 1, "n_head": 2},
            "takes no position_ids",
        ),
        (
            SHAPE
            | {
                "model_type": "qwen2",
                "num_key_value_heads": 2,
                "sliding_window": 5,
                "layer_types": ["full_attention", "chunked_attention"],
            },
            "layers of type chunked_attention",
        ),
    ],
)
def test_a_family_that_cannot_be_packed_is_refused(family: dict[str, Any], said: str) -> None:
    config = dict(family)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop("model_type"), **config))
    with pytest.raises(ConfigError, match=said):
        kernels.prepare_model(model, "sdpa")


def test_a_model_that_was_not_prepared_is_our_bug() -> None:
    with pytest.raises(AssertionError, match="prepare_model"):
        kernels.forward_logits(build("llama"), pack([[4]]), "varlen")

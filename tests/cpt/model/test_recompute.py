"""Recomputing forgets activations and changes no gradient."""

import warnings
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from cpt.config import ConfigError
from cpt.data.batch import Batch
from cpt.model import kernels
from cpt.model.recompute import set_recompute


def build(mode: str) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, max_position_embeddings=64)).train()
    kernels.prepare_model(model, "sdpa")
    set_recompute(model, mode)
    return model


def batch() -> Batch:
    ids = torch.randint(0, 50, (2, 64), generator=torch.Generator().manual_seed(1))
    segments = (torch.arange(64) > 20).long().expand(2, 64)
    positions = torch.cat([torch.arange(21), torch.arange(43)]).expand(2, 64)
    return Batch(ids, ids, positions, segments, torch.zeros(2, dtype=torch.int64))


def gradients(mode: str) -> list[torch.Tensor]:
    model = build(mode)
    kernels.forward_logits(model, batch(), "sdpa").square().sum().backward()
    return [parameter.grad for parameter in model.parameters()]


def kept_bytes(mode: str) -> int:
    """What a forward pass has allocated and not freed when the backward pass is due."""
    model = build(mode)
    kernels.forward_logits(model, batch(), "sdpa").sum().backward()  # what is made once is made
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        logits = kernels.forward_logits(model, batch(), "sdpa")
    assert logits.requires_grad
    return sum(event.self_cpu_memory_usage for event in profiler.events())


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_gradients_are_the_same_bits(mode: str) -> None:
    for found, wanted in zip(gradients(mode), gradients("none"), strict=True):
        assert torch.equal(found, wanted)


def test_full_keeps_less_than_selective_and_selective_less_than_none() -> None:
    none, selective, full = (kept_bytes(mode) for mode in ("none", "selective", "full"))
    assert full < 0.8 * selective and selective < 0.8 * none, (none, selective, full)


def test_the_banner_says_what_is_kept() -> None:
    assert set_recompute(build("none"), "none") == ""
    assert "matrix products and attention are kept" in set_recompute(build("none"), "selective")


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_nobody_is_warned_of_calls_that_are_not_theirs(mode: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build(mode)


def test_a_family_without_blocks_to_recompute_is_refused() -> None:
    model = build("none")
    model.supports_gradient_checkpointing = False
    with pytest.raises(ConfigError, match="no blocks that can be computed again"):
        set_recompute(model, "full")

"""Which parts of a model are compiled, and what is said where nothing can be."""

import shutil
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from cpt.config import ConfigError
from cpt.model.compiling import compile_blocks, decoder_blocks

CPU = torch.device("cpu")
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4},
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4},
}


def build(family: str) -> Any:
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, vocab_size=97, **SHAPES[family]))


@pytest.mark.parametrize("family", SHAPES)
def test_every_decoder_block_is_found_once(family: str) -> None:
    assert len(decoder_blocks(build(family))) == 3


def test_blocks_and_nothing_else_are_compiled_at_their_first_call() -> None:
    model = build("llama")
    assert compile_blocks(model, device=CPU) == "torch.compile: 3 blocks, compiled at the first step"
    compiled = [name for name, module in model.named_modules() if module._compiled_call_impl is not None]
    assert compiled == [f"model.layers.{number}" for number in range(3)]


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match=r"with g\+\+, which is not on the PATH"):
        compile_blocks(build("llama"), device=CPU)


def test_a_missing_triton_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: False)
    with pytest.raises(ConfigError, match="Triton"):
        compile_blocks(build("llama"), device=torch.device("cuda"))


def test_a_model_without_known_blocks_is_refused() -> None:
    model = torch.nn.Linear(2, 2)
    model.config = AutoConfig.for_model("llama")
    with pytest.raises(ConfigError, match="no blocks"):
        compile_blocks(model, device=CPU)

"""A model computes its loss inside its own forward pass, or keeps whole logits where it changes them afterwards."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from cpt.data.batch import Batch
from cpt.model import kernels
from cpt.train import losses
from cpt.train.loss_head import LossHead, attach_loss_head, forward_losses

SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
PLAIN = {
    "llama": SHAPE | {"tie_word_embeddings": False},
    "llama-tied": SHAPE | {"tie_word_embeddings": True},
    "gpt_neox": {key: value for key, value in SHAPE.items() if key != "num_key_value_heads"},
    "phi": SHAPE,  # its output layer has a bias
    "qwen3": SHAPE | {"head_dim": 8},
}
CHANGED = {
    "gemma3_text": SHAPE | {"head_dim": 8, "final_logit_softcapping": 30.0},
    "cohere": SHAPE | {"logit_scale": 0.25},
    "granite": SHAPE | {"logits_scaling": 8.0},
}


def build(name: str, shape: dict[str, Any]) -> torch.nn.Module:
    torch.manual_seed(3)
    config = AutoConfig.for_model(name.removesuffix("-tied"), **shape)
    model: torch.nn.Module = AutoModelForCausalLM.from_config(config)
    kernels.prepare_model(model, "sdpa")
    return model


def batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 97, (2, 24), generator=generator)
    labels = ids.roll(-1, dims=1)
    labels[:, [5, 23]] = -100
    segments = (torch.arange(24) > 5).long().expand(2, 24)
    positions = torch.cat([torch.arange(6), torch.arange(18)]).expand(2, 24)
    return Batch(ids, labels, positions, segments, torch.zeros(2, dtype=torch.int64))


def gradients_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    model.zero_grad()
    found = forward_losses(model, batch(), "sdpa")
    (found.total / 44).backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("name", PLAIN)
def test_loss_and_every_gradient_are_those_of_whole_logits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "chunk_tokens", lambda vocab_size, device_type: 7)
    model = build(name, PLAIN[name])
    before, wanted = forward_losses(model, batch(), "sdpa"), gradients_of(model)
    said = attach_loss_head(model, "sdpa", vocab_size=97, device="cpu")
    assert said.startswith("in chunks")
    after, found = forward_losses(model, batch(), "sdpa"), gradients_of(model)
    torch.testing.assert_close(after.per_token_BT, before.per_token_BT, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(after.total, before.total, rtol=1e-6, atol=0)
    assert not after.per_token_BT.requires_grad and found.keys() == wanted.keys()
    for parameter, gradient in found.items():
        error = (gradient - wanted[parameter]).norm() / wanted[parameter].norm().clamp(min=1e-12)
        assert error < 1e-6 or (gradient - wanted[parameter]).abs().max() < 1e-8, parameter


@pytest.mark.parametrize("name", CHANGED)
def test_a_family_that_changes_its_logits_keeps_them_whole(name: str) -> None:
    model = build(name, CHANGED[name])
    before = forward_losses(model, batch(), "sdpa").total
    said = attach_loss_head(model, "sdpa", vocab_size=97, device="cpu")
    assert said.startswith("of whole logits") and type(model).__name__ in said
    assert torch.equal(forward_losses(model, batch(), "sdpa").total, before)


def test_an_output_layer_that_is_no_plain_matrix_keeps_whole_logits() -> None:
    class Scaled(torch.nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    model: Any = build("llama", PLAIN["llama"])
    model.lm_head = Scaled(32, 97, bias=False)
    assert "Scaled" in attach_loss_head(model, "sdpa", vocab_size=97, device="cpu")


def test_without_labels_the_model_still_gives_logits_and_the_same_state() -> None:
    model = build("llama", PLAIN["llama"])
    names, wanted = list(model.state_dict()), kernels.forward_logits(model, batch(), "sdpa")
    attach_loss_head(model, "sdpa", vocab_size=97, device="cpu")
    forward_losses(model, batch(), "sdpa")
    assert torch.equal(kernels.forward_logits(model, batch(), "sdpa"), wanted)
    assert list(model.state_dict()) == names and model.training


def test_labels_do_not_outlive_a_forward_pass_that_failed() -> None:
    head = LossHead(torch.nn.Linear(4, 5))
    with pytest.raises(ZeroDivisionError), head.given(labels_BT=torch.zeros(1, 1)):
        raise ZeroDivisionError
    assert head.labels_BT is None and head.answer is None

"""Norms, rotary positions and gates in fewer passes: the same numbers, only where a probe has found the same formula."""

import copy
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from cpt.model.lean import ROTARY, LeanGate, LeanNorm, LeanRotary, apply_lean
from cpt.train.one_by_one import empty_parameters

SHAPE = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}


def build(family: str = "llama") -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SHAPE, **HEADS))
    for name, weight in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(weight)  # a weight of ones would hide a forgotten one
    return model


@pytest.fixture(autouse=True)
def unpatched() -> Iterator[None]:
    """Every test finds the families' own functions, and leaves them."""
    yield
    for module in list(sys.modules.values()):
        if isinstance(found := getattr(module, ROTARY, None), LeanRotary):
            setattr(module, ROTARY, found.composed)


def trained(model: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    ids = torch.arange(48).remainder(61).view(2, 24)
    logits = model(input_ids=ids, use_cache=False).logits
    logits.square().sum().backward()
    return logits.detach(), [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_logits_and_gradients_are_the_same_within_rounding(family: str) -> None:
    plain = build(family)
    lean = copy.deepcopy(plain)
    wanted, gradients = trained(plain)
    assert apply_lean(lean) == "norms, rotary positions, gates"
    found, lean_gradients = trained(lean)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))
    for one, other in zip(lean_gradients, gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=float(1e-5 * other.abs().max()))


def test_gradients_agree_with_finite_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cpt.model.lean._is_lean", lambda *tensors: True)  # in fp64, where differences are exact enough
    norm = build().model.norm.double()
    x = torch.randn(3, 32, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: _applied(norm, x, w), (x, norm.weight))
    q, k = (torch.randn(2, 2, 3, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    cos, sin = torch.randn(2, 2, 3, 8, dtype=torch.float64)
    rotary = LeanRotary(lambda *arguments: pytest.fail("the composed one was called"))
    assert torch.autograd.gradcheck(lambda q, k: rotary(q, k, cos, sin), (q, k))
    gate = LeanGate(build().model.layers[0].mlp.double())
    assert torch.autograd.gradcheck(gate, (x,))


def _applied(norm: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    assert weight is norm.weight
    return LeanNorm(norm)(x)


def test_a_norm_of_another_formula_and_another_rotation_are_left_alone() -> None:
    gemma = build("gemma")  # its norm multiplies by one more than the weight
    assert apply_lean(gemma) == "rotary positions"
    assert not any(isinstance(module.forward, LeanNorm) for module in gemma.modules())
    assert apply_lean(build("cohere")) == "gates"  # neighbouring values are rotated as pairs there


def test_a_gate_gives_the_same_bits_and_one_of_another_function_is_left_alone() -> None:
    plain = build().model.layers[0].mlp
    lean = copy.deepcopy(plain)
    apply_lean(model := torch.nn.ModuleList([lean]))
    assert isinstance(model[0].forward, LeanGate)
    for x in (torch.randn(2, 5, 32), 9 * torch.randn(64, 32)):
        results = []
        for mlp in (plain, lean):
            mlp.zero_grad()
            given = x.clone().requires_grad_()
            out = mlp(given)
            out.square().sum().backward()
            results.append((out, given.grad, *(parameter.grad for parameter in mlp.parameters())))
        assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    relu = build()
    relu.model.layers[0].mlp.act_fn = torch.nn.ReLU()
    apply_lean(relu)
    assert not isinstance(relu.model.layers[0].mlp.forward, LeanGate)
    assert isinstance(relu.model.layers[1].mlp.forward, LeanGate)


def test_other_dtypes_and_frozen_weights_come_out_as_before() -> None:
    model = build().bfloat16()
    wanted = trained(copy.deepcopy(model))[0]
    apply_lean(model)
    assert torch.equal(trained(model)[0], wanted)
    frozen = build()
    frozen.requires_grad_(False)
    frozen.get_input_embeddings().weight.requires_grad_(True)
    apply_lean(frozen)
    assert trained(frozen)[1][0] is not None and frozen.model.norm.weight.grad is None


def test_a_model_without_memory_is_recognised_too() -> None:
    with empty_parameters():  # as a resumed run under ZeRO 3 builds it
        model = build()
        assert apply_lean(model) == "norms, rotary positions, gates"


def test_a_second_model_of_the_family_finds_the_function_patched_once() -> None:
    apply_lean(build())
    model = build()
    assert apply_lean(model) == "norms, rotary positions, gates"
    assert not isinstance(getattr(sys.modules[type(model).__module__], ROTARY).composed, LeanRotary)

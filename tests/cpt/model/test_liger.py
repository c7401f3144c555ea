"""Liger's kernels are chosen where they can run, and only the patches that fit the model are applied."""

import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cpt.config import ConfigError
from cpt.model import liger

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def model(activation: str = "silu", family: str = "llama") -> Any:
    config = SimpleNamespace(model_type=family, hidden_act=activation)
    config.get_text_config = lambda: config
    return SimpleNamespace(config=config)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """liger-kernel 0.8's table with two entries that only write down how they were called."""
    found: list[dict[str, Any]] = []

    def llama(rope=True, cross_entropy=False, fused_linear_cross_entropy=True, rms_norm=True, swiglu=True, model=None):  # type: ignore[no-untyped-def]
        found.append(dict(locals()))

    def gemma(rope=True, cross_entropy=False, fused_linear_cross_entropy=True, rms_norm=True, geglu=True, model=None):  # type: ignore[no-untyped-def]
        found.append(dict(locals()))

    table = SimpleNamespace(MODEL_TYPE_TO_APPLY_LIGER_FN={"llama": llama, "gemma": gemma})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib, "import_module", lambda name: table)
    return found


def test_on_a_cpu_auto_keeps_torchs_own_and_liger_is_refused() -> None:
    assert liger.apply_liger(model(), "auto", device=CPU) == (
        "kernels: torch's own; not Liger's: they run on CUDA only, and this run uses cpu"
    )
    with pytest.raises(ConfigError, match="CUDA only"):
        liger.apply_liger(model(), "liger", device=CPU)
    assert liger.apply_liger(model(), "torch", device=CUDA) == "kernels: torch's own"


def test_a_missing_package_is_named_with_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install liger-kernel"):
        liger.apply_liger(model(), "liger", device=CUDA)


def test_a_family_that_liger_does_not_know_is_said(calls: list[dict[str, Any]]) -> None:
    assert "liger-kernel has none for rwkv" in liger.apply_liger(model(family="rwkv"), "auto", device=CUDA)
    assert not calls


def test_liger_gets_this_model_and_keeps_its_hands_off_the_loss(calls: list[dict[str, Any]]) -> None:
    live = model()
    assert liger.apply_liger(live, "auto", device=CUDA) == "kernels: Liger's rms_norm, rope, swiglu"
    assert calls[0]["model"] is live and calls[0]["swiglu"]
    assert not calls[0]["cross_entropy"] and not calls[0]["fused_linear_cross_entropy"]


def test_an_activation_that_the_fused_mlp_does_not_compute_keeps_its_own_mlp(calls: list[dict[str, Any]]) -> None:
    assert "swiglu" not in liger.apply_liger(model("relu"), "liger", device=CUDA)
    assert calls[0]["swiglu"] is False
    assert "geglu" in liger.apply_liger(model("gelu_pytorch_tanh", "gemma"), "liger", device=CUDA)

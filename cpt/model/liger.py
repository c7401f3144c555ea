"""Liger's fused Triton kernels for norms, rotary positions and gated MLPs, put into a model that exists already.

Owns the choice (model.kernels) and which of Liger's patches fit the model in hand. Its loss is not used: ours works
under every ZeRO stage and on a CPU (``cpt.train.losses``). Refuses, where they are asked for by name, a machine or
family that has none; ``auto`` goes on with torch's own and says why.

Liger patches norms and MLPs of this model alone, but the rotary function of the whole family in this process.
"""

import importlib
import importlib.util
import inspect
from typing import Any

import torch

from cpt.config import ConfigError, Problem

FIELD = "model.kernels"
INSTALL = "pip install liger-kernel"
SILU, GELU_TANH = ("silu", "swish"), ("gelu_pytorch_tanh", "gelu_new")


def apply_liger(model: torch.nn.Module, wish: str, *, device: torch.device) -> str:
    """Patch ``model`` if ``wish`` (auto, torch, liger) and the machine agree; returns the choice in words.

    Raises:
        ConfigError: ``liger`` was asked for and is not possible.
    """
    if wish == "torch":
        return "kernels: torch's own"
    family = model.config.model_type  # type: ignore[union-attr]
    reason = _missing(str(family), device)
    if reason is None:
        return f"kernels: Liger's {_patch(model, str(family))}"
    if wish == "liger":
        raise ConfigError(Problem(FIELD, wish, f"cannot be used: {reason}", "set model.kernels=auto"))
    return f"kernels: torch's own; not Liger's: {reason}"


def _missing(family: str, device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"they run on CUDA only, and this run uses {device.type}"
    if importlib.util.find_spec("liger_kernel") is None:
        return f"the liger-kernel package is not installed: {INSTALL}"
    return None if family in _patches() else f"liger-kernel has none for {family}"


def _patches() -> dict[str, Any]:
    """Liger's function for each family."""
    module = importlib.import_module("liger_kernel.transformers.monkey_patch")
    return dict(module.MODEL_TYPE_TO_APPLY_LIGER_FN)


def _patch(model: torch.nn.Module, family: str) -> str:
    patch = _patches()[family]
    takes = inspect.signature(patch).parameters
    config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    wanted = {
        "rms_norm": True,
        "rope": True,
        # an instance's activation is not looked at by Liger: the fused form would quietly replace another one
        "swiglu": activation in SILU,
        "geglu": activation in GELU_TANH,
    }
    switches = {name: on for name, on in wanted.items() if name in takes}
    off = {name: False for name in ("cross_entropy", "fused_linear_cross_entropy") if name in takes}
    patch(model=model, **switches, **off)
    return ", ".join(name for name, on in switches.items() if on)

"""torch.compile for a model's decoder blocks.

Owns which parts are compiled: each block by itself, so that one compilation serves all of them and the first step
waits for one block, not for the model. Attention functions whose shapes change with every batch stay outside. Refuses
machines without the compiler that the generated code needs.
"""

import os
import shutil
from typing import Any

import torch

from cpt.config import ConfigError, Problem

FIELD = "train.compile"


def compile_blocks(model: torch.nn.Module, *, device: torch.device) -> str:
    """Compile every decoder block at its first call; returns what was set, in words.

    Raises:
        ConfigError: no blocks are known of this family, or there is no compiler.
    """
    blocks = decoder_blocks(model)
    if not blocks:
        family = model.config.model_type  # type: ignore[union-attr]
        raise ConfigError(Problem(FIELD, True, f"{family} has no blocks known to transformers", "set it to false"))
    if reason := _missing(device):
        raise ConfigError(Problem(FIELD, True, f"cannot be used: {reason}", "install it, or set train.compile=false"))
    for block in blocks:
        block.compile()
    return f"torch.compile: {len(blocks)} blocks, compiled at the first step"


def decoder_blocks(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The layers that transformers checkpoints: one per decoder block, none inside another."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    found: list[torch.nn.Module] = []
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer) and not any(_holds(block, module) for block in found):
            found.append(module)
    return found


def _holds(block: torch.nn.Module, module: torch.nn.Module) -> bool:
    return any(part is module for part in block.modules())


def _missing(device: torch.device) -> str | None:
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        return None if has_triton() else "torch compiles for this GPU with Triton, which is not installed"
    compiler = os.environ.get("CXX", "g++")
    there: Any = shutil.which(compiler) or shutil.which("clang++")
    return None if there else f"torch compiles for a CPU with {compiler}, which is not on the PATH"

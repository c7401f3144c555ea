"""Optimizers by name, and the groups of parameters that they treat alike.

Owns which parameters decay and which ones Muon takes; each group carries the kinds of state its parameters will have,
so that nobody else needs to know the optimizers.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from cpt.train.muon import Muon

ADAM_KINDS = ("exp_avg", "exp_avg_sq")
MUON_KINDS = ("momentum_buffer",)


@dataclass(frozen=True)
class OptimizerSpec:
    """What the run file says of the optimizer."""

    name: str  # adamw | muon
    weight_decay: float
    betas: tuple[float, float]
    eps: float


def build_optimizer(model: torch.nn.Module, spec: OptimizerSpec) -> torch.optim.Optimizer:
    """The optimizer at rate 0: the trainer states the rate of every step.

    AdamW is fused: one kernel per group instead of one per operation, on the GPU and on the CPU alike. So the same
    class serves masters that are offloaded to the host, and needs no compiler there.
    """
    return OPTIMIZERS[spec.name](model, spec)


def _adamw(model: torch.nn.Module, spec: OptimizerSpec) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameter_groups(model, spec), lr=0.0, betas=spec.betas, eps=spec.eps, fused=True)


def _muon(model: torch.nn.Module, spec: OptimizerSpec) -> torch.optim.Optimizer:
    return Muon(parameter_groups(model, spec), betas=spec.betas, eps=spec.eps)


OPTIMIZERS: dict[str, Callable[[torch.nn.Module, OptimizerSpec], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "muon": _muon,
}


def parameter_groups(model: torch.nn.Module, spec: OptimizerSpec) -> list[dict[str, Any]]:
    """Groups that hold every trained parameter once: matrices and embeddings decay, biases and gains do not."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    blocks = {id(parameter) for parameter in block_matrices(model)} if spec.name == "muon" else set()
    inner = [parameter for parameter in trained if id(parameter) in blocks]
    rest = [parameter for parameter in trained if id(parameter) not in blocks]
    matrices = [parameter for parameter in rest if len(full_shape(parameter)) >= 2]
    vectors = [parameter for parameter in rest if len(full_shape(parameter)) < 2]
    decay = spec.weight_decay
    groups = [
        {"params": inner, "weight_decay": decay, "state_kinds": MUON_KINDS},
        {"params": matrices, "weight_decay": decay, "state_kinds": ADAM_KINDS},
        {"params": vectors, "weight_decay": 0.0, "state_kinds": ADAM_KINDS},
    ]
    return [group for group in groups if group["params"]]


def block_matrices(model: torch.nn.Module) -> Iterator[torch.nn.Parameter]:
    """What Muon takes: trained matrices, but neither embeddings nor the output head, whose rows are tokens."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is not None:
        tables.add(id(head.weight))
    for parameter in model.parameters():
        if parameter.requires_grad and len(full_shape(parameter)) == 2 and id(parameter) not in tables:
            yield parameter


def full_shape(parameter: torch.nn.Parameter) -> tuple[int, ...]:
    """The shape of the whole parameter, also where ZeRO 3 has left only a part of it here."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))

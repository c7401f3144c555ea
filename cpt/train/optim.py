"""AdamW and its parameter groups."""

from collections.abc import Sequence

import torch


def parameter_groups(model: torch.nn.Module, *, weight_decay: float) -> list[dict[str, object]]:
    """Two groups that hold every trained parameter once: matrices and embeddings decay, biases and gains do not."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.ndim >= 2]
    vectors = [parameter for parameter in trained if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_adamw(
    model: torch.nn.Module, *, weight_decay: float, betas: Sequence[float], eps: float
) -> torch.optim.Optimizer:
    """AdamW at rate 0: the trainer states the rate of every step. Fused: one kernel per group instead of one per
    operation.
    """
    groups = parameter_groups(model, weight_decay=weight_decay)
    return torch.optim.AdamW(groups, lr=0.0, betas=(betas[0], betas[1]), eps=eps, fused=True)

"""How much of a built model works on each token, for families without a closed form in ``cpt.model.size``.

Owns one count, by parameter shapes alone. Refuses to guess: experts count by the share that the config says is
active, and where it does not say, all of them count.
"""

from collections.abc import Mapping
from typing import Any

import torch

EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")
ACTIVE_COUNTS = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk")


def count_matmul_weights(model: torch.nn.Module, config: Mapping[str, Any]) -> int:
    """Weights that an average token is multiplied with: every matrix but a table that is only looked up, routed
    experts at their active share.

    Under ZeRO 3 the full shapes are taken.
    """
    known: Any = model
    head = known.get_output_embeddings() if hasattr(known, "get_output_embeddings") else None
    looked_up = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, torch.nn.Embedding)
        for parameter in module.parameters()
    }
    looked_up -= {id(head.weight)} if head is not None else set()
    share = active_share(config)
    total = 0.0
    for name, parameter in model.named_parameters():
        shape = getattr(parameter, "ds_shape", parameter.shape)
        if len(shape) >= 2 and id(parameter) not in looked_up:
            total += torch.Size(shape).numel() * (share if ".experts." in name else 1.0)
    return round(total)


def active_share(config: Mapping[str, Any]) -> float:
    """Routed experts that work on one token, of all; 1 where the config names none."""
    experts = next((config[key] for key in EXPERT_COUNTS if config.get(key)), None)
    active = next((config[key] for key in ACTIVE_COUNTS if config.get(key)), None)
    return active / experts if experts and active else 1.0

"""Next-token loss: per token in nats, so that any sum over tokens, rows or sources is exact.

Shape suffixes: B rows, T positions, V vocabulary, S sources.
"""

import torch
from torch.nn.functional import cross_entropy

from cpt.data.packing import IGNORE_INDEX


def token_losses(logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    """Cross entropy of every position, computed in fp32; 0 where the label is ``IGNORE_INDEX``. Returns (B, T)."""
    flat = logits_BTV.float().flatten(0, 1)
    losses = cross_entropy(flat, labels_BT.reshape(-1), reduction="none", ignore_index=IGNORE_INDEX)
    return losses.view_as(labels_BT)


def sums_by_source(
    losses_BT: torch.Tensor, labels_BT: torch.Tensor, source_ids_B: torch.Tensor, *, num_sources: int
) -> torch.Tensor:
    """(2, S) float64: summed loss and number of counted tokens of every source. float64: sums over 10^7 tokens stay
    exact enough.
    """
    per_row = torch.stack([losses_BT.sum(dim=1, dtype=torch.float64), (labels_BT != IGNORE_INDEX).sum(dim=1).double()])
    sums = torch.zeros(2, num_sources, dtype=torch.float64, device=losses_BT.device)
    return sums.index_add_(1, source_ids_B, per_row)

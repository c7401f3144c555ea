"""How likely chosen tokens are at chosen places, computed from those places' logits alone.

What an evaluation asks of a model: not the loss of every token, but the log-probability of a few, and whether each is
the likeliest one. Logits exist for the places that are asked about, a chunk of them at a time, and are softened in
fp32 whatever the compute dtype.

Shape suffixes: B rows, T positions, V vocabulary, D width, Q questions, C questions of a chunk.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from cpt.train.losses import chunk_tokens


@dataclass(frozen=True)
class Asked:
    """Q questions to a batch of B rows of T positions: after position ``places_Q`` (of B * T, row by row), how likely
    is the token ``tokens_Q``? Both int64 on the batch's device; a place may be asked about more than once.
    """

    places_Q: Tensor
    tokens_Q: Tensor


def linear_scores(hidden_BTD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, asked: Asked) -> Tensor:
    """(Q, 2) fp32: log-probability in nats, and 1 where no token is likelier, else 0; of ``hidden @ weight.T + bias``.

    Under autocast the product is taken in its dtype, as the layer itself would.
    """
    hidden_ND = hidden_BTD.flatten(0, -2)
    scores = hidden_ND.new_empty((len(asked.places_Q), 2), dtype=torch.float32)
    chunk = chunk_tokens(len(weight_VD), hidden_BTD.device.type)
    for first in range(0, len(scores), chunk):
        part = slice(first, first + chunk)
        logits_CV = linear(hidden_ND[asked.places_Q[part]], weight_VD, bias_V)
        scores[part] = _scores(logits_CV, asked.tokens_Q[part])
    return scores


def scores_of_logits(logits_BTV: Tensor, asked: Asked) -> Tensor:
    """The same of a batch's logits, where a model changes them after its output layer."""
    return _scores(logits_BTV.flatten(0, -2)[asked.places_Q], asked.tokens_Q)


def _scores(logits_CV: Tensor, tokens_C: Tensor) -> Tensor:
    log_p_CV = torch.log_softmax(logits_CV, dim=-1, dtype=torch.float32)
    log_p_C = log_p_CV.gather(1, tokens_C[:, None])[:, 0]
    return torch.stack([log_p_C, (log_p_CV.argmax(dim=-1) == tokens_C).float()], dim=1)

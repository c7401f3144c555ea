"""Chinchilla's form without the share, the baseline that every mixture law has to beat (arXiv 2203.15556, section 3.3).

    L(N, D) = E + A / N^alpha + B / D^beta

N parameters and D tokens in billions, L in nats per token. Owns the formula. It ignores the mixture: where shares
differ it predicts their mean, and it always falls with tokens.
"""

import numpy as np

from cpt.planner.fitting import FloatArray, Parameter
from cpt.planner.laws.dcpt import data_term, floor_and_size
from cpt.planner.laws.law import Inputs, Samples, parametric

PAPER = "arXiv 2203.15556"


def chinchilla(theta: FloatArray, inputs: Inputs) -> tuple[FloatArray, FloatArray]:
    """``theta`` (S, 5) in the order E, A, alpha, B, beta."""
    e, a, alpha, b, beta = theta.T[:, :, None]
    log_n, log_d = np.log(inputs.params), np.log(inputs.tokens)
    per_a, per_b = np.exp(-alpha * log_n), np.exp(-beta * log_d)
    size, data = a * per_a, b * per_b
    slopes = (np.ones_like(size), per_a, -size * log_n, per_b, -data * log_d)
    return e + size + data, np.stack(slopes, axis=1)


def _ranges(samples: Samples) -> tuple[Parameter, ...]:
    return (*floor_and_size(samples), *data_term(samples))


CHINCHILLA = parametric(
    "chinchilla",
    chinchilla,
    _ranges,
    title="Chinchilla: E + A/N^alpha + B/D^beta, blind to shares (baseline)",
    paper=PAPER,
    many_sources=True,
    sees_shares=False,
)

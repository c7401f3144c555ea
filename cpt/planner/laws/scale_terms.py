"""The part of a mixture law that does not depend on the mixture: E + A / N^alpha + B / D^beta.

Owns this sum with its derivatives, and which of its parameters the observations can tell. A term whose variable takes
one value only cannot be told from E: it is pinned to nothing, and the law then holds at that size or token count.
N parameters and D tokens in billions, E in nats.
"""

import numpy as np

from cpt.planner.fitting import FloatArray, Parameter, pinned
from cpt.planner.laws.dcpt import data_term, floor_and_size
from cpt.planner.laws.law import Inputs, Samples

NUM_SCALE = 5


def scale_terms(theta: FloatArray, inputs: Inputs) -> tuple[FloatArray, list[FloatArray]]:
    """(S, n) sum and its derivatives, each (S, n). ``theta`` (S, 5) in the order E, A, alpha, B, beta."""
    e, a, alpha, b, beta = theta.T[:, :, None]
    log_n, log_d = np.log(inputs.params), np.log(inputs.tokens)
    per_a, per_b = np.exp(-alpha * log_n), np.exp(-beta * log_d)
    size, data = a * per_a, b * per_b
    return e + size + data, [np.ones_like(size), per_a, -size * log_n, per_b, -data * log_d]


def scale_ranges(samples: Samples) -> tuple[Parameter, ...]:
    """Ranges of E, A, alpha, B and beta."""
    if tokens_vary(samples):
        return (*floor_and_size(samples), *data_term(samples))
    return (*floor_and_size(samples), pinned("B", 0.0), pinned("beta", 1.0))


def tokens_vary(samples: Samples) -> bool:
    """Token counts that differ by rounding to whole steps are one count."""
    return float(samples.inputs.tokens.max()) > 1.1 * float(samples.inputs.tokens.min())


def num_mixtures(samples: Samples) -> int:
    return len(np.unique(samples.inputs.shares.round(6), axis=0))

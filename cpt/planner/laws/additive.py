"""The additive law for optimal data mixtures (arXiv 2507.09404).

    L(N, D, h) = E + 1 / (sum_i C_i h_i^gamma_i) + A / N^alpha + B / D^beta

N parameters and D tokens in billions, L in nats per token, h the shares of all sources; one law per target. The mixture
term knows nothing of N and D, so the best mixture is the same at every size and budget: a strong claim, and the reason
why ten small runs suffice for three or four sources. The paper's joint law, where A and B depend on h, is not here.

With fewer mixtures than C_i, gamma_i and E have values, the gammas are kept at 1/2.
"""

import numpy as np

from cpt.planner.fitting import FloatArray, Parameter, pinned, positive
from cpt.planner.laws.law import Inputs, Samples, parametric
from cpt.planner.laws.scale_terms import NUM_SCALE, num_mixtures, scale_ranges, scale_terms

TYPICAL_GAMMA = 0.5


def mixture_term(gain: FloatArray, gamma: FloatArray, shares: FloatArray) -> tuple[FloatArray, FloatArray]:
    """1 / (sum_i C_i h_i^gamma_i), (S, n), and its derivatives (S, 2m, n) by C and by gamma, both (S, m)."""
    present = shares.T > 0
    log_share = np.log(np.where(present, shares.T, 1.0))
    power = np.where(present, np.exp(gamma[:, :, None] * log_share), 0.0)
    gained = gain[:, :, None] * power
    loss = 1.0 / np.maximum(gained.sum(axis=1), 1e-12)
    slope = -(loss * loss)[:, None, :]
    return loss, np.concatenate((slope * power, slope * gained * log_share), axis=1)


def additive(theta: FloatArray, inputs: Inputs) -> tuple[FloatArray, FloatArray]:
    """``theta`` (S, 5 + 2m) in the order E, A, alpha, B, beta, C_1 ... C_m, gamma_1 ... gamma_m."""
    scale, slopes = scale_terms(theta[:, :NUM_SCALE], inputs)
    gain, gamma = np.split(theta[:, NUM_SCALE:], 2, axis=1)
    loss, per_mixture = mixture_term(gain, gamma, inputs.shares)
    return scale + loss, np.concatenate((np.stack(slopes, axis=1), per_mixture), axis=1)


def _ranges(samples: Samples) -> tuple[Parameter, ...]:
    sources = samples.inputs.sources
    highest = float(samples.losses.max())
    gains = (positive(f"C_{name}", 1e-3 / highest, 1e4 / highest, (0.3 / highest, 30 / highest)) for name in sources)
    told = num_mixtures(samples) >= 2 * len(sources) + 1
    gammas = (
        positive(f"gamma_{name}", 0.01, 3.0, (0.1, 1.0)) if told else pinned(f"gamma_{name}", TYPICAL_GAMMA)
        for name in sources
    )
    return (*scale_ranges(samples), *gains, *gammas)


ADDITIVE = parametric(
    "additive",
    additive,
    _ranges,
    title="additive law: E + 1/(sum C_i h_i^gamma_i) + A/N^alpha + B/D^beta",
    paper="arXiv 2507.09404",
    many_sources=True,
)

"""Data mixing laws (arXiv 2403.16952): the loss falls exponentially with the shares of sources that help.

    L(r) = c + k exp(sum_j t_j r_j)                                            one model size, one token count
    L(N, D, r) = c + A/N^alpha + B/D^beta + D^kappa exp(sum_j t_j r_j)         pilots of several sizes or token counts

N parameters and D tokens in billions, L in nats per token, r the shares of all sources. One law per target, which need
not be a source. Since shares sum to 1, k only shifts all t_j together: it is kept at 1, and exp(t_j) is the loss above
c (at one billion tokens) of a run on source j alone.

The paper reaches other sizes and token counts by nesting: it fits a power law of steps and one of sizes to every
mixture, then the mixing law to what they extrapolate. That needs the same ladder of runs at every mixture. Here floor
and mixture term each get a power of D and one fit does it all. kappa may be positive, so that the loss of a corpus
that is barely replayed rises with tokens.
"""

from dataclasses import replace

import numpy as np

from cpt.planner.fitting import FloatArray, Parameter, pinned
from cpt.planner.laws.law import Inputs, Samples, parametric
from cpt.planner.laws.scale_terms import NUM_SCALE, scale_ranges, scale_terms, tokens_vary

STEEPEST = -300.0  # lower bound of t_j: a share of 1% ends the excess loss


def mixing(theta: FloatArray, inputs: Inputs) -> tuple[FloatArray, FloatArray]:
    """``theta`` (S, 6 + m) in the order c, A, alpha, B, beta, kappa, t_1 ... t_m."""
    scale, slopes = scale_terms(theta[:, :NUM_SCALE], inputs)
    kappa, transfer = theta[:, NUM_SCALE, None], theta[:, NUM_SCALE + 1 :]
    log_d = np.log(inputs.tokens)
    excess = np.exp(np.minimum(kappa * log_d + transfer @ inputs.shares.T, 100.0))
    per_transfer = excess[:, None, :] * inputs.shares.T
    return scale + excess, np.concatenate((np.stack((*slopes, excess * log_d), axis=1), per_transfer), axis=1)


def _ranges(samples: Samples) -> tuple[Parameter, ...]:
    floor, *scale = scale_ranges(samples)
    lowest, highest = float(samples.losses.min()), float(samples.losses.max())
    # The floor may lie above the lowest loss: where one source teaches much with little, no exponential fits both ends.
    floor = replace(floor, name="c", high=max(float(np.median(samples.losses)), lowest))
    kappa = Parameter("kappa", -1.0, 1.0, -0.3, 0.3, log=False) if tokens_vary(samples) else pinned("kappa", 0.0)
    ceiling = float(np.log(20 * highest))
    transfer = (
        Parameter(f"t_{source}", STEEPEST, ceiling, -4.0, float(np.log(highest)), log=False)
        for source in samples.inputs.sources
    )
    return (floor, *scale, kappa, *transfer)


MIXING = parametric(
    "mixing",
    mixing,
    _ranges,
    title="data mixing law: c + exp(sum t_j r_j), c and the mixture term with powers of D",
    paper="arXiv 2403.16952",
    many_sources=True,
    rises=True,
)

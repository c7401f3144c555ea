"""Power transfer: the loss of a target as powers of how much of each source was seen. Ours, for many sources.

    L(N, D, h) = E + A/N^alpha + B/D^beta + sum_k K_k (1 + D^delta_k sum_j t_kj h_j^g_k)^-b_k,   k = 1 or k = 1, 2

N parameters and D tokens in billions, L in nats per token, h the shares of all sources; one law per target, which need
not be a source. It joins two published ideas: every source helps a target at its own rate of exchange, the transfer
t_j (the mixing laws of arXiv 2403.16952), and losses are powers of data (arXiv 2203.15556), not exponentials of it.

Why this form. Measured losses fall almost linearly with the logarithm of the target's own share over three decades,
which no exponential does, and flatten below the share where related sources teach as much: that is the sum over
sources. Ten small sources teach more than one large one of their total size: that is g < 1. The "1 +" keeps the loss
finite where nothing related was seen, at E + K: a model of all that any text teaches. Two terms, because what a source
teaches is of two kinds with their own transfer: what all of one family of text share (code, prose, abstracts) and what
only the target itself shows (its vocabulary, its format). One term fits the middle of the range but bends at both ends.

What the data tell decides the size: two terms from four mixtures per parameter on, else one; below two mixtures per
parameter of the single term g is kept at 1/2, below one also b at 1/4 and delta at 0. Thresholds and form were chosen
by cross-validation within the 512 training mixtures of RegMix (arXiv 2407.01492); its test mixtures were left alone.
B/D^beta, and delta at 0 for few mixtures, were chosen by leaving out shares of the Pythia-70M runs of 2403.16952.
"""

from collections.abc import Iterator, Mapping

import numpy as np

from cpt.planner.fitting import FloatArray, Parameter, pinned, positive
from cpt.planner.laws.law import Inputs, Samples, parametric
from cpt.planner.laws.scale_terms import NUM_SCALE, num_mixtures, scale_ranges, scale_terms, tokens_vary

NUM_SHAPE = 4  # K, b, g and delta of one term, before its transfers
TYPICAL_G, TYPICAL_B = 0.5, 0.25


def power_transfer(theta: FloatArray, inputs: Inputs) -> tuple[FloatArray, FloatArray]:
    """``theta`` (S, 5 + k (4 + m)) in the order E, A, alpha, B, beta, then per term K, b, g, delta, t_1 ... t_m."""
    loss, scale_slopes = scale_terms(theta[:, :NUM_SCALE], inputs)
    slopes = [np.stack(scale_slopes, axis=1)]
    width = NUM_SHAPE + inputs.shares.shape[1]
    for first in range(NUM_SCALE, theta.shape[1], width):
        term, slope = _term(theta[:, first : first + width], inputs)
        loss = loss + term
        slopes.append(slope)
    return loss, np.concatenate(slopes, axis=1)


def _term(theta: FloatArray, inputs: Inputs) -> tuple[FloatArray, FloatArray]:
    """K (1 + D^delta sum_j t_j h_j^g)^-b, (S, n), and its derivatives (S, 4 + m, n)."""
    k, b, g, delta = theta.T[:NUM_SHAPE, :, None]
    transfer = theta[:, NUM_SHAPE:]
    present = inputs.shares.T > 0
    log_share = np.log(np.where(present, inputs.shares.T, 1.0))
    log_d = np.log(inputs.tokens)
    power = np.exp(g[:, :, None] * log_share + (delta * log_d)[:, None, :]) * present
    taught = transfer[:, :, None] * power
    seen = taught.sum(axis=1)
    log_seen = np.log1p(seen)
    unit = np.exp(-b * log_seen)
    term = k * unit
    slope = -b * term / (1.0 + seen)
    per_g = slope * np.einsum("smn,mn->sn", taught, log_share)
    shape = np.stack((unit, -term * log_seen, per_g, slope * seen * log_d), axis=1)
    return term, np.concatenate((shape, slope[:, None, :] * power), axis=1)


def _ranges(samples: Samples) -> tuple[Parameter, ...]:
    sources = samples.inputs.sources
    mixtures, one_term = num_mixtures(samples), 4 + len(sources)  # E, K, b, g and the transfers
    two_terms = 2 * one_term - 1
    marks = ("1", "2") if mixtures >= 4 * two_terms else ("",)
    told = {"b": mixtures >= one_term, "g": mixtures >= 2 * one_term}
    told["delta"] = told["b"] and tokens_vary(samples)
    terms = (parameter for mark in marks for parameter in _term_ranges(samples, mark, told))
    return (*scale_ranges(samples), *terms)


def _term_ranges(samples: Samples, mark: str, told: Mapping[str, bool]) -> Iterator[Parameter]:
    highest = float(samples.losses.max())
    yield positive(f"K{mark}", 0.01 * highest, 1.5 * highest, (0.2 * highest, highest))
    yield positive(f"b{mark}", 0.02, 3.0, (0.1, 1.0)) if told["b"] else pinned(f"b{mark}", TYPICAL_B)
    yield positive(f"g{mark}", 0.2, 2.0, (0.3, 1.2)) if told["g"] else pinned(f"g{mark}", TYPICAL_G)
    yield positive(f"delta{mark}", 1e-3, 2.0, (0.01, 0.5)) if told["delta"] else pinned(f"delta{mark}", 0.0)
    middle = float(np.exp(np.log(samples.inputs.tokens).mean()))
    unit = middle**-0.2 if told["delta"] else 1.0  # keeps the starts right whether tokens are thousands or trillions
    for name in samples.inputs.sources:
        yield positive(f"t{mark}_{name}", 1e-2 * unit, 1e3 * unit, (0.1 * unit, 100 * unit))


POWER_TRANSFER = parametric(
    "power-transfer",
    power_transfer,
    _ranges,
    title="power transfer: E + A/N^alpha + B/D^beta + sum_k K_k (1 + D^delta_k sum_j t_kj h_j^g_k)^-b_k",
    paper="this project; after arXiv 2403.16952 and 2203.15556",
    many_sources=True,
)

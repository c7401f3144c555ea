"""D-CPT, the domain-specific continual pre-training law (arXiv 2406.01375, form L3), and its two simpler rivals.

    L3(N, D, r) = E + A / N^alpha + B r^eta / D^beta + C / (r + eps)^gamma

N parameters and D tokens in billions; r the share of the corpus whose loss is predicted. General and domain loss are
fitted apart. Owns the formulas, and what makes a fit of L3 admissible. L3 always falls with D: a general loss that
rises because little of it is replayed cannot be represented (``cpt.planner.admissibility`` looks for it).

The paper names its rejected candidates without their algebra; L1 (no interaction of share and tokens) and L5 (one data
term) are re-derived here from the parameter counts and the failures that it states.
"""

import numpy as np

from cpt.planner.fitting import FloatArray, Parameter, pinned, positive
from cpt.planner.laws.law import Inputs, Samples, parametric

PAPER = "arXiv 2406.01375"


def dcpt(theta: FloatArray, inputs: Inputs) -> tuple[FloatArray, FloatArray]:
    """L3. ``theta`` (S, 9) in the order E, A, alpha, B, beta, eta, C, gamma, eps."""
    e, a, alpha, b, beta, eta, c, gamma, eps = theta.T[:, :, None]
    log_n, log_d, log_r = np.log(inputs.params), np.log(inputs.tokens), _log(inputs.own_share)
    per_a, per_b = np.exp(-alpha * log_n), np.exp(eta * log_r - beta * log_d)
    shifted = inputs.own_share + eps
    log_shifted = np.log(shifted)
    per_c = np.exp(-gamma * log_shifted)
    size, data, mix = a * per_a, b * per_b, c * per_c
    slopes = (np.ones_like(size), per_a, -size * log_n, per_b, -data * log_d, data * log_r)
    return e + size + data + mix, np.stack((*slopes, per_c, -mix * log_shifted, -gamma * mix / shifted), axis=1)


def l1(theta: FloatArray, inputs: Inputs) -> tuple[FloatArray, FloatArray]:
    """E + A / N^alpha + B / D^beta + C / (r + eps)^gamma: L3 with eta = 0. ``theta`` (S, 8), L3's order without eta."""
    with_eta = np.insert(theta, 5, 0.0, axis=1)
    loss, jacobian = dcpt(with_eta, inputs)
    return loss, np.delete(jacobian, 5, axis=1)


def l5(theta: FloatArray, inputs: Inputs) -> tuple[FloatArray, FloatArray]:
    """E + A / N^alpha + B / ((r + eps) D)^beta. ``theta`` (S, 6) in the order E, A, alpha, B, beta, eps."""
    e, a, alpha, b, beta, eps = theta.T[:, :, None]
    log_n, shifted = np.log(inputs.params), inputs.own_share + eps
    log_data = np.log(shifted) + np.log(inputs.tokens)
    per_a, per_b = np.exp(-alpha * log_n), np.exp(-beta * log_data)
    size, data = a * per_a, b * per_b
    slopes = (np.ones_like(size), per_a, -size * log_n, per_b, -data * log_data, -beta * data / shifted)
    return e + size + data, np.stack(slopes, axis=1)


def _log(values: FloatArray) -> FloatArray:
    """log with log(0) = -700, so that 0^eta is 0 and 0^eta log(0) is 0 for every eta in use."""
    return np.log(np.maximum(values, np.exp(-700.0)))


def floor_and_size(samples: Samples) -> tuple[Parameter, ...]:
    """E, A and alpha; with a single model size A and alpha cannot be told from E and are pinned to no effect."""
    lowest = float(samples.losses.min())
    floor = positive("E", 0.01 * lowest, lowest, (0.3 * lowest, 0.98 * lowest))
    if len(np.unique(samples.inputs.params)) == 1:
        return floor, pinned("A", 0.0), pinned("alpha", 1.0)
    at_middle = np.exp(0.35 * np.log(samples.inputs.params).mean())
    start = (0.02 * lowest * at_middle, lowest * at_middle)
    return floor, positive("A", 1e-6 * start[0], 1e4 * start[1], start), positive("alpha", 0.01, 3.0, (0.05, 1.0))


def data_term(samples: Samples) -> tuple[Parameter, Parameter]:
    """B and beta."""
    lowest = float(samples.losses.min())
    at_middle = np.exp(0.3 * np.log(samples.inputs.tokens).mean())
    start = (0.005 * lowest * at_middle, lowest * at_middle)
    return positive("B", 1e-6 * start[0], 1e4 * start[1], start), positive("beta", 0.01, 3.0, (0.05, 1.0))


def _share_term(samples: Samples) -> tuple[Parameter, ...]:
    lowest = float(samples.losses.min())
    return (
        positive("C", 1e-6 * lowest, 1e2 * lowest, (0.005 * lowest, lowest)),
        positive("gamma", 0.01, 5.0, (0.1, 2.0)),
        positive("eps", np.exp(-7.0), 1.0, (0.02, 1.0)),
    )


def _dcpt_ranges(samples: Samples) -> tuple[Parameter, ...]:
    eta = positive("eta", 1e-3, 5.0, (0.1, 2.0))
    return (*floor_and_size(samples), *data_term(samples), eta, *_share_term(samples))


def _l1_ranges(samples: Samples) -> tuple[Parameter, ...]:
    return (*floor_and_size(samples), *data_term(samples), *_share_term(samples))


def _l5_ranges(samples: Samples) -> tuple[Parameter, ...]:
    return (*floor_and_size(samples), *data_term(samples), positive("eps", np.exp(-7.0), 10.0, (0.01, 1.0)))


DCPT = parametric(
    "dcpt", dcpt, _dcpt_ranges, title="D-CPT L3: E + A/N^alpha + B r^eta/D^beta + C/(r+eps)^gamma", paper=PAPER
)
L1 = parametric("l1", l1, _l1_ranges, title="D-CPT L1, re-derived: no interaction of share and tokens", paper=PAPER)
L5 = parametric("l5", l5, _l5_ranges, title="D-CPT L5, re-derived: one term for share and tokens", paper=PAPER)

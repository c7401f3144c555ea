"""The forgetting law with injected pre-training data (arXiv 2502.06042): general loss that rises with domain tokens.

    general   L = L0 + A D^beta / ((1 + B p) N)^alpha        p share of general data, D domain tokens seen
    domain    L = E + A / (N^alpha D^beta)

N parameters and D = share_domain * tokens in billions, L in nats per token; L0 is the loss of the base, taken from the
data where it is known and fitted where it is not. Unlike D-CPT the general loss rises with tokens, more slowly the more
general data is mixed in: the reduction is ``(1 + B p)^-alpha``.

Traps. It never falls below the base: general data that still teaches the model something is outside of it, and a
warning counts such points. B is of the order of 1e3 to 1e4 in the paper, where p is below 5 %; at larger shares B p is
far above 1 and only A / B^alpha is known. With one model size N cannot be told from A. At p = 1 no domain data is seen
and L = L0. Shares below ``LOWEST_SHARE`` are held there in the domain's form, which has no value at D = 0.
"""

from dataclasses import replace

import numpy as np

from cpt.planner.fitting import FloatArray, Parameter, pinned, positive
from cpt.planner.laws.law import Fitted, Inputs, ParametricFit, Samples, parametric

PAPER = "arXiv 2502.06042"
DOMAIN = "domain"
LOWEST_SHARE = 1e-3


def reduction(share_general: float, injection: float, alpha: float) -> float:
    """``(1 + B p)^-alpha``: what part of the forgetting is left when a share p of general data is mixed in."""
    return float((1 + injection * share_general) ** -alpha)


def forgetting(theta: FloatArray, inputs: Inputs) -> tuple[FloatArray, FloatArray]:
    """General form, ``theta`` (S, 5) in the order L0, A, B, alpha, beta; for the domain (S, 4): E, A, alpha, beta."""
    return _domain_form(theta, inputs) if inputs.target == DOMAIN else _general_form(theta, inputs)


def _general_form(theta: FloatArray, inputs: Inputs) -> tuple[FloatArray, FloatArray]:
    fitted_base, a, b, alpha, beta = theta.T[:, :, None]
    share = inputs.own_share
    # 0^beta is 0: without domain data nothing is forgotten.
    log_d = np.log(np.maximum((1 - share) * inputs.tokens, 1e-300))
    log_n, injected = np.log(inputs.params), 1 + b * share
    shape = np.exp(beta * log_d - alpha * (np.log(injected) + log_n))
    rise = a * shape
    known = np.isfinite(inputs.base_loss)
    base = np.where(known, inputs.base_loss, fitted_base)
    by_base = np.broadcast_to(np.where(known, 0.0, 1.0), rise.shape)
    slopes = (by_base, shape, -alpha * rise * share / injected, -rise * (np.log(injected) + log_n), rise * log_d)
    return base + rise, np.stack(slopes, axis=1)


def _domain_form(theta: FloatArray, inputs: Inputs) -> tuple[FloatArray, FloatArray]:
    e, a, alpha, beta = theta.T[:, :, None]
    log_n, log_d = np.log(inputs.params), np.log(np.maximum(inputs.own_share, LOWEST_SHARE) * inputs.tokens)
    shape = np.exp(-alpha * log_n - beta * log_d)
    fall = a * shape
    return e + fall, np.stack((np.ones_like(fall), shape, -fall * log_n, -fall * log_d), axis=1)


def _ranges(samples: Samples) -> tuple[Parameter, ...]:
    lowest, highest = float(samples.losses.min()), float(samples.losses.max())
    one_size = len(np.unique(samples.inputs.params)) == 1
    exponent = positive("beta", 0.01, 3.0, (0.05, 1.0))
    if samples.inputs.target == DOMAIN:
        size = pinned("alpha", 0.0) if one_size else positive("alpha", 0.01, 3.0, (0.05, 1.0))
        floor = positive("E", 0.01 * lowest, lowest, (0.3 * lowest, 0.98 * lowest))
        return floor, positive("A", 1e-6 * lowest, 1e4 * lowest, (0.01 * lowest, lowest)), size, exponent
    known = samples.inputs.base_loss[np.isfinite(samples.inputs.base_loss)]
    floor = positive("L0", 0.5 * lowest, highest, (0.9 * lowest, lowest))
    if len(known) == len(samples):
        floor = pinned("L0", float(np.median(known)))
    rise = max(highest - lowest, 1e-3)
    return (
        floor,
        positive("A", 1e-8 * rise, 1e6 * rise, (0.01 * rise, 100 * rise)),
        positive("B", 1e-3, 1e6, (1.0, 1e4)),
        positive("alpha", 0.01, 3.0, (0.05, 1.0)),
        exponent,
    )


def _below_base(samples: Samples) -> str | None:
    below = int((samples.losses < samples.inputs.base_loss).sum())
    if samples.inputs.target == DOMAIN or not below:
        return None
    return (
        f"{below} of {len(samples)} general losses lie below their base, where this law cannot follow; "
        "use cmr or dcpt at such shares"
    )


_PLAIN = parametric(
    "forgetting",
    forgetting,
    _ranges,
    title="Forgetting: L0 + A D_domain^beta / ((1 + B share_general) N)^alpha",
    paper=PAPER,
    rises=True,
)


def fit_forgetting(samples: Samples, num_replicas: int, seed: int) -> Fitted:
    """The fit, with a warning where the general loss falls below its base."""
    fitted = _PLAIN.fit(samples, num_replicas, seed)
    note = _below_base(samples)
    if note is None or not isinstance(fitted, ParametricFit):
        return fitted
    return replace(fitted, warnings=(*fitted.warnings, note))


FORGETTING = replace(_PLAIN, fit=fit_forgetting)

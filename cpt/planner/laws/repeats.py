"""What repeated data is worth: the data-constrained scaling law (arXiv 2305.16264) and the harmful band of repeats.

    L(N, D, U) = E + A / N'^alpha + B / D'^beta
    D' = U + U R_D* (1 - exp(-R_D / R_D*)),   R_D = max(D/U - 1, 0)
    N' = U_N + U_N R_N* (1 - exp(-R_N / R_N*)),   U_N = min(N, N_opt(U)),   R_N = max(N/U_N - 1, 0)
    N_opt(U) = (U G)^(beta/alpha) G,   G = (alpha A / (beta B))^(1/(alpha + beta))

N parameters, D tokens seen, U distinct tokens: plain counts, not billions, because the paper's constants are fitted so.
L in nats per token. Owns these formulas with the published constants. Refuses nothing by itself: how many distinct
tokens a corpus has, the caller must know.

Traps: counting repeated domain tokens as fresh ones is the usual planning mistake (four passes are worth 3.7). The law
saturates and never rises, so it shows no overfitting; its constants come from one web corpus and one tokenizer.
"""

import math

from scipy.optimize import minimize_scalar

PAPER = "arXiv 2305.16264"
A = math.exp(6.255414)
B = math.exp(7.3049974)
E = math.exp(0.6254804)
ALPHA = BETA = 0.3526596
REPEATS_HALF_LIFE = 15.387756  # R_D*
EXCESS_PARAMS_HALF_LIFE = 5.309743  # R_N*
FLOPS_PER_PARAM_TOKEN = 6

# Repeats per model size N between which a small repeated set hurts most (Hernandez et al., arXiv 2205.10487).
BAND_LOW = (4.2e6, -0.56)
BAND_HIGH = (5.1e7, -0.50)


def _saturating(total: float, unique: float, half_life: float) -> float:
    repeats = max(total / unique - 1, 0.0)
    return min(total, unique) + unique * half_life * -math.expm1(-repeats / half_life)


def effective_tokens(tokens: float, unique: float) -> float:
    """D': how many fresh tokens ``tokens`` of a corpus with ``unique`` distinct ones are worth.

    Four passes are worth 3.7257 epochs, sixteen 10.58; more than ``unique * (1 + 15.4)`` is never reached.
    """
    return _saturating(tokens, unique, REPEATS_HALF_LIFE)


def effective_params(params: float, unique: float) -> float:
    """N': parameters beyond the optimum for ``unique`` tokens count less and less."""
    optimal = min(params, optimal_params(unique))
    return _saturating(params, optimal, EXCESS_PARAMS_HALF_LIFE)


def optimal_params(unique: float) -> float:
    """N_opt: the compute-optimal size for ``unique`` distinct tokens."""
    g = (ALPHA * A / (BETA * B)) ** (1 / (ALPHA + BETA))
    return float((unique * g) ** (BETA / ALPHA) * g)


def loss(params: float, tokens: float, unique: float) -> float:
    """L(N, D, U) in nats per token with the published constants."""
    size, data = effective_params(params, unique), effective_tokens(tokens, unique)
    return float(E + A / size**ALPHA + B / data**BETA)


def best_allocation(flops: float, unique: float) -> tuple[float, float, float]:
    """(tokens, epochs, params) with the lowest loss at ``flops`` = 6 N D; 1e22 and 25e9 give 237.3e9, 9.49, 7.02e9."""

    def at(log_tokens: float) -> float:
        tokens = math.exp(log_tokens)
        return loss(flops / (FLOPS_PER_PARAM_TOKEN * tokens), tokens, unique)

    # The loss is not convex at the kinks where repeats begin: a grid finds the valley.
    middle = 0.5 * math.log(flops / FLOPS_PER_PARAM_TOKEN)
    grid = [middle + 0.05 * step for step in range(-200, 201)]
    nearest = min(grid, key=at)
    found = minimize_scalar(at, bounds=(nearest - 0.05, nearest + 0.05), method="bounded", options={"xatol": 1e-10})
    tokens = math.exp(float(found.x))
    return tokens, tokens / unique, flops / (FLOPS_PER_PARAM_TOKEN * tokens)


def repeat_band(params: float) -> tuple[float, float]:
    """Repeats of a small set that hurt a model of ``params`` parameters; 43 to 1803 at 800M (arXiv 2205.10487)."""
    low, high = (factor * params**power for factor, power in (BAND_LOW, BAND_HIGH))
    return float(low), float(high)


def repeat_warning(params: float, repeats: float, source: str) -> str | None:
    """A sentence where ``source`` is repeated so often that copying suffers more than its loss shows."""
    low, high = repeat_band(params)
    if not low <= repeats <= high:
        return None
    return (
        f"{source} is seen {repeats:.0f} times; between {low:.0f} and {high:.0f} repeats a small set harms a model of "
        f"{params:.3g} parameters more than the loss shows (arXiv 2205.10487); add data or lower its share"
    )

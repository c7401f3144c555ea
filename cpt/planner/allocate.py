"""Usage 3 of D-CPT (arXiv 2406.01375): model size and tokens for a given compute, at a fixed share.

At C = 6 N D floating-point operations the domain loss along the curve N D = C/6 has one minimum. For Chinchilla-like
laws it has a closed form (arXiv 2203.15556, appendix A); here any law that sees sizes is minimised numerically, which
also serves the ones without.
"""

from dataclasses import replace
from typing import Any

import numpy as np

from cpt.planner.admissibility import at_shares, base_at
from cpt.planner.fitting import FloatArray
from cpt.planner.forecast import QUANTILES, Forecaster, band, outside, said
from cpt.planner.laws.law import Inputs
from cpt.planner.observations import BILLION, Observations
from cpt.problems import ConfigError, Problem
from cpt.rundir import DataError

FLOPS_PER_PARAMETER_TOKEN = 6.0
LOG_SIZES = np.linspace(np.log(1e-6), np.log(1e6), 4001)  # billions of parameters


def along_budget(by: Forecaster, log_sizes: FloatArray, compute: float, share_general: float) -> Inputs:
    """Inputs at sizes exp(log_sizes) (n,), in billions, with the tokens that ``compute`` = N D (1e18) leaves them."""
    own = share_general if by.target == "general" else 1 - share_general
    like = at_shares(by.samples.inputs, np.full(len(log_sizes), own), params=1.0, tokens=1.0)
    sizes = np.exp(log_sizes)
    return replace(like, params=sizes, tokens=compute / sizes, base_loss=base_at(by.samples.inputs, sizes))


def best_size(by: Forecaster, compute: float, share_general: float) -> float:
    """Parameters in billions with the lowest loss at N D = ``compute`` (1e18), to about 1e-7 of the size."""
    grid = LOG_SIZES
    for _ in range(4):
        losses = by.fitted.predict(along_budget(by, grid, compute, share_general))
        best = int(np.argmin(losses))
        grid = np.linspace(grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)], 201)
    return float(np.exp(grid[len(grid) // 2]))


def allocate(
    observations: Observations, general: Forecaster, domain: Forecaster, *, flops: float, share_general: float
) -> dict[str, Any]:
    """The facts of ``cpt plan recommend --flops``: the best size and tokens, their interval, and measured sizes beside.

    Raises:
        ConfigError: an impossible option. DataError: laws or observations that do not see the size.
    """
    if not 0 <= share_general <= 1:
        raise ConfigError(Problem("--share-general", share_general, "a share lies between 0 and 1"))
    sizes = np.unique(domain.samples.inputs.params)
    for by in (domain, general):
        if not by.ranked.law.sizes or len(sizes) < 2:
            raise DataError(
                f"--flops asks for a model size, but {'law ' + by.name if len(sizes) > 1 else 'one measured size'} "
                "cannot tell how the loss changes with it; run pilots at three sizes and use a law such as dcpt"
            )
    compute = flops / FLOPS_PER_PARAMETER_TOKEN / BILLION**2
    size = best_size(domain, compute, share_general)
    widen, told = outside(domain, params=size, tokens=compute / size, share=1 - share_general)
    told += outside(general, params=size, tokens=compute / size, share=share_general)[1]
    point = along_budget(domain, np.log([size]), compute, share_general)
    own = band(domain, point, widen=widen)
    other = band(general, along_budget(general, np.log([size]), compute, share_general), widen=widen)
    return {
        "usage": "flops",
        "flops": flops,
        "share_general": share_general,
        "share_domain": 1 - share_general,
        "interval": [share_general, share_general],
        "params": size * BILLION,
        "tokens": compute / size * BILLION,
        "params_interval": [end * BILLION for end in _size_interval(domain, compute, share_general, size, widen)],
        "predicted": {
            "loss_general": float(other.loss[0]),
            "loss_domain": float(own.loss[0]),
            "interval_general": [float(other.low[0]), float(other.high[0])],
            "interval_domain": [float(own.low[0]), float(own.high[0])],
        },
        "baselines": [_at_size(general, domain, float(n), compute, share_general, float(own.loss[0])) for n in sizes],
        "law": {"general": general.name, "domain": domain.name},
        "warnings": list(dict.fromkeys([*observations.warnings, *said(general), *said(domain), *told])),
    }


def _size_interval(
    by: Forecaster, compute: float, share_general: float, size: float, widen: float
) -> tuple[float, float]:
    """Where the replicates put the best size (billions), ``widen`` times as far from it in log size."""
    grid = LOG_SIZES[::4]
    replicas = by.fitted.replicas(along_budget(by, grid, compute, share_general))
    if not len(replicas):
        return (float("nan"), float("nan"))
    low, high = np.quantile(grid[np.argmin(replicas, axis=1)], QUANTILES)
    at = np.log(size)
    return float(np.exp(at - widen * max(at - low, 0.0))), float(np.exp(at + widen * max(high - at, 0.0)))


def _at_size(
    general: Forecaster, domain: Forecaster, size: float, compute: float, share_general: float, best: float
) -> dict[str, Any]:
    """A measured model size instead: models come in the sizes that exist."""
    at = np.log([size])
    loss = float(domain.fitted.predict(along_budget(domain, at, compute, share_general))[0])
    return {
        "name": f"{size * BILLION:.4g} parameters, {compute / size * BILLION:.4g} tokens",
        "params": size * BILLION,
        "tokens": compute / size * BILLION,
        "share_general": share_general,
        "loss_general": float(general.fitted.predict(along_budget(general, at, compute, share_general))[0]),
        "loss_domain": loss,
        "regret": max(0.0, loss - best),
    }

"""``cpt plan critical``: the smallest general share that keeps the general loss, for every tolerance epsilon.

    R*(eps, T) = min { share_general : L_general(share_general, T) <= L_general(base) + eps }

after the critical mixture ratio of arXiv 2407.17467, which calls the domain share ``1 - R*``. The paper fixes eps at
0.05 nats without saying why, and the answer is mostly a statement about eps; so the whole curve R*(eps) is given, next
to the turning points T0 (where the general loss stops rising) and the feasible set at every tolerance.

Owns the facts of the verb and their tables; the loss across shares and the search in it are
``cpt.planner.share_search``'s. Refuses to guess: a tolerance that no share meets is infeasible and has no share, and a
warning says which epsilon or budget would do. Tokens and parameters are counts, losses nats per token.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cpt.planner.fitting import FloatArray
from cpt.planner.laws.cmr import SAME_SHARE, SAME_SIZE, SizeFit, fit_cmr, fit_critical_ratio, trained_sizes
from cpt.planner.laws.law import Samples
from cpt.planner.laws.power_curves import Slope, lagrangian, turning_point
from cpt.planner.share_search import BILLION, REACH, CriticalQuery, Search, scaled_tokens
from cpt.problems import ConfigError, Problem
from cpt.rundir import DataError

NUM_TOLERANCES = 31  # of the curve over epsilon


def critical(general: Samples, query: CriticalQuery, domain: Samples | None = None) -> dict[str, Any]:
    """Facts of the verb: critical shares, the curves over epsilon and tokens, turning points, feasible sets, warnings.

    ``general``: observations of the general loss with the loss of their base; ``domain`` serves finite penalties.

    Raises:
        ConfigError: an option that cannot be. DataError: observations without base loss or with a single share.
    """
    _check(query)
    size, warnings = _choose_size(general, query.params)
    base = _base_loss(general, size) if query.base_loss is None else query.base_loss
    there = _of_size(general, size)
    if query.law is None and not len(there):
        fit_cmr(general).size_of(size)  # says which sizes there are
    search = Search(there if query.law is None else general, query, size, base)
    rows = [search.row(epsilon) for epsilon in query.epsilons]
    warnings += [*search.warnings, *_range_warnings(rows, search.samples, query.tokens)]
    warnings += [search.remedy(row["epsilon"]) for row in rows if not row["feasible"]]
    turning, curves = _over_tokens(there, domain, query, base)
    return {
        "tokens": query.tokens,
        "params": size * BILLION,
        "law": search.law,
        "base_loss": base,
        "critical": rows,
        "epsilon_curve": [search.row(float(epsilon)) for epsilon in _tolerances(query.epsilons)],
        "curve": search.over_tokens(query.epsilons),
        "turning_points": turning,
        "turning_share": _turning_share(turning, query.tokens),
        "feasible_set": _feasible_set(turning, query.epsilons),
        "delta_curves": curves,
        "warnings": list(dict.fromkeys(warnings)),
    }


def _over_tokens(
    samples: Samples, domain: Samples | None, query: CriticalQuery, base: float
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Turning points and delta curves; none for a size that was not trained."""
    if not len(samples):
        return [], []
    size = fit_cmr(samples, interior=False).sizes[0]
    turning = _turning_points(size, base, query, _domain_curves(domain, size.params, query))
    return turning, _delta_curves(samples, size, base, query.tokens)


def _turning_points(size: SizeFit, base: float, query: CriticalQuery, domain: SizeFit | None) -> list[dict[str, Any]]:
    """For each trained share: T0, whether the general loss has stopped rising by the budget, and its change there."""
    wanted = query.tokens / BILLION
    losses = size.curves.at(np.log(np.array([wanted])), slice(0, 1))[0, 0]
    middle = float(np.exp(size.curves.middle.mean()))
    low, high = middle / REACH, REACH * max(wanted, middle)
    found = []
    for row, share in enumerate(size.shares):
        slope = lagrangian(size.curves.slope(row), _partner(domain, float(share)), query.penalty)
        turn = turning_point(slope, low, high)
        found.append(
            {
                "share_general": float(share),
                "tokens": None if turn is None else turn * BILLION,
                "feasible": slope.at(math.log(wanted)) <= 0,
                "delta_general": float(losses[row]) - base,
            }
        )
    return found


def _partner(domain: SizeFit | None, share_general: float) -> Slope | None:
    if domain is None:
        return None
    return domain.curves.slope(int(np.argmin(np.abs(1 - domain.shares - share_general))))


def _domain_curves(domain: Samples | None, size: float, query: CriticalQuery) -> SizeFit | None:
    if math.isinf(query.penalty):
        return None
    if domain is None:
        raise ConfigError(
            Problem("penalty", query.penalty, "needs the domain's losses", "leave it out, or measure loss_domain")
        )
    return fit_cmr(_of_size(domain, size), interior=False).sizes[0]


def _turning_share(turning: list[dict[str, Any]], tokens: float) -> float | None:
    """The general share whose general loss turns exactly at ``tokens``: CMR's R_CMR(T), from three pairs or more."""
    pairs = [(row["tokens"], 1 - row["share_general"]) for row in turning if row["tokens"] and row["share_general"] < 1]
    if len(pairs) < 3:
        return None
    found = 1 - fit_critical_ratio([pair[0] for pair in pairs], [pair[1] for pair in pairs])(tokens)
    return min(max(found, 0.0), 1.0)


def _feasible_set(turning: list[dict[str, Any]], epsilons: Sequence[float]) -> list[dict[str, Any]]:
    """The paper's set at each tolerance: trained shares within it at the budget whose general loss rises no more."""
    return [
        {
            "epsilon": epsilon,
            "shares_general": [
                row["share_general"] for row in turning if row["feasible"] and row["delta_general"] <= epsilon
            ],
        }
        for epsilon in epsilons
    ]


def _delta_curves(samples: Samples, size: SizeFit, base: float, tokens: float) -> list[dict[str, Any]]:
    inputs = samples.inputs
    budgets = np.geomspace(inputs.tokens.min(), max(tokens / BILLION, inputs.tokens.max()), 60)
    fitted = size.curves.at(np.log(budgets), slice(0, 1))[0] - base
    found = []
    for row, share in enumerate(size.shares):
        own = np.flatnonzero(np.abs(inputs.own_share - share) < 2 * SAME_SHARE)
        own = own[np.argsort(inputs.tokens[own], kind="stable")]
        measured = np.column_stack((inputs.tokens[own] * BILLION, samples.losses[own] - base))
        curve = np.column_stack((budgets * BILLION, fitted[:, row]))
        found.append({"share_general": float(share), "measured": measured.tolist(), "fitted": curve.tolist()})
    return found


def _tolerances(epsilons: Sequence[float]) -> FloatArray:
    top = max(*epsilons, 0.05)
    return np.linspace(min(*epsilons, 0.0), top, NUM_TOLERANCES)


def _check(query: CriticalQuery) -> None:
    problems = []
    if not (math.isfinite(query.tokens) and query.tokens > 0):
        problems.append(Problem("tokens", query.tokens, "must be a positive number", "give the budget, such as 20e9"))
    if query.params is not None and not (math.isfinite(query.params) and query.params > 0):
        problems.append(
            Problem("params", query.params, "must be a positive number", "give the model size, such as 8e9")
        )
    if not query.epsilons or not all(math.isfinite(epsilon) for epsilon in query.epsilons):
        rule = "must be one or more numbers, in nats per token"
        problems.append(Problem("epsilon", list(query.epsilons), rule, "give for example 0.0 0.01 0.05"))
    if not query.penalty > 0:
        problems.append(Problem("penalty", query.penalty, "must be positive", "the paper uses 100 to 7000"))
    if problems:
        raise ConfigError(*problems)


def _choose_size(samples: Samples, params: float | None) -> tuple[float, list[str]]:
    """The size in billions; without ``params`` the largest that was trained."""
    sizes = trained_sizes(samples)
    if params is not None:
        nearest = min(sizes, key=lambda size: abs(math.log(size * BILLION / params)))
        return (nearest if abs(params / (nearest * BILLION) - 1) <= SAME_SIZE else params / BILLION), []
    if len(sizes) == 1:
        return sizes[0], []
    return sizes[-1], [
        f"{len(sizes)} model sizes were trained and params is not given; the largest, {sizes[-1] * BILLION:.4g}, is "
        "used (the paper's larger models need less general data)"
    ]


def _of_size(samples: Samples, size: float) -> Samples:
    return samples.select(np.abs(samples.inputs.params / size - 1) <= 2 * SAME_SIZE)


def _base_loss(samples: Samples, size: float) -> float:
    known = np.unique(_of_size(samples, size).inputs.base_loss)
    known = known[np.isfinite(known)]
    if not len(known):
        raise DataError(
            f"loss_{samples.inputs.target}: no base row (tokens = 0) for {size * BILLION:.4g} parameters; epsilon is "
            "measured from the loss of the base, so add its starting losses"
        )
    return float(np.median(known))


def _range_warnings(rows: Sequence[Mapping[str, Any]], samples: Samples, tokens: float) -> list[str]:
    found = []
    last, first = samples.inputs.tokens.max() * BILLION, samples.inputs.tokens.min() * BILLION
    if tokens > 1.01 * last:
        found.append(
            f"{tokens:.3g} tokens lie {tokens / last:.3g} times beyond the measured {last:.3g}; curves are extrapolated"
        )
    if tokens < 0.99 * first:
        found.append(f"{tokens:.3g} tokens lie before the first measurement at {first:.3g}; curves are extrapolated")
    shares = samples.inputs.own_share
    for row in rows:
        share = row["share_general"]
        if share is not None and not shares.min() <= share <= shares.max():
            found.append(
                f"the critical share {share:.3f} at epsilon {row['epsilon']:g} lies outside the trained general shares "
                f"{shares.min():.3f} to {shares.max():.3f}"
            )
    return found


def render(facts: Mapping[str, Any]) -> RenderableType:
    """The facts as tables."""
    critical_shares = Table(title=f"critical general share at {facts['tokens']:.4g} tokens ({facts['law']})")
    for column in ("epsilon", "general share", "90% interval", "domain share", "feasible trained shares"):
        critical_shares.add_column(column, justify="right", no_wrap=column == "90% interval")
    for row, members in zip(facts["critical"], facts["feasible_set"], strict=True):
        share = row["share_general"]
        interval = "" if row["interval"] is None else "{:.3f} to {:.3f}".format(*row["interval"])
        critical_shares.add_row(
            f"{row['epsilon']:g}",
            "infeasible" if share is None else f"{share:.3f}",
            interval if share is not None else "",
            "" if share is None else f"{1 - share:.3f}",
            ", ".join(f"{value:.3g}" for value in members["shares_general"]) or "none",
        )
    turning = Table(title="where the general loss turns")
    for column in ("general share", "stops rising at (tokens)", "falling at the budget", "change there (nats)"):
        turning.add_column(column, justify="right")
    for row in facts["turning_points"]:
        turning.add_row(
            f"{row['share_general']:.3g}",
            "none" if row["tokens"] is None else scaled_tokens(row["tokens"] / BILLION),
            "yes" if row["feasible"] else "no",
            f"{row['delta_general']:+.4f}",
        )
    return Group(critical_shares, turning, *(Text(f"warning: {text}") for text in facts["warnings"]))

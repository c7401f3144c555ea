"""From fitted laws to a share of general data: usages 1 and 2 of D-CPT (arXiv 2406.01375) for any pair of laws.

Usage 1: at N parameters and D tokens, the share with the lowest domain loss whose general loss stays within a tolerance
of the base. Usage 2: the domain corpus holds D_d tokens, used once, so D = D_d / share_domain; with a fixed budget
instead, repeated domain tokens count for what they are worth (arXiv 2305.16264). Owns the search, its bootstrap
interval and the baselines. Refuses shares where a law's trend is wrong, and says what would make an empty feasible set
feasible.

Regret of a choice, in nats: the domain loss that it gives up against the recommendation, plus its general loss above
the limit. Both count, so replaying nothing is no bargain because its domain loss is low.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cpt.planner.admissibility import at_shares, trusted_shares
from cpt.planner.base_losses import base_loss
from cpt.planner.fitting import FloatArray
from cpt.planner.forecast import QUANTILES, Band, Forecaster, band, check_size, form_error, outside, said, snapped
from cpt.planner.laws.law import Inputs
from cpt.planner.laws.repeats import effective_tokens, repeat_warning
from cpt.planner.observations import BILLION, Observations
from cpt.problems import ConfigError, Problem

GRID_SHARES = 1001
MAX_SHARE_ONCE = 0.99  # usage 2: with all general data a domain corpus would last for ever
DEFAULT_TOLERANCE = 0.03
NEARLY_FREE_PASSES = 4.0
NO_LIMIT = "no --tolerance is given: the lowest domain loss is sought, whatever the model forgets"
PROMISE_POINTS = 24
PROMISE_RANGE = 50.0  # at most; before that a run is still re-warming, and before the shortest pilot nothing is known


@dataclass(frozen=True)
class Question:
    """What is asked; params and tokens in billions, ``tolerance`` relative to the base's general loss.

    ``tokens`` None: the domain corpus is used once. ``general_tokens`` only serves the token-proportional baseline.
    """

    params: float
    tokens: float | None
    tolerance: float | None = None
    domain_tokens: float | None = None
    general_tokens: float | None = None

    def budget(self, share_general: FloatArray) -> FloatArray:
        """(n,) tokens of the run in billions."""
        if self.tokens is not None:
            return np.full(len(share_general), self.tokens)
        assert self.domain_tokens is not None, "without a budget the domain corpus sets it"
        return self.domain_tokens / (1 - np.minimum(share_general, MAX_SHARE_ONCE))


@dataclass(frozen=True)
class Sides:
    """The laws of both losses, and the general loss that may not be exceeded (nats, infinite: no limit)."""

    general: Forecaster
    domain: Forecaster
    limit: float = math.inf


@dataclass(frozen=True)
class Choice:
    """A share of general data with its 90% interval; ``feasible`` False: even the best share breaks the limit."""

    share_general: float
    interval: tuple[float, float]
    feasible: bool


def pick(grid: FloatArray, general: FloatArray, domain: FloatArray, limit: float | FloatArray) -> FloatArray:
    """(B,) shares of ``grid`` (G,) with the lowest ``domain`` (B, G) loss where ``general`` (B, G) keeps the ``limit``.

    Where no share keeps it, the one with the lowest general loss.
    """
    allowed = general <= np.asarray(limit).reshape(-1, 1) if np.ndim(limit) else general <= limit
    wanted = np.argmin(np.where(allowed, domain, np.inf), axis=1)
    safest = np.argmin(general, axis=1)
    return np.asarray(grid[np.where(allowed.any(axis=1), wanted, safest)])


def refine(
    losses: Callable[[FloatArray], tuple[FloatArray, FloatArray]], limit: float, low: float, high: float
) -> float:
    """The best share between ``low`` and ``high`` to about 1e-9; ``losses(shares)`` gives general and domain (n,)."""
    share = low
    for _ in range(6):
        grid = np.linspace(low, high, 401)
        general, domain = losses(grid)
        share = float(pick(grid, general[None, :], domain[None, :], limit)[0])
        step = (high - low) / 400
        low, high = max(low, share - step), min(high, share + step)
    return round(share, 12)  # the ends of the range come out a rounding error inside


def general_inputs(by: Forecaster, question: Question, share_general: FloatArray) -> Inputs:
    like = at_shares(by.samples.inputs, share_general, params=snapped(by, question.params), tokens=1.0)
    return replace(like, tokens=question.budget(share_general))


def domain_inputs(by: Forecaster, question: Question, share_general: FloatArray) -> Inputs:
    """As many tokens as they are worth: repeated domain tokens count less, which lowers budget and share alike."""
    seen = question.budget(share_general) * (1 - share_general)
    worth = seen if question.domain_tokens is None else np.vectorize(effective_tokens)(seen, question.domain_tokens)
    tokens = question.budget(share_general) - seen + worth
    like = at_shares(by.samples.inputs, worth / tokens, params=snapped(by, question.params), tokens=1.0)
    return replace(like, tokens=tokens)


def recommend(
    observations: Observations, general: Forecaster, domain: Forecaster, question: Question
) -> dict[str, Any]:
    """The facts of ``cpt plan recommend`` for usages 1 and 2.

    Raises:
        ConfigError: an option that cannot be, a size the laws do not know, a limit that no share keeps.
        DataError: the base loss is not known.
    """
    check_size(general, question.params)
    check_size(domain, question.params)
    bound = base_loss(observations, "general", question.params * BILLION) if question.tolerance is not None else None
    limit = bound.loss * (1 + (question.tolerance or 0.0)) if bound else math.inf
    sides = Sides(general, domain, limit)
    low, high, warnings = allowed_range(sides, question)
    warnings = [*(bound.warnings if bound else [NO_LIMIT]), *warnings]
    choice = choose_share(sides, question, low, high)
    if not choice.feasible and question.tolerance is not None:
        raise ConfigError(_infeasible(sides, question, choice.share_general))
    widen, told = _outside(sides, question, choice.share_general)
    told += repeats_told(question, choice.share_general)
    if 0 < low >= choice.share_general - 1e-6:
        told.append(
            f"{low:.3g} is the lowest share that may be recommended here; a pilot below it may allow less replay"
        )
    return {
        "usage": "tolerance" if question.tokens is not None else "domain-tokens",
        "share_general": choice.share_general,
        "share_domain": 1 - choice.share_general,
        "interval": list(_widened(choice, widen, low, high)),
        "params": question.params * BILLION,
        "tokens": float(question.budget(np.array([choice.share_general]))[0]) * BILLION,
        "domain_passes": passes(question, choice.share_general),
        "limit_general": None if math.isinf(limit) else limit,
        "tolerance": question.tolerance,
        "trusted_shares": [low, high],
        "predicted": _predicted(sides, question, choice.share_general),
        "baselines": baselines(observations, sides, question, choice.share_general),
        "curve": curve(sides, question, np.linspace(low, high, 61)),
        "promise": promise(sides, question, choice.share_general),
        "law": {"general": general.name, "domain": domain.name},
        "warnings": _unique([*observations.warnings, *said(general), *said(domain), *warnings, *told]),
    }


def allowed_range(sides: Sides, question: Question) -> tuple[float, float, list[str]]:
    """Shares of general data between the pilots' at which both laws' trends hold; the range and what was cut off.

    Towards either end losses change in kind (with no replay the general loss jumps), so shares that no pilot came near
    are not recommended whatever a law says of them.

    Raises:
        ConfigError: there is no share at which all of that holds.
    """
    measured = sides.general.samples.inputs.own_share
    low, high = float(measured.min()), float(measured.max())
    high = high if question.tokens is not None else min(high, MAX_SHARE_ONCE)
    told: list[str] = []
    tokens = question.tokens if question.tokens is not None else (question.domain_tokens or 1.0)
    for by in (sides.general, sides.domain):
        trusted = trusted_shares(by.fitted, by.samples.inputs, params=snapped(by, question.params), tokens=tokens)
        least = max(trusted.low, by.above or 0.0)
        ends = (least, trusted.high) if by.target == "general" else (1 - trusted.high, 1 - least)
        if max(low, ends[0]) >= min(high, ends[1]):
            rule = (
                f"law {by.name} is trusted at general shares {ends[0]:.3g} to {ends[1]:.3g}, what else holds asks for"
            )
            fix = "choose another law, or run pilots with more tokens or at other shares"
            raise ConfigError(Problem("--law", by.name, f"{rule} {low:.3g} to {high:.3g}", fix))
        low, high = max(low, ends[0]), min(high, ends[1])
        told += trusted.warnings
    return low, high, told


def choose_share(sides: Sides, question: Question, low: float, high: float) -> Choice:
    """The best share, refined, and where the bootstrap replicates put it."""
    grid = np.linspace(low, high, GRID_SHARES)
    inputs = general_inputs(sides.general, question, grid), domain_inputs(sides.domain, question, grid)
    general, domain = sides.general.fitted.predict(inputs[0]), sides.domain.fitted.predict(inputs[1])
    rough = float(pick(grid, general[None, :], domain[None, :], sides.limit)[0])
    step = grid[1] - grid[0]

    def losses(shares: FloatArray) -> tuple[FloatArray, FloatArray]:
        return (
            sides.general.fitted.predict(general_inputs(sides.general, question, shares)),
            sides.domain.fitted.predict(domain_inputs(sides.domain, question, shares)),
        )

    share = refine(losses, sides.limit, max(low, rough - step), min(high, rough + step))
    spread = _replica_shares(sides, grid, inputs)
    ends = np.quantile(spread, QUANTILES) if len(spread) else (share, share)
    interval = min(share, float(ends[0])), max(share, float(ends[1]))
    return Choice(share, interval, bool((general <= sides.limit).any()))


def _replica_shares(sides: Sides, grid: FloatArray, inputs: tuple[Inputs, Inputs]) -> FloatArray:
    """(B,) shares chosen by each pair of replicates; the general law's own error moves its curve up or down."""
    general, domain = sides.general.fitted.replicas(inputs[0]), sides.domain.fitted.replicas(inputs[1])
    if not len(general) or not len(domain):
        return np.empty(0)
    error = form_error(sides.general, inputs[0].tokens)
    offsets = np.random.default_rng(0x0FF5).normal(size=(len(general), 1)) * error
    return pick(grid, general + offsets, domain, sides.limit)


def _widened(choice: Choice, widen: float, least: float, most: float) -> tuple[float, float]:
    """The interval times ``widen``, inside the shares that may be recommended."""
    share, (low, high) = choice.share_general, choice.interval
    return max(least, share - widen * (share - low)), min(most, share + widen * (high - share))


def _outside(sides: Sides, question: Question, share: float) -> tuple[float, list[str]]:
    tokens = float(question.budget(np.array([share]))[0])
    found = [
        outside(by, params=snapped(by, question.params), tokens=tokens, share=own)
        for by, own in ((sides.general, share), (sides.domain, 1 - share))
    ]
    return max(widen for widen, _ in found), [line for _, lines in found for line in lines]


def bands(sides: Sides, question: Question, share: FloatArray) -> tuple[Band, Band]:
    """Predicted general and domain losses with intervals at shares (n,) of general data."""
    widen = _outside(sides, question, float(share[len(share) // 2]))[0]
    return (
        band(sides.general, general_inputs(sides.general, question, share), widen=widen),
        band(sides.domain, domain_inputs(sides.domain, question, share), widen=widen),
    )


def _predicted(sides: Sides, question: Question, share: float) -> dict[str, Any]:
    general, domain = bands(sides, question, np.array([share]))
    return {
        "loss_general": float(general.loss[0]),
        "loss_domain": float(domain.loss[0]),
        "interval_general": [float(general.low[0]), float(general.high[0])],
        "interval_domain": [float(domain.low[0]), float(domain.high[0])],
    }


def curve(sides: Sides, question: Question, shares: FloatArray) -> list[dict[str, Any]]:
    """Predicted losses with intervals at many shares of general data: what the figure draws."""
    general, domain = bands(sides, question, shares)
    return [{"share_general": float(share), **_point(general, domain, i)} for i, share in enumerate(shares)]


def promise(sides: Sides, question: Question, share: float) -> list[dict[str, Any]]:
    """Predicted losses along the run at its share: what ``cpt report`` holds against the measurements."""
    budget = float(question.budget(np.array([share]))[0])
    measured = min(float(by.samples.inputs.tokens.min()) for by in (sides.general, sides.domain))
    points = []
    for tokens in np.geomspace(min(max(budget / PROMISE_RANGE, measured), 0.5 * budget), budget, PROMISE_POINTS):
        then = replace(question, tokens=float(tokens))
        general, domain = bands(sides, then, np.array([share]))
        points.append({"tokens": float(tokens) * BILLION, **_point(general, domain, 0)})
    return points


def _point(general: Band, domain: Band, index: int) -> dict[str, Any]:
    return {
        "loss_general": float(general.loss[index]),
        "general_interval": [float(general.low[index]), float(general.high[index])],
        "loss_domain": float(domain.loss[index]),
        "domain_interval": [float(domain.low[index]), float(domain.high[index])],
    }


def baselines(observations: Observations, sides: Sides, question: Question, share: float) -> list[dict[str, Any]]:
    """What the usual rules would choose, with predicted losses and regret; a rule that needs unknown facts says so."""
    named: dict[str, float | None] = {
        "recommended": share,
        "uniform": 0.5,
        "token-proportional": _proportional(question),
        "replay 5%": 0.05,
        "replay 25%": 0.25,
        "best pilot": best_pilot(observations, question.tolerance),
    }
    known = {name: value for name, value in named.items() if value is not None}
    shares = np.array(list(known.values()))
    general, domain = bands(sides, question, shares)
    losses = {name: (float(general.loss[i]), float(domain.loss[i])) for i, name in enumerate(known)}
    return [_baseline(name, value, losses, sides.limit) for name, value in named.items() if name != "recommended"]


def _baseline(
    name: str, share: float | None, losses: Mapping[str, tuple[float, float]], limit: float
) -> dict[str, Any]:
    if share is None:
        missing = {"note": "needs --general-tokens and --domain-tokens"} if name == "token-proportional" else {}
        unknown = dict.fromkeys(("share_general", "loss_general", "loss_domain", "regret"))
        return {"name": name, **unknown, **missing}
    general, domain = losses[name]
    regret = max(0.0, domain - losses["recommended"][1]) + max(0.0, general - limit)
    return {
        "name": name,
        "share_general": share,
        "loss_general": general,
        "loss_domain": domain,
        "regret": regret,
        "feasible": general <= limit + 1e-12,
    }


def _proportional(question: Question) -> float | None:
    if question.general_tokens is None or question.domain_tokens is None:
        return None
    return question.general_tokens / (question.general_tokens + question.domain_tokens)


def best_pilot(observations: Observations, tolerance: float | None) -> float | None:
    """The share of the run that ended best: lowest domain loss among those within the tolerance of their base.

    Judged on the largest measured size, at the end of its longest runs.
    """
    measured = observations.trained & np.isfinite(observations.losses["domain"])
    largest = measured & (observations.params == observations.params[measured].max())
    last = largest & (observations.tokens >= 0.999 * observations.tokens[largest].max())
    ends = observations.select(last)
    rise = ends.losses["general"] / observations.measured_base("general")[last] - 1
    within = rise <= (math.inf if tolerance is None else tolerance)
    if not within.any():
        within = np.ones(len(ends), dtype=bool)
    return float(ends.shares["general"][within][np.argmin(ends.losses["domain"][within])])


def _budget_advice(sides: Sides, question: Question, share: float) -> str:
    """Whether half or twice the tokens would lower the general loss, as its law sees it."""
    at = np.array([share])
    budget = float(question.budget(at)[0])
    fewer, same, more = (
        float(sides.general.fitted.predict(general_inputs(sides.general, replace(question, tokens=t), at))[0])
        for t in (budget / 2, budget, budget * 2)
    )
    if min(fewer, more) >= same:
        return "or lower the learning rate"
    return f"train {'fewer' if fewer < more else 'more'} tokens, or lower the learning rate"


def _infeasible(sides: Sides, question: Question, best: float) -> Problem:
    general = sides.general.fitted.predict(general_inputs(sides.general, question, np.array([best])))
    start = sides.limit / (1 + (question.tolerance or 0.0))
    least = float(general[0]) / start - 1
    rule = (
        f"no trusted share of general data keeps the general loss within it: at share {best:.3g} it still rises by "
        f"{least:.2%} over the base's {start:.4f} nats"
    )
    fix = (
        f"ask for --tolerance {math.ceil(least * 1000 + 0.5) / 1000:g} or more, {_budget_advice(sides, question, best)}"
    )
    return Problem("--tolerance", question.tolerance, rule, fix)


def passes(question: Question, share_general: float) -> float | None:
    """How often the domain corpus is read; None where its size was not given."""
    if question.domain_tokens is None:
        return None
    return float(question.budget(np.array([share_general]))[0]) * (1 - share_general) / question.domain_tokens


def repeats_told(question: Question, share_general: float) -> list[str]:
    times = passes(question, share_general)
    if times is None or times <= NEARLY_FREE_PASSES * (1 + 1e-9):
        return []
    told = (
        f"the domain corpus is read {times:.3g} times; up to {NEARLY_FREE_PASSES:g} passes are nearly free, later ones "
    )
    harm = repeat_warning(question.params * BILLION, times, "the domain corpus")
    return [told + "are worth less and less (arXiv 2305.16264)", *([harm] if harm else [])]


def _unique(lines: list[str]) -> list[str]:
    return list(dict.fromkeys(lines))

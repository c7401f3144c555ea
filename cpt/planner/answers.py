"""Which question is asked: the options of a verb, checked, and the one function that answers them.

Owns the choice of usage (bounded forgetting, small domain corpus, compute budget, more than two sources) and the
defaults of sizes and budgets. Refuses options that contradict each other, all of them in one go.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cpt.planner.allocate import allocate
from cpt.planner.base_losses import base_loss
from cpt.planner.compare import Wanted
from cpt.planner.critical import critical
from cpt.planner.fit_law import check_learns, check_suits
from cpt.planner.forecast import Forecaster, check_size, forecaster, outside_scale, predict_facts, snapped
from cpt.planner.laws.cmr import CMR
from cpt.planner.many_sources import ManyQuestion, predict_mixture, read_weights, recommend_mixture
from cpt.planner.observations import BILLION, Observations, samples
from cpt.planner.recommend import DEFAULT_TOLERANCE, Question, recommend
from cpt.planner.share_search import CriticalQuery
from cpt.problems import ConfigError, Problem

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Ask:
    """Options as given; counts in parameters and tokens. ``available``: JSON of source -> tokens or weights."""

    params: float | None = None
    tokens: float | None = None
    tolerance: float | None = None
    domain_tokens: float | None = None
    general_tokens: float | None = None
    flops: float | None = None
    share_general: float | None = None
    available: Path | None = None
    law: str = "auto"
    seed: int = 0


POSITIVE = ("params", "tokens", "domain_tokens", "general_tokens", "flops")


def check(asked: Ask) -> None:
    """Raises ConfigError for every option that is no positive, finite number, and for those that exclude each other."""
    problems = []
    for name in POSITIVE:
        value = getattr(asked, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            problems.append(Problem(_option(name), value, "must be a positive number, such as 20e9"))
    if asked.tolerance is not None and not 0 <= asked.tolerance < 10:
        problems.append(Problem("--tolerance", asked.tolerance, "is a relative rise of at least 0, such as 0.03"))
    if asked.share_general is not None and not 0 <= asked.share_general <= 1:
        problems.append(Problem("--share-general", asked.share_general, "a share lies between 0 and 1"))
    if asked.flops is not None:
        for name in ("tokens", "params", "domain_tokens", "tolerance"):
            if getattr(asked, name) is not None:
                rule = "is chosen by --flops or has no meaning with it"
                problems.append(Problem(_option(name), getattr(asked, name), rule, "leave one of the two out"))
        if asked.share_general is None:
            problems.append(Problem("--share-general", None, "is required with --flops", "for example 0.2"))
    if problems:
        raise ConfigError(*problems)


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def recommend_facts(observations: Observations, asked: Ask, *, progress: Progress | None = None) -> dict[str, Any]:
    """The facts of ``cpt plan recommend``.

    Raises:
        ConfigError: impossible or missing options, an empty feasible set. DataError: unsuitable observations.
    """
    check(asked)
    if not observations.two_sided:
        return _recommend_many(observations, asked, progress)
    _check_two_sided(asked)
    check_learns(observations, samples(observations, "domain")[0])
    general, domain = _laws(observations, ("general", "domain"), asked, progress).values()
    if asked.flops is not None and asked.share_general is not None:
        return allocate(observations, general, domain, flops=asked.flops, share_general=asked.share_general)
    return recommend(observations, general, domain, _question(observations, asked))


def _check_two_sided(asked: Ask) -> None:
    problems = []
    if asked.available is not None:
        fix = "give --general-tokens and --domain-tokens"
        problems.append(Problem("--available", str(asked.available), "belongs to more than two sources", fix))
    if asked.flops is None and asked.share_general is not None:
        fix = "leave it out, or ask `cpt plan predict` for the losses at a share"
        problems.append(Problem("--share-general", asked.share_general, "is what recommend answers", fix))
    if asked.flops is None and asked.tokens is None and asked.domain_tokens is None:
        fix = "give --tokens, or --domain-tokens for a small domain corpus, or --flops"
        problems.append(Problem("--tokens", None, "is required: the share depends on the budget", fix))
    if problems:
        raise ConfigError(*problems)


def _question(observations: Observations, asked: Ask) -> Question:
    once = asked.tokens is None
    return Question(
        params=_in_billions(asked.params) or float(observations.sizes[-1]) / BILLION,
        tokens=_in_billions(asked.tokens),
        tolerance=DEFAULT_TOLERANCE if asked.tolerance is None and not once else asked.tolerance,
        domain_tokens=_in_billions(asked.domain_tokens),
        general_tokens=_in_billions(asked.general_tokens),
    )


def _in_billions(value: float | None) -> float | None:
    return None if value is None else value / BILLION


def _laws(
    observations: Observations, targets: tuple[str, ...], asked: Ask, progress: Progress | None
) -> dict[str, Forecaster]:
    found = {}
    for target in targets:
        check_suits(observations, asked.law, samples(observations, target)[0])
        found[target] = forecaster(observations, target, _wanted(asked), seed=asked.seed, progress=progress)
    return found


def _wanted(asked: Ask) -> Wanted:
    """Where laws will be asked; a domain corpus used once is taken at equal shares."""
    tokens = asked.tokens if asked.tokens is not None or asked.domain_tokens is None else 2 * asked.domain_tokens
    return Wanted(asked.law, _in_billions(asked.params), _in_billions(tokens), varies_size=asked.flops is not None)


def _check_many(observations: Observations, asked: Ask) -> None:
    problems = []
    for name in ("flops", "share_general", "domain_tokens", "general_tokens"):
        if getattr(asked, name) is not None:
            rule = f"has no meaning with {len(observations.sources)} sources"
            problems.append(Problem(_option(name), getattr(asked, name), rule, "give --available, source -> tokens"))
    if asked.tolerance is not None and "general" not in observations.losses:
        rule = "needs a column loss_general, which the observations do not have"
        problems.append(Problem("--tolerance", asked.tolerance, rule, "leave it out"))
    if problems:
        raise ConfigError(*problems)


def _recommend_many(observations: Observations, asked: Ask, progress: Progress | None) -> dict[str, Any]:
    _check_many(observations, asked)
    if asked.tokens is None and asked.available is not None:
        raise ConfigError(Problem("--tokens", None, "is required with --available: caps are shares of the budget"))
    available = read_weights(asked.available, observations.sources, "--available") if asked.available else {}
    tokens = asked.tokens if asked.tokens is not None else float(np.nanmax(observations.tokens))
    question = ManyQuestion(
        params=(asked.params if asked.params is not None else float(observations.sizes[-1])) / BILLION,
        tokens=tokens / BILLION,
        available=available,
        tolerance=asked.tolerance,
        seed=asked.seed,
    )
    return recommend_mixture(observations, _laws(observations, tuple(observations.losses), asked, progress), question)


def predicted_facts(
    observations: Observations, target: str, asked: Ask, *, progress: Progress | None = None
) -> dict[str, Any]:
    """The facts of ``cpt plan predict``: by --share-general for two sources, by --weights for more."""
    check(asked)
    if observations.two_sided == (asked.available is not None) or (
        observations.two_sided and asked.share_general is None
    ):
        wanted, other = ("--share-general", "--weights") if observations.two_sided else ("--weights", "--share-general")
        rule = f"is what these observations of {len(observations.sources)} sources need"
        raise ConfigError(Problem(wanted, None, rule, f"give it and leave {other} out"))
    weights = read_weights(asked.available, observations.sources, "--weights") if asked.available else None
    by = _laws(observations, (target,), asked, progress)[target]
    if weights is not None:
        return predict_mixture(by, weights, params=asked.params, tokens=asked.tokens)
    assert asked.share_general is not None, "checked above"
    return predict_facts(by, params=asked.params, tokens=asked.tokens, share_general=asked.share_general)


def critical_facts(observations: Observations, epsilons: tuple[float, ...], asked: Ask) -> dict[str, Any]:
    """The facts of ``cpt plan critical``."""
    check(asked)
    if not observations.two_sided:
        rule = "the critical share is one of general against domain data, these observations have other sources"
        raise ConfigError(Problem("OBSERVATIONS", str(observations.path), rule, "merge the sources into two"))
    general = samples(observations, "general")[0]
    check_suits(observations, asked.law, general)
    longest = float(observations.tokens.max())
    far = asked.tokens is not None and asked.tokens > CMR.reach * longest
    by_name = asked.law != "auto" or far  # curves across shares reach little beyond the measured tokens
    base = None if asked.params is None else base_loss(observations, "general", asked.params)
    query = CriticalQuery(
        tokens=asked.tokens if asked.tokens is not None else longest,
        epsilons=epsilons,
        law=None,
        params=asked.params,
        base_loss=None if base is None else base.loss,
        seed=asked.seed,
    )
    told = list(base.warnings) if base else []
    if by_name:
        by = forecaster(observations, "general", _wanted(asked), seed=asked.seed, num_replicas=0)
        size = _in_billions(asked.params) or float(observations.sizes[-1]) / BILLION
        check_size(by, size)
        told += [*by.notes, *outside_scale(by, params=snapped(by, size), tokens=query.tokens / BILLION)[1]]
        query = replace(query, law=by.ranked.law)
    facts = critical(general, query, samples(observations, "domain")[0])
    return {**facts, "warnings": list(dict.fromkeys([*observations.warnings, *facts["warnings"], *told]))}

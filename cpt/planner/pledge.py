"""From the facts of a recommendation to the record that a run carries: the plan file."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from cpt.planner.observations import Observations
from cpt.recommendation import (
    BaseLoss,
    LawNames,
    ObservationsFile,
    PromisePoint,
    Recommendation,
    RecommendedStage,
)


def recommendation_of(observations: Observations, facts: Mapping[str, Any]) -> Recommendation:
    """``facts`` as ``recommend``, ``allocate`` or ``recommend_many`` give them."""
    stage = RecommendedStage(
        tokens=max(1, round(facts["tokens"])),
        share_general=facts["share_general"],
        share_domain=facts["share_domain"],
        weights=facts.get("weights", {}),
    )
    rates = observations.lr[observations.trained]
    return Recommendation(
        usage=facts["usage"],
        base=_base_name(observations, facts["params"]),
        params=facts["params"],
        lr=float(np.median(rates)) if np.isfinite(rates).all() and (rates < 1).all() else None,
        stages=(stage,),
        interval=tuple(facts["interval"]) if facts["interval"] else None,
        law=LawNames(**facts["law"]),
        promise=tuple(PromisePoint(**point) for point in facts.get("promise", ())),
        base_loss=BaseLoss(*(_measured(observations, target, facts["params"]) for target in ("general", "domain"))),
        observations=ObservationsFile(str(observations.path), observations.sha256),
        warnings=tuple(facts["warnings"]),
    )


def _base_name(observations: Observations, params: float) -> str:
    """The base of that size, if one was measured."""
    same = np.isclose(observations.params, params, rtol=0.01)
    return observations.base[int(np.flatnonzero(same)[0])] if same.any() else ""


def _measured(observations: Observations, target: str, params: float) -> float | None:
    if target not in observations.losses:
        return None
    same = [loss for size, loss in observations.base_losses(target).values() if abs(size / params - 1) < 0.01]
    return float(np.mean(same)) if same else None

"""A recommendation for tests that follow one, show one, or hold a run to it."""

from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture
def recommend() -> Callable[..., Any]:
    """Builds a recommendation; changes are its fields, ``tokens``/``share``/``weights`` those of its only stage."""

    def make(*, tokens: int = 1024, share: float | None = 0.5, weights: Any = None, **changes: Any) -> Any:
        from cpt.recommendation import (
            BaseLoss,
            LawNames,
            ObservationsFile,
            PromisePoint,
            Recommendation,
            RecommendedStage,
        )

        domain = None if share is None else 1 - share
        half = PromisePoint(tokens / 2, 2.9, (2.87, 2.93), 2.5, (2.4, 2.6))
        fields = {
            "usage": "tolerance",
            "base": "",
            "params": 8e9,
            "lr": 1e-2,
            "stages": (RecommendedStage(tokens, share, domain, weights or {}),),
            "interval": None if share is None else (0.4, 0.6),
            "law": LawNames("cmr", "dcpt"),
            "promise": (half, PromisePoint(tokens, 2.95, (2.92, 2.98), 2.3, (2.2, 2.4))),
            "base_loss": BaseLoss(2.8, 3.5),
            "observations": ObservationsFile("observations.csv", "ab" * 32),
        }
        return Recommendation(**{**fields, **changes})

    return make

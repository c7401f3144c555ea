"""The record of one optimizer step, as hooks and the metrics file see it."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class StepInfo:
    """``step`` updates are done; losses are sums in nats over all ranks, so that windows and sources add up exactly."""

    step: int
    tokens_seen: int
    loss_sums: dict[str, float]
    counted: dict[str, int]
    lr: float
    grad_norm: float
    step_seconds: float
    seconds: Mapping[str, float]  # by phase (``cpt.train.phases``); what is missing to step_seconds is the loop itself
    attended_pairs: int = 0  # (query, key) pairs that attention computed over all ranks, document by document

    @classmethod
    def before_training(cls, step: int, *, tokens_seen: int) -> "StepInfo":
        return cls(step, tokens_seen, {}, {}, 0.0, 0.0, 0.0, {})

"""The record of one optimizer step, as hooks and the metrics file see it."""

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
    data_seconds: float

    @classmethod
    def before_training(cls, step: int, *, tokens_seen: int) -> "StepInfo":
        return cls(step, tokens_seen, {}, {}, 0.0, 0.0, 0.0, 0.0)

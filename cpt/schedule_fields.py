"""The fields of the learning-rate schedules, and the number types that all sections of a run configuration share.

Owns what a schedule needs to be told; its curve is in ``cpt.train.schedules``. Refuses a floor of 0 where the curve
cannot reach it.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def whole_number(value: object) -> object:
    """Accept ``20e9``, ``"1_000_000"`` and ``4096.0`` where an integer is meant; YAML reads ``20e9`` as a string."""
    if isinstance(value, bool):  # pydantic would take YAML's yes for 1
        raise ValueError(f"must be a whole number, not {str(value).lower()}")
    if isinstance(value, str):
        try:
            value = float(value.replace("_", "")) if "e" in value.lower() else int(value.replace("_", ""))
        except ValueError:
            return value
    return int(value) if isinstance(value, float) and value.is_integer() else value


Count = Annotated[int, BeforeValidator(whole_number), Field(ge=1)]
Steps = Annotated[int, BeforeValidator(whole_number), Field(ge=0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class RewarmCosine(Section):
    """Linear re-warm to the peak, cosine re-decay to the floor at the last step (arXiv 2403.08763)."""

    name: Literal["rewarm_cosine"] = "rewarm_cosine"
    warmup_steps: Steps | None = Field(None, description="steps of the linear warm-up; default: 1% of the steps")
    min_lr_ratio: Share = Field(0.1, description="final rate over peak rate")


class Constant(Section):
    name: Literal["constant"]
    warmup_steps: Steps = Field(0, description="steps of the linear warm-up")


class LinearToZero(Section):
    name: Literal["linear_to_zero"]
    warmup_steps: Steps = Field(0, description="steps of the linear warm-up")


class WarmupStableDecay(Section):
    """WSD: warm-up, plateau, decay over the last steps (arXiv 2404.06395)."""

    name: Literal["wsd"]
    warmup_steps: Steps = Field(0, description="steps of the linear warm-up")
    decay_steps: Steps = Field(description="steps of the final decay")
    decay: Literal["linear", "sqrt", "square", "cosine"] = Field(
        "sqrt", description="shape of the decay, sqrt: 1 - sqrt(x)"
    )
    min_lr_ratio: Share = Field(0.0, description="final rate over peak rate")


class Infinite(Section):
    """Warm-up, cooldown to a plateau that has no end, and a short exponential anneal (arXiv 2403.08763, 2503.02844)."""

    name: Literal["infinite_cosine", "infinite_inv_sqrt"]
    warmup_steps: Steps = Field(description="steps of the linear warm-up")
    cooldown_steps: Steps = Field(description="steps from the peak to the plateau")
    constant_steps: Steps = Field(description="steps on the plateau; what is left of the run anneals")
    constant_lr_ratio: Annotated[float, Field(gt=0.0, le=1.0)] = Field(0.55, description="plateau over peak rate")
    min_lr_ratio: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        0.1, description="final over peak rate; the exponential anneal cannot reach 0"
    )
    timescale: Annotated[float, Field(gt=0.0)] = Field(
        10.0, description="curvature of the inverse-square-root cooldown"
    )


def _named(schedule: object) -> object:
    """``train.schedule.warmup_steps=100`` alone changes the default schedule."""
    return {"name": "rewarm_cosine", **schedule} if isinstance(schedule, dict) else schedule


Known = Annotated[RewarmCosine | Constant | LinearToZero | WarmupStableDecay | Infinite, Field(discriminator="name")]
Schedule = Annotated[Known, BeforeValidator(_named)]

"""The fields of the mixture schedules: what each needs to be told.

Owns names, units and limits. What a schedule makes of them is in ``cpt.mix_schedules``; which fields of a run file
exclude each other is in ``cpt.run_rules``.
"""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from cpt.schedule_fields import Count, Section, Share, Steps

DEFAULT_REPLAY_SHARE = 0.25  # for a strong shift, such as prose to code or another language: arXiv 2403.08763

Weight = Annotated[float, Field(ge=0.0)]
Scope = Annotated[
    Literal["group", "all"],
    Field(description="group: general and domain keep their shares, sources share inside them; all: across the groups"),
]
Fraction = Annotated[float, Field(gt=0.0, lt=1.0)]


class StageSection(Section):
    tokens: Count = Field(description="tokens of this stage")
    share_general: Share | None = Field(
        None, description="share of general tokens in this stage; without it weights say it: the sum of general sources"
    )
    weights: dict[str, Weight] = Field(
        default_factory=dict,
        description="relative weight of each source inside its group, default: by tokens; "
        "without share_general its share of the whole stage",
    )
    seq_len: Count | None = Field(None, description="tokens in a packed row of this stage; default: data.seq_len")


class ConstantMix(Section):
    """One mixture: ``replay.share_general`` and ``data.weights``; or, with ``data.stages``, what the stages say."""

    name: Literal["constant"] = "constant"


class MixPoint(Section):
    """The mixture at one moment of the run; between two points it moves in a straight line."""

    tokens: Steps = Field(description="tokens seen, from the start of the run; the same number twice is a jump")
    share_general: Share | None = Field(None, description="share of general tokens; without it weights say it")
    weights: dict[str, Weight] = Field(
        default_factory=dict,
        description="relative weight of each source inside its group, default: data.weights; "
        "without share_general its share of the whole batch",
    )


class LinearMix(Section):
    """From point to point in straight lines; constant before the first and after the last."""

    name: Literal["linear"]
    points: tuple[MixPoint, ...] = Field(min_length=2, description="two or more, in the order of their tokens")


class TemperatureMix(Section):
    """Shares in proportion to tokens ** (1 / tau): 1 by size, large values evenly (arXiv 2410.04579)."""

    name: Literal["temperature"]
    tau: Annotated[float, Field(gt=0.0)] = Field(description="temperature; above 1 small sources are upsampled")
    final_tau: Annotated[float, Field(gt=0.0)] | None = Field(
        None, description="temperature of the end of the run (cool-down), mostly 1; default: none"
    )
    final_fraction: Fraction = Field(0.5, description="part of the run's tokens, at its end, that has final_tau")
    scope: Scope = "group"


class UpsampleEndMix(Section):
    """Named sources upsampled over the last part of the run (arXiv 2406.03476: 10-20% of the tokens was best)."""

    name: Literal["upsample_end"]
    factors: dict[str, Annotated[float, Field(gt=0.0)]] = Field(
        min_length=1, description="source -> its share at the end over its share before; the others make room"
    )
    final_fraction: Fraction = Field(0.15, description="part of the run's tokens, at its end")
    scope: Scope = "group"


def _named(mix: object) -> object:
    return {"name": "constant", **mix} if isinstance(mix, dict) else mix


Known = Annotated[ConstantMix | LinearMix | TemperatureMix | UpsampleEndMix, Field(discriminator="name")]
Mix = Annotated[Known, BeforeValidator(_named)]

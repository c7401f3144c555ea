"""The mixtures of a run in turn, and the plan that they make: what it has now, after what it had before.

Owns how a run file's statements become a plan once the sources are known. A mixture that was changed stays in the run
file (``data.past``), so the whole plan can be made again from it, on any machine, row by row.
"""

from collections.abc import Mapping

from cpt.mix_schedules import MIXES, MixRequest, after_step, steps
from cpt.plan import Plan, append_stages, build_plan
from cpt.plan_parts import PlanSource, StageWish
from cpt.run_fields import PastMixture, RunConfig


def plan_mixtures(
    config: RunConfig, sources: Mapping[str, PlanSource], packing: str = "concat"
) -> tuple[Plan, list[str]]:
    """The plan, and warnings on the mixture that the run has now.

    Raises:
        DataError: a mixture that cannot be had.
    """
    first, *later = mixtures = [*config.data.past, mixture_of(config, until_step=num_steps(config))]
    plan, warnings = build_plan(
        [sources[name] for name in first.sources],
        _wishes(config, first, sources),
        seed=config.run.seed,
        seq_len=config.data.seq_len,
        global_batch_rows=config.global_batch_rows,
        max_epochs=epoch_caps(first),
        packing=packing,
    )
    for before, mixture in zip(mixtures, later, strict=False):
        plan, warnings = append_stages(
            plan,
            after_step(_wishes(config, mixture, sources), before.until_step, config.train.global_batch_tokens),
            from_step=before.until_step,
            max_epochs=epoch_caps(mixture),
            new_sources=[sources[name] for name in mixture.sources if name not in before.sources],
        )
    return plan, warnings


def mixture_of(config: RunConfig, until_step: int) -> PastMixture:
    """The mixture that the run file states now, as it is kept when it is replaced."""
    data = config.data
    return PastMixture(
        until_step=until_step,
        sources=tuple(data.stores),
        share_general=config.replay.share_general,
        weights=data.weights,
        max_epochs=data.max_epochs,
        max_epochs_of=data.max_epochs_of,
        stages=data.stages,
        mix=data.mix,
    )


def epoch_caps(mixture: PastMixture) -> dict[str, float]:
    return {name: mixture.max_epochs_of.get(name, mixture.max_epochs) for name in mixture.sources}


def num_steps(config: RunConfig) -> int:
    return config.train.tokens // config.train.global_batch_tokens


def _budget_at(config: RunConfig, until_step: int) -> int:
    """Tokens that the run was to have when a mixture was planned that ended at ``until_step``: fewer than now, if it
    was extended since.
    """
    return next((past.tokens for past in config.train.past if until_step <= past.until_step), config.train.tokens)


def row_lengths(config: RunConfig) -> tuple[int, ...]:
    """``data.seq_len``, then every other length that a stage of the run has or had."""
    stages = [stage for part in (*(past.stages for past in config.data.past), config.data.stages) for stage in part]
    return tuple(dict.fromkeys([config.data.seq_len, *(stage.seq_len or config.data.seq_len for stage in stages)]))


def _wishes(config: RunConfig, mixture: PastMixture, sources: Mapping[str, PlanSource]) -> list[StageWish]:
    """Stages of the whole run as this mixture states them."""
    request = MixRequest(
        sources=tuple(sources[name] for name in mixture.sources),
        tokens=_budget_at(config, mixture.until_step),
        step_rows=config.global_batch_rows,
        step_tokens=config.train.global_batch_tokens,
        share_general=mixture.share_general,
        weights=mixture.weights,
    )
    return steps(mixture.stages, request) if mixture.stages else MIXES[mixture.mix.name](mixture.mix, request)

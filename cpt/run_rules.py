"""The rules between fields of a run file: what each pair of fields, right by itself, must not say together.

Owns one function per rule and the fields it reads; a rule is not checked while one of those is wrong itself. Refuses
to look at files: whether stores and weights fit is ``cpt.prepare``'s.
"""

from collections.abc import Callable
from itertools import pairwise

from cpt.mix_fields import MixPoint
from cpt.problems import Problem
from cpt.run_fields import RunConfig, StageSection

Rule = tuple[tuple[str, ...], Callable[[RunConfig], Problem | None]]


def _exactly_one_model(config: RunConfig) -> Problem | None:
    if (config.model.init_from is None) == (config.model.fresh is None):
        return Problem(
            "model", None, "give exactly one of model.init_from and model.fresh", "init_from continues a model"
        )
    return None


def _whole_rows(config: RunConfig) -> Problem | None:
    tokens, seq_len = config.train.global_batch_tokens, config.data.seq_len
    if tokens % seq_len:
        nearest = max(1, round(tokens / seq_len)) * seq_len
        rule = f"must be a multiple of data.seq_len ({seq_len})"
        return Problem("train.global_batch_tokens", tokens, rule, f"the nearest is {nearest}")
    return None


def _at_least_one_step(config: RunConfig) -> Problem | None:
    if config.train.tokens < config.train.global_batch_tokens:
        rule = f"is less than one step (train.global_batch_tokens = {config.train.global_batch_tokens})"
        return Problem("train.tokens", config.train.tokens, rule)
    return None


def _stages_fill_the_budget(config: RunConfig) -> Problem | None:
    total = sum(stage.tokens for stage in config.data.stages)
    if config.data.stages and total != config.train.tokens:
        return Problem("data.stages", total, f"stage tokens must add up to train.tokens ({config.train.tokens})")
    return None


def _shares_are_stated(config: RunConfig) -> Problem | None:
    """Weights without ``share_general`` must say the whole mixture."""
    stated: dict[str, StageSection | MixPoint] = {f"data.stages.{i}": each for i, each in enumerate(config.data.stages)}
    if config.data.mix.name == "linear":
        stated |= {f"data.mix.points.{i}": point for i, point in enumerate(config.data.mix.points)}
    for where, part in stated.items():
        if part.share_general is None and set(part.weights) != set(config.data.stores):
            rule = f"is required, unless weights state the share of every source ({sorted(config.data.stores)})"
            return Problem(f"{where}.share_general", None, rule, "share of general tokens in this stage")
    return None


def _one_mixture(config: RunConfig) -> Problem | None:
    """Shares are stated in one place: by stages, by the schedule, or for the whole run."""
    data, share, mix = config.data, config.replay.share_general, config.data.mix
    if data.stages and mix.name != "constant":
        return Problem("data.mix", mix.name, "data.stages states the mixture of every stage", "remove one of the two")
    if data.stages and share is not None:
        rule = "data.stages states the share of every stage"
        return Problem("replay.share_general", share, rule, "remove one of the two")
    if share is not None and (mix.name == "linear" or (mix.name == "temperature" and mix.scope == "all")):
        rule = f"data.mix ({mix.name}) states the share of general tokens"
        return Problem("replay.share_general", share, rule, "remove one of the two")
    if data.weights and mix.name == "temperature":
        return Problem("data.weights", data.weights, "data.mix (temperature) derives them from the sources' tokens")
    return None


def _points_lie_in_the_run(config: RunConfig) -> Problem | None:
    mix = config.data.mix
    if mix.name != "linear":
        return None
    places = [point.tokens for point in mix.points]
    if places != sorted(places):
        return Problem("data.mix.points", places, "their tokens must not fall from one point to the next")
    if places[-1] > config.train.tokens:
        return Problem("data.mix.points", places[-1], f"lies behind the end, train.tokens ({config.train.tokens})")
    return None


def _known_sources(config: RunConfig) -> Problem | None:
    data = config.data
    named = {
        "data.weights": set(data.weights).union(*(stage.weights for stage in data.stages)),
        "data.max_epochs_of": set(data.max_epochs_of),
        "data.mix.points": set().union(*(p.weights for p in data.mix.points)) if data.mix.name == "linear" else set(),
        "data.mix.factors": set(data.mix.factors) if data.mix.name == "upsample_end" else set(),
    }
    for field, names in named.items():
        if unknown := sorted(names - set(data.stores)):
            return Problem(field, unknown, f"names no source of data.stores ({sorted(data.stores)})")
    return None


def _past_leads_here(config: RunConfig) -> Problem | None:
    """A mixture of the past ends within the run and after the one before it; sources come, but never go."""
    steps, data = config.train.tokens // config.train.global_batch_tokens, config.data
    ends = [past.until_step for past in data.past]
    if ends != sorted(set(ends)) or (ends and ends[-1] >= steps):
        return Problem("data.past", ends, f"until_step must rise and stay below the run's {steps} steps")
    known = [*(set(past.sources) for past in data.past), set(data.stores)]
    if any(not before <= after for before, after in pairwise(known)):
        lost = sorted(set().union(*known) - known[-1])
        rule = "a source that the run has read may get a weight of 0, but must stay in data.stores"
        return Problem("data.stores", lost or sorted(data.stores), rule)
    return None


def _schedule_fits(config: RunConfig) -> Problem | None:
    steps = config.train.tokens // config.train.global_batch_tokens
    fields = config.train.schedule.model_dump()
    parts = {name: value for name, value in fields.items() if name.endswith("_steps") and value}
    if sum(parts.values()) > steps:
        rule = f"segments add up to {sum(parts.values())} steps but the run has {steps}"
        return Problem("train.schedule", parts, rule, "shorten them or raise train.tokens")
    return None


# Keys of the DeepSpeed dictionary that engine.py derives; stated again in deepspeed.extra they could contradict it.
GENERATED = frozenset(
    {
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "train_batch_size",
        "gradient_clipping",
        "bf16",
        "fp16",
        "torch_autocast",
        "data_types",
        "communication_data_type",
    }
)


def _extra_adds_only(config: RunConfig) -> Problem | None:
    extra = config.deepspeed.extra
    taken = sorted(GENERATED & set(extra))
    if isinstance(extra.get("zero_optimization"), dict) and "stage" in extra["zero_optimization"]:
        taken.append("zero_optimization.stage")
    if taken:
        rule = "is derived from other fields: train.micro_batch_size, train.global_batch_tokens, train.precision, "
        return Problem(
            f"deepspeed.extra.{taken[0]}", None, f"{rule}train.max_grad_norm, deepspeed.zero_stage", "remove it"
        )
    return None


def _evaluations_happen(config: RunConfig) -> Problem | None:
    steps = config.train.tokens // config.train.global_batch_tokens
    late = [step for step in config.eval.at_steps if step > steps]
    return Problem("eval.at_steps", late, f"lies behind the last step, {steps}") if late else None


RULES: tuple[Rule, ...] = (
    (("deepspeed.extra",), _extra_adds_only),
    (("eval.at_steps", "train.tokens", "train.global_batch_tokens"), _evaluations_happen),
    (("model",), _exactly_one_model),
    (("train.global_batch_tokens", "data.seq_len"), _whole_rows),
    (("train.tokens", "train.global_batch_tokens"), _at_least_one_step),
    (("data.stages", "train.tokens"), _stages_fill_the_budget),
    (("data.stages", "data.mix", "data.stores"), _shares_are_stated),
    (("data.stages", "data.mix", "data.weights", "replay.share_general"), _one_mixture),
    (("data.mix", "train.tokens"), _points_lie_in_the_run),
    (("data.weights", "data.max_epochs_of", "data.mix", "data.stages", "data.stores"), _known_sources),
    (("data.past", "data.stores", "train.tokens", "train.global_batch_tokens"), _past_leads_here),
    (("train.schedule", "train.tokens", "train.global_batch_tokens"), _schedule_fits),
)

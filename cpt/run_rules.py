"""The rules between fields of a run file: what each pair of fields, right by itself, must not say together.

Owns one function per rule and the fields it reads; a rule is not checked while one of those is wrong itself. Refuses
to look at files: whether stores and weights fit is ``cpt.prepare``'s.
"""

from collections.abc import Callable

from cpt.problems import Problem
from cpt.run_fields import RunConfig

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


def _stages_state_a_share(config: RunConfig) -> Problem | None:
    for index, stage in enumerate(config.data.stages):
        if stage.share_general is None and set(stage.weights) != set(config.data.stores):
            rule = f"is required, unless weights state the share of every source ({sorted(config.data.stores)})"
            return Problem(f"data.stages.{index}.share_general", None, rule, "share of general tokens in this stage")
    return None


def _replay_or_stages(config: RunConfig) -> Problem | None:
    if config.data.stages and config.replay.share_general is not None:
        rule = "data.stages states the share of every stage"
        return Problem("replay.share_general", config.replay.share_general, rule, "remove one of the two")
    return None


def _known_weights(config: RunConfig) -> Problem | None:
    named = set(config.data.weights).union(*(stage.weights for stage in config.data.stages))
    if unknown := sorted(named - set(config.data.stores)):
        return Problem("data.weights", unknown, f"names no source of data.stores ({sorted(config.data.stores)})")
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
    (("data.stages", "data.stores"), _stages_state_a_share),
    (("data.stages", "replay.share_general"), _replay_or_stages),
    (("data.weights", "data.stages", "data.stores"), _known_weights),
    (("train.schedule", "train.tokens", "train.global_batch_tokens"), _schedule_fits),
)

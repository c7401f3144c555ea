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


def _stages_have_whole_rows(config: RunConfig) -> Problem | None:
    tokens = config.train.global_batch_tokens
    odd = [stage.seq_len for stage in config.data.stages if stage.seq_len and tokens % stage.seq_len]
    if odd:
        rule = f"must divide train.global_batch_tokens ({tokens}), which is the same in every stage"
        return Problem("data.stages", f"seq_len {', '.join(map(str, odd))}", rule)
    return None


def _rows_are_shared(config: RunConfig) -> Problem | None:
    shared = config.deepspeed.sequence_parallel
    lengths = [config.data.seq_len, *(stage.seq_len for stage in config.data.stages if stage.seq_len)]
    if odd := sorted({length for length in lengths if length % shared}):
        rule = f"must divide the rows that ranks share ({', '.join(map(str, odd))} tokens)"
        return Problem("deepspeed.sequence_parallel", shared, rule)
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
    """The schedule of an extended run is counted from its extension."""
    start = config.train.past[-1].until_step if config.train.past else 0
    steps = config.train.tokens // config.train.global_batch_tokens - start
    fields = config.train.schedule.model_dump()
    parts = {name: value for name, value in fields.items() if name.endswith("_steps") and value}
    if sum(parts.values()) > steps:
        since = f" after its extension at step {start}" if start else ""
        rule = f"segments add up to {sum(parts.values())} steps but the run has {steps}{since}"
        return Problem("train.schedule", parts, rule, "shorten them or raise train.tokens")
    return None


def _past_rates_lead_here(config: RunConfig) -> Problem | None:
    """Each extension lies after the one before it, inside the run that it extended and inside this one."""
    step_tokens, past = config.train.global_batch_tokens, config.train.past
    ends = [rates.until_step for rates in past]
    if ends != sorted(set(ends)) or (ends and ends[-1] >= config.train.tokens // step_tokens):
        rule = "until_step must rise and stay below the run's steps"
        return Problem("train.past", ends, rule, "only cpt extend writes it; restore config.yaml from a copy")
    if wrong := [rates.until_step for rates in past if rates.until_step > rates.tokens // step_tokens]:
        rule = "until_step lies behind the end that its tokens give"
        return Problem("train.past", wrong, rule, "only cpt extend writes it; restore config.yaml from a copy")
    return None


def _micro_batch_fits(config: RunConfig) -> Problem | None:
    """Of any number of ranks; how many there are is asked when they are known."""
    rows, micro = config.global_batch_rows, config.train.micro_batch_size
    if 0 < rows < micro:
        rule = f"is more than the {rows} rows of a step (train.global_batch_tokens / data.seq_len)"
        return Problem("train.micro_batch_size", micro, rule, f"at most {rows}, or a larger global_batch_tokens")
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
        "optimizer",
        "scheduler",
    }
)
GENERATED_ZERO = frozenset(
    {
        "stage",
        "compute_grad_norm",
        "offload_optimizer",
        "zero_hpz_partition_size",
        "zero_quantized_weights",
        "zero_quantized_gradients",
    }
)


def _extra_adds_only(config: RunConfig) -> Problem | None:
    extra = config.deepspeed.extra
    taken = sorted(GENERATED & set(extra))
    zero = extra.get("zero_optimization")
    taken += [
        f"zero_optimization.{key}" for key in sorted(GENERATED_ZERO & set(zero if isinstance(zero, dict) else ()))
    ]
    if taken:
        rule = (
            "is derived from other fields, of train (batch, precision, clipping, optimizer, schedule) and of deepspeed "
        )
        rule += "(zero_stage, offload, hpz_size, quantized_communication)"
        return Problem(f"deepspeed.extra.{taken[0]}", None, rule, "remove it, and set those")
    return None


def _offload_has_a_place(config: RunConfig) -> Problem | None:
    section = config.deepspeed
    if section.offload != "none" and section.zero_stage == 0:
        rule = "needs sharded state (deepspeed.zero_stage 1, 2 or 3)"
        return Problem("deepspeed.offload", section.offload, rule, "set deepspeed.zero_stage=1 or more")
    if section.offload == "nvme" and section.zero_stage != 3:
        rule = "DeepSpeed writes state to files under ZeRO 3 only"
        return Problem("deepspeed.offload", "nvme", rule, "set deepspeed.zero_stage=3, or deepspeed.offload=cpu")
    if (section.offload == "nvme") != (section.nvme_dir is not None):
        rule = "goes with deepspeed.offload=nvme, and that with it"
        fix = "a folder on each node's own fast disk"
        return Problem("deepspeed.nvme_dir", str(section.nvme_dir) if section.nvme_dir else None, rule, fix)
    return None


def _zero_plus_plus_shards_weights(config: RunConfig) -> Problem | None:
    section = config.deepspeed
    fix = "set deepspeed.zero_stage=3, or leave it out"
    if section.hpz_size > 1 and section.zero_stage != 3:
        return Problem("deepspeed.hpz_size", section.hpz_size, "ZeRO++ hpZ is a part of ZeRO 3", fix)
    if section.quantized_communication and section.zero_stage != 3:
        return Problem("deepspeed.quantized_communication", True, "ZeRO++ is a part of ZeRO 3", fix)
    return None


def _evaluations_happen(config: RunConfig) -> Problem | None:
    steps, section = config.train.tokens // config.train.global_batch_tokens, config.eval
    listed = {"eval.at_steps": section.at_steps}
    if section.suite_steps != "geometric":
        listed["eval.suite_steps"] = section.suite_steps
        if section.suite is None:
            return Problem("eval.suite_steps", list(section.suite_steps), "there is no eval.suite to run at them")
    for field, asked in listed.items():
        if late := [step for step in asked if step > steps]:
            return Problem(field, late, f"lies behind the last step, {steps}")
    return None


def _best_is_measured(config: RunConfig) -> Problem | None:
    name, known = config.checkpoint.keep_best, ["general", "domain", *config.data.stores]
    if name is not None and name not in known:
        return Problem("checkpoint.keep_best", name, f"is no group or source ({known})")
    return None


def _weights_are_saved(config: RunConfig) -> Problem | None:
    """Steps to keep the weights of are steps that are saved at all."""
    saved, kept = config.checkpoint.every_steps, config.checkpoint.keep_weights_every
    if kept is None or (saved is not None and kept % saved == 0):
        return None
    if saved is None:
        fix = "set checkpoint.every_steps"
        return Problem("checkpoint.keep_weights_every", kept, "only the last step is saved", fix)
    nearest = max(1, round(kept / saved)) * saved
    rule = f"must be a multiple of checkpoint.every_steps ({saved})"
    return Problem("checkpoint.keep_weights_every", kept, rule, f"the nearest is {nearest}")


def _compiled_blocks_are_left_alone(config: RunConfig) -> Problem | None:
    if config.train.compile and config.deepspeed.zero_stage == 3:
        rule = "cannot be used with deepspeed.zero_stage=3, whose hooks gather weights in the middle of a block"
        return Problem("train.compile", True, rule, "set it to false, or deepspeed.zero_stage=2")
    if config.train.compile and config.train.activation_checkpointing == "selective":
        rule = "chooses by itself what to keep: cannot be used with train.activation_checkpointing=selective"
        return Problem("train.compile", True, rule, "set activation_checkpointing to none or full")
    return None


RULES: tuple[Rule, ...] = (
    (("checkpoint.keep_best", "data.stores"), _best_is_measured),
    (("checkpoint.keep_weights_every", "checkpoint.every_steps"), _weights_are_saved),
    (("deepspeed.extra",), _extra_adds_only),
    (("deepspeed.offload", "deepspeed.nvme_dir", "deepspeed.zero_stage"), _offload_has_a_place),
    (
        ("deepspeed.hpz_size", "deepspeed.quantized_communication", "deepspeed.zero_stage"),
        _zero_plus_plus_shards_weights,
    ),
    (
        ("eval.at_steps", "eval.suite", "eval.suite_steps", "train.tokens", "train.global_batch_tokens"),
        _evaluations_happen,
    ),
    (("model",), _exactly_one_model),
    (("train.compile", "train.activation_checkpointing", "deepspeed.zero_stage"), _compiled_blocks_are_left_alone),
    (("train.global_batch_tokens", "data.seq_len"), _whole_rows),
    (("train.global_batch_tokens", "data.stages"), _stages_have_whole_rows),
    (("deepspeed.sequence_parallel", "data.seq_len", "data.stages"), _rows_are_shared),
    (("train.tokens", "train.global_batch_tokens"), _at_least_one_step),
    (("data.stages", "train.tokens"), _stages_fill_the_budget),
    (("data.stages", "data.mix", "data.stores"), _shares_are_stated),
    (("data.stages", "data.mix", "data.weights", "replay.share_general"), _one_mixture),
    (("data.mix", "train.tokens"), _points_lie_in_the_run),
    (("data.weights", "data.max_epochs_of", "data.mix", "data.stages", "data.stores"), _known_sources),
    (("data.past", "data.stores", "train.tokens", "train.global_batch_tokens"), _past_leads_here),
    (("train.schedule", "train.past", "train.tokens", "train.global_batch_tokens"), _schedule_fits),
    (("train.past", "train.tokens", "train.global_batch_tokens"), _past_rates_lead_here),
    (("train.micro_batch_size", "train.global_batch_tokens", "data.seq_len"), _micro_batch_fits),
)

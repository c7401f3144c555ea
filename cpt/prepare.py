"""From a run config to its plan, before any GPU is touched: opens the stores, checks that everything fits, apportions
the tokens.

Imports no torch, so ``cpt train --dry-run`` works on a login node. Every problem found is reported in one go.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group as Lines
from rich.console import RenderableType

from cpt.checkpoint.upload import missing_driver
from cpt.config import ConfigError, Problem, RunConfig
from cpt.data.pack_effect import effect_facts, packing_effect, render_effects
from cpt.data.pack_index import open_rows, rule_for
from cpt.data.packing import Rows
from cpt.data.store_selection import Split, is_ordered, open_split
from cpt.mix_schedules import share_general_of
from cpt.mixtures import plan_mixtures, row_lengths
from cpt.plan import Group, Plan, PlanSource
from cpt.plan_parts import heads_rule, micro_rows
from cpt.planner.show import frozen_facts, frozen_table, in_words, recommendation_facts, render_steps
from cpt.recommendation import Recommendation, read_recommendation
from cpt.rundir import DataError, RunDir
from cpt.suite_rules import suite_problems
from cpt.world_rules import check_world as check_world  # the rules of ranks are a part of this module's name
from cpt.world_rules import world_problems
from data_tools.encoders import tokenizer_fingerprint

SAME_RATE = 2.0  # peak rates that differ by more than this factor are not the pilots' any more
SAME_SHARE = 0.005
LOW_FILL = 0.98


@dataclass(frozen=True)
class Prepared:
    """A run that can start: its plan and its open stores by source name. ``rows``: of every row length there is."""

    config: RunConfig
    plan: Plan
    warnings: tuple[str, ...]
    train_stores: Mapping[str, Split]
    heldout_stores: Mapping[str, Split]
    rows: Mapping[tuple[str, int], Rows]  # by source and row length
    recommendation: Recommendation | None = None

    @property
    def vocab_size(self) -> int:
        return max(store.manifest.vocab_size for store in self.train_stores.values())


def prepare(config: RunConfig) -> Prepared:
    """Open the stores and build the plan.

    Raises:
        ConfigError: every store that cannot be used, tokenizers that differ, a mixture that cannot be had.
    """
    train, problems = _open_split(config, "train")
    heldout, more = _open_split(config, "heldout")
    problems += [problem for problem in more if problem not in problems]
    problems += _tokenizer_problems(config, train)
    problems += _head_problems(config)
    problems += _upload_problems(config)
    if problems:
        raise ConfigError(*problems)
    rows = _open_rows(config, train)
    try:
        plan, warnings = _build_plan(config, train, rows)
    except DataError as error:
        raise ConfigError(Problem("data", None, str(error))) from None
    recommendation, doubts = _find_recommendation(config)
    warnings += doubts + _label_warnings(config, recommendation, plan.sources) + _fill_warnings(plan)
    return Prepared(config, plan, tuple(warnings), train, heldout, rows, recommendation)


def _upload_problems(config: RunConfig) -> list[Problem]:
    url = config.checkpoint.upload_to
    missing = missing_driver(url) if url else None
    if missing is None:
        return []
    fix = "install the driver, or leave it out"
    return [Problem("checkpoint.upload_to", url, f"cannot be written to: {missing}", fix)]


def prepare_job(config: RunConfig, world_size: int) -> Prepared:
    """``prepare``, for so many ranks. Raises ConfigError with the problems of all, stores, ranks and benchmarks, in one
    list.
    """
    problems = world_problems(config, world_size) + suite_problems(config, tokenizer_path(config))
    try:
        prepared = prepare(config)
    except ConfigError as error:
        raise ConfigError(*error.problems, *problems) from None
    if problems:
        raise ConfigError(*problems)
    return prepared


def group_of(store: Split) -> Group:
    """A store labelled ``general`` is replayed; any other label is a domain to learn."""
    return "general" if store.manifest.domain == "general" else "domain"


def _open_split(config: RunConfig, split: str) -> tuple[dict[str, Split], list[Problem]]:
    stores: dict[str, Split] = {}
    problems: list[Problem] = []
    for name, folder in config.data.stores.items():
        try:
            stores[name] = open_split(folder / split)
        except DataError as error:
            problems.append(Problem(f"data.stores.{name}", str(folder), str(error)))
            continue
        if stores[name].num_tokens < 2:
            rule = f"its {split} split holds {stores[name].num_tokens} tokens, too few to predict one"
            fix = "tokenize more text, or a larger --heldout-fraction"
            problems.append(Problem(f"data.stores.{name}", str(folder), rule, fix))
    return stores, problems


def _tokenizer_problems(config: RunConfig, stores: Mapping[str, Split]) -> list[Problem]:
    prints = {name: store.manifest.tokenizer.fingerprint for name, store in stores.items()}
    named = [f"{name} with {store.manifest.tokenizer.name}" for name, store in stores.items()]
    if len(set(prints.values())) > 1:
        rule = f"the stores were made with different tokenizers: {', '.join(named)}"
        return [Problem("data.stores", None, rule, "tokenize them again with the model's tokenizer")]
    tokenizer = tokenizer_path(config)
    if not prints:
        return []
    if tokenizer is None:
        return _other_tokens(config.model.init_from, prints)
    try:
        wanted = tokenizer_fingerprint(tokenizer)
    except DataError as error:
        return [Problem("model.tokenizer", str(tokenizer), str(error))]
    if wanted in prints.values():
        return []
    rule = f"differs from the tokenizer that made the stores ({named[0]})"
    return [Problem("model.tokenizer", str(tokenizer), rule, "tokenize with it, or give the stores' tokenizer")]


def _other_tokens(origin: str | None, prints: Mapping[str, str]) -> list[Problem]:
    """Of a checkpoint without a tokenizer: were the stores that it was trained on, where they are still there, made
    with another one than the stores of this run?
    """
    if origin is None or not (Path(origin) / "meta.json").is_file():
        return []
    run_config = json.loads((Path(origin) / "meta.json").read_text(encoding="utf-8"))["run_config"]
    for folder in run_config.get("data", {}).get("stores", {}).values():
        try:
            before = open_split(Path(folder) / "train").manifest.tokenizer
        except DataError:
            continue
        if before.fingerprint not in prints.values():
            rule = f"was trained on tokens of another tokenizer ({before.name}) than the stores of this run hold"
            return [Problem("model.init_from", origin, rule, "tokenize the text with its tokenizer")]
    return []


def tokenizer_path(config: RunConfig) -> Path | None:
    """The tokenizer that belongs to the model: stated, found in a local init_from folder, or that of the checkpoint's
    own run. None where it cannot be known here, as for a hub name.
    """
    return _tokenizer_of(config.model.tokenizer, config.model.init_from)


def own_tokenizer_path(origin: str) -> Path | None:
    """The tokenizer that lies with weights, whatever the run file states: in their folder, or that of their run."""
    return _tokenizer_of(None, origin)


def _tokenizer_of(stated: str | None, origin: str | None) -> Path | None:
    if stated is not None or origin is None:
        return Path(stated) if stated else None
    folder = Path(origin)
    if any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "spiece.model")):
        return folder
    if not (folder / "meta.json").is_file():
        return None
    model = json.loads((folder / "meta.json").read_text(encoding="utf-8"))["run_config"]["model"]
    return _tokenizer_of(model["tokenizer"], model["init_from"])


def _head_problems(config: RunConfig) -> list[Problem]:
    """Attention is shared by heads; of a model that is not here yet they are asked for when it is."""
    shared, model = config.deepspeed.sequence_parallel, _model_config(config)
    heads = model.get("num_attention_heads")
    if shared == 1 or not isinstance(heads, int):
        return []
    rule = heads_rule(heads, model.get("num_key_value_heads") or heads, shared)
    return [Problem("deepspeed.sequence_parallel", shared, rule)] if rule else []


def _model_config(config: RunConfig) -> Mapping[str, Any]:
    """The model's Hugging Face config as far as it is stated or lies in a local folder; empty otherwise."""
    if config.model.init_from is None:
        return config.model.fresh if isinstance(config.model.fresh, dict) else {}
    folder = Path(config.model.init_from)
    for name, inside in (("meta.json", "model_config"), ("config.json", None)):
        if (folder / name).is_file():
            found = json.loads((folder / name).read_text(encoding="utf-8"))
            return dict(found.get(inside) or {}) if inside else dict(found)
    return {}


def _open_rows(config: RunConfig, stores: Mapping[str, Split]) -> dict[tuple[str, int], Rows]:
    data = config.data
    found: dict[tuple[str, int], Rows] = {}
    problems: list[Problem] = []
    for name, store in stores.items():
        try:
            for seq_len in row_lengths(config):
                found[name, seq_len] = open_rows(store, data.packing, seq_len, data.pack_dir)
        except DataError as error:
            problems.append(Problem(f"data.stores.{name}", str(data.stores[name]), str(error)))
    if problems:
        raise ConfigError(*problems)
    return found


def _build_plan(
    config: RunConfig, stores: Mapping[str, Split], rows: Mapping[tuple[str, int], Rows]
) -> tuple[Plan, list[str]]:
    base, *others = row_lengths(config)
    sources = {
        name: PlanSource(
            name=name,
            group=group_of(store),
            num_rows=rows[name, base].num_rows,
            num_tokens=store.num_tokens,
            content_hash=store.manifest.content_hash,
            in_order=is_ordered(store),
            rows_by_length=tuple((seq_len, rows[name, seq_len].num_rows) for seq_len in others),
        )
        for name, store in stores.items()
    }
    plan, warnings = plan_mixtures(config, sources, packing=config.data.packing)
    return plan, [*warnings, *_doubts(config, plan)]


def _doubts(config: RunConfig, plan: Plan) -> list[str]:
    warnings = []
    if config.model.init_from and plan.share_general() == 0:
        warnings.append("no general data is replayed (replay.share_general = 0): expect the model to forget")
    if config.model.init_from and tokenizer_path(config) is None:
        warnings.append("the model's tokenizer is not known here, so it is not compared with the stores' and exports "
                        "hold none; give model.tokenizer")  # fmt: skip
    if config.plan and config.train.past:
        promised = config.train.past[0].tokens
        warnings.append(f"the run was extended beyond the {promised:,} tokens that its recommendation is for")
    elif config.plan and config.data.past:
        step = config.data.past[0].until_step
        warnings.append(f"the mixture was changed after step {step}: the recommendation's losses were promised for "
                        "another one")  # fmt: skip
    return warnings


def _find_recommendation(config: RunConfig) -> tuple[Recommendation | None, list[str]]:
    """The recommendation that the config follows: the run folder's copy, or where it was read from before there is one.

    Its fingerprint decides, so nothing else is ever taken for it. Its stages are in the config already: a run goes on
    without the file, only its promises are then unknown.
    """
    if config.plan is None:
        return None, []
    assert config.plan.fingerprint, "a run file with a plan is read by load_config, which follows it"
    for path in (RunDir(config.run_dir).recommendation, config.plan.path):
        try:
            found = read_recommendation(path)
        except DataError:
            continue
        if found.fingerprint == config.plan.fingerprint:
            return found, _recommendation_warnings(config, found)
    lost = f"recommendation {config.plan.fingerprint}, which this run follows, is neither in its folder nor at"
    return None, [f"{lost} {config.plan.path}: the report cannot compare promised and measured losses"]


def _recommendation_warnings(config: RunConfig, found: Recommendation) -> list[str]:
    rate = config.train.peak_lr
    if found.lr is None or 1 / SAME_RATE <= rate / found.lr <= SAME_RATE:
        return []
    return [
        f"train.peak_lr is {rate:g}, the recommendation's pilots had {found.lr:g}: what is forgotten and learned "
        "depends on the rate, so its share and promised losses may not hold"
    ]


def _label_warnings(config: RunConfig, found: Recommendation | None, sources: Sequence[PlanSource]) -> list[str]:
    """Where stages are stated by weights: does the recommendation count the same stores as general?"""
    if found is None or found.share_general is None or not any(stage.weights for stage in found.stages):
        return []
    general = sum(stage.tokens * share_general_of(stage, sources) for stage in config.data.stages) / config.train.tokens
    if abs(found.share_general - general) <= SAME_SHARE:
        return []
    labelled = ", ".join(source.name for source in sources if source.group == "general") or "none"
    return [
        f"the recommendation counts {found.share_general:.1%} of the tokens as general, "
        f"the stores' labels {general:.1%} (labelled general: {labelled})"
    ]


def _fill_warnings(plan: Plan) -> list[str]:
    """Documents of a little more than half a row leave the rest of it empty, and best fit does not cut them."""
    return [
        f"best_fit fills only {fill:.1%} of the rows of source {source.name!r}{_of(plan, seq_len)} with its documents, "
        "and padding costs as much as text: compare with cpt data pack --dry-run, or use data.packing=concat or "
        "another seq_len"
        for index, source in enumerate(plan.sources)
        for seq_len in plan.seq_lens
        if (rows := plan.epoch_rows(index, seq_len)) and (fill := source.num_tokens / (rows * seq_len)) < LOW_FILL
    ]


def _of(plan: Plan, seq_len: int) -> str:
    return "" if plan.seq_lens == (seq_len,) else f" of {seq_len} tokens"


def packing_facts(prepared: Prepared) -> list[dict[str, Any]]:
    """What packing does to each source, for a dry run: it reads the lengths of all documents."""
    data = prepared.config.data
    return [
        effect_facts(name, packing_effect(store, rule_for(store, data.packing), seq_len))
        for name, store in prepared.train_stores.items()
        for seq_len in row_lengths(prepared.config)
    ]


def plan_facts(prepared: Prepared) -> dict[str, Any]:
    """What the plan promises, for --json and the banner: tokens, shares and epochs per source and stage."""
    section, found = prepared.config.plan, prepared.recommendation
    follows = {**recommendation_facts(found), "replaced": section.replaced} if section and found else None
    facts = {**frozen_facts(prepared.plan), "recommendation": follows, "warnings": list(prepared.warnings)}
    if len(prepared.plan.seq_lens) > 1 or prepared.config.deepspeed.sequence_parallel > 1:
        facts["steps_by_stage"] = stage_steps(prepared.plan, prepared.config)
    return facts


def stage_steps(plan: Plan, config: RunConfig) -> list[dict[str, Any]]:
    """What a step of each stage is made of: rows, and how many of them a rank, or a group of ranks that share rows,
    holds at a time. ``micro_batches``: in a step, of all readers together; accumulation is that divided by them.
    """
    found = []
    for index in range(len(plan.stages)):
        seq_len, rows = plan.seq_len_of(index), plan.rows_per_step(index)
        micro = micro_rows(config.train.micro_batch_size, seq_len=seq_len, stated_for=plan.seq_len)
        steps = plan.first_step(index + 1) - plan.first_step(index)
        found.append(
            {
                "steps": steps,
                "tokens": steps * plan.global_batch_tokens,
                "seq_len": seq_len,
                "tokens_per_rank_and_row": seq_len // config.deepspeed.sequence_parallel,
                "rows_per_step": rows,
                "micro_batch_size": micro,
                "micro_batches": rows // micro,
            }
        )
    return found


def render_plan(facts: Mapping[str, Any]) -> RenderableType:
    """The banner's table: which source gives how much, and on whose advice."""
    for name, render in (("packing", render_effects), ("steps_by_stage", render_steps)):
        if name in facts:
            rest = {other: value for other, value in facts.items() if other != name}
            return Lines(render_plan(rest), render(facts[name]))
    follows = facts["recommendation"]
    if not follows:
        return frozen_table(facts)
    shown = {
        name: f"({len(value)})" if isinstance(value, list) else value for name, value in follows["replaced"].items()
    }
    said = ", ".join(f"{name} {value}" for name, value in shown.items())
    advice = f"follows recommendation {in_words(follows)}" + (f"; the run file said {said}" if said else "")
    return frozen_table({**facts, "warnings": [advice, *facts["warnings"]]})

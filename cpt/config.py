"""The typed run configuration: one YAML file plus dotted overrides, every problem reported at once.

Owns the fields, their units and the rules between them. A fact lives once: accumulation, steps and the DeepSpeed
dictionary are derived elsewhere. Refuses unknown keys (naming the nearest known one), unsafe YAML and run names that
would leave their folder.
"""

import difflib
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError

from cpt.problems import ConfigError as ConfigError  # every module that reads a config raises it
from cpt.problems import Problem as Problem
from cpt.problems import location_of, problem_of
from cpt.schedule_fields import Count, RewarmCosine, Schedule, Section, Share, Steps

DEFAULT_REPLAY_SHARE = 0.25  # for a strong shift, such as prose to code or another language: arXiv 2403.08763


class RunSection(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = Field(description="name of the run folder")
    dir: Path = Field(Path("runs"), description="folder that holds run folders")
    seed: int = Field(1234, ge=0, lt=2**63, description="seed of data order and fresh weights")


class ModelSection(Section):
    init_from: str | None = Field(
        None, description="pre-trained weights: a Hugging Face folder or hub name, or a checkpoint of an earlier run"
    )
    fresh: dict[str, Any] | str | None = Field(
        None, description="a new model instead: a Hugging Face config mapping, or a YAML file that holds one"
    )
    tokenizer: str | None = Field(
        None, description="tokenizer to export with the model; default: the one in init_from, if any"
    )
    attention: Literal["auto", "sdpa", "varlen", "flash_attn"] = Field("auto", description="attention back-end")
    trust_remote_code: bool = Field(False, description="run Python code that comes with a hub model")


class StageSection(Section):
    tokens: Count = Field(description="tokens of this stage")
    share_general: Share = Field(description="share of general tokens in this stage")
    weights: dict[str, Annotated[float, Field(ge=0.0)]] = Field(
        default_factory=dict, description="relative weight of each source inside its group; default: by tokens"
    )


class DataSection(Section):
    stores: dict[str, Path] = Field(min_length=1, description="source name -> token store folder")
    seq_len: Count = Field(description="tokens in a packed row")
    weights: dict[str, Annotated[float, Field(ge=0.0)]] = Field(
        default_factory=dict, description="relative weight of each source inside its group; default: by tokens"
    )
    max_epochs: Annotated[float, Field(gt=0.0)] = Field(
        4.0, description="passes over one source before its quota is capped (up to 4 are nearly free: arXiv 2305.16264)"
    )
    stages: tuple[StageSection, ...] = Field((), description="mixture by stage; replaces replay.share_general")


class ReplaySection(Section):
    share_general: Share | None = Field(
        None,
        description="share of every batch's tokens that replays general data, displacing domain tokens; "
        f"default {DEFAULT_REPLAY_SHARE} when both kinds of store are given",
    )


class TrainSection(Section):
    tokens: Count = Field(description="token budget of the run, all sources together; whole steps of it are trained")
    global_batch_tokens: Count = Field(description="tokens per step over all ranks; accumulation is derived from it")
    micro_batch_size: Count = Field(description="rows per rank in one forward and backward pass")
    peak_lr: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(description="highest learning rate")
    schedule: Schedule = Field(RewarmCosine(), description="learning rate over the run")
    weight_decay: Annotated[float, Field(ge=0.0)] = Field(0.1, description="decoupled decay of matrices and embeddings")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        (0.9, 0.95), description="decay of Adam's first and second moment"
    )
    eps: Annotated[float, Field(gt=0.0)] = Field(1e-8, description="added to the root of Adam's second moment")
    max_grad_norm: Annotated[float, Field(gt=0.0)] = Field(1.0, description="gradients are scaled down to this norm")
    precision: Literal["fp32", "bf16"] = Field("bf16", description="compute type; masters and moments stay fp32")
    activation_checkpointing: bool = Field(False, description="recompute activations in the backward pass")


class DeepSpeedSection(Section):
    zero_stage: Literal[0, 1, 2, 3] = Field(0, description="what is sharded: 1 optimizer, 2 + gradients, 3 + weights")
    extra: dict[str, Any] = Field(
        default_factory=dict, description="keys merged over the generated DeepSpeed dictionary, unchecked"
    )


class CheckpointSection(Section):
    every_steps: Count | None = Field(None, description="default: only after the last step")
    keep_last: Count = Field(2, description="complete checkpoints kept; the newest is never deleted")


class EvalSection(Section):
    every_steps: Count | None = Field(None, description="default: step 0 and the last step only")
    at_steps: tuple[Steps, ...] = Field((), description="further steps to evaluate at")
    tokens_per_source: Count = Field(262_144, description="held-out tokens evaluated of each source, at most")


class LogSection(Section):
    every_steps: Count = Field(10, description="steps of one record in metrics.jsonl")
    wandb: Literal["disabled", "offline", "online"] = Field(
        "offline", description="Weights & Biases; online needs a login"
    )


class RunConfig(Section):
    """Everything a run needs; frozen."""

    run: RunSection
    model: ModelSection
    data: DataSection
    replay: ReplaySection = ReplaySection()
    train: TrainSection
    deepspeed: DeepSpeedSection = DeepSpeedSection()
    checkpoint: CheckpointSection = CheckpointSection()
    eval: EvalSection = EvalSection()
    log: LogSection = LogSection()

    @property
    def run_dir(self) -> Path:
        return self.run.dir / self.run.name

    @property
    def global_batch_rows(self) -> int:
        return self.train.global_batch_tokens // self.data.seq_len


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
    (("data.stages", "replay.share_general"), _replay_or_stages),
    (("data.weights", "data.stages", "data.stores"), _known_weights),
    (("train.schedule", "train.tokens", "train.global_batch_tokens"), _schedule_fits),
)


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run YAML, apply ``a.b=value`` overrides, validate, and make paths absolute.

    Raises:
        ConfigError: with every problem found.
    """
    raw = read_mapping(path)
    problems: list[Problem] = []
    for action in (*(partial(apply_override, raw, text) for text in overrides), partial(_make_paths_absolute, raw)):
        try:
            action()
        except ConfigError as error:
            problems += error.problems
    try:
        config = validate(raw)
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError(*problems)
    return config


def read_mapping(path: Path) -> dict[str, Any]:
    """A YAML file that holds one mapping. Raises ConfigError naming the file and, for bad syntax, the line."""
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(Problem(str(path), None, "no such file", _nearby_files(path))) from None
    except (
        yaml.YAMLError,
        ValueError,
        RecursionError,
        OSError,
    ) as error:  # ValueError: not UTF-8, or a date such as 2024-02-30
        raise ConfigError(Problem(str(path), None, f"cannot be read as YAML: {error}")) from None
    if not isinstance(raw, dict):
        raise ConfigError(Problem(str(path), raw, "must hold a mapping of sections such as run, model, data, train"))
    return raw


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Set ``a.b.c=value`` in place; the value is read as YAML: ``1e-3``, ``null`` and ``[1, 2]`` mean what they say."""
    key, separator, text = override.partition("=")
    if not separator or not key or not all(key.split(".")):
        raise ConfigError(Problem(override, None, "an override has the form section.field=value"))
    *parents, leaf = key.split(".")
    node = raw
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ConfigError(Problem(key, child, f"{parent} is not a section, so it has no field {leaf}"))
        node = child
    try:
        node[leaf] = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(Problem(key, text, f"is not a YAML value: {error}")) from None


def validate(raw: Mapping[str, Any]) -> RunConfig:
    """Build the config, or raise ConfigError with every wrong field and every broken rule."""
    try:
        config, problems = RunConfig.model_validate(raw), []
    except ValidationError as error:
        told = [problem_of(detail, _fields()) for detail in error.errors()]
        problems = [one for i, one in enumerate(told) if one.field not in {before.field for before in told[:i]}]
        repaired = _without_faults(raw, error)
        if repaired is None:
            raise ConfigError(*problems) from None
        config = repaired
    faulty = {problem.field for problem in problems}
    for fields, rule in RULES:
        if not any(bad.startswith(field) or field.startswith(bad) for field in fields for bad in faulty):
            found = rule(config)
            problems += [found] if found else []
    if problems:
        raise ConfigError(*problems)
    return config


# Legal values for required fields that are wrong or missing: no rule that reads them is checked then.
STAND_INS: dict[str, dict[str, Any]] = {
    "run": {"name": "x"},
    "model": {},
    "data": {"stores": {"x": "x"}, "seq_len": 1},
    "train": {"tokens": 1, "global_batch_tokens": 1, "micro_batch_size": 1, "peak_lr": 0.1},
}


def _without_faults(raw: Mapping[str, Any], error: ValidationError) -> RunConfig | None:
    """The config with its wrong fields left out, so that rules between the others are checked; None if that fails."""
    copy = deepcopy(dict(raw))
    for detail in error.errors():
        node, (*parents, leaf) = copy, location_of(detail)
        for part in parents:
            if not isinstance(node.get(part), dict):  # inside a list: all of it goes
                leaf = part
                break
            node = node[part]
        node.pop(leaf, None)
    for section, fields in STAND_INS.items():
        copy[section] = {**fields, **copy.get(section, {})}
    try:
        return RunConfig.model_validate(copy)
    except ValidationError:
        return None


def _fields(model: type[BaseModel] = RunConfig, prefix: str = "") -> dict[str, str]:
    """Dotted name -> description of every field; a schedule's own fields stand under train.schedule."""
    found: dict[str, str] = {}
    for name, info in model.model_fields.items():
        found[prefix + name] = info.description or ""
        kinds = [info.annotation, *getattr(info.annotation, "__args__", ())]
        for kind in kinds:
            if isinstance(kind, type) and issubclass(kind, Section):
                found |= _fields(kind, f"{prefix}{name}.")
    return found


def _nearby_files(path: Path) -> str:
    if not path.parent.is_dir():
        return f"the folder {path.parent} does not exist either"
    close = difflib.get_close_matches(path.name, [entry.name for entry in path.parent.iterdir()], n=1)
    return f"did you mean {path.parent / close[0]}?" if close else ""


def _make_paths_absolute(raw: dict[str, Any]) -> None:
    """Paths are relative to where the command runs; a run folder keeps them absolute, so that resume works anywhere."""
    base = Path.cwd()
    data, model, run = (
        section if isinstance(section := raw.get(name), dict) else {} for name in ("data", "model", "run")
    )
    if isinstance(data.get("stores"), dict):
        data["stores"] = {
            name: str(base / Path(path).expanduser()) if isinstance(path, str) else path
            for name, path in data["stores"].items()
        }
    for key in ("init_from", "tokenizer"):  # either a local path or a hub name
        if isinstance(model.get(key), str) and (local := base / Path(model[key]).expanduser()).exists():
            model[key] = str(local)
    if isinstance(run.get("dir", "runs"), str):
        run["dir"] = str(base / run.get("dir", "runs"))
    if isinstance(model.get("fresh"), str):
        model["fresh"] = read_mapping(base / model["fresh"])


def to_yaml(config: RunConfig) -> str:
    """The resolved config, every default filled in; reading it back gives an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, width=120)


def json_schema() -> dict[str, Any]:
    """JSON schema of a run file, for editors."""
    return RunConfig.model_json_schema()

"""What fits: the memory of a run as its file describes it, and the settings with which it would fit a device.

Owns the way from a run file to ``cpt.model.memory``'s setting, the table of ``cpt plan fit-memory``, and the settings
that an out-of-memory message proposes. No torch: it answers on a login node. Refuses a model family without a closed
form.
"""

import importlib.util
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Group
from rich.table import Table

from cpt.config import ConfigError, ModelSection, Problem, RunConfig
from cpt.mixtures import row_lengths
from cpt.model.memory import AttentionMemory, Checkpointing, Prediction, Setting, loss_chunk_tokens, predict_memory
from cpt.model.size import FAMILIES, layer_windows, model_shape, num_parameters, render_count
from cpt.plan_parts import micro_rows
from cpt.run_rules import RULES
from cpt.train.deepspeed_config import EngineSpec, deepspeed_config
from cpt.world_rules import check_world, world_problems

Config = Mapping[str, Any]

ENOUGH_TOKENS = 16_384  # of a micro-batch on one GPU: more make its matrix products no faster
CHECKPOINTING: tuple[Checkpointing, ...] = ("none", "selective", "full")
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def setting_of(config: RunConfig, model: Config, *, world_size: int, on_gpu: bool) -> Setting:
    """The run's setting; ``model`` is its Hugging Face config mapping."""
    train, parallel = config.train, config.deepspeed
    shape, longest = model_shape(model), max(row_lengths(config))  # the stage that needs most
    micro = micro_rows(train.micro_batch_size, seq_len=longest, stated_for=config.data.seq_len)
    sharing = parallel.sequence_parallel
    rows = config.global_batch_rows * sharing // (train.micro_batch_size * world_size)
    spec = EngineSpec(
        parallel.zero_stage,
        train.precision,
        train.micro_batch_size,
        max(1, rows),
        max_grad_norm=train.max_grad_norm,
        extra=parallel.extra,
        offload=parallel.offload,
    )
    made = deepspeed_config(spec, world_size=world_size, on_gpu=on_gpu, num_parameters=num_parameters(model) or 0)
    zero = made["zero_optimization"]
    return Setting(
        seq_len=longest,
        micro_batch_size=micro,
        grad_accum_steps=spec.grad_accum_steps,
        zero_stage=parallel.zero_stage,
        world_size=world_size,
        precision=train.precision,
        checkpointing=train.activation_checkpointing,
        on_gpu=on_gpu,
        attention=_attention_memory(config, model, on_gpu=on_gpu),
        fused_norms=_has_fused_norms(config.model.kernels, on_gpu=on_gpu),
        lean=config.model.kernels == "auto" and not on_gpu,
        loss_chunk=loss_chunk_tokens(shape.vocab_size, on_gpu=on_gpu) if shape else None,
        optimizer=train.optimizer,
        offload=parallel.offload != "none",
        sequence_parallel=sharing,
        hpz_size=parallel.hpz_size,
        bucket=int(zero.get("reduce_bucket_size", 500_000_000)),
        num_buckets=2 if zero.get("overlap_comm") and parallel.zero_stage < 3 else 1,
        contiguous_gradients=bool(zero.get("contiguous_gradients", True)),
    )


def _attention_memory(config: RunConfig, model: Config, *, on_gpu: bool) -> AttentionMemory:
    if on_gpu:  # the kernels that need no mask compute in 16 bits
        return "mask" if config.model.attention == "sdpa" or config.train.precision == "fp32" else "fused"
    return "runs" if len(set(layer_windows(model))) == 1 else "mask"


def _has_fused_norms(kernels: str, *, on_gpu: bool) -> bool:
    installed = importlib.util.find_spec("liger_kernel") is not None  # what ``auto`` would find
    return kernels == "liger" or (kernels == "auto" and on_gpu and installed)


def render_cost(num_params: int, flops: int | None, memory: Prediction | None) -> str:
    """The lines shown before a run starts: parameters, FLOPs per token, memory per rank and its parts."""
    known = f"{render_count(flops)} (6 N + 12 L H Q T)" if flops is not None else "unknown for this model family"
    shown = "unknown for this model family"
    if memory is not None:
        parts = {**memory.terms, **memory.overhead}
        listed = " + ".join(f"{name} {render_count(part, 'B')}" for name, part in parts.items())
        shown = f"{render_count(memory.total, 'B')} predicted, at its highest in {memory.moment}: {listed}"
    return "\n".join(
        (
            f"parameters       {render_count(num_params)} ({num_params:,})",
            f"FLOPs per token  {known}",
            f"memory per rank  {shown}",
        )
    )


# --- what fits --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Device:
    """The devices of a job: how many, and the bytes of one."""

    count: int
    memory: int
    on_gpu: bool = True


@dataclass(frozen=True)
class Candidate:
    """A setting of the run, told as the fields to change, with what it needs."""

    overrides: tuple[str, ...]
    zero_stage: int
    micro_batch_size: int
    needs: Prediction


def fit_facts(config: RunConfig, device: Device) -> dict[str, Any]:
    """Every ZeRO stage and micro-batch with its bytes, and the choice: the largest micro-batch, up to ENOUGH_TOKENS
    tokens, at the lowest stage; with more recomputation, or offload, only where nothing fits without.

    Raises:
        ConfigError: the model's memory has no closed form, the GPUs do not divide into groups, or the global batch does
        not divide among them even by micro-batches of one row.
    """
    model = read_model_mapping(config.model)
    _check_known(model)
    check_world(_changed(config, train__micro_batch_size=1), device.count)
    table, found = list(candidates(config, model, device)), choose(config, model, device)
    return {
        "model": str(config.model.init_from or model.get("model_type")),
        "parameters": num_parameters(model),
        "seq_len": config.data.seq_len,
        "gpus": device.count,
        "gpu_memory": device.memory,
        "checkpointing": config.train.activation_checkpointing,
        "table": [
            {
                "zero_stage": each.zero_stage,
                "micro_batch_size": each.micro_batch_size,
                "bytes": each.needs.total,
                "fits": each.needs.total <= device.memory,
            }
            for each in table
        ],
        "choice": _choice_facts(found) if found else None,
    }


def _choice_facts(found: Candidate) -> dict[str, Any]:
    return {
        "overrides": list(found.overrides),
        "bytes": found.needs.total,
        "moment": found.needs.moment,
        "terms": {**found.needs.terms, **found.needs.overhead},
        "host_bytes": found.needs.host,
    }


def choose(config: RunConfig, model: Config, device: Device) -> Candidate | None:
    """The best candidate that fits, by the rule of ``fit_facts``; None where nothing does."""
    for changes in _escalations(config):
        fitting = [
            each for each in candidates(_changed(config, **changes), model, device) if each.needs.total <= device.memory
        ]
        if fitting:
            best = min(fitting, key=lambda each: _preference(each, config))
            return Candidate((*best.overrides, *_words(changes)), best.zero_stage, best.micro_batch_size, best.needs)
    return None


def settings_that_fit(config: RunConfig, model: Config, device: Device, *, most: int = 5) -> list[Candidate]:
    """Steps down from the run as it stands that would fit, the mildest first: fewest fields changed, then the largest
    micro-batch, then the lowest stage. Empty where nothing fits, or the family has no closed form.
    """
    if model_shape(model) is None:
        return []
    train, stage = config.train, config.deepspeed.zero_stage
    now = {f"train.micro_batch_size={train.micro_batch_size}", f"deepspeed.zero_stage={stage}"}
    fitting = []
    for changes in _escalations(config):
        said = _words(changes)
        for each in candidates(_changed(config, **changes), model, device):
            changed = tuple(words for words in (*each.overrides, *said) if words not in now)
            shards = device.count > 1 or "deepspeed__offload" in changes  # among one there is nothing to share
            right_stage = each.zero_stage >= stage if shards else each.zero_stage == stage
            milder = each.micro_batch_size <= train.micro_batch_size and right_stage
            if changed and milder and each.needs.total <= device.memory:
                fitting.append(Candidate(changed, each.zero_stage, each.micro_batch_size, each.needs))
    return sorted(fitting, key=lambda each: (len(each.overrides), -each.micro_batch_size, each.zero_stage))[:most]


def _words(changes: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(f"{field.replace('__', '.')}={value}" for field, value in changes.items())


def _preference(each: Candidate, config: RunConfig) -> tuple[int, int, int]:
    tokens = min(each.micro_batch_size * config.data.seq_len, ENOUGH_TOKENS)
    return -tokens, each.zero_stage, each.micro_batch_size


def _escalations(config: RunConfig) -> Iterator[dict[str, str]]:
    """The run as it stands, then with ever more of its time given for memory."""
    yield {}
    stated = config.train.activation_checkpointing
    for mode in CHECKPOINTING[CHECKPOINTING.index(stated) + 1 :]:
        yield {"train__activation_checkpointing": mode}
    if config.deepspeed.offload == "none":
        for mode in CHECKPOINTING[CHECKPOINTING.index(stated) :]:
            changed = {} if mode == stated else {"train__activation_checkpointing": mode}
            yield {**changed, "deepspeed__offload": "cpu"}


def candidates(config: RunConfig, model: Config, device: Device) -> Iterator[Candidate]:
    """Every ZeRO stage and micro-batch that the run file may state and the job could have."""
    rows = config.global_batch_rows * config.deepspeed.sequence_parallel // device.count
    for stage in (0, 1, 2, 3):
        for micro in _micro_batches(rows):
            tried = _changed(config, train__micro_batch_size=micro, deepspeed__zero_stage=stage)
            if world_problems(tried, device.count) or any(rule(tried) for _, rule in RULES):
                continue
            needs = predict_memory(model, setting_of(tried, model, world_size=device.count, on_gpu=device.on_gpu))
            assert needs is not None, "the family was checked"
            overrides = (f"train.micro_batch_size={micro}", f"deepspeed.zero_stage={stage}")
            yield Candidate(overrides, stage, micro, needs)


def _micro_batches(rows: int) -> Iterator[int]:
    """1, 2, 4 ... up to the rows of a rank."""
    micro = 1
    while micro <= rows:
        yield micro
        micro *= 2


def _changed(config: RunConfig, **fields: Any) -> RunConfig:
    """A copy with ``section__field`` replaced."""
    for name, value in fields.items():
        section, field = name.split("__")
        part = getattr(config, section).model_copy(update={field: value})
        config = config.model_copy(update={section: part})
    return config


def _check_known(model: Config) -> None:
    try:
        shape = model_shape(model)
        sizes = asdict(shape) if shape else {}
    except (TypeError, ZeroDivisionError) as error:  # a mapping that somebody wrote: nothing has read it yet
        raise ConfigError(Problem("model", model.get("model_type"), f"its sizes are no numbers ({error})")) from error
    if wrong := sorted(name for name, size in sizes.items() if not isinstance(size, int) or size < 0):
        raise ConfigError(Problem("model", model.get("model_type"), f"has a {wrong[0]} of {sizes[wrong[0]]!r}"))
    if shape is None:
        rule = f"memory has a formula for {', '.join(FAMILIES)} only"
        fix = "start the run: its first step is a rehearsal of the largest batch"
        raise ConfigError(Problem("model", model.get("model_type"), rule, fix))


# --- inputs -----------------------------------------------------------------------------------------------------------


def parse_bytes(text: str) -> int:
    """``80GB`` -> 80 * 10^9, ``79.6GiB`` -> 79.6 * 2^30.

    Raises:
        ConfigError: neither.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?B?)\s*", text.upper())
    if match is None or match[2] not in UNITS or float(match[1]) <= 0:
        raise ConfigError(Problem("--gpu-memory", text, "is no size", "write 80GB or 79.6GiB"))
    return round(float(match[1]) * UNITS[match[2]])


def run_config_for(model: str, *, seq_len: int, gpus: int) -> RunConfig:
    """A run file's content for someone who has none yet: 64 rows per GPU and step, all else by default."""
    rows = 64 * gpus
    return RunConfig.model_validate(
        {
            "run": {"name": "fit-memory"},
            "model": {"init_from": model},
            "data": {"stores": {"any": "any"}, "seq_len": seq_len},
            "train": {
                "tokens": rows * seq_len,
                "global_batch_tokens": rows * seq_len,
                "micro_batch_size": 1,
                "peak_lr": 1e-5,
            },
        }
    )


def read_model_mapping(section: ModelSection) -> dict[str, Any]:
    """The Hugging Face config of the run's model as a mapping, from a file or the hub, without torch.

    Raises:
        ConfigError: there is none.
    """
    if isinstance(section.fresh, Mapping):
        return dict(section.fresh)
    if section.fresh is not None:
        return _mapping_of(Path(section.fresh), "model.fresh")
    folder = Path(str(section.init_from)).expanduser()
    if (folder / "meta.json").is_file():
        return dict(_mapping_of(folder / "meta.json", "model.init_from").get("model_config", {}))
    if folder.is_file():
        return _mapping_of(folder, "model.init_from")
    if folder.is_dir():
        return _mapping_of(folder / "config.json", "model.init_from")
    return _mapping_of(_from_hub(str(section.init_from)), "model.init_from")


def _from_hub(name: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(name, "config.json"))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        rule = f"is neither a folder here nor a hub model within reach ({str(error).splitlines()[0]})"
        raise ConfigError(Problem("model.init_from", name, rule)) from error


def _mapping_of(path: Path, field: str) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(Problem(field, str(path), f"cannot be read: {error}", "give a model's config")) from error
    if not isinstance(found, dict):
        raise ConfigError(Problem(field, str(path), "holds no mapping", "give a model's config"))
    return found


# --- table ------------------------------------------------------------------------------------------------------------


def render_fit(facts: Mapping[str, Any]) -> Group:
    """The table of stages and micro-batches, and the line to paste."""
    memory, micros = facts["gpu_memory"], sorted({each["micro_batch_size"] for each in facts["table"]})
    title = (
        f"GB per GPU, {facts['model']} ({render_count(facts['parameters'])} parameters), rows of {facts['seq_len']:,}, "
        f"{facts['gpus']} GPUs of {memory / 1e9:.0f} GB, activation checkpointing {facts['checkpointing']}"
    )
    table = Table(title=title, caption="does not fit: in brackets")
    table.add_column("ZeRO / rows at a time")
    for micro in micros:
        table.add_column(str(micro), justify="right")
    for stage in sorted({each["zero_stage"] for each in facts["table"]}):
        cells = [each for each in facts["table"] if each["zero_stage"] == stage]
        table.add_row(str(stage), *(_cell(each) for each in cells))
    return Group(table, _choice_words(facts["choice"], memory))


def _cell(each: Mapping[str, Any]) -> str:
    shown = f"{each['bytes'] / 1e9:.1f}"
    return shown if each["fits"] else f"({shown})"


def _choice_words(choice: Mapping[str, Any] | None, memory: int) -> str:
    if choice is None:
        return (
            "Nothing fits, not even one row at ZeRO 3 with offload and full recomputation: take more GPUs, shorter "
            "rows, or deepspeed.sequence_parallel"
        )
    parts = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in choice["terms"].items() if size >= 5e7)
    host = f"; {choice['host_bytes'] / 1e9:.1f} GB of host memory per GPU" if choice["host_bytes"] else ""
    return (
        f"{' '.join(choice['overrides'])}\n"
        f"needs {choice['bytes'] / 1e9:.1f} of {memory / 1e9:.0f} GB, most in {choice['moment']}: {parts}{host}"
    )

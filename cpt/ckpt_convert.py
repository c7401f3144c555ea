"""Checkpoints from and to other programs: ``cpt ckpt convert SRC --out DST --to cpt|hf|deepspeed``.

    --to hf          a checkpoint of ours as a Hugging Face folder, its logits compared (as cpt export)
    --to deepspeed   a full checkpoint of ours as DeepSpeed's universal folder: ZeRO 1, 2 and 3, any number of ranks
    --to cpt         a Hugging Face folder (weights alone), or a folder of DeepSpeed (weights and optimizer state)

Owns which is which, and the proof: what was written is read again from the disk and compared with its source before
it appears under its name. A conversion that failed or was cut short leaves nothing there. Refuses a target that holds
something, and to guess a model's configuration.
"""

import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch

from cpt.checkpoint.convert_deepspeed import (
    MODEL_FILES,
    DeepSpeedFolder,
    open_deepspeed,
    shards,
    write_universal,
)
from cpt.checkpoint.marker import META
from cpt.checkpoint.portable import Checkpoint, CheckpointMeta, Fragment
from cpt.checkpoint.writing import finish_checkpoint, start_checkpoint, write_shard
from cpt.config import ConfigError, ModelSection, Problem
from cpt.model.build import Needs, build_model, named_tensors
from cpt.model.export import TOKENIZER_FILES, ExportSpec, export_checkpoint
from cpt.prepare import own_tokenizer_path
from cpt.rundir import DataError

To = Literal["cpt", "hf", "deepspeed"]
Say = Callable[[str], None]


def convert(
    source: Path, out: Path, to: To, *, model: Path | None = None, say: Say = lambda text: None
) -> dict[str, Any]:
    """Convert and prove; returns facts of what was written. ``model``: a folder whose config.json describes the model,
    where the source does not hold it.

    Raises:
        ConfigError: the target holds something, or this source cannot become that.
        DataError: the source is damaged, or of a kind that is not read.
        RuntimeError: what was written differs from its source; it was removed.
    """
    kind = kind_of(source)
    if (kind == "cpt") == (to == "cpt"):
        fix = "from cpt: --to hf or deepspeed; from Hugging Face or DeepSpeed: --to cpt"
        raise ConfigError(Problem("--to", to, f"{source} is a checkpoint of {NAMES[kind]}", fix))
    with _appearing(out) as part:
        if to == "hf":
            facts = _to_hf(source, part)
        elif to == "deepspeed":
            facts = _to_deepspeed(source, part, say)
        elif kind == "hf":
            facts = _from_hf(source, part)
        else:
            facts = _from_deepspeed(source, part, (model, say))
    return {"source": str(source), "out": str(out), "from": kind, "to": to, **facts}


NAMES = {"cpt": "cpt", "hf": "Hugging Face", "deepspeed": "DeepSpeed"}


def kind_of(source: Path) -> str:
    """Whose checkpoint lies there. Raises DataError where nobody's does."""
    if (source / META).is_file():
        return "cpt"
    tagged = any((source / name).is_file() for name in ("latest", "latest_universal"))
    if tagged or any((source / name).is_file() for name in MODEL_FILES):
        return "deepspeed"
    if (source / "config.json").is_file():
        return "hf"
    if (source / "checkpoints").is_dir():
        raise DataError(f"{source}: is a run folder; name one of its checkpoints, {source}/checkpoints/step_N")
    rule = "is neither a checkpoint of cpt (meta.json), of DeepSpeed (latest) nor a Hugging Face folder (config.json)"
    raise DataError(f"{source}: {rule}")


@contextmanager
def _appearing(out: Path) -> Iterator[Path]:
    """A folder beside ``out`` that takes its name at the end; what an earlier attempt left there is removed."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(Problem("--out", str(out), "holds something already", "choose another folder"))
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    part = out.absolute().parent / f".{out.name}.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        yield part / "made"
        if out.exists():
            out.rmdir()
        (part / "made").replace(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _to_hf(source: Path, part: Path) -> dict[str, Any]:
    from transformers import AutoConfig

    checkpoint = Checkpoint.open(source)
    spec = ExportSpec(out=part, tokenizer=own_tokenizer_path(str(source)))
    report = export_checkpoint(checkpoint.tensors(), AutoConfig.for_model(**checkpoint.meta.model_config), spec)
    return {
        "parameters": report.parameters,
        "proof": f"reloaded, largest logit difference {report.logit_difference:.2g}",
    }


def _to_deepspeed(source: Path, part: Path, say: Say) -> dict[str, Any]:
    checkpoint = Checkpoint.open(source)
    if not checkpoint.is_full:
        fix = "convert it to hf, or take a full checkpoint"
        raise ConfigError(Problem("SRC", str(source), "holds weights alone, no optimizer state", fix))
    say("writing")
    write_universal(checkpoint, part)
    written = open_deepspeed(part)
    compared = 0
    for fragments, _ in shards(written):
        say("comparing what was written")
        compared += sum(_same(checkpoint, fragment) for fragment in fragments)
    _check_all(checkpoint.meta, compared)
    how = '"checkpoint": {"load_universal": true} in the DeepSpeed config, then engine.load_checkpoint(OUT)'
    return {"parameters": compared, "proof": "reloaded, every element equal", "how_to_load": how}


def _from_hf(source: Path, part: Path) -> dict[str, Any]:
    needs = Needs(seq_len=1, vocab_size=1, seed=0)
    loaded = build_model(ModelSection(init_from=str(source), attention="sdpa", kernels="torch"), needs)
    tensors = dict(named_tensors(loaded.model))
    config: Any = loaded.model.config
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    meta = _meta(source, shapes, json.loads(config.to_json_string(use_diff=False)))
    fragments = [Fragment(name, 0, {"param": tensor.reshape(-1)}) for name, tensor in tensors.items()]
    _write(part, [(fragments, 0)], meta, parts=("param",), num_shards=1)
    compared = sum(_same(Checkpoint.open(part), fragment) for fragment in fragments)
    _check_all(meta, compared)
    return {"parameters": compared, "proof": "reloaded, every element equal", "holds": "weights"}


def _from_deepspeed(source: Path, part: Path, told: tuple[Path | None, Say]) -> dict[str, Any]:
    model, say = told
    folder = open_deepspeed(source)
    config = _model_config(source, folder, model)
    meta = _meta(source, folder.shapes, config, step=folder.step)
    say(f"converting {folder.kind}")
    updates = _write(part, shards(folder), meta, num_shards=folder.num_shards)
    checkpoint = Checkpoint.open(part)
    if problems := checkpoint.verify():
        raise DataError(f"{source}: does not hold every element of its parameters once: {problems[0]}")
    compared = 0
    for fragments, _ in shards(folder):
        say("comparing what was written")
        compared += sum(_same(checkpoint, fragment) for fragment in fragments)
    _check_all(meta, compared)
    facts = {"parameters": compared, "proof": "reloaded, every element equal", "holds": "weights and optimizer state"}
    return {**facts, "step": folder.step, "optimizer_steps": updates, "was": folder.kind}


def _write(
    part: Path,
    pieces: Iterable[tuple[list[Fragment], int]],
    meta: CheckpointMeta,
    *,
    num_shards: int,
    parts: tuple[str, ...] = ("param", "state"),
) -> int:
    """One piece after the other; returns the updates that the moments have seen."""
    values = 3 if "state" in parts else 1
    start_checkpoint(part, 4 * values * sum(math.prod(shape) for shape in meta.parameter_shapes.values()))
    receipts, updates = [], 0
    for rank, (fragments, steps) in enumerate(pieces):
        receipts.append(write_shard(part, fragments, rank=rank, world_size=num_shards, parts=parts))
        updates = max(updates, steps)
    finish_checkpoint(part, CheckpointMeta(**{**vars(meta), "optimizer_steps": updates}), receipts)
    return updates


def _meta(source: Path, shapes: dict[str, list[int]], config: dict[str, Any], *, step: int = 0) -> CheckpointMeta:
    """A checkpoint that no run of ours wrote: it has a model and a tokenizer, and no data that it was trained on."""
    has_tokenizer = any((source / name).is_file() for name in TOKENIZER_FILES)
    return CheckpointMeta(
        step=step,
        tokens_seen=0,
        tokens_by_source={},
        optimizer_steps=0,
        seed=0,
        plan_fingerprint="",
        parameter_shapes=shapes,
        model_config=config,
        run_config={"model": {"tokenizer": str(source.absolute()) if has_tokenizer else None, "init_from": None}},
        written_by={"converted_from": str(source)},
    )


def _model_config(source: Path, folder: DeepSpeedFolder, model: Path | None) -> dict[str, Any]:
    """Of ``model``, or of the config.json that lies with the folder; its parameters must be those of the folder."""
    places = [model] if model else list(dict.fromkeys([source, folder.path, folder.path.parent]))
    found = next((place for place in places if (place / "config.json").is_file()), None)
    if found is None:
        rule = f"no config.json lies in {', '.join(map(str, places))}, and DeepSpeed's files do not describe the model"
        raise ConfigError(
            Problem("--model", str(model) if model else None, rule, "give the model's Hugging Face folder")
        )
    from transformers import AutoConfig, AutoModelForCausalLM

    config: Any = AutoConfig.from_pretrained(found, local_files_only=True)
    with torch.device("meta"):
        wanted = {name: list(p.shape) for name, p in AutoModelForCausalLM.from_config(config).named_parameters()}
    if wanted != folder.shapes:
        name = next(n for n in sorted({*wanted, *folder.shapes}) if wanted.get(n) != folder.shapes.get(n))
        rule = f"describes another model: {name} is {wanted.get(name)} there, {folder.shapes.get(name)} in {source}"
        raise ConfigError(Problem("--model", str(found), rule, "give the folder of the model that was trained"))
    return dict(json.loads(config.to_json_string(use_diff=False)))


def _same(checkpoint: Checkpoint, fragment: Fragment) -> int:
    """Elements of a fragment that the checkpoint holds too, bit for bit; raises RuntimeError where one differs."""
    again = Fragment(fragment.name, fragment.start, {k: torch.empty_like(v) for k, v in fragment.state.items()})
    checkpoint.fill(again)
    for kind, tensor in fragment.state.items():
        if not torch.equal(tensor.view(torch.int32), again.state[kind].view(torch.int32)):  # NaN is equal to itself
            raise RuntimeError(f"{kind} of {fragment.name} differs from its source after writing; nothing was kept")
    return fragment.numel


def _check_all(meta: CheckpointMeta, compared: int) -> None:
    total = sum(math.prod(shape) for shape in meta.parameter_shapes.values())
    if compared != total:
        raise RuntimeError(f"{compared} of {total} elements were written; nothing was kept")


def render_conversion(facts: Mapping[str, Any]) -> str:
    lines = [f"{facts['out']}: {facts['parameters']:,} parameters from {NAMES[facts['from']]}; {facts['proof']}"]
    if "holds" in facts:
        lines.append(f"holds {facts['holds']}; a run starts from it with model.init_from={facts['out']}")
    return "\n".join([*lines, *([f"load it with {facts['how_to_load']}"] if "how_to_load" in facts else [])])

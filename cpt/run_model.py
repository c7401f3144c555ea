"""The model of a run with its weights: from its checkpoint, from another run or Hugging Face folder, or fresh."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from cpt.announce import model_config
from cpt.checkpoint.portable import Checkpoint, CheckpointMeta
from cpt.config import RunConfig
from cpt.model.build import LoadedModel, Needs, build_from_config, build_model, load_tensors
from cpt.model.compiling import compile_blocks
from cpt.model.recompute import set_recompute
from cpt.model.vocab import extend_vocabulary, with_vocabulary
from cpt.new_tokens import find_extension
from cpt.prepare import Prepared
from cpt.train.deepspeed_config import EngineSpec
from cpt.train.engine import Topology, shard_parameters
from cpt.train.one_by_one import empty_parameters


def load_model(prepared: Prepared, topology: Topology, checkpoint: Checkpoint | None) -> LoadedModel:
    """The model's weights: of this run's checkpoint, of another run's (init_from), from Hugging Face, or fresh."""
    return _whole(prepared, needs_of(prepared), topology.device, checkpoint)


def load_sharded(
    spec: EngineSpec, prepared: Prepared, topology: Topology, checkpoint: Checkpoint | None
) -> LoadedModel:
    """``load_model``, its weights cut up over the ranks where ZeRO 3 shards them. No rank but the first ever holds them
    all, and of a run that goes on, whose weights the engine fills in, not even that one.

    Raises:
        whatever ``load_model`` raises on rank 0, on every rank.
    """
    if spec.zero_stage < 3:
        return load_model(prepared, topology, checkpoint)
    needs = replace(needs_of(prepared), on_host=True)
    if checkpoint is not None:
        with empty_parameters():
            loaded = _whole(prepared, needs, topology.device, checkpoint)
    else:
        loaded = _from_rank_0(prepared, needs, topology)
    shard_parameters(loaded.model, spec, topology)
    return loaded


def _from_rank_0(prepared: Prepared, needs: Needs, topology: Topology) -> LoadedModel:
    """The whole model on rank 0, one of the same shapes without memory on the others."""
    loaded: LoadedModel | None = None
    told: list[Any] = [None, None]
    if topology.rank == 0:
        try:
            loaded = _whole(prepared, needs, topology.device, None)
            told[1] = (model_config(loaded), loaded.report)
        except Exception as error:  # whatever it was, the other ranks wait for this one's answer
            told[0] = error
    if topology.world_size > 1:
        dist.broadcast_object_list(told)
    if told[0] is not None:
        raise told[0]
    saved, report = told[1]
    if loaded is None:
        with empty_parameters():
            model = build_from_config(saved, prepared.config.model, needs, device=topology.device).model
        loaded = LoadedModel(model, report)
    return loaded


def _whole(prepared: Prepared, needs: Needs, device: torch.device, checkpoint: Checkpoint | None) -> LoadedModel:
    config = prepared.config
    if checkpoint is not None:  # the engine fills in the weights, each rank its own part
        return build_from_meta(config, checkpoint.meta, needs, device)
    origin = config.model.init_from
    if not origin:
        return build_model(config.model, needs, device=device)
    extension = find_extension(config)
    if extension is not None:
        needs = replace(needs, vocab_size=extension.base_vocab_size)
    if (Path(origin) / "meta.json").is_file():
        other = Checkpoint.open(Path(origin))
        loaded = build_from_meta(config, other.meta, needs, device)
        load_tensors(loaded.model, other.tensors(), origin=origin)
    else:
        loaded = build_model(config.model, needs, device=device)
    if extension is not None:  # now, while the weights are whole: sharded ones cannot be resized
        return extend_vocabulary(loaded, extension)
    return with_vocabulary(loaded, tokens=prepared.vocab_size)


def for_training(loaded: LoadedModel, config: RunConfig, device: torch.device) -> LoadedModel:
    """The same model with its blocks recomputed and compiled as the run asks; called before an engine wraps it.

    Raises:
        ConfigError: the family or the machine lacks what was asked for.
    """
    recompute = set_recompute(loaded.model, config.train.activation_checkpointing)
    compiled = compile_blocks(loaded.model, device=device) if config.train.compile else ""
    return loaded.noting(recompute, compiled)


def needs_of(prepared: Prepared) -> Needs:
    """What this run asks of any model."""
    config = prepared.config
    return Needs(
        seq_len=max(config.data.seq_len, *prepared.plan.seq_lens),
        vocab_size=prepared.vocab_size,
        seed=config.run.seed,
        compute_dtype=torch.bfloat16 if config.train.precision == "bf16" else torch.float32,
    )


def build_from_meta(config: RunConfig, meta: CheckpointMeta, needs: Needs, device: torch.device) -> LoadedModel:
    """A model of the shape that a checkpoint was written from, its weights still to be filled in."""
    return build_from_config(meta.model_config, config.model, needs, device=device)

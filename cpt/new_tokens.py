"""An extended tokenizer meets a model: does the model have the new rows already, and a folder that has them.

Who is right is decided by fingerprints: of the tokenizer that lies with the model, of the base that ``extension.json``
names, and of the extended tokenizer. A model of neither is refused. Finding out needs no torch.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from cpt.config import ConfigError, ModelSection, Problem, RunConfig
from cpt.data.vocabulary import VocabularyExtension, read_extension
from cpt.prepare import own_tokenizer_path, tokenizer_path
from cpt.rundir import DataError
from data_tools.encoders import tokenizer_fingerprint


def find_extension(config: RunConfig) -> VocabularyExtension | None:
    """The extension by which the weights of ``model.init_from`` must grow at the start of a new run, if any.

    Raises:
        ConfigError: ``model.tokenizer`` was extended from another tokenizer than the model's, or nobody knows which.
    """
    tokenizer, origin = tokenizer_path(config), config.model.init_from
    if tokenizer is None or origin is None:
        return None
    own = own_tokenizer_path(origin)
    try:
        extension = _read_checked(tokenizer)
        if extension is None:
            return None
        if own is not None:
            return _needed(extension, own, field="model.tokenizer", tokenizer=tokenizer)
    except DataError as error:
        raise ConfigError(Problem("model.tokenizer", str(tokenizer), str(error))) from None
    rule = f"was extended from {extension.base_name}, and no tokenizer lies with {origin} to compare"
    fix = f"put {extension.base_name}'s files there, or start from cpt extend-model {origin} --tokenizer {tokenizer}"
    raise ConfigError(Problem("model.tokenizer", str(tokenizer), rule, fix))


def extend_folder(base: Path, tokenizer: Path, out: Path, *, initializer: str = "mean_of_subtokens") -> dict[str, Any]:
    """Write the model of ``base`` (a Hugging Face folder or hub name) with rows for the extended tokenizer, and that.

    Old tokens' logits on a text of old tokens are compared before and after; the folder is loaded again before it
    appears.

    Raises:
        ConfigError, DataError: the tokenizer was not extended from the model's, or ``out`` holds something.
        RuntimeError: the old logits changed.
    """
    import torch

    from cpt.model.build import Needs, build_model, named_tensors
    from cpt.model.export import ExportSpec, export_checkpoint
    from cpt.model.model_config import read_model_config
    from cpt.model.vocab import INITIALIZERS, extend_vocabulary

    extension = _read_checked(tokenizer)
    own = own_tokenizer_path(str(base))
    if extension is not None and own is not None:
        extension = _needed(extension, own, field="--tokenizer", tokenizer=tokenizer)
    if extension is None:
        rule = "adds nothing to this model: it was not extended, or the model has its rows already"
        raise ConfigError(Problem("--tokenizer", str(tokenizer), rule, "give the output of cpt data extend-tokenizer"))
    section = ModelSection(init_from=str(base), attention="sdpa")
    loaded = build_model(section, Needs(seq_len=1, vocab_size=extension.base_vocab_size, seed=0))
    config: Any = loaded.model.config
    dtype: Literal["fp32", "bf16"] = "bf16" if "bfloat16" in str(read_model_config(section).dtype) else "fp32"
    positions = getattr(config.get_text_config(), "max_position_embeddings", None) or 32
    probe = torch.arange(min(32, extension.base_vocab_size, positions))[None]
    before_TV = _logits(loaded.model, probe)[:, : extension.base_vocab_size]
    loaded = extend_vocabulary(loaded, extension, initializer=INITIALIZERS[initializer])
    after_TV = _logits(loaded.model, probe)[:, : extension.base_vocab_size]
    change = (after_TV - before_TV).abs().max().item()
    if not change <= 1e-5 * max(1.0, before_TV.abs().max().item()):
        raise RuntimeError(f"the old tokens' logits changed by {change:.3g}; nothing was written")
    spec = ExportSpec(out=out, dtype=dtype, tokenizer=tokenizer)
    written = export_checkpoint(named_tensors(loaded.model), loaded.model.config, spec)
    facts = {**asdict(written), "out": str(written.out), "new_tokens": len(extension.subtokens)}
    facts["compared_with"] = str(own) if own is not None else None
    return {**facts, "vocabulary": loaded.report.vocabulary, "old_logits_change": change, "initializer": initializer}


def _read_checked(tokenizer: Path) -> VocabularyExtension | None:
    fingerprint = tokenizer_fingerprint(tokenizer)  # first of all: is there a tokenizer?
    extension = read_extension(tokenizer)
    if extension is not None and extension.fingerprint != fingerprint:
        raise DataError(f"{tokenizer}: changed since its extension.json was written; fix: extend the tokenizer again")
    return extension


def _needed(extension: VocabularyExtension, own: Path, *, field: str, tokenizer: Path) -> VocabularyExtension | None:
    """None where the model's own tokenizer is the extended one already."""
    found = tokenizer_fingerprint(own)
    if found == extension.fingerprint:
        return None
    if found == extension.base_fingerprint:
        return extension
    rule = f"was extended from {extension.base_name}, which is not the tokenizer of the model ({own})"
    raise ConfigError(Problem(field, str(tokenizer), rule, "extend the model's own tokenizer"))


def _logits(model: Any, probe: Any) -> Any:
    import torch

    with torch.no_grad():
        return model(input_ids=probe, use_cache=False).logits[0].float()

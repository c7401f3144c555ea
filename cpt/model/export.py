"""A Hugging Face folder from full named tensors, proved before it appears under its name.

Order: the tensors fill a model of the given config (every weight covered, no shape off), transformers writes it
(sharded safetensors, config, generation config), tokenizer files are added, the folder is loaded again and its logits
compared; only then is it renamed into place. A failed export leaves nothing behind. Refuses a target that holds
something.

Tolerances, largest absolute logit difference on the given token row:
- fp32: 1e-5 against the tensors given.
- bf16: 1e-5 against the given tensors rounded to bf16 (both computed in fp32, so the file is exact); what the
  rounding itself moves is measured and reported as ``rounding_difference``, not judged: it belongs to the format.
"""

import contextlib
import copy
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from cpt.config import ConfigError, Problem
from cpt.model.build import cast_parameters, load_tensors

LOGIT_TOLERANCE = 1e-5
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)


@dataclass(frozen=True)
class ExportSpec:
    """Where and how to write. ``tokenizer``: a folder, a ``tokenizer.json`` or a sentencepiece ``.model``; None
    writes none.

    ``probe`` is the token row on which logits are compared; ``max_shard_size`` as transformers spells it.
    """

    out: Path
    dtype: Literal["fp32", "bf16"] = "fp32"
    tokenizer: Path | None = None
    generation_config: Path | None = None
    max_shard_size: str = "4GB"
    probe: Sequence[int] = tuple(range(1, 33))


@dataclass(frozen=True)
class ExportReport:
    """What was written: counts, and the differences that were measured (see the module docstring)."""

    out: Path
    dtype: str
    files: tuple[str, ...]
    parameters: int
    bytes: int
    logit_difference: float
    rounding_difference: float


def export_checkpoint(
    tensors: Iterable[tuple[str, Tensor]], config: Any, spec: ExportSpec, *, live_logits_TV: Tensor | None = None
) -> ExportReport:
    """Write full tensors (named as the model names them, any float dtype) as a Hugging Face folder and verify it.

    ``config`` is the transformers config of the model. ``live_logits_TV``, where given, are fp32 logits of the
    running model on ``spec.probe``; the tensors must reproduce them too, within 1e-3 of the largest logit (another
    device rounds differently).

    Raises:
        ConfigError: the target is not empty, tensors do not fit the config, the tokenizer is missing.
        RuntimeError: what was written does not load or does not reproduce the logits; the target is then not created.
    """
    from transformers import AutoModelForCausalLM

    _check_target(spec)
    # A copy, and plain sdpa: the run's back-end may need a GPU, and the run's config must not change.
    model = AutoModelForCausalLM.from_config(
        copy.deepcopy(config), dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    load_tensors(model, tensors, origin="the checkpoint")
    probe = _probe_row(spec.probe, model.config.get_text_config())
    exact_TV = _logits(model, probe)
    _check_live(exact_TV, live_logits_TV)
    cast_parameters(model, DTYPES[spec.dtype])
    with _folder_beside(spec.out) as folder:
        _write(model, spec, folder)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        cast_parameters(model, torch.float32)
        rounded_TV = _logits(model, probe)
        difference = _verify(folder, rounded_TV, probe, parameters)
        files = sorted(path for path in folder.iterdir())
        names, size = tuple(path.name for path in files), sum(path.stat().st_size for path in files)
    return ExportReport(
        out=spec.out,
        dtype=spec.dtype,
        files=names,
        parameters=parameters,
        bytes=size,
        logit_difference=difference,
        rounding_difference=(rounded_TV - exact_TV).abs().max().item(),
    )


def _check_target(spec: ExportSpec) -> None:
    if spec.out.exists() and (not spec.out.is_dir() or any(spec.out.iterdir())):
        raise ConfigError(Problem("--out", str(spec.out), "already holds something", "name a new or empty folder"))
    for field, path in (("tokenizer", spec.tokenizer), ("generation_config", spec.generation_config)):
        if path is not None and not path.exists():
            raise ConfigError(Problem(field, str(path), "does not exist", "give the path of an existing one"))


def _probe_row(probe: Sequence[int], config: Any) -> Tensor:
    limit = getattr(config, "max_position_embeddings", None) or len(probe)
    return torch.tensor([[token % config.vocab_size for token in probe[:limit]]])


@torch.no_grad()
def _logits(model: torch.nn.Module, probe: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=probe, use_cache=False).logits[0].float()
    return logits


def _check_live(exact_TV: Tensor, live_TV: Tensor | None) -> None:
    if live_TV is None:
        return
    difference = (exact_TV - live_TV.to(exact_TV)).abs().max().item()
    if not difference <= 1e-3 * live_TV.abs().max().item():
        raise RuntimeError(
            f"export: the checkpoint's weights give logits that differ by {difference:.3g} from the live model's; "
            "it was taken from another step, or it is damaged: save the checkpoint again"
        )


@contextlib.contextmanager
def _folder_beside(out: Path) -> Iterator[Path]:
    """A temporary sibling that becomes ``out`` when the block succeeds and disappears when it does not."""
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        yield folder
        folder.chmod(0o755)  # mkdtemp makes it private
        if out.exists():
            out.rmdir()
        os.replace(folder, out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _write(model: Any, spec: ExportSpec, folder: Path) -> None:
    model.config.dtype = DTYPES[spec.dtype]
    if spec.generation_config is not None:
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_pretrained(
            spec.generation_config.parent, spec.generation_config.name
        )
    model.save_pretrained(folder, max_shard_size=spec.max_shard_size)
    if spec.tokenizer is not None:
        write_tokenizer(spec.tokenizer, folder)


def write_tokenizer(tokenizer: Path, folder: Path) -> None:
    """Copy the files of a tokenizer (see ``ExportSpec``) to an exported folder. Raises ConfigError: there are none."""
    if tokenizer.is_dir():
        found = [tokenizer / name for name in TOKENIZER_FILES if (tokenizer / name).is_file()]
        if not found:
            raise ConfigError(Problem("tokenizer", str(tokenizer), "the folder holds no tokenizer files"))
        for path in found:
            shutil.copyfile(path, folder / path.name)
    elif tokenizer.suffix == ".json":
        from transformers import PreTrainedTokenizerFast

        PreTrainedTokenizerFast(tokenizer_file=str(tokenizer)).save_pretrained(folder)
    else:
        shutil.copyfile(tokenizer, folder / "tokenizer.model")


def _verify(folder: Path, expected_TV: Tensor, probe: Tensor, parameters: int) -> float:
    """Load the folder as a stranger would and compare; returns the largest logit difference."""
    from transformers import AutoModelForCausalLM

    loaded, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True, local_files_only=True, output_loading_info=True
    )
    lost = sorted(info["missing_keys"]) + sorted(info["unexpected_keys"])
    count = sum(parameter.numel() for parameter in loaded.parameters())
    if lost or count != parameters:
        raise RuntimeError(
            f"export: {count:,} of {parameters:,} parameters came back from the written folder; lost: {lost[:8]}"
        )
    difference = (_logits(loaded.eval(), probe) - expected_TV).abs().max().item()
    if not difference <= LOGIT_TOLERANCE:
        raise RuntimeError(
            f"export: the written folder gives logits that differ by {difference:.3g}, more than {LOGIT_TOLERANCE}; "
            "nothing was kept"
        )
    return float(difference)

"""Which attention back-end runs, and the one call that runs a model on a batch (``forward_logits``).

Owns the choice among the back-ends of ``cpt.model.attention``. All are exact: positions restart with each document and
a query attends to earlier tokens of its own document only. ``verify_packing`` proves that for the model in hand,
because a model family is free to ignore what it is given. Refuses, rather than approximates: a family that takes no
``position_ids``, layers that mix tokens by other means than attention, a back-end whose package or device is missing.

Shapes: B row, T position in the row, V vocabulary.
"""

import functools
import importlib.util
import inspect
import itertools
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any, cast

import torch
from torch import Tensor

from cpt.config import ConfigError, Problem
from cpt.data.batch import Batch
from cpt.model.attention import (
    FIELD,
    RUNS_NAME,
    attention_in_use,
    attention_windows,
    bare_model,
    flex_attention_forward,
    flex_inputs,
    load_varlen_attn,
    sdpa_inputs,
    varlen_attention_forward,
    varlen_inputs,
)
from cpt.model.document_runs import document_run_attention

VARLEN_NAME, FLEX_NAME = "cpt_varlen", "cpt_flex"
EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")
HALF_DTYPES = (torch.bfloat16, torch.float16)


# --- the table --------------------------------------------------------------------------------------------------------


def _needs_gpu(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return f"it runs on CUDA only, and this run uses {device.type}"
    if dtype not in HALF_DTYPES:
        return f"it computes in bf16 or fp16 only, and this run uses {dtype}"
    return None


def _varlen_missing(device: torch.device, dtype: torch.dtype) -> str | None:
    if reason := _needs_gpu(device, dtype):  # asked first: the import below costs two seconds
        return reason
    if load_varlen_attn() is None:
        return f"torch {torch.__version__} has no torch.nn.attention.varlen with windows: install torch >= 2.11"
    return None


def _flex_missing(device: torch.device, dtype: torch.dtype) -> str | None:
    if reason := _needs_gpu(device, dtype):
        return reason
    if importlib.util.find_spec("triton") is None:
        return "FlexAttention is compiled with Triton, which is not installed: pip install triton"
    return None


def _flash_missing(
    distribution: str, how: str, majors: Collection[int], device: torch.device, dtype: torch.dtype
) -> str | None:
    """By the name of the distribution: FlashAttention 2 and 4 share a module name. Never fetched from a hub instead.

    ``majors``: compute capabilities that it is fast on.
    """
    if reason := _needs_gpu(device, dtype):
        return reason
    try:
        version(distribution)
    except PackageNotFoundError:
        return f"the {distribution} package is not installed: {how}"
    major, minor = torch.cuda.get_device_capability(device)
    return None if major in majors else f"it is not for GPUs of compute capability {major}.{minor}"


FLASH_2 = ("flash-attn", "pip install flash-attn --no-build-isolation", range(8, 100))
FLASH_3 = ("flash-attn-3", "build it from the folder hopper of github.com/Dao-AILab/flash-attention", (9,))
FLASH_4 = ("flash-attn-4", "pip install flash-attn-4", range(9, 100))


@dataclass(frozen=True)
class AttentionBackend:
    """One way to run attention: the name transformers knows it by, why it cannot run here (None: it can), its model
    inputs.
    """

    implementation: str
    missing: Callable[[torch.device, torch.dtype], str | None]
    inputs: Callable[[torch.nn.Module, Batch], dict[str, Any]]


# Fastest first: ``auto`` takes the first that can run.
ATTENTION_BACKENDS: dict[str, AttentionBackend] = {
    "flash_attn_3": AttentionBackend("flash_attention_3", functools.partial(_flash_missing, *FLASH_3), varlen_inputs),
    "flash_attn_4": AttentionBackend("flash_attention_4", functools.partial(_flash_missing, *FLASH_4), varlen_inputs),
    "flash_attn": AttentionBackend("flash_attention_2", functools.partial(_flash_missing, *FLASH_2), varlen_inputs),
    "varlen": AttentionBackend(VARLEN_NAME, _varlen_missing, varlen_inputs),
    "flex": AttentionBackend(FLEX_NAME, _flex_missing, flex_inputs),
    "sdpa": AttentionBackend("sdpa", lambda device, dtype: None, sdpa_inputs),
}


@dataclass(frozen=True)
class Choice:
    """A back-end and, where it was chosen rather than asked for, why faster ones were passed over."""

    name: str
    passed_over: str = ""


def resolve_backend(name: str, *, device: torch.device | str, dtype: torch.dtype) -> Choice:
    """The back-end to use: ``auto`` becomes the fastest that can run on this device and dtype.

    Raises:
        ConfigError: an unknown name, or a back-end that cannot run here, with what is missing.
    """
    device = torch.device(device)
    reasons = {key: backend.missing(device, dtype) for key, backend in ATTENTION_BACKENDS.items()}
    able = [key for key, reason in reasons.items() if reason is None]
    if name == "auto":
        faster = itertools.takewhile(lambda item: item[1] is not None, reasons.items())
        by_reason: dict[str, list[str]] = {}
        for key, reason in faster:
            by_reason.setdefault(str(reason), []).append(key)
        return Choice(able[0], "; ".join(f"{', '.join(keys)}: {reason}" for reason, keys in by_reason.items()))
    if name not in ATTENTION_BACKENDS:
        known = ", ".join(["auto", *ATTENTION_BACKENDS])
        raise ConfigError(Problem(FIELD, name, f"must be one of {known}"))
    if reasons[name]:
        raise ConfigError(Problem(FIELD, name, f"cannot be used: {reasons[name]}", f"set {FIELD}={able[0]} or auto"))
    return Choice(name)


def prepare_model(model: torch.nn.Module, backend: str, *, device: torch.device | str = "cpu") -> None:
    """Make a transformers model use ``backend``; called once after building, before any engine wraps the model.

    ``device`` is where it will run. Raises:
        ConfigError: the family takes no positions per token, mixes tokens across documents, or does not support the
        back-end.
    """
    bare: Any = bare_model(model)
    family = bare.config.model_type
    if "position_ids" not in inspect.signature(bare.forward).parameters:
        rule = "this family takes no position_ids, so positions cannot restart with each document"
        raise ConfigError(Problem("model", family, rule, "use a family with rotary or learned positions"))
    attention_windows(bare.config)
    implementation = ATTENTION_BACKENDS[backend].implementation
    _register(implementation)
    _set_implementation(bare, backend, implementation)
    if backend == "sdpa" and torch.device(device).type == "cpu":
        _register(RUNS_NAME)
        _set_implementation(bare, backend, RUNS_NAME)


def _register(implementation: str) -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    if implementation == VARLEN_NAME:
        attend = load_varlen_attn()
        assert attend is not None, "varlen was chosen without being available"
        AttentionInterface.register(VARLEN_NAME, functools.partial(varlen_attention_forward, attend))
    elif implementation == FLEX_NAME:
        AttentionInterface.register(FLEX_NAME, flex_attention_forward)
    elif implementation == RUNS_NAME:
        AttentionInterface.register(RUNS_NAME, document_run_attention)
        AttentionMaskInterface.register(RUNS_NAME, AttentionMaskInterface()["sdpa"])  # for calls that are not ours


def _set_implementation(bare: Any, backend: str, implementation: str) -> None:
    family = bare.config.model_type
    try:
        bare.set_attn_implementation(implementation)
    except (ValueError, ImportError) as error:
        raise ConfigError(Problem(FIELD, backend, f"{family} does not support it: {error}", "try another")) from error
    if bare.config._attn_implementation != implementation:
        rule = f"{family} keeps {bare.config._attn_implementation!r} instead"
        raise ConfigError(Problem(FIELD, backend, rule, "use a model family that transformers can switch"))


def forward_logits(model: torch.nn.Module, batch: Batch, backend: str) -> Tensor:
    """Logits (B, T, V) of a packed batch; ``model`` is a prepared transformers model or an engine around one.

    The call goes through ``model(...)``, so the hooks of an engine or of ZeRO-3 run.
    """
    able = {ATTENTION_BACKENDS[backend].implementation, *([RUNS_NAME] if backend == "sdpa" else [])}
    config: Any = bare_model(model).config
    assert attention_in_use(config) in able, f"prepare_model(model, {backend!r}) was not called"
    inputs: Mapping[str, Any] = ATTENTION_BACKENDS[backend].inputs(model, batch)
    output = model(input_ids=batch.input_ids_BT, position_ids=batch.positions_BT, use_cache=False, **inputs)
    return cast("Tensor", output.logits)


def verify_packing(model: torch.nn.Module, backend: str, *, vocab_size: int, device: torch.device | str) -> None:
    """Run one row of two documents twice, with another first document, and require the second one's logits not to
    change by a bit.

    A few milliseconds at start that turn a silent leak between documents into a message. Every rank must call it
    (ZeRO-3 gathers weights). Mixtures of experts multiply tokens in groups that depend on the whole batch, so there
    1% of the largest logit is let pass as rounding.

    Raises:
        ConfigError: the logits of the second document depend on the first.
    """
    batch = probe_batch(vocab_size, device)
    other = torch.where(batch.segments_BT == 0, batch.input_ids_BT + 1, batch.input_ids_BT)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        logits = [
            forward_logits(model, replace(batch, input_ids_BT=ids), backend) for ids in (batch.input_ids_BT, other)
        ]
    model.train(was_training)
    config: Any = bare_model(model).config
    rounding = 0.01 * logits[0].abs().max().item() if any(getattr(config, key, None) for key in EXPERT_COUNTS) else 0.0
    difference = (logits[0] - logits[1])[:, 16:].abs().max().item()
    if not difference <= rounding:  # also true for NaN
        family = config.model_type
        rule = f"documents in one row see each other under {family} (logits move by {difference:.3g})"
        raise ConfigError(Problem(FIELD, backend, rule, "use another back-end or model family"))


def probe_batch(vocab_size: int, device: torch.device | str) -> Batch:
    """One row of two documents of 16 tokens, none of whose labels counts."""
    row = torch.arange(32, device=device).remainder(max(vocab_size - 1, 1))[None]
    segments = (torch.arange(32, device=device) >= 16).long()[None]
    positions = torch.arange(32, device=device).remainder(16)[None]
    return Batch(row, torch.full_like(row, -100), positions, segments, row[:, 0])

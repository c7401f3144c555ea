"""Attention over packed rows: several documents in one row, none of which sees another.

Owns the back-ends and the one call that runs a model on a batch (``forward_logits``). All are exact: positions
restart with each document and a query attends to earlier tokens of its own document only. ``verify_packing`` proves
that for the model in hand, because a model family is free to ignore what it is given. Refuses, rather than
approximates: a family that takes no ``position_ids``, layers that mix tokens by other means than attention, a
back-end whose package or device is missing.

Shapes: B row, T position in the row, V vocabulary, H head, D head width. Worked example, two rows of four tokens
(``segments_BT``):

    [[0, 0, 0, 1],          cu_seqlens = [0, 3, 4, 6, 8]: documents in the flattened batch; a row's end always ends one
     [0, 0, 1, 1]]          max_length = 3
"""

import functools
import importlib.util
import inspect
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from cpt.config import ConfigError, Problem
from cpt.data.batch import Batch

log = logging.getLogger(__name__)

FIELD = "model.attention"
VARLEN_NAME = "cpt_varlen"
EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")
HALF_DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class PackedLayout:
    """Where documents lie in the flattened batch; computed on the CPU it saves the GPU a synchronisation per
    micro-batch.
    """

    cu_seqlens: Tensor  # int32 [documents + 1]
    max_length: int
    one_document_per_row: bool


def packed_layout(segments_BT: Tensor) -> PackedLayout:
    """Document borders of a batch from its segment numbers (see the example above)."""
    starts_BT = torch.ones_like(segments_BT, dtype=torch.bool)
    starts_BT[:, 1:] = segments_BT[:, 1:] != segments_BT[:, :-1]
    starts = starts_BT.flatten().nonzero().flatten()
    cu_seqlens = torch.cat([starts, starts.new_tensor([segments_BT.numel()])]).to(torch.int32)
    return PackedLayout(
        cu_seqlens=cu_seqlens,
        max_length=int(cu_seqlens.diff().max()),
        one_document_per_row=starts.numel() == segments_BT.shape[0],
    )


# --- sdpa: a boolean mask, on any device ------------------------------------------------------------------------------


def _sdpa_inputs(model: torch.nn.Module, batch: Batch, layout: PackedLayout | None) -> dict[str, Any]:
    config: Any = _bare(model).config
    windows = attention_windows(config)
    layout = layout or packed_layout(batch.segments_BT)
    if layout.one_document_per_row and windows == {None}:
        return {}  # plain causal attention: without a mask the fused causal kernels run
    masks = {window: _document_mask(batch.segments_BT, window) for window in windows}
    if len(masks) == 1:
        return {"attention_mask": next(iter(masks.values()))}
    by_layer_type = {"sliding_attention" if window else "full_attention": mask for window, mask in masks.items()}
    return {"attention_mask": by_layer_type}


def _document_mask(segments_BT: Tensor, window: int | None) -> Tensor:
    """Boolean (B, 1, T, T): True where query t may see key s: same document, s <= t, and t - s < window."""
    length = segments_BT.shape[1]
    index_T = torch.arange(length, device=segments_BT.device)
    distance_TT = index_T[:, None] - index_T[None, :]
    visible_TT = distance_TT >= 0
    if window is not None:
        visible_TT = visible_TT & (distance_TT < window)
    return ((segments_BT[:, :, None] == segments_BT[:, None, :]) & visible_TT)[:, None]


def attention_windows(config: Any) -> set[int | None]:
    """The sliding windows a model's layers use; None stands for full attention. An explicit mask must repeat them.

    Raises:
        ConfigError: a layer mixes tokens by something else (recurrence, chunks), which no mask can cut at document
        borders.
    """
    window = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None)
    if layer_types is None:
        return {window if getattr(config, "use_sliding_window", True) else None}
    foreign = sorted(set(layer_types) - {"full_attention", "sliding_attention"})
    if foreign:
        rule = f"layers of type {', '.join(foreign)} carry information across documents in a packed row"
        raise ConfigError(Problem("model", config.model_type, rule, "use a model with full or sliding attention only"))
    return {window if kind == "sliding_attention" else None for kind in layer_types}


# --- varlen and flash_attn: document borders given to a CUDA kernel ---------------------------------------------------


def _varlen_inputs(model: torch.nn.Module, batch: Batch, layout: PackedLayout | None) -> dict[str, Any]:
    layout = layout or packed_layout(batch.segments_BT)
    cu_seqlens = layout.cu_seqlens.to(batch.segments_BT.device, non_blocking=True)
    # transformers' own names: flash_attention_2 and the function below both read them.
    return {
        "cu_seq_lens_q": cu_seqlens,
        "cu_seq_lens_k": cu_seqlens,
        "max_length_q": layout.max_length,
        "max_length_k": layout.max_length,
    }


def load_varlen_attn() -> Callable[..., Tensor] | None:
    """torch's variable-length attention where this torch has the version with ``scale`` and ``window_size`` (2.11
    on), else None.
    """
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return None
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    return cast("Callable[..., Tensor]", varlen_attn) if {"scale", "window_size"} <= set(known) else None


def varlen_attention_forward(
    attend: Callable[..., Tensor], module: torch.nn.Module, *qkv_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers attention function over torch's varlen kernel ``attend``: (B, H, T, D) in, (B, T, H, D) out."""
    query, key, value = (cast("Tensor", x) for x in qkv_mask[:3])
    cu_seqlens, max_length = kwargs.get("cu_seq_lens_q"), kwargs.get("max_length_q")
    if cu_seqlens is None or max_length is None:
        rule = f"{type(module).__name__} does not hand the document borders to its attention function"
        raise ConfigError(Problem(FIELD, "varlen", rule, "use sdpa"))
    unsupported = [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]
    unsupported += ["dropout"] if kwargs.get("dropout") else []
    if unsupported:
        rule = f"this model's attention uses {', '.join(unsupported)}, which this kernel lacks"
        raise ConfigError(Problem(FIELD, "varlen", rule, "use flash_attn or sdpa"))
    if torch.is_autocast_enabled(query.device.type):  # a kernel of its own is not on autocast's list
        query, key, value = (x.to(torch.get_autocast_dtype(x.device.type)) for x in (query, key, value))
    batch, heads, length, _ = query.shape
    options: dict[str, Any] = {"scale": kwargs.get("scaling"), "window_size": (-1, 0)}
    if (window := kwargs.get("sliding_window")) is not None and window < length:
        options["window_size"] = (window - 1, 0)  # the kernel counts tokens to the left of the query, without itself
    if key.shape[1] != heads and "enable_gqa" in inspect.signature(attend).parameters:
        options["enable_gqa"] = True
    elif key.shape[1] != heads:  # torch 2.11 does not promise grouped heads
        key, value = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (key, value))
    flat = [x.transpose(1, 2).reshape(batch * length, x.shape[1], x.shape[3]) for x in (query, key, value)]
    out = attend(*flat, cu_seqlens, cu_seqlens, max_length, max_length, **options)
    return out.view(batch, length, heads, -1), None


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


def _flash_attn_missing(device: torch.device, dtype: torch.dtype) -> str | None:
    if importlib.util.find_spec("flash_attn") is None:
        return "the flash-attn package is not installed: pip install flash-attn --no-build-isolation"
    return _needs_gpu(device, dtype)


@dataclass(frozen=True)
class AttentionBackend:
    """One way to run attention: the name transformers knows it by, why it cannot run here (None: it can), its model
    inputs.
    """

    attn_implementation: str
    missing: Callable[[torch.device, torch.dtype], str | None]
    inputs: Callable[[torch.nn.Module, Batch, PackedLayout | None], dict[str, Any]]


# Fastest first: ``auto`` takes the first that can run.
ATTENTION_BACKENDS: dict[str, AttentionBackend] = {
    "flash_attn": AttentionBackend("flash_attention_2", _flash_attn_missing, _varlen_inputs),
    "varlen": AttentionBackend(VARLEN_NAME, _varlen_missing, _varlen_inputs),
    "sdpa": AttentionBackend("sdpa", lambda device, dtype: None, _sdpa_inputs),
}


def resolve_backend(name: str, *, device: torch.device | str, dtype: torch.dtype) -> str:
    """The back-end to use: ``auto`` becomes the fastest that can run on this device and dtype; the choice is logged.

    Raises:
        ConfigError: an unknown name, or a back-end that cannot run here, with what is missing.
    """
    device = torch.device(device)
    reasons = {key: backend.missing(device, dtype) for key, backend in ATTENTION_BACKENDS.items()}
    able = [key for key, reason in reasons.items() if reason is None]
    if name == "auto":
        passed_over = "".join(f"; not {key}: {reason}" for key, reason in reasons.items() if reason)
        log.info("attention back-end: %s%s", able[0], passed_over)
        return able[0]
    if name not in ATTENTION_BACKENDS:
        known = ", ".join(["auto", *ATTENTION_BACKENDS])
        raise ConfigError(Problem(FIELD, name, f"must be one of {known}"))
    if reasons[name]:
        raise ConfigError(Problem(FIELD, name, f"cannot be used: {reasons[name]}", f"set {FIELD}={able[0]} or auto"))
    return name


def prepare_model(model: torch.nn.Module, backend: str) -> None:
    """Make a transformers model use ``backend``; called once after building, before any engine wraps the model.

    Raises:
        ConfigError: the family takes no positions per token, mixes tokens across documents, or does not support the
        back-end.
    """
    bare: Any = _bare(model)
    family = bare.config.model_type
    if "position_ids" not in inspect.signature(bare.forward).parameters:
        rule = "this family takes no position_ids, so positions cannot restart with each document"
        raise ConfigError(Problem("model", family, rule, "use a family with rotary or learned positions"))
    attention_windows(bare.config)
    implementation = ATTENTION_BACKENDS[backend].attn_implementation
    if implementation == VARLEN_NAME:
        from transformers import AttentionInterface

        attend = load_varlen_attn()
        assert attend is not None, "varlen was chosen without being available"
        AttentionInterface.register(VARLEN_NAME, functools.partial(varlen_attention_forward, attend))
    try:
        bare.set_attn_implementation(implementation)
    except (ValueError, ImportError) as error:
        raise ConfigError(Problem(FIELD, backend, f"{family} does not support it: {error}", "try another")) from error
    if bare.config._attn_implementation != implementation:
        rule = f"{family} keeps {bare.config._attn_implementation!r} instead"
        raise ConfigError(Problem(FIELD, backend, rule, "use a model family that transformers can switch"))


def forward_logits(model: torch.nn.Module, batch: Batch, backend: str, *, layout: PackedLayout | None = None) -> Tensor:
    """Logits (B, T, V) of a packed batch; ``model`` is a prepared transformers model or an engine around one.

    The call goes through ``model(...)``, so the hooks of an engine or of ZeRO-3 run. ``layout`` may be computed
    beforehand on the CPU copy of the batch (``packed_layout``) to spare a device synchronisation.
    """
    expected = ATTENTION_BACKENDS[backend].attn_implementation
    config: Any = _bare(model).config
    assert config._attn_implementation == expected, f"prepare_model(model, {backend!r}) was not called"
    inputs: Mapping[str, Any] = ATTENTION_BACKENDS[backend].inputs(model, batch, layout)
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
    row = torch.arange(32, device=device).remainder(max(vocab_size - 1, 1))[None]
    segments = (torch.arange(32, device=device) >= 16).long()[None]
    positions = torch.arange(32, device=device).remainder(16)[None]
    other = torch.where(segments == 0, row + 1, row)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        logits = [
            forward_logits(model, Batch(ids, torch.full_like(ids, -100), positions, segments, ids[:, 0]), backend)
            for ids in (row, other)
        ]
    model.train(was_training)
    config: Any = _bare(model).config
    rounding = 0.01 * logits[0].abs().max().item() if any(getattr(config, key, None) for key in EXPERT_COUNTS) else 0.0
    difference = (logits[0] - logits[1])[:, 16:].abs().max().item()
    if not difference <= rounding:  # also true for NaN
        family = config.model_type
        rule = f"documents in one row see each other under {family} (logits move by {difference:.3g})"
        raise ConfigError(Problem(FIELD, backend, rule, "use another back-end or model family"))


def _bare(model: torch.nn.Module) -> torch.nn.Module:
    """The transformers model inside an engine, or the model itself."""
    inner = getattr(model, "module", model)
    return inner if isinstance(inner, torch.nn.Module) else model

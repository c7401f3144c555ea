"""Attention back-ends over packed rows: what each is given, and the functions that transformers calls for ours.

Owns the document borders in the forms that kernels want them: a boolean mask, runs (``cpt.model.document_runs``), a
table of blocks, cumulated lengths. Refuses families whose layers mix tokens by other means than attention, and models
that ask a kernel for what it lacks. Which back-end is used is decided in ``cpt.model.kernels``.

Shapes: B row, T position in the row, H head, D head width.
"""

import functools
import importlib.util
import inspect
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from cpt.config import ConfigError, Problem
from cpt.data.batch import Batch, packed_layout
from cpt.model import document_runs

FIELD = "model.attention"
RUNS_NAME = "cpt_document_runs"
ULYSSES = "cpt_ulysses_"  # before the name of the function that runs between exchanges (cpt.model.ulysses)
FLASH, VEILED = "flash", "FLASH"
BLOCKS = "document_blocks"  # under which a model hands a BlockMask to its attention layers


# --- sdpa: a boolean mask on any device, runs of documents on a CPU ---------------------------------------------------


def sdpa_inputs(model: torch.nn.Module, batch: Batch) -> dict[str, Any]:
    config: Any = bare_model(model).config
    windows = attention_windows(config)
    layout = batch.layout or packed_layout(batch.segments_BT)
    if layout.one_document_per_row and windows == {None}:
        return {}  # plain causal attention: without a mask the fused causal kernels run
    by_runs = attention_in_use(config) == RUNS_NAME
    make = document_runs.mask_with_runs if by_runs else document_runs.document_mask
    masks = {window: make(batch.segments_BT, window) for window in windows}
    return {"attention_mask": _by_layer_type(masks)}


def _by_layer_type(masks: Mapping[int | None, object]) -> object:
    """A mask per window as transformers takes them: one for all layers, or one for each type of layer."""
    if len(masks) == 1:
        return next(iter(masks.values()))
    return {"sliding_attention" if window else "full_attention": mask for window, mask in masks.items()}


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


def varlen_inputs(model: torch.nn.Module, batch: Batch) -> dict[str, Any]:
    layout = batch.layout or packed_layout(batch.segments_BT)
    # transformers' own names: flash_attention_2 and the function below both read them.
    return {
        "cu_seq_lens_q": layout.cu_seqlens,
        "cu_seq_lens_k": layout.cu_seqlens,
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
    _refuse_extras("varlen", kwargs)
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


# --- flex: torch's FlexAttention with a mask of blocks, written for any device, compiled where there is a GPU ---------


def flex_inputs(model: torch.nn.Module, batch: Batch) -> dict[str, Any]:
    windows = attention_windows(bare_model(model).config)
    masks = {window: block_mask(batch.segments_BT, window) for window in windows}
    # some families look at attention_mask as at a tensor; layers of different types get theirs in no other way
    return {BLOCKS: next(iter(masks.values()))} if len(masks) == 1 else {"attention_mask": _by_layer_type(masks)}


def block_mask(segments_BT: Tensor, window: int | None) -> Any:
    """FlexAttention's BlockMask of a packed batch: same document, earlier, inside the window."""
    from torch.nn.attention.flex_attention import create_block_mask

    def seen(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        visible = (query >= key) & (segments_BT[row, query] == segments_BT[row, key])
        return visible if window is None else visible & (query - key < window)

    rows, length = segments_BT.shape
    # compiled: without, a (rows, T, T) tensor is made on the way
    create: Any = _compiled(create_block_mask) if segments_BT.is_cuda else create_block_mask
    return create(seen, rows, None, length, length, device=segments_BT.device)


def flex_attention_forward(module: torch.nn.Module, *qkv_mask: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """transformers attention function over torch's FlexAttention: (B, H, T, D) in, (B, T, H, D) out."""
    from torch.nn.attention.flex_attention import flex_attention

    query, key, value, blocks = qkv_mask[:4]
    blocks = kwargs.get(BLOCKS, blocks)
    _refuse_extras("flex", kwargs)
    if torch.is_autocast_enabled(query.device.type):
        query, key, value = (x.to(torch.get_autocast_dtype(x.device.type)) for x in (query, key, value))
    attend: Any = _compiled(flex_attention) if query.is_cuda else flex_attention
    grouped = key.shape[1] != query.shape[1]
    out = attend(query, key, value, block_mask=blocks, scale=kwargs.get("scaling"), enable_gqa=grouped)
    return out.transpose(1, 2), None


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)


def _refuse_extras(backend: str, kwargs: Mapping[str, Any]) -> None:
    unsupported = [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]
    unsupported += ["dropout"] if kwargs.get("dropout") else []
    if unsupported:
        rule = f"this model's attention uses {', '.join(unsupported)}, which this kernel lacks"
        raise ConfigError(Problem(FIELD, backend, rule, "use flash_attn or sdpa"))


def attention_in_use(config: Any) -> str:
    """The attention function of a model, whether or not ranks share its rows."""
    name = str(config._attn_implementation)
    return name.removeprefix(ULYSSES).replace(VEILED, FLASH) if name.startswith(ULYSSES) else name


def name_of_shared(implementation: str) -> str:
    """What the attention function is registered as that runs ``implementation`` between exchanges. transformers looks
    for a kernel by every name that has the word flash in it, and finds none by this one.
    """
    return ULYSSES + implementation.replace(FLASH, VEILED)


def bare_model(model: torch.nn.Module) -> torch.nn.Module:
    """The transformers model inside an engine, or the model itself."""
    inner = getattr(model, "module", model)
    return inner if isinstance(inner, torch.nn.Module) else model

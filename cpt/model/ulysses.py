"""Sequence parallelism for long rows (DeepSpeed Ulysses, arXiv 2309.14509): P ranks share a row.

Everything but attention works on positions one by one, so each rank holds T / P of a row's positions all along. Only
attention needs the whole row: there the ranks exchange what they hold, so that each has all positions of 1 / P of the
heads, runs the run's own back-end on them as if it had never been otherwise, and exchanges back.

    before   rank 0: positions 0..T/2, heads 0..H        inside   rank 0: positions 0..T, heads 0..H/2
             rank 1: positions T/2..T, heads 0..H                 rank 1: positions 0..T, heads H/2..H

So documents are kept apart by the back-end, with the segments of the whole row (``Batch.held_by``), and results differ
from those of one rank by rounding alone. Where a model has fewer key-value heads than P, each is sent to the P / KV
ranks whose query heads use it. Gradients go back the same way. Owns the exchange, and the proof that a model stands it
(``share_rows``). Refuses numbers of heads that do not divide, and rotary positions that depend on the longest position
in sight, because a rank does not see it.

Shapes: B row, H head, T position, t = T / P, D head width.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from cpt.config import ConfigError, Problem
from cpt.data.place import Place
from cpt.model.attention import attention_in_use, bare_model, name_of_shared
from cpt.model.kernels import forward_logits, probe_batch
from cpt.plan_parts import heads_rule

FIELD = "deepspeed.sequence_parallel"
WATCHES_LENGTH = ("dynamic", "longrope")  # rotary positions that change with the longest position of the batch
SAME = {torch.float32: 1e-4}  # rounding that is let pass, of the largest logit; of 16-bit types 5%

Attention = Callable[..., tuple[Tensor, Any]]


def share_rows(model: torch.nn.Module, backend: str, place: Place, *, vocab_size: int, device: torch.device) -> str:
    """Make a prepared model, or the engine around it, work on parts of rows; returns what was done, in words.

    Called last of all, with ``backend`` proven on whole rows: the logits of a row of two documents that is shared must
    be those of the whole row. Every rank must call it.

    Raises:
        ConfigError: heads that do not divide, positions that cannot be shared, logits that differ.
    """
    shared = place.sequence_parallel
    if shared == 1:
        return ""
    bare: Any = bare_model(model)
    _check_model(bare.config, shared)
    probe = probe_batch(vocab_size, device)
    length = -(-probe.input_ids_BT.shape[1] // shared) * shared
    whole = probe.padded(length)
    logits = _logits(model, whole, backend)
    _install(bare, sequence_group(place), shared)
    own = place.positions(length)
    difference = (_logits(model, whole.held_by(place), backend) - logits[:, own])[whole.segments_BT[:, own] < 2]
    worst = torch.tensor([difference.abs().max().item() if difference.numel() else 0.0], device=device)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)  # all ranks leave, or none
    limit = SAME.get(next(model.parameters()).dtype, 0.05) * max(1.0, logits.abs().max().item())
    if not worst.item() <= limit:  # also true for NaN
        rule = f"{bare.config.model_type} gives other logits when {shared} ranks share a row (by {worst.item():.3g})"
        raise ConfigError(Problem(FIELD, shared, rule, "use 1, or another attention back-end or model family"))
    return f"rows: shared by {shared} ranks each (Ulysses)"


def sequence_group(place: Place) -> dist.ProcessGroup:
    """The ranks that share this rank's rows; every rank must call it."""
    shared, own = place.sequence_parallel, None
    for first in range(0, place.world_size, shared):
        group = dist.new_group(range(first, first + shared))
        own = group if first <= place.rank < first + shared else own
    assert own is not None
    return cast("dist.ProcessGroup", own)


def _check_model(config: Any, shared: int) -> None:
    text = config.get_text_config()
    heads = text.num_attention_heads
    rule = heads_rule(heads, getattr(text, "num_key_value_heads", None) or heads, shared)
    parameters = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    if rule is None and parameters.get("rope_type") in WATCHES_LENGTH:
        rule = f"its rotary positions ({parameters['rope_type']}) depend on the longest one, which no rank sees"
    if rule:
        raise ConfigError(Problem(FIELD, shared, f"{config.model_type}: {rule}"))


@torch.no_grad()
def _logits(model: torch.nn.Module, batch: Any, backend: str) -> Tensor:
    was_training = model.training
    model.eval()
    logits = forward_logits(model, batch, backend).float()
    model.train(was_training)
    return logits


def _install(bare: Any, group: dist.ProcessGroup, shared: int) -> None:
    from transformers import AttentionInterface

    inner = bare.config._attn_implementation
    attend = AttentionInterface()[inner]

    def attention(module: torch.nn.Module, *qkv_mask: Any, **kwargs: Any) -> tuple[Tensor, None]:
        seen = _AsIf(module, config=_AsIf(module.config, _attn_implementation=inner))
        return attend_shared(attend, (group, shared), seen, *qkv_mask, **kwargs)

    shared_name = name_of_shared(inner)
    AttentionInterface.register(shared_name, torch.compiler.disable(attention))  # type: ignore[no-untyped-call]
    bare.set_attn_implementation(shared_name)
    assert attention_in_use(bare.config) == inner, "the model did not take the new attention function"


def attend_shared(
    attend: Attention, ranks: tuple[dist.ProcessGroup, int], module: Any, *qkv_mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers attention function: (B, H, t, D) in, (B, t, H, D) out, with ``attend`` on whole rows in between.

    ``ranks``: the group that shares rows, and its size.
    """
    group, shared = ranks
    query, key, value, *mask = qkv_mask
    if kwargs.get("position_bias") is not None:
        raise ConfigError(Problem(FIELD, shared, "this model's attention has a bias by position", "use 1"))
    heads, kv_heads = query.shape[1], key.shape[1]
    if kv_heads % shared:  # each is sent to the ranks whose query heads use it
        key, value = (x.repeat_interleave(shared // kv_heads, dim=1) for x in (key, value))
    if hasattr(module, "num_key_value_groups"):
        module = _AsIf(module, num_key_value_groups=heads // key.shape[1])
    if isinstance(sinks := kwargs.get("s_aux"), Tensor):  # one per head
        kwargs["s_aux"] = sinks.chunk(shared)[dist.get_rank(group)]
    kwargs.pop("position_ids", None)  # of this rank's part; documents are in the mask or the layout of the whole row
    whole = (_to_heads(x, group, shared) for x in (query, key, value))
    out, _ = attend(module, *whole, *mask, **kwargs)
    return _to_positions(out, group, shared), None


def _to_heads(x: Tensor, group: dist.ProcessGroup, shared: int) -> Tensor:
    """(B, H, t, D) of all heads -> (B, H / P, T, D) of all positions."""
    rows, heads, held, width = x.shape
    parts = x.reshape(rows, shared, heads // shared, held, width).transpose(0, 1)  # by the rank that gets it
    parts = _exchange(parts, group)  # by the rank that it came from
    return parts.permute(1, 2, 0, 3, 4).reshape(rows, heads // shared, shared * held, width)


def _to_positions(x: Tensor, group: dist.ProcessGroup, shared: int) -> Tensor:
    """(B, T, H / P, D) of all positions -> (B, t, H, D) of all heads."""
    rows, length, own, width = x.shape
    parts = x.reshape(rows, shared, length // shared, own, width).transpose(0, 1)
    parts = _exchange(parts, group)
    return parts.permute(1, 2, 0, 3, 4).reshape(rows, length // shared, shared * own, width)


def _exchange(parts: Tensor, group: dist.ProcessGroup) -> Tensor:
    exchanged: Tensor = Exchange.apply(parts, group)  # type: ignore[no-untyped-call]
    return exchanged


class Exchange(torch.autograd.Function):
    """Part p of the first dimension goes to rank p of the group; what comes is by sender. Gradients go back likewise:
    the exchange is its own transpose.
    """

    @staticmethod
    def forward(ctx: Any, parts: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _exchanged(parts, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _exchanged(grads[0], ctx.group), None


def _exchanged(parts: Tensor, group: dist.ProcessGroup) -> Tensor:
    given = parts.contiguous()
    taken = torch.empty_like(given)
    dist.all_to_all_single(taken, given, group=group)
    return taken


class _AsIf:
    """An object with some of its attributes replaced."""

    def __init__(self, of: Any, **others: Any) -> None:
        self.__dict__.update(others, _of=of)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_of"], name)

"""Activation checkpointing: what a decoder block forgets after its forward pass and computes again for the backward.

Owns the one place where it is switched on. ``full`` keeps the input of each block; ``selective`` keeps the results of
matrix products and attention too, which are nearly all of the time and less than half of the memory, and computes
norms, rotary positions, activations and sums again. Neither changes a bit of the gradients: the same operations run
on the same numbers. Refuses families without checkpointed blocks.
"""

from collections import defaultdict, deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from cpt.config import ConfigError, Problem

FIELD = "train.activation_checkpointing"
# Names of the operations whose results are kept, in any namespace: torch's own products and attention kernels, and
# those that flash-attention packages register.
PRODUCTS = frozenset({"mm", "addmm", "bmm", "baddbmm", "_grouped_mm", "linear"})
ATTENTION_WORDS = ("scaled_dot_product", "flash_attention", "flash_attn", "varlen_attn", "efficient_attention", "flex")


def set_recompute(model: torch.nn.Module, mode: str) -> str:
    """Switch a transformers model to ``none``, ``selective`` or ``full``; returns what was set, in words.

    Raises:
        ConfigError: the family has no blocks that can be computed again.
    """
    known: Any = model
    if mode == "none":
        return ""
    if not known.supports_gradient_checkpointing:
        rule = f"{known.config.model_type} has no blocks that can be computed again"
        raise ConfigError(Problem(FIELD, mode, rule, f"set {FIELD}=none"))
    settings: dict[str, Any] = {"use_reentrant": False}
    if mode == "selective":
        settings["context_fn"] = selective_contexts
    # the newer name where there is one: the older one warns, and goes with transformers 6
    enable = getattr(known, "activation_checkpointing_enable", None) or known.gradient_checkpointing_enable
    enable(settings)
    kept = "matrix products and attention are kept" if mode == "selective" else "only the input of each is kept"
    return f"activation checkpointing: {mode}, of the blocks {kept}"


def selective_contexts() -> tuple[TorchDispatchMode, TorchDispatchMode]:
    """What runs around a block's forward pass and around its recomputation: the one keeps results, the other gives
    them back in the same order.

    torch's own pair wants the recomputation to be the same list of operations to the last one; the hooks of ZeRO-3
    gather weights in between, differently each time. Here only kept operations are counted.
    """
    kept: dict[object, deque[Any]] = defaultdict(deque)
    return _Keep(kept), _GiveBack(kept)


class _Keep(TorchDispatchMode):  # type: ignore[no-untyped-call]
    supports_higher_order_operators = True  # what a compiler made of a function passes through

    def __init__(self, kept: dict[object, deque[Any]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kept = kept

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if _is_kept(func):
            self.kept[func].append(tree_map_only(Tensor, lambda tensor: (tensor.detach(), tensor._version), out))
        return out


class _GiveBack(_Keep):  # type: ignore[no-untyped-call]
    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if not _is_kept(func):
            return func(*args, **(kwargs or {}))
        assert self.kept[func], f"{func} was not there in the forward pass, or this is a second backward pass"
        return _unwrapped(self.kept[func].popleft())


def _unwrapped(out: Any) -> Any:
    """Results as they were kept: one tensor with its version, or a tuple of such and of other things."""
    if not isinstance(out, tuple | list):
        return out
    if len(out) == 2 and isinstance(out[0], Tensor) and isinstance(out[1], int):
        assert out[0]._version == out[1], "a result that was kept for the backward pass was written over"
        return out[0]
    return tuple(_unwrapped(each) for each in out)


def _is_kept(operation: Any) -> bool:
    """By its whole name, such as ``aten.mm.default`` or ``flash_attn_3.fwd.default``."""
    name = str(operation).lower()
    return not PRODUCTS.isdisjoint(name.split(".")) or any(word in name for word in ATTENTION_WORDS)

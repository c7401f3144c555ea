"""Norms, rotary positions and gates in fewer passes over memory, for fp32 on a CPU: what Liger's kernels are on a GPU.

transformers composes them of small operations, and on a CPU each is a pass over the hidden states and, in the backward
pass, a fresh buffer: together more than a quarter of the step of a small model. Here each is one autograd function,
which writes into its own buffers and keeps its inputs alone. Norms and positions round once less than the composed
forms, gates exactly as often, and that is all that differs.

Owns which modules and functions are replaced: those that a probe finds to compute the same. Whatever comes in another
dtype, on another device, or through a compiler, which fuses by itself, goes the family's own way.
"""

import sys
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu

ROTARY = "apply_rotary_pos_emb"  # transformers' name for it, a function of the family's module
Rotary = Callable[..., tuple[Tensor, Tensor]]


def apply_lean(model: torch.nn.Module) -> str:
    """Patch what a probe recognises: the norms of ``model``, and the rotary function of its family in this process;
    returns what was patched, in words.
    """
    norms = [module for module in model.modules() if type(module).__name__.endswith("RMSNorm") and _is_rms_norm(module)]
    for norm in norms:
        norm.forward = LeanNorm(norm)
    rotary = _patch_rotary(sys.modules[type(model).__module__])
    gated = [module for module in model.modules() if type(module).__name__.endswith("MLP") and _is_gated(module)]
    for mlp in gated:
        mlp.forward = LeanGate(mlp)
    patched = {"norms": norms, "rotary positions": rotary, "gates": gated}
    return ", ".join(name for name, found in patched.items() if found)


def _is_lean(*tensors: Tensor) -> bool:
    return not torch.compiler.is_compiling() and all(x.dtype == torch.float32 and x.is_cpu for x in tensors)


# --- norms ------------------------------------------------------------------------------------------------------------


class LeanNorm:
    """The ``forward`` of one norm: root mean square over the last dimension, times the weight."""

    def __init__(self, norm: torch.nn.Module) -> None:
        self.norm = norm
        self.eps = float(cast("float", norm.variance_epsilon))
        self.composed: Callable[[Tensor], Tensor] = norm.forward

    def __call__(self, x: Tensor) -> Tensor:
        weight = cast("Tensor", self.norm.weight)  # the parameter of the moment: ZeRO 3 exchanges it
        if not _is_lean(x, weight):
            return self.composed(x)
        return cast("Tensor", _RmsNorm.apply(x, weight, self.eps))  # type: ignore[no-untyped-call]


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out = x.pow(2)
        scale = out.mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return torch.mul(x, scale, out=out).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        width = x.shape[-1]
        along = torch.mul(grad, x).view(-1, width)
        for_weight = torch.mv(along.T, scale.view(-1)) if ctx.needs_input_grad[1] else None
        pull = torch.mv(along, weight).view_as(scale).mul_(scale.pow(3)).div_(-width)
        return torch.mul(grad, weight, out=along.view_as(grad)).mul_(scale).addcmul_(x, pull), for_weight, None


def _is_rms_norm(norm: torch.nn.Module) -> bool:
    """Whether it computes what ``LeanNorm`` does: tried on a copy with weights of its own."""
    weight, eps = getattr(norm, "weight", None), getattr(norm, "variance_epsilon", None)
    if not isinstance(weight, torch.nn.Parameter) or weight.dim() != 1 or not isinstance(eps, float):
        return False
    probe = type(norm).__new__(type(norm))
    probe.__dict__ = {**norm.__dict__, "_parameters": {}}
    generator = torch.Generator().manual_seed(0)
    # Not by assignment: a model may be built just now with all its parameters on the meta device.
    probe._parameters["weight"] = torch.nn.Parameter(torch.randn(len(weight), generator=generator))
    x = torch.randn(3, len(weight), generator=generator)
    return torch.allclose(cast("Tensor", probe.forward(x)), LeanNorm(probe)(x), rtol=1e-5, atol=1e-6)


# --- rotary positions -------------------------------------------------------------------------------------------------


class LeanRotary:
    """A family's rotary function: queries and keys (B, H, T, D), cosines and sines (B, T, D)."""

    def __init__(self, composed: Rotary) -> None:
        self.composed = composed

    def __call__(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *rest: Any, **named: Any) -> Any:
        whole = q.shape[-1] == k.shape[-1] == cos.shape[-1] and not (rest or named or cos.requires_grad)
        if not (whole and _is_lean(q, k, cos, sin)):
            return self.composed(q, k, cos, sin, *rest, **named)
        return tuple(_Rotate.apply(x, cos[:, None], sin[:, None]) for x in (q, k))  # type: ignore[no-untyped-call]


class _Rotate(torch.autograd.Function):
    """x * cos + (-second half, first half) * sin."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        half = x.shape[-1] // 2
        first, second, out = x[..., :half], x[..., half:], x * cos
        out[..., :half].addcmul_(second, sin[..., :half], value=-1.0)
        out[..., half:].addcmul_(first, sin[..., half:])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        half = grad.shape[-1] // 2
        out = grad * cos
        out[..., :half].addcmul_(grad[..., half:], sin[..., half:])
        out[..., half:].addcmul_(grad[..., :half], sin[..., :half], value=-1.0)
        return out, None, None


def _patch_rotary(module: Any) -> bool:
    found = getattr(module, ROTARY, None)
    if isinstance(found, LeanRotary):
        return True
    if found is None or not _is_rotary(found):
        return False
    setattr(module, ROTARY, LeanRotary(found))
    return True


def _is_rotary(composed: Rotary) -> bool:
    generator = torch.Generator().manual_seed(0)
    q, k, cos, sin = (
        torch.randn(shape, generator=generator) for shape in ((2, 2, 3, 8), (2, 1, 3, 8), (2, 3, 8), (2, 3, 8))
    )
    try:
        wanted = composed(q, k, cos, sin)
    except (TypeError, ValueError, RuntimeError, IndexError):  # a function of other arguments
        return False
    pairs = zip(wanted, LeanRotary(composed)(q, k, cos, sin), strict=True)
    return all(a.shape == b.shape and torch.allclose(a, b, rtol=1e-6, atol=1e-6) for a, b in pairs)


# --- gates ------------------------------------------------------------------------------------------------------------


class LeanGate:
    """The ``forward`` of one MLP: down(silu(gate(x)) * up(x)).

    Its three layers are called as they are, so that whatever an engine hooks to them still happens.
    """

    def __init__(self, mlp: torch.nn.Module) -> None:
        self.mlp = mlp
        self.composed: Callable[[Tensor], Tensor] = mlp.forward

    def __call__(self, x: Tensor) -> Tensor:
        if not _is_lean(x) or torch.is_autocast_enabled("cpu"):
            return self.composed(x)
        mlp = cast("Any", self.mlp)
        product: Tensor = _SiluGate.apply(mlp.gate_proj(x), mlp.up_proj(x))  # type: ignore[no-untyped-call]
        return cast("Tensor", mlp.down_proj(product))


class _SiluGate(torch.autograd.Function):
    """silu(gate) * up, both of one shape."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        for_gate = torch.mul(grad, up)
        torch.ops.aten.silu_backward.grad_input(for_gate, gate, grad_input=for_gate)
        return for_gate, silu(gate).mul_(grad)


def _is_gated(mlp: torch.nn.Module) -> bool:
    """Whether it computes what ``LeanGate`` does: tried on a copy with three small layers of its own."""
    if not all(isinstance(getattr(mlp, name, None), torch.nn.Linear) for name in ("gate_proj", "up_proj", "down_proj")):
        return False
    probe = type(mlp).__new__(type(mlp))
    generator = torch.Generator().manual_seed(0)
    layers = {name: torch.randn(shape, generator=generator) for name, shape in _PROBE_SHAPES.items()}
    modules: dict[str, Any] = {name: _Product(weight) for name, weight in layers.items()}
    probe.__dict__ = {**mlp.__dict__, "_modules": {**mlp._modules, **modules}}
    x = torch.randn(4, 3, generator=generator)
    try:
        wanted = cast("Tensor", probe.forward(x))
    except (TypeError, ValueError, RuntimeError, AttributeError):  # it does more than three layers and a gate
        return False
    return wanted.shape == x.shape and torch.allclose(wanted, LeanGate(probe)(x), rtol=1e-5, atol=1e-6)


_PROBE_SHAPES = {"gate_proj": (5, 3), "up_proj": (5, 3), "down_proj": (3, 5)}


class _Product(torch.nn.Module):
    """A linear layer for a probe. Not ``torch.nn.Linear``: a model may be built just now on the meta device, and its
    layers with it.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight_of_probe = (weight,)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight_of_probe[0].T

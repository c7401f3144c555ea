"""Next-token loss: per token in nats, so that any sum over tokens, rows or sources is exact.

Owns the definition (``token_losses``) and the way that never holds all logits (``linear_losses``): output layer and
cross entropy together, a chunk of tokens at a time. While a chunk's logits are at hand its gradients are computed too,
for a total of factor 1; the backward pass only multiplies them by the factor that arrives. So nothing is computed
twice, and what is kept is the gradient of the hidden states and of the weight, never a token x vocabulary tensor. (The
idea is Liger's, arXiv 2410.10989.) Gradients of the weight add up in fp32 over chunks; everything else rounds as it
does on the plain way: logits in the compute dtype, softmax and loss in fp32.

Shape suffixes: B rows, T positions, V vocabulary, S sources, N counted tokens, C tokens of a chunk, D width.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy, linear

from cpt.data.packing import IGNORE_INDEX

# fp32 logits of a chunk. CPU: more leaves the caches, measured at vocabularies of 4k and 32k. GPU: large enough that
# adding up the weight's gradient is a few percent of the matrix products.
CHUNK_BYTES = {"cpu": 2**25, "cuda": 2**30}
CHUNK_TOKENS = {"cpu": (128, 512), "cuda": (1024, 16384)}  # fewest and most


@dataclass(frozen=True)
class Losses:
    """Of one micro-batch: ``total``, the sum over counted tokens, carries the gradient; ``per_token_BT`` (fp32, 0 where
    a token does not count) carries none.
    """

    total: Tensor
    per_token_BT: Tensor


def losses_of_logits(logits_BTV: Tensor, labels_BT: Tensor) -> Losses:
    """The plain way: all logits at once."""
    per_token_BT = token_losses(logits_BTV, labels_BT)
    return Losses(per_token_BT.sum(), per_token_BT.detach())


def token_losses(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Cross entropy of every position, computed in fp32; 0 where the label is ``IGNORE_INDEX``. Returns (B, T)."""
    flat = logits_BTV.float().flatten(0, 1)
    losses = cross_entropy(flat, labels_BT.reshape(-1), reduction="none", ignore_index=IGNORE_INDEX)
    return losses.view_as(labels_BT)


def sums_by_source(losses_BT: Tensor, labels_BT: Tensor, source_ids_B: Tensor, *, num_sources: int) -> Tensor:
    """(2, S) float64: summed loss and number of counted tokens of every source. float64: sums over 10^7 tokens stay
    exact enough.
    """
    per_row = torch.stack([losses_BT.sum(dim=1, dtype=torch.float64), (labels_BT != IGNORE_INDEX).sum(dim=1).double()])
    sums = torch.zeros(2, num_sources, dtype=torch.float64, device=losses_BT.device)
    return sums.index_add_(1, source_ids_B, per_row)


def chunk_tokens(vocab_size: int, device_type: str) -> int:
    """Tokens whose logits exist at one time; a constant of the device, so that a resumed run adds up alike."""
    fewest, most = CHUNK_TOKENS.get(device_type, CHUNK_TOKENS["cuda"])
    budget = CHUNK_BYTES.get(device_type, CHUNK_BYTES["cuda"])
    return max(fewest, min(most, budget // (4 * vocab_size)))


def linear_losses(hidden_BTD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, labels_BT: Tensor) -> Tensor:
    """[total, loss of every token in order] of the logits ``hidden @ weight.T + bias``, fp32, (1 + B * T).

    The first element carries the gradient, and only that one. On a CPU tokens that do not count are left out of the
    matrix products; a GPU would have to be waited for to know which they are, so there they get a gradient of zero.
    """
    kind = hidden_BTD.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden_BTD.dtype
    hidden_ND, labels_N = hidden_BTD.flatten(0, -2), labels_BT.flatten()
    with torch.autocast(kind, enabled=False):
        if torch.is_grad_enabled():
            found: Tensor = _LinearLosses.apply(hidden_ND, weight_VD, bias_V, labels_N, dtype)  # type: ignore[no-untyped-call]
            return found
        return _Pass(hidden_ND, weight_VD, bias_V, dtype, needs=(False, False, False)).run(labels_N)


class _LinearLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, labels_N: Tensor, dtype: torch.dtype
    ) -> Tensor:
        work = _Pass(hidden_ND, weight_VD, bias_V, dtype, needs=ctx.needs_input_grad[:3])
        losses = work.run(labels_N)
        ctx.gradients = work.gradients()
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factors: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None  # in place below: they are good for one backward pass
        assert gradients is not None, "the loss of one forward pass went through two backward passes"
        return *(None if each is None else each.mul_(factors[0]) for each in gradients), None, None


class _Pass:
    """One pass over the tokens: losses, and the gradients of those inputs that ``needs`` marks."""

    def __init__(
        self,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        dtype: torch.dtype,
        *,
        needs: tuple[bool, bool, bool],
    ) -> None:
        self.hidden_ND = hidden_ND
        self.weight_VD = weight_VD.to(dtype)
        self.bias_V = None if bias_V is None else bias_V.to(dtype)
        self.dtype = dtype
        self.needs = needs
        # The gradient of the hidden states takes their own dtype at once, as it does on its way through the plain
        # graph; those of weight and bias stay in fp32 until they are whole.
        self.hidden_grad = torch.zeros_like(hidden_ND) if needs[0] else None
        self.weight_grad = torch.zeros_like(weight_VD, dtype=torch.float32) if needs[1] else None
        self.bias_grad = torch.zeros_like(bias_V, dtype=torch.float32) if bias_V is not None and needs[2] else None

    def run(self, labels_N: Tensor) -> Tensor:
        kind, count = self.hidden_ND.device.type, len(labels_N)
        losses = torch.zeros(1 + count, dtype=torch.float32, device=self.hidden_ND.device)
        counted = labels_N != IGNORE_INDEX
        places = counted.nonzero()[:, 0] if kind == "cpu" else torch.arange(count, device=labels_N.device)
        terms = _terms_on_gpu() if kind == "cuda" else _terms
        for places_C in torch.split(places, chunk_tokens(len(self.weight_VD), kind)):
            hidden_CD = self.hidden_ND[places_C].to(self.dtype)
            logits_CV = linear(hidden_CD, self.weight_VD, self.bias_V)
            losses_C, grad_CV = terms(logits_CV, labels_N[places_C], any(self.needs))
            losses[1 + places_C] = losses_C
            if grad_CV is not None:
                self._add_gradients(places_C, hidden_CD, grad_CV)
            del hidden_CD, logits_CV, losses_C, grad_CV  # else the next chunk's logits come beside them
        losses[0] = losses[1:].sum()
        return losses

    def _add_gradients(self, places_C: Tensor, hidden_CD: Tensor, grad_CV: Tensor) -> None:
        if self.hidden_grad is not None:
            self.hidden_grad[places_C] = torch.mm(grad_CV, self.weight_VD).to(self.hidden_grad.dtype)
        if self.weight_grad is not None:
            _add_product(self.weight_grad, grad_CV.T, hidden_CD)
        if self.bias_grad is not None:
            self.bias_grad += grad_CV.sum(dim=0, dtype=torch.float32)

    def gradients(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return self.hidden_grad, self.weight_grad, self.bias_grad


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total`` (fp32) += left @ right, the product not rounded to their dtype first where the device can do that."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif total.device.type == "cuda":
        torch.ops.aten.addmm.dtype_out(total, left, right, torch.float32, out=total)
    else:
        total += torch.mm(left, right)


def _terms(logits_CV: Tensor, labels_C: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """Losses (C,) in fp32 and their gradient by the logits, in the logits' dtype; zero where the label is ignored.

    One buffer beside the logits: log-softmax, exponentiated in place, minus one at the label.
    """
    ignored_C = labels_C == IGNORE_INDEX
    labels_C1 = labels_C.masked_fill(ignored_C, 0)[:, None]
    log_p_CV = torch.log_softmax(logits_CV, dim=-1, dtype=torch.float32)
    losses_C = log_p_CV.gather(1, labels_C1)[:, 0].neg().masked_fill(ignored_C, 0.0)
    if not with_gradient:
        return losses_C, None
    grad_CV = log_p_CV.exp_()
    grad_CV.scatter_add_(1, labels_C1, torch.full_like(labels_C1, -1.0, dtype=torch.float32))
    if logits_CV.device.type != "cpu":  # on a CPU they were left out
        grad_CV.masked_fill_(ignored_C[:, None], 0.0)
    return losses_C, grad_CV.to(logits_CV.dtype)


def _fused_terms(logits_CV: Tensor, labels_C: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """The same without writing into anything, for a compiler that makes one or two kernels of it."""
    ignored_C = labels_C == IGNORE_INDEX
    label_C1 = labels_C.masked_fill(ignored_C, 0)[:, None]
    log_p_CV = torch.log_softmax(logits_CV.float(), dim=-1)
    losses_C = log_p_CV.gather(1, label_C1)[:, 0].neg().masked_fill(ignored_C, 0.0)
    if not with_gradient:
        return losses_C, None
    at_label_CV = torch.arange(logits_CV.shape[1], device=logits_CV.device) == label_C1
    grad_CV = (log_p_CV.exp() - at_label_CV.float()).masked_fill(ignored_C[:, None], 0.0)
    return losses_C, grad_CV.to(logits_CV.dtype)


Terms = Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor | None]]


@functools.cache
def _terms_on_gpu() -> Terms:
    """Compiled where torch has Triton: otherwise softmax and gradient cross the memory bus half a dozen times."""
    from torch.utils._triton import has_triton

    return torch.compile(_fused_terms, fullgraph=True) if has_triton() else _terms

"""A model's output layer that answers with losses instead of logits while labels are set, or with the scores of chosen
tokens while those are asked for.

A transformers model calls its output layer at the end of its own forward pass, inside the hooks of an engine: there
ZeRO-3 has just gathered the layer's weight, so that is where the loss must be computed if logits are never to be
whole. ``attach_loss_head`` puts a ``LossHead`` in place of the layer's ``forward``; parameters, names and hooks stay as
they are, and without labels it does what the layer did.

Refuses to guess: a family that does anything with its logits afterwards (soft caps, scales: gemma2, cohere, granite)
is found by a probe (``attach_loss_head``), and keeps its whole logits.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.functional import linear

from cpt.data.batch import Batch
from cpt.model.attention import bare_model
from cpt.model.kernels import forward_logits, probe_batch
from cpt.train.losses import Losses, chunk_tokens, linear_losses, losses_of_logits
from cpt.train.token_scores import Asked, linear_scores, scores_of_logits


class LossHead:
    """What an output layer does when it is called; ``labels_BT``, ``asked`` and ``answer`` change that for one call."""

    def __init__(self, layer: torch.nn.Linear) -> None:
        self.layer = layer
        self.labels_BT: Tensor | None = None
        self.asked: Asked | None = None
        self.answer: Tensor | None = None  # given back whatever comes in: the probe

    def __call__(self, hidden_BTD: Tensor) -> Tensor:
        if self.answer is not None:
            return self.answer
        if self.asked is not None:
            return linear_scores(hidden_BTD, self.layer.weight, self.layer.bias, self.asked)
        if self.labels_BT is None:
            return linear(hidden_BTD, self.layer.weight, self.layer.bias)
        assert hidden_BTD.shape[:-1] == self.labels_BT.shape, "the model cut its hidden states before the output layer"
        return linear_losses(hidden_BTD, self.layer.weight, self.layer.bias, self.labels_BT)

    @contextmanager
    def given(
        self, *, labels_BT: Tensor | None = None, asked: Asked | None = None, answer: Tensor | None = None
    ) -> Iterator[None]:
        self.labels_BT, self.asked, self.answer = labels_BT, asked, answer
        try:
            yield
        finally:
            self.labels_BT = self.asked = self.answer = None


def forward_losses(model: torch.nn.Module, batch: Batch, backend: str) -> Losses:
    """The loss of a packed batch: in chunks where a ``LossHead`` is attached, of whole logits elsewhere."""
    head = _head_of(model)
    if head is None:
        return losses_of_logits(forward_logits(model, batch, backend), batch.labels_BT)
    with head.given(labels_BT=batch.labels_BT):
        found = forward_logits(model, batch, backend)
    return Losses(found[0], found[1:].detach().view_as(batch.labels_BT))


def forward_scores(model: torch.nn.Module, batch: Batch, asked: Asked, backend: str) -> Tensor:
    """(Q, 2) fp32: log-probability of each token asked about (nats), and 1 where no token is likelier, else 0. Logits
    of other places are made only where the model has no ``LossHead``.
    """
    head = _head_of(model)
    if head is None:
        return scores_of_logits(forward_logits(model, batch, backend), asked)
    with head.given(asked=asked):
        return forward_logits(model, batch, backend)


def attach_loss_head(model: torch.nn.Module, backend: str, *, vocab_size: int, device: torch.device | str) -> str:
    """Attach a ``LossHead`` if the model's logits are what its output layer gives, to the last bit; returns the choice
    in words.

    ``model`` may be an engine; every rank must call it (ZeRO-3 gathers weights for the probe).
    """
    layer = _output_layer(model)
    if type(layer) is not torch.nn.Linear:
        return f"of whole logits, for the output layer is a {type(layer).__name__}"
    head = LossHead(layer)
    layer.forward = head  # type: ignore[assignment]
    if not _logits_are_untouched(model, head, backend, vocab_size=vocab_size, device=device):
        del layer.forward
        return f"of whole logits, for {type(bare_model(model)).__name__} changes them after its output layer"
    chunk = chunk_tokens(layer.out_features, torch.device(device).type)
    return f"in chunks of {chunk:,} tokens, so that logits are never whole"


@torch.no_grad()
def _logits_are_untouched(
    model: torch.nn.Module, head: LossHead, backend: str, *, vocab_size: int, device: torch.device | str
) -> bool:
    """Whether logits of -96, -93 ... 96, which every dtype holds exactly, come out as they went in."""
    batch = probe_batch(vocab_size, device)
    shape = (*batch.input_ids_BT.shape, head.layer.out_features)
    dtype = next(model.parameters()).dtype
    wanted = torch.arange(torch.Size(shape).numel(), device=device).remainder(65).sub(32).mul(3).to(dtype).view(shape)
    was_training = model.training
    model.eval()
    with head.given(answer=wanted):
        found = forward_logits(model, batch, backend)
    model.train(was_training)
    return found.shape == wanted.shape and torch.equal(found.float(), wanted.float())


def _output_layer(model: torch.nn.Module) -> object:
    return bare_model(model).get_output_embeddings()  # type: ignore[operator]


def _head_of(model: torch.nn.Module) -> LossHead | None:
    head = getattr(_output_layer(model), "forward", None)
    return head if isinstance(head, LossHead) else None

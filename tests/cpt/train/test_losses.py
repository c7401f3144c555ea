"""The loss equals its definition, token by token and source by source."""

import torch

from cpt.data.packing import IGNORE_INDEX
from cpt.train.losses import sums_by_source, token_losses

LOGITS_BTV = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0))
LABELS_BT = torch.randint(0, 7, (3, 5), generator=torch.Generator().manual_seed(1))
LABELS_BT[0, 2] = LABELS_BT[2, 0] = LABELS_BT[2, 4] = IGNORE_INDEX


def naive(logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    """-log(exp(logit of the label) / sum of exp), in float64."""
    weights = logits_BTV.double().exp()
    right = weights.gather(-1, labels_BT.clamp(min=0)[..., None])[..., 0]
    return -(right / weights.sum(-1)).log() * (labels_BT != IGNORE_INDEX)


def test_every_tokens_loss_equals_the_naive_formula() -> None:
    torch.testing.assert_close(
        token_losses(LOGITS_BTV, LABELS_BT).double(), naive(LOGITS_BTV, LABELS_BT), atol=1e-6, rtol=0
    )


def test_an_ignored_label_costs_exactly_nothing_and_sends_no_gradient() -> None:
    logits = LOGITS_BTV.clone().requires_grad_()
    losses = token_losses(logits, LABELS_BT)
    assert losses[LABELS_BT == IGNORE_INDEX].tolist() == [0.0, 0.0, 0.0]
    losses.sum().backward()
    assert logits.grad is not None and not logits.grad[LABELS_BT == IGNORE_INDEX].any()
    assert logits.grad[LABELS_BT != IGNORE_INDEX].any(dim=-1).all()


def test_the_loss_is_computed_in_fp32_for_bf16_logits() -> None:
    low = LOGITS_BTV.bfloat16()
    assert token_losses(low, LABELS_BT).dtype == torch.float32
    torch.testing.assert_close(token_losses(low, LABELS_BT), token_losses(low.float(), LABELS_BT), atol=0, rtol=0)


def test_logits_may_come_as_a_view_that_is_not_contiguous() -> None:
    turned = LOGITS_BTV.transpose(0, 1).contiguous().transpose(0, 1)
    torch.testing.assert_close(token_losses(turned, LABELS_BT), token_losses(LOGITS_BTV, LABELS_BT), atol=0, rtol=0)


def test_sums_and_counts_go_to_the_source_of_each_row() -> None:
    losses = token_losses(LOGITS_BTV, LABELS_BT)
    totals, counts = sums_by_source(losses, LABELS_BT, torch.tensor([2, 0, 2]), num_sources=4)
    expected = [losses[1].double().sum(), 0.0, losses[[0, 2]].double().sum(), 0.0]
    torch.testing.assert_close(totals, torch.tensor(expected, dtype=torch.float64))
    assert counts.tolist() == [5, 0, 4 + 3, 0]


def test_sums_over_millions_of_tokens_lose_nothing() -> None:
    """A float32 sum of 2**24 + 1 ones stops at 2**24."""
    losses = torch.ones(1, 2**24 + 1)
    labels = torch.zeros(1, 1, dtype=torch.int64).expand(1, 2**24 + 1)
    sums = sums_by_source(losses, labels, torch.tensor([0]), num_sources=1)
    assert sums.flatten().tolist() == [2**24 + 1, 2**24 + 1]

"""The loss in chunks on a GPU: compiled terms, products added up in fp32, no waiting for the device."""

import pytest
import torch
from torch.nn.functional import linear

from cpt.data.packing import IGNORE_INDEX
from cpt.train import losses
from cpt.train.losses import linear_losses, losses_of_logits

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def tensors(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(2, 700, 256, generator=generator), torch.randn(3001, 256, generator=generator) / 16
    labels = torch.randint(0, 3001, (2, 700), generator=generator)
    labels[:, ::7] = IGNORE_INDEX
    live = [x.to("cuda", dtype).requires_grad_() for x in (hidden, weight)]
    return live[0], live[1], labels.cuda()


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-4), (torch.bfloat16, 0.01)])
def test_chunks_give_the_loss_and_the_gradients_of_whole_logits(
    dtype: torch.dtype, limit: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "chunk_tokens", lambda vocab_size, device_type: 300)
    hidden, weight, labels = tensors(dtype)
    found = linear_losses(hidden, weight, None, labels)
    (found[0] / 1200).backward()
    gradients = hidden.grad, weight.grad
    exact = [x.detach().float().requires_grad_() for x in (hidden, weight)]
    wanted = losses_of_logits(linear(exact[0], exact[1]), labels)
    (wanted.total / 1200).backward()
    assert (found[1:].view_as(labels) - wanted.per_token_BT).abs().max() < (1e-3 if dtype == torch.float32 else 0.1)
    assert not found[1:].view_as(labels)[:, ::7].any()
    for gradient, right in zip(gradients, (exact[0].grad, exact[1].grad), strict=True):
        assert gradient is not None and right is not None and gradient.dtype == dtype
        assert (gradient.float() - right).norm() / right.norm() < limit


def test_the_host_never_waits_for_the_device() -> None:
    hidden, weight, labels = tensors(torch.bfloat16)
    linear_losses(hidden, weight, None, labels)[0].backward()  # compiled now
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        linear_losses(hidden, weight, None, labels)[0].backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")

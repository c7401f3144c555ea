"""The loss equals its definition, token by token and source by source; in chunks it equals the loss of whole logits."""

import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import linear

from cpt.data.packing import IGNORE_INDEX
from cpt.train import losses as module
from cpt.train.losses import chunk_tokens, linear_losses, losses_of_logits, sums_by_source, token_losses

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


# --- in chunks --------------------------------------------------------------------------------------------------------


def leaves(*, bias: bool, dtype: torch.dtype = torch.float32, hidden: tuple[int, int] = (3, 50)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(*hidden, 16), (31, 16), *([(31,)] if bias else [])]
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def some_labels(counted: float = 0.8) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 31, (3, 50), generator=generator)
    return labels.masked_fill(torch.rand(3, 50, generator=generator) > counted, IGNORE_INDEX)


def plainly(tensors: list[Tensor], labels_BT: Tensor, factor: float) -> tuple[Tensor, list[Tensor]]:
    losses = losses_of_logits(linear(*tensors), labels_BT)
    (losses.total * factor).backward()
    return losses.per_token_BT, gradients(tensors)


def in_chunks(tensors: list[Tensor], labels_BT: Tensor, factor: float) -> tuple[Tensor, list[Tensor]]:
    hidden, weight, *bias = tensors
    found = linear_losses(hidden, weight, bias[0] if bias else None, labels_BT)
    (found[0] * factor).backward()
    torch.testing.assert_close(found[0], found[1:].sum())
    return found[1:].detach().view_as(labels_BT), gradients(tensors)


def gradients(tensors: list[Tensor]) -> list[Tensor]:
    found = [tensor.grad for tensor in tensors if tensor.grad is not None]
    for tensor in tensors:
        tensor.grad = None
    return found


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm().clamp(min=1e-30))


@pytest.fixture(params=[7, 50, 1000])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(module, "chunk_tokens", lambda vocab_size, device_type: request.param)
    return int(request.param)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("counted", [1.0, 0.5, 0.0])
def test_in_chunks_loss_and_gradients_are_those_of_whole_logits(chunk: int, bias: bool, counted: float) -> None:
    tensors, labels = leaves(bias=bias), some_labels(counted)
    wanted, found = plainly(tensors, labels, 1 / 77), in_chunks(tensors, labels, 1 / 77)
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-6, atol=1e-6)
    assert len(found[1]) == len(wanted[1]) == len(tensors)
    for one, other in zip(found[1], wanted[1], strict=True):
        assert one.dtype == other.dtype and relative_error(one, other) < 1e-6


def test_in_bf16_chunks_are_as_near_to_fp32_as_whole_logits_are(chunk: int) -> None:
    tensors = leaves(bias=False, dtype=torch.bfloat16)
    exact = plainly([tensor.detach().float().requires_grad_() for tensor in tensors], some_labels(), 1)
    plain, chunked = plainly(tensors, some_labels(), 1), in_chunks(tensors, some_labels(), 1)
    torch.testing.assert_close(chunked[0], plain[0], rtol=1e-6, atol=1e-6)  # the same bf16 logits
    for one, other, true in zip(chunked[1], plain[1], exact[1], strict=True):
        assert one.dtype == torch.bfloat16
        assert relative_error(one, true) <= 1.2 * relative_error(other, true)


def test_under_autocast_weights_of_fp32_get_fp32_gradients(chunk: int) -> None:
    tensors, labels = leaves(bias=True), some_labels()
    with torch.autocast("cpu", torch.bfloat16):
        plain, chunked = plainly(tensors, labels, 0.5), in_chunks(tensors, labels, 0.5)
    torch.testing.assert_close(chunked[0], plain[0], rtol=1e-6, atol=1e-6)
    for one, other in zip(chunked[1], plain[1], strict=True):
        assert one.dtype == torch.float32 and relative_error(one, other) < 0.01


def test_a_frozen_weight_gets_no_gradient_and_costs_none(chunk: int) -> None:
    hidden, weight = leaves(bias=False)
    linear_losses(hidden, weight.detach(), None, some_labels())[0].backward()
    alone = gradients([hidden])[0]
    wanted = plainly([hidden, weight], some_labels(), 1.0)[1][0]
    assert relative_error(alone, wanted) < 1e-6 and weight.grad is None


def test_without_gradients_the_losses_are_the_same_bits(chunk: int) -> None:
    hidden, weight = leaves(bias=False)
    with torch.no_grad():
        found = linear_losses(hidden, weight, None, some_labels())
    assert not found.requires_grad
    assert torch.equal(found, linear_losses(hidden, weight, None, some_labels()).detach())


def test_two_backward_passes_through_one_loss_are_refused() -> None:
    hidden, weight = leaves(bias=False)
    total = linear_losses(hidden, weight, None, some_labels())[0]
    total.backward(retain_graph=True)
    with pytest.raises(AssertionError, match="two backward passes"):
        total.backward()


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 40), st.integers(1, 9), st.booleans())
def test_the_form_for_a_compiler_gives_what_the_form_in_place_gives(tokens: int, vocab: int, gradient: bool) -> None:
    generator = torch.Generator().manual_seed(tokens)
    logits, labels = torch.randn(tokens, vocab, generator=generator), torch.arange(tokens) % vocab
    for one, other in zip(
        module._fused_terms(logits, labels, gradient), module._terms(logits, labels, gradient), strict=True
    ):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            torch.testing.assert_close(one, other)


def test_ignored_labels_inside_a_chunk_send_no_gradient() -> None:
    """As on a GPU, where they are not sorted out beforehand."""
    logits, labels = torch.randn(4, 7), torch.tensor([3, IGNORE_INDEX, 0, IGNORE_INDEX])
    losses, gradient = module._fused_terms(logits, labels, True)
    assert gradient is not None and not gradient[[1, 3]].any() and gradient[[0, 2]].any(dim=1).all()
    assert losses[[1, 3]].tolist() == [0.0, 0.0]


def test_chunks_are_bounded_in_memory_and_in_tokens() -> None:
    assert chunk_tokens(64, "cpu") == 512
    assert chunk_tokens(32_000, "cpu") == 262
    assert chunk_tokens(256_000, "cpu") == 128
    assert chunk_tokens(32_000, "cuda") == 8388
    assert 4 * 32_000 * chunk_tokens(32_000, "cuda") <= 2**30


def test_logits_never_exist_as_a_whole() -> None:
    """The largest tensor made on the way has a chunk's tokens, not the batch's."""
    from torch.utils._python_dispatch import TorchDispatchMode

    sizes: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in (out if isinstance(out, tuple | list) else [out]) if isinstance(t, Tensor))
            return out

    vocab, tokens = 2000, 2048
    hidden, weight = torch.randn(1, tokens, 4, requires_grad=True), torch.randn(vocab, 4, requires_grad=True)
    with Watch():
        linear_losses(hidden, weight, None, torch.zeros(1, tokens, dtype=torch.int64))[0].backward()
    assert max(sizes) == chunk_tokens(vocab, "cpu") * vocab < tokens * vocab


def test_the_logits_of_a_chunk_are_gone_when_those_of_the_next_one_come(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[Tensor]] = []

    def watched(*inputs: Tensor) -> Tensor:
        assert all(logits() is None for logits in made)
        logits = linear(*inputs)
        made.append(weakref.ref(logits))
        return logits

    monkeypatch.setattr(module, "linear", watched)
    monkeypatch.setattr(module, "chunk_tokens", lambda vocab_size, device_type: 3)
    hidden, weight = torch.randn(2, 5, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    linear_losses(hidden, weight, None, torch.ones(2, 5, dtype=torch.int64))
    assert len(made) == 4

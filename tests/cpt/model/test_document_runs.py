"""Runs of documents give every row the attention that a mask over the whole row gives it."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from cpt.model.document_runs import Run, document_mask, document_run_attention, mask_with_runs, runs_of

MODULE: Any = SimpleNamespace()


def segments(lengths: list[int]) -> torch.Tensor:
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))


def shape(runs: tuple[Run, ...]) -> list[tuple[int, bool]]:
    return [(run.length, run.mask_LL is not None) for run in runs]


def test_the_runs_of_the_worked_example() -> None:
    runs = runs_of(segments([300, 50, 60, 102])[None], None)
    assert shape(runs[0]) == [(300, False), (110, True), (102, False)]


def test_a_document_longer_than_the_window_has_a_mask_and_a_shorter_one_needs_none() -> None:
    assert shape(runs_of(segments([300])[None], 299)[0]) == [(300, True)]
    assert shape(runs_of(segments([300])[None], 300)[0]) == [(300, False)]


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 200), min_size=1, max_size=8))
def test_runs_cover_the_row_and_never_cut_a_document(lengths: list[int]) -> None:
    runs = runs_of(segments(lengths)[None], None)[0]
    assert sum(run.length for run in runs) == sum(lengths)
    ends = {sum(lengths[: n + 1]) for n in range(len(lengths))}
    assert all(sum(run.length for run in runs[: n + 1]) in ends for n in range(len(runs)))
    assert all(run.length <= 128 for run in runs if run.mask_LL is not None)


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_output_and_gradients_are_those_of_one_mask_over_the_row(window: int | None, kv_heads: int) -> None:
    segments_BT = torch.stack([segments([150, 20, 30, 50]), segments([10, 240])])
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 250, 8, generator=generator).requires_grad_() for heads in (4, kv_heads, kv_heads))
    found, _ = document_run_attention(MODULE, q, k, v, mask_with_runs(segments_BT, window), scaling=0.3)
    gradients = torch.autograd.grad(found.square().sum(), (q, k, v))
    wide = (x.repeat_interleave(4 // kv_heads, dim=1) for x in (k, v))
    mask = document_mask(segments_BT, window)
    wanted = scaled_dot_product_attention(q, *wide, attn_mask=mask, scale=0.3).transpose(1, 2)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    for one, other in zip(gradients, torch.autograd.grad(wanted.square().sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_without_a_mask_a_row_is_one_document_and_a_plain_mask_is_obeyed() -> None:
    q, k, v = (torch.randn(2, 4, 30, 8) for _ in range(3))
    found, _ = document_run_attention(MODULE, q, k, v, None, scaling=None)
    torch.testing.assert_close(found, scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2))
    mask = document_mask(segments([10, 20]).expand(2, 30), None)
    found, _ = document_run_attention(MODULE, q, k, v, mask, scaling=None)
    torch.testing.assert_close(found, scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2))


def test_what_a_plain_kernel_lacks_is_refused() -> None:
    q = torch.zeros(1, 1, 2, 8)
    with pytest.raises(ValueError, match="softcap"):
        document_run_attention(MODULE, q, q, q, mask_with_runs(segments([1, 1])[None], None), softcap=50.0)

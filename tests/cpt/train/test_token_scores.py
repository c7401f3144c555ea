"""Scores of chosen tokens against the logits of the whole batch."""

import pytest
import torch

from cpt.train import losses
from cpt.train.token_scores import Asked, linear_scores, scores_of_logits


def asked(places: list[int], tokens: list[int]) -> Asked:
    return Asked(torch.tensor(places, dtype=torch.int64), torch.tensor(tokens, dtype=torch.int64))


@pytest.fixture
def layer() -> torch.nn.Linear:
    torch.manual_seed(0)
    return torch.nn.Linear(8, 13)


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_scores_are_those_of_the_whole_logits_whatever_the_chunk(
    layer: torch.nn.Linear, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setitem(losses.CHUNK_TOKENS, "cpu", (chunk, chunk))
    hidden = torch.randn(2, 5, 8)
    questions = asked([0, 7, 7, 9, 3], [12, 0, 5, 5, 1])
    with torch.no_grad():
        found = linear_scores(hidden, layer.weight, layer.bias, questions)
        whole = layer(hidden)
    expected = whole.flatten(0, 1).log_softmax(-1)[[0, 7, 7, 9, 3], [12, 0, 5, 5, 1]]
    torch.testing.assert_close(found[:, 0], expected)
    torch.testing.assert_close(found, scores_of_logits(whole, questions))


def test_a_token_is_greedy_only_where_it_is_the_likeliest() -> None:
    logits = torch.tensor([[[0.0, 2.0, 1.0], [3.0, 0.0, 0.0]]])
    found = scores_of_logits(logits, asked([0, 0, 1], [1, 2, 0]))
    assert found[:, 1].tolist() == [1.0, 0.0, 1.0]


def test_no_question_has_no_answer(layer: torch.nn.Linear) -> None:
    assert linear_scores(torch.randn(1, 4, 8), layer.weight, layer.bias, asked([], [])).shape == (0, 2)


def test_half_precision_is_softened_in_fp32(layer: torch.nn.Linear) -> None:
    hidden = torch.randn(1, 4, 8, dtype=torch.bfloat16)
    half = layer.to(torch.bfloat16)
    found = linear_scores(hidden, half.weight, half.bias, asked([2], [4]))
    expected = half(hidden)[0, 2].float().log_softmax(-1)[4]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found[0, 0], expected, rtol=1e-6, atol=1e-6)

"""New rows: made of old ones, on both sides of the model, padded rows included, old logits untouched."""

from typing import Any

import pytest
import torch

from cpt.config import ConfigError, ModelSection
from cpt.data.vocabulary import VocabularyExtension
from cpt.model.build import LoadedModel, Needs, build_model
from cpt.model.vocab import INITIALIZERS, extend_vocabulary, look_over

SUBTOKENS = ((1, 2), (3, 4, 5), (6, 6))


def build(vocab_size: int = 60, *, family: str = "llama", **change: Any) -> LoadedModel:
    fresh = {"model_type": family, "vocab_size": vocab_size, "hidden_size": 16, "intermediate_size": 24}
    fresh |= {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64, **change}
    loaded = build_model(ModelSection(fresh=fresh), Needs(seq_len=32, vocab_size=vocab_size, seed=5))
    torch.nn.init.normal_(loaded.model.get_input_embeddings().weight, std=0.5)  # type: ignore[operator]
    return loaded


def extension(base_vocab_size: int = 60, subtokens: tuple[tuple[int, ...], ...] = SUBTOKENS) -> VocabularyExtension:
    return VocabularyExtension("base", "a", "b", base_vocab_size, subtokens)


def rows(loaded: LoadedModel, *, head: bool = False) -> torch.Tensor:
    model: Any = loaded.model
    found: torch.Tensor = (model.get_output_embeddings() if head else model.get_input_embeddings()).weight.detach()
    return found.clone()


@torch.no_grad()
def logits(loaded: LoadedModel) -> torch.Tensor:
    found: torch.Tensor = loaded.model.eval()(input_ids=torch.arange(1, 31)[None]).logits[0]
    return found


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("vocab_size", [60, 64, 70])
def test_new_rows_are_means_of_their_subtokens_and_old_logits_stay(vocab_size: int, tied: bool) -> None:
    loaded = build(vocab_size, tie_word_embeddings=tied)
    before, old_in, old_out = logits(loaded), rows(loaded), rows(loaded, head=True)
    found = extend_vocabulary(loaded, extension())
    for head, old in ((False, old_in), (True, old_out)):
        new = rows(found, head=head)
        assert torch.equal(new[:60], old[:60])
        for i, parts in enumerate(SUBTOKENS):
            assert torch.allclose(new[60 + i], old[list(parts)].mean(0))
    assert torch.allclose(logits(found)[:, :60], before[:, :60], atol=1e-6)
    model: Any = found.model
    assert model.config.vocab_size == len(rows(found)) == {60: 63, 64: 64, 70: 70}[vocab_size]
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) is tied
    assert found.report.parameters == sum(weight.numel() for weight in model.parameters())


def test_a_model_padded_to_64_stays_so_and_its_padding_is_the_mean_row() -> None:
    loaded = build(64)
    old = rows(loaded)
    found = extend_vocabulary(loaded, extension(64))
    assert len(rows(found)) == 128
    assert torch.allclose(rows(found)[67:], old.mean(0).expand(61, -1), atol=1e-6)
    assert "67 tokens, 128 rows" in found.report.vocabulary and "rows 67 to 127 are padding" in found.report.vocabulary


def test_a_head_with_a_bias_gets_new_entries_too() -> None:
    loaded = build(60, family="phi", tie_word_embeddings=False)
    head: Any = loaded.model.get_output_embeddings()  # type: ignore[operator]
    torch.nn.init.normal_(head.bias)
    old = head.bias.detach().clone()
    found: Any = extend_vocabulary(loaded, extension()).model
    bias = found.get_output_embeddings().bias
    assert len(bias) == 63 and torch.equal(bias[:60], old) and torch.allclose(bias[60], old[[1, 2]].mean())


def test_gradients_reach_the_new_rows() -> None:
    found = extend_vocabulary(build(60, tie_word_embeddings=False), extension())
    model: Any = found.model
    ids = torch.tensor([[1, 60, 2, 61, 62, 3]])
    model(input_ids=ids, labels=ids).loss.backward()
    for table in (model.get_input_embeddings(), model.get_output_embeddings()):
        assert (table.weight.grad[60:63].norm(dim=1) > 0).all()


def test_every_initializer_gives_rows_of_a_usual_length() -> None:
    for name, initializer in INITIALIZERS.items():
        found = extend_vocabulary(build(), extension(), initializer=initializer)
        assert rows(found)[60:63].isfinite().all(), name
    assert torch.allclose(rows(found)[60], rows(found)[:60].mean(0), atol=1e-6)


def test_an_initializer_is_asked_once_per_table() -> None:
    asked = []

    def initializer(rows_VD: torch.Tensor, subtokens: Any) -> torch.Tensor:
        asked.append(len(subtokens))
        return INITIALIZERS["mean_of_all"](rows_VD, subtokens)

    extend_vocabulary(build(60, tie_word_embeddings=False), extension(), initializer=initializer)
    assert asked == [3, 3]


def test_the_same_model_gives_the_same_rows_and_the_random_state_is_left_alone() -> None:
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first = extend_vocabulary(build_same(), extension())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(rows(first), rows(extend_vocabulary(build_same(), extension())))


def build_same() -> LoadedModel:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return build()


def test_a_model_with_fewer_rows_than_the_base_has_tokens_is_refused() -> None:
    with pytest.raises(ConfigError, match="its 50 rows do not cover the 60 tokens of base"):
        extend_vocabulary(build(50), extension())


@pytest.mark.parametrize("bad", [0.0, float("nan")])
def test_a_new_row_that_comes_out_zero_or_not_finite_is_refused(bad: float) -> None:
    loaded = build()
    with torch.no_grad():
        loaded.model.get_input_embeddings().weight[[1, 2]] = bad  # type: ignore[operator]
    with pytest.raises(RuntimeError, match=r"input rows of tokens \[60\] are zero or not finite"):
        extend_vocabulary(loaded, extension(), initializer=INITIALIZERS["mean_of_subtokens"])


def test_rows_that_were_never_trained_are_named() -> None:
    loaded = build()
    with torch.no_grad():
        loaded.model.get_input_embeddings().weight[7] = 1e-4  # type: ignore[operator]
        loaded.model.get_input_embeddings().weight[9] *= 100  # type: ignore[operator]
    report = look_over(loaded.model, tokens=58)
    assert report.odd == (7, 9) and report.rows == 60
    assert "2 tokens have a row 10 times off" in report.render() and "rows 58 to 59 are padding" in report.render()

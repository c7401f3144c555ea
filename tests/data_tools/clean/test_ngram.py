"""The n-gram model: equal to Kneser-Ney worked out with dictionaries, sums to 1, ranks by likeness, saved and loaded."""

import itertools
import math
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpt.rundir import DataError
from data_tools.clean.ngram import BEGIN, END, SPECIAL, NgramModel, tokenize_line
from data_tools.clean.ngram_training import TrainOptions, train_ngram

TOY = ["the cat sat on the mat\nthe dog sat on the log", "the cat saw the dog\n\na dog saw a cat on a mat"]
WORDS = st.lists(st.sampled_from(list("abcde")), min_size=1, max_size=6).map(" ".join)
CORPORA = st.lists(st.lists(WORDS, min_size=1, max_size=4).map("\n".join), min_size=1, max_size=4)


def plain(order: int, prune: int = 0) -> TrainOptions:
    return TrainOptions(order=order, prune=prune, min_count=1)


class ByHand:
    """Interpolated modified Kneser-Ney as the formula says it, one probability at a time."""

    def __init__(self, texts: list[str], order: int, discounts: list[list[float]]) -> None:
        self.order, self.discounts = order, discounts
        self.sentences = [
            ["<s>", *tokenize_line(line), "</s>"] for text in texts for line in text.splitlines() if line.strip()
        ]
        grams = [
            tuple(s[i : i + n]) for s in self.sentences for n in range(1, order + 1) for i in range(len(s) - n + 1)
        ]
        self.seen = Counter(grams)
        self.vocabulary = [*sorted({w for s in self.sentences for w in s} - {"<s>"}), "<unk>"]
        before = defaultdict(set)
        for gram in self.seen:
            before[gram[1:]].add(gram[0])
        self.adjusted = {
            gram: count if len(gram) == order or gram[0] == "<s>" else len(before[gram])
            for gram, count in self.seen.items()
            if gram != ("<s>",)
        }

    def p(self, word: str, history: tuple[str, ...]) -> float:
        history = history[-(self.order - 1) :] if self.order > 1 else ()
        return self._p(word, history)

    def _p(self, word: str, history: tuple[str, ...]) -> float:
        lower = self._p(word, history[1:]) if history else 1 / len(self.vocabulary)
        follow = {w: self.adjusted.get((*history, w), 0) for w in self.vocabulary}
        total = sum(follow.values())
        if not total:
            return lower
        d = [0.0, *self.discounts[len(history)]]
        taken = sum(d[min(count, 3)] for count in follow.values())
        return max(follow[word] - d[min(follow[word], 3)], 0) / total + taken / total * lower


def discounts_of(adjusted: dict[tuple[str, ...], int], n: int) -> list[float]:
    counts = Counter(count for gram, count in adjusted.items() if len(gram) == n)
    y = counts[1] / (counts[1] + 2 * counts[2])
    return [k - (k + 1) * y * counts[k + 1] / counts[k] for k in (1, 2, 3)]


@pytest.mark.parametrize("order", [1, 2, 3, 4, 5])
def test_every_probability_is_the_formulas(order: int) -> None:
    model = train_ngram(TOY, plain(order))
    reference = ByHand(TOY, order, model.facts["discounts"])
    index = {word: i for i, word in enumerate(model.words)}
    histories = [("<s>",), ("<s>", "the"), ("cat", "sat"), ("on", "the"), ("mat", "mat"), ("the", "cat", "sat", "on")]
    for history, word in itertools.product(histories, reference.vocabulary):
        ids = np.array([index[w] for w in (*history, word)])
        assert math.exp(model.log_probs(ids)[-1]) == pytest.approx(reference.p(word, history), rel=1e-5)


def test_the_discounts_are_chen_and_goodmans_where_the_counts_allow_them() -> None:
    text = "\n".join(
        " ".join(str(pow(i, j, 11)) * 1 + "abcdefghijk"[pow(i, j, 11)] for j in range(1, 8)) for i in range(1, 60)
    )
    model = train_ngram([text], plain(2))
    reference = ByHand([text], 2, model.facts["discounts"])
    for n, found in enumerate(model.facts["discounts"], 1):
        counts = Counter(count for gram, count in reference.adjusted.items() if len(gram) == n)
        if all(counts[k] for k in (1, 2, 3, 4)):
            assert found == pytest.approx(discounts_of(reference.adjusted, n)) or found == [0.5, 1.0, 1.5]
        else:
            assert found == [0.5, 1.0, 1.5]


@given(CORPORA, st.integers(1, 4), st.integers(0, 2), st.lists(st.integers(0, 6), max_size=4))
@settings(max_examples=60, deadline=None)
def test_the_probabilities_of_all_words_sum_to_one_in_any_context(
    texts: list[str], order: int, prune: int, history: list[int]
) -> None:
    model = train_ngram(texts, plain(order, prune))
    known = [BEGIN, *(i % len(model.words) for i in history)]
    known = [known[0], *(i for i in known[1:] if i not in (BEGIN, END))]
    total = 0.0
    for word in range(1, len(model.words)):
        total += math.exp(model.log_probs(np.array([*known, word]))[-1])
    assert total == pytest.approx(1.0, abs=1e-5)


@given(CORPORA, st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_every_probability_of_small_corpora_is_the_formulas(texts: list[str], order: int) -> None:
    model = train_ngram(texts, plain(order))
    reference = ByHand(texts, order, model.facts["discounts"])
    for sentence in reference.sentences[:2]:
        ids = np.array([model.words.index(word) for word in sentence])
        expected = [reference.p(word, tuple(sentence[:i])) for i, word in enumerate(sentence) if i]
        assert np.exp(model.log_probs(ids)[1:]) == pytest.approx(expected, rel=1e-5)


def test_the_perplexity_is_that_of_words_and_line_ends() -> None:
    model = train_ngram(TOY, plain(3))
    reference = ByHand(TOY, 3, model.facts["discounts"])
    logs = [
        math.log(reference.p(word, tuple(sentence[:i])))
        for sentence in (["<s>", "a", "cat", "</s>"], ["<s>", "the", "log", "</s>"])
        for i, word in enumerate(sentence)
        if i
    ]
    assert model.perplexity("A cat\n\nthe log\n") == pytest.approx(math.exp(-sum(logs) / 6), rel=1e-5)


def test_sentences_do_not_see_each_other() -> None:
    model = train_ngram(TOY, plain(4))
    one, two = model.encode("the cat sat"), model.encode("on the mat")
    together = model.log_probs(np.concatenate([one, two]))
    assert together == pytest.approx(np.concatenate([model.log_probs(one), model.log_probs(two)]))


def test_a_text_longer_than_a_piece_is_scored_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model = train_ngram(TOY, plain(4))
    ids = model.encode("\n".join(TOY) * 3)
    whole = model.log_probs(ids)
    monkeypatch.setattr("data_tools.clean.ngram._PIECE", 7)
    assert model.log_probs(ids) == pytest.approx(whole)


def test_words_left_out_of_the_vocabulary_are_no_cheaper_than_rare_ones() -> None:
    model = train_ngram(
        ["law court law court judge\nlaw court rare odd strange\nlaw court judge"], TrainOptions(prune=0)
    )
    assert model.words == (*SPECIAL, "law", "court", "judge") and model.facts["unknown_types"] == 3
    assert (
        model.perplexity("zebra zebra zebra")
        > model.perplexity("judge judge judge")
        > model.perplexity("law court judge")
    )


@pytest.mark.parametrize("text", ["", " \n\t\n"])
def test_a_text_without_words_has_no_finite_perplexity(text: str) -> None:
    assert train_ngram(TOY, plain(2)).perplexity(text) == math.inf


@pytest.mark.parametrize(
    "text", ["日本語の文章です。", "\ud800 lone", "مرحبا بالعالم", "\x00\x01", "x" * 100_000, "😀👩‍👩‍👧"]
)
def test_odd_texts_have_a_perplexity(text: str) -> None:
    assert 1 < train_ngram(TOY, plain(3)).perplexity(text) < math.inf


def test_tokens_are_lower_case_words_digits_as_zeros_and_single_kanji() -> None:
    assert tokenize_line("In 1999, it's LAW_1.") == ["in", "0000", ",", "it's", "law", "_", "0", "."]
    assert tokenize_line("東京の夜") == ["東", "京", "の", "夜"]


def test_a_pruned_model_keeps_what_was_seen_more_often() -> None:
    full, pruned = train_ngram(TOY, plain(3)), train_ngram(TOY, plain(3, prune=1))
    sizes = [len(order.keys) for order in pruned.orders]
    assert sizes[:2] == [len(order.keys) for order in full.orders[:2]] and 0 < sizes[2] < len(full.orders[2].keys)
    assert pruned.perplexity(TOY[0]) == pytest.approx(full.perplexity(TOY[0]), rel=0.5)


def test_a_model_is_saved_and_loaded_whole_and_the_same_texts_give_the_same_bytes(tmp_path: Path) -> None:
    model = train_ngram(TOY, plain(3))
    model.save(tmp_path / "deep" / "a.npz")
    train_ngram(TOY, plain(3)).save(tmp_path / "b.npz")
    assert (tmp_path / "deep" / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    loaded = NgramModel.load(tmp_path / "b.npz")
    assert loaded.words == model.words and loaded.facts == model.facts
    assert loaded.perplexity("a cat saw a zebra") == model.perplexity("a cat saw a zebra")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["b.npz", "deep"]


def test_what_is_no_model_is_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "model.npz"
    with pytest.raises(DataError, match="no such file"):
        NgramModel.load(file)
    for content in (b"", b"PK\x03\x04 cut", b"\x93NUMPY"):
        file.write_bytes(content)
        with pytest.raises(DataError, match="not an n-gram model"):
            NgramModel.load(file)
    np.savez(file, words=np.zeros(3))
    with pytest.raises(DataError, match="not an n-gram model"):
        NgramModel.load(file)
    model = train_ngram(TOY, plain(3))
    NgramModel(model.words[:-1], model.orders, model.facts).save(file)
    with pytest.raises(DataError, match="do not fit together"):
        NgramModel.load(file)
    model.save(file)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(DataError, match="not an n-gram model"):
        NgramModel.load(file)


def test_training_refuses_a_reference_without_words_and_an_order_out_of_range() -> None:
    with pytest.raises(DataError, match="no words"):
        train_ngram(["", " \n"], plain(3))
    with pytest.raises(DataError, match="--order is 9"):
        train_ngram(TOY, plain(9))


def test_training_reads_no_further_than_max_words() -> None:
    model = train_ngram(TOY * 100, TrainOptions(order=2, min_count=1, max_words=20))
    assert model.facts["documents"] == 2


@pytest.mark.parametrize("name", [".", "..", ""])
def test_a_folder_is_no_name_for_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(DataError, match="a folder, not a file name"):
        train_ngram(TOY, plain(3)).save(Path(name))
    assert [file.name for file in tmp_path.rglob("*")] == ["here"]

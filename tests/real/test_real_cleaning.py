"""Cleaning on real corpora: the shipped rules keep good text, datatrove decides alike, the n-gram model knows its own."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_tools.clean.language import load_identifier
from data_tools.clean.ngram_training import TrainOptions, train_ngram
from data_tools.clean.quality import c4_quality, fineweb_quality, gopher_quality
from data_tools.clean.repetition import gopher_repetition
from data_tools.clean.rules import build_step, load_rules
from data_tools.clean.settings import C4Quality, FinewebQuality, GopherQuality, GopherRepetition
from data_tools.clean.words import count_sentences, split_words
from data_tools.corpus.document import Document
from data_tools.sources import ReadOptions, read_texts, resolve_inputs

ROOT = Path(__file__).resolve().parents[2]
CORPORA = ROOT.parent / "shared" / "data" / "corpora"
pytestmark = pytest.mark.skipif(not CORPORA.is_dir(), reason="the shared corpora are not here")


def texts(name: str, split: str = "test", at_most: int = 40) -> list[str]:
    [source] = resolve_inputs([str(CORPORA / name / f"{split}.jsonl.zst")])
    return list(read_texts(source, ReadOptions()))[:at_most]


def our_words() -> Any:
    from datatrove.utils.word_tokenizers import WordTokenizer

    class OurWords(WordTokenizer):
        def word_tokenize(self, text: str) -> list[str]:
            return list(split_words(text))

        def sent_tokenize(self, text: str) -> list[str]:
            return [""] * count_sentences(text)

        def span_tokenize(self, text: str) -> list[tuple[int, int]]:
            return [(0, 1)] * count_sentences(text)

    return OurWords()


def test_decisions_on_real_documents_are_datatroves_on_the_same_words() -> None:
    from datatrove.data import Document as TheirDocument
    from datatrove.pipeline import filters

    words = our_words()
    pairs = [
        (gopher_quality(GopherQuality(punctuation_counts=True)), filters.GopherQualityFilter(language=words)),
        (gopher_repetition(GopherRepetition()), filters.GopherRepetitionFilter(language=words)),
        (fineweb_quality(FinewebQuality()), filters.FineWebQualityFilter(language=words)),
        (c4_quality(C4Quality()), filters.C4QualityFilter(language=words)),
    ]
    dropped = 0
    for name in ("en_gov_web", "med_qa", "code_python", "math_stacks", "de_law", "ja_aozora"):
        for text in texts(name, at_most=25):
            for ours, theirs in pairs:
                mine, other = Document(text), TheirDocument(text=text, id="0")
                kept = ours(mine) is None
                assert kept == (theirs.filter(other) is True), (name, theirs.name, text[:200])
                assert not kept or mine.text == other.text
                dropped += not kept
    assert dropped > 50


@pytest.mark.parametrize(
    ("rules", "corpus", "least"),
    [
        ("web", "en_gov_web", 0.85),
        ("web", "med_qa", 0.7),
        ("books", "en_novels", 0.97),
        ("books", "de_novels", 0.97),
        ("code", "code_python", 0.95),
        ("japanese", "ja_aozora", 0.85),
    ],
)
def test_the_shipped_rules_keep_text_of_their_kind(rules: str, corpus: str, least: float) -> None:
    step = build_step(load_rules(ROOT / "configs" / "corpora" / f"clean_{rules}.yaml"))
    rejects = [step(Document(text)) for text in texts(corpus)]
    assert rejects.count(None) / len(rejects) >= least, rejects


def test_the_web_rules_drop_other_languages_code_and_latex() -> None:
    step = build_step(load_rules(ROOT / "configs" / "corpora" / "clean_web.yaml"))
    for corpus in ("de_novels", "ja_aozora", "code_python", "math_stacks"):
        kept = [text for text in texts(corpus) if step(Document(text)) is None]
        assert len(kept) <= 0.1 * len(texts(corpus)), corpus


@pytest.mark.parametrize(
    ("corpus", "code"),
    [("en_gov_web", "en"), ("de_law", "de"), ("de_novels", "de"), ("ja_aozora", "ja"), ("law_uscode", "en")],
)
def test_languages_are_identified(corpus: str, code: str) -> None:
    identify = load_identifier()
    found = [identify(text)[0] for text in texts(corpus)]
    assert found.count(code) >= 0.97 * len(found)


def test_a_model_of_the_law_finds_law_the_likeliest() -> None:
    model = train_ngram(texts("law_uscode", "train", 2000), TrainOptions())
    median = {
        name: float(np.median([model.perplexity(text) for text in texts(name)]))
        for name in ("law_uscode", "fin_fed", "en_gov_web", "en_novels", "code_python", "de_law", "ja_aozora")
    }
    law = median.pop("law_uscode")
    assert all(other > 5 * law for other in median.values()), (law, median)
    assert min(median, key=lambda name: median[name]) in ("fin_fed", "en_gov_web")  # plain official English comes next

"""Gopher's, FineWeb's and C4's rules: a keep and a drop for every reason, and datatrove's decisions on the same words."""

import itertools
import random
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.clean.quality import c4_quality, fineweb_quality, gopher_quality
from data_tools.clean.repetition import gopher_repetition
from data_tools.clean.settings import C4Quality, FinewebQuality, GopherQuality, GopherRepetition
from data_tools.clean.words import count_sentences, split_words
from data_tools.corpus.document import Document, Step

PROSE = (
    "The committee met on Tuesday to consider the report that the office had prepared with great care. "
    "It was the first time in years that members of both houses have come to the same table, and nobody knew "
    "what would be said. The chair opened the meeting with a few words about the weather and the state of the roads. "
    "Most of those present agreed with her, although some had doubts about the second part of the plan."
)
OURS = {"gopher_quality": gopher_quality, "gopher_repetition": gopher_repetition, "fineweb_quality": fineweb_quality, "c4_quality": c4_quality}  # fmt: skip
# datatrove's reasons in our words
REASONS = {
    "gopher_short_doc": "short_doc",
    "gopher_long_doc": "long_doc",
    "gopher_below_avg_threshold": "mean_word_length",
    "gopher_above_avg_threshold": "mean_word_length",
    "gopher_too_many_hashes": "hashes",
    "gopher_too_many_ellipsis": "ellipses",
    "gopher_too_many_bullets": "bullet_lines",
    "gopher_too_many_end_ellipsis": "ellipsis_lines",
    "gopher_below_alpha_threshold": "few_alpha_words",
    "gopher_enough_stop_words": "few_stop_words",
    "dup_para_frac": "duplicate_paragraphs",
    "dup_para_char_frac": "duplicate_paragraph_characters",
    "dup_line_frac": "duplicate_lines",
    "dup_line_char_frac": "duplicate_line_characters",
    "line_punct_ratio": "line_punctuation",
    "short_line_ratio": "short_lines",
    "char_dup_ratio": "duplicate_lines",
    "list_ratio": "list",
    "too_few_sentences": "few_sentences",
    **{f"top_{n}_gram": f"top_{n}_gram" for n in range(2, 5)},
    **{f"duplicated_{n}_n_grams": f"duplicate_{n}_grams" for n in range(5, 11)},
    **{name: name for name in ("empty", "lorem_ipsum", "curly_bracket")},
}


def verdict(step: Step, text: str) -> tuple[str, str]:
    """("", text after the step) or (reason, "")."""
    document = Document(text)
    reject = step(document)
    return ("", document.text) if reject is None else (reject.reason.partition(".")[2], "")


def datatrove_filters() -> dict[str, Any]:
    """datatrove's filters with the words and sentences of ours."""
    from datatrove.pipeline.filters import (
        C4QualityFilter,
        FineWebQualityFilter,
        GopherQualityFilter,
        GopherRepetitionFilter,
    )
    from datatrove.utils.word_tokenizers import WordTokenizer

    class OurWords(WordTokenizer):
        def word_tokenize(self, text: str) -> list[str]:
            return list(split_words(text))

        def sent_tokenize(self, text: str) -> list[str]:
            return [""] * count_sentences(text)

        def span_tokenize(self, text: str) -> list[tuple[int, int]]:
            return [(0, 1)] * count_sentences(text)

    words: Any = OurWords()
    return {
        "gopher_quality": GopherQualityFilter(language=words),
        "gopher_repetition": GopherRepetitionFilter(language=words),
        "fineweb_quality": FineWebQualityFilter(language=words),
        "c4_quality": C4QualityFilter(language=words),
    }


def their_verdict(filter_: Any, text: str) -> tuple[str, str]:
    from datatrove.data import Document as TheirDocument

    document = TheirDocument(text=text, id="0")
    result = filter_.filter(document)
    return ("", document.text) if result is True else (REASONS[result[1]], "")


def damaged(rng: random.Random) -> Iterator[str]:
    """Prose with one kind of damage after another, near every threshold."""
    sentences = PROSE.split(". ")
    junk = [
        "###",
        "...",
        "…",
        "- item",
        "lorem ipsum",
        "{ x }",
        "12345 678",
        "cookie policy",
        "Javascript on!",
        "a b",
        "\n\n",
        "short",
        "[1] cited.",
        "Buy now",
        "日本語の文章です。",
    ]
    for _ in range(250):
        pieces = rng.choices(sentences, k=rng.randint(0, 12)) + rng.choices(junk, k=rng.randint(0, 8)) * rng.randint(
            1, 4
        )
        rng.shuffle(pieces)
        yield rng.choice([". ", "\n", ".\n", "\n\n", " "]).join(pieces)


@pytest.mark.parametrize("rule", OURS)
def test_the_decisions_and_texts_are_datatroves_on_the_same_words(rule: str) -> None:
    theirs = datatrove_filters()[rule]
    ours = OURS[rule]({"gopher_quality": GopherQuality(punctuation_counts=True), "gopher_repetition": GopherRepetition(), "fineweb_quality": FinewebQuality(), "c4_quality": C4Quality()}[rule])  # type: ignore[operator]  # fmt: skip
    seen = set()
    for text in damaged(random.Random(0)):
        expected = their_verdict(theirs, text)
        assert verdict(ours, text) == expected, text
        seen.add(expected[0])
    assert "" in seen and len(seen) >= 4, f"the texts meet few of the reasons: {seen}"


@given(st.lists(st.sampled_from(["a", "b", "ab", "ba", "aa", ".", "\n", "\n\n"]), max_size=80).map(" ".join))
@settings(max_examples=100, deadline=None)
def test_repetition_is_datatroves_where_the_words_run_together_alike(text: str) -> None:
    theirs = datatrove_filters()["gopher_repetition"]
    assert verdict(gopher_repetition(GopherRepetition()), text) == their_verdict(theirs, text)


@pytest.mark.parametrize(
    ("reason", "text"),
    [
        ("short_doc", "Too short."),
        ("long_doc", "The words of that " * 30_000),
        ("mean_word_length", "to be or of it is " * 30),
        ("mean_word_length", "internationalization of institutionalization " * 40),
        ("hashes", PROSE + " #" * 20),
        ("ellipses", PROSE + " ... and" * 20),
        ("bullet_lines", "- " + PROSE.replace(". ", "\n- ")),
        ("ellipsis_lines", PROSE.replace(". ", "...\n")),
        ("few_alpha_words", PROSE + " 1200 3400" * 30),
        ("few_stop_words", "Komisja spotkała się wczoraj wieczorem aby rozważyć sprawozdanie " * 10),
        ("", PROSE),
    ],
)
def test_gopher_quality_names_its_reason(reason: str, text: str) -> None:
    limits = GopherQuality(max_symbol_ratio=0.08) if reason in ("hashes", "ellipses") else GopherQuality()
    assert verdict(gopher_quality(limits), text)[0] == reason


def test_a_reject_says_the_value_and_the_threshold() -> None:
    reject = gopher_quality(GopherQuality(min_words=5))(Document("only three words"))
    assert reject is not None and reject.detail == "3 < 5"


def test_marks_of_punctuation_are_no_words_in_the_ratios_unless_asked_for() -> None:
    dialogue = '"No," said the man, "to be, or not to be, that - with, and of, the rest - is, well, it." ' * 5
    assert verdict(gopher_quality(GopherQuality(min_mean_word_length=None)), dialogue)[0] == ""
    counted = GopherQuality(min_mean_word_length=None, punctuation_counts=True)
    assert verdict(gopher_quality(counted), dialogue)[0] == "few_alpha_words"


def test_null_switches_a_threshold_off() -> None:
    assert verdict(gopher_quality(GopherQuality(min_words=None, min_stop_words=None)), "three more words")[0] == ""


@pytest.mark.parametrize(
    ("reason", "text"),
    [
        ("empty", " \n \n"),
        ("line_punctuation", "no stop at the end of this line of text\n" * 3 + "nor at the end of that one here"),
        ("short_lines", "Short.\nLines.\nOnly.\n" + PROSE),
        ("duplicate_lines", f"{PROSE}\n{PROSE}"),
        (
            "list",
            "This here is a line.\nOne line.\n" + "\n".join(f"I am word number {n}." * 2 for n in range(3)) + "\n" * 20,
        ),
        ("", PROSE),
    ],
)
def test_fineweb_quality_names_its_reason(reason: str, text: str) -> None:
    assert verdict(fineweb_quality(FinewebQuality()), text)[0] == reason


def test_c4_takes_out_lines_and_keeps_the_rest() -> None:
    lines = PROSE.replace(". ", ".\n").split("\n")
    noise = [
        "Home | About | Contact",
        "Please switch on Javascript to go on.",
        "We value you: read our cookie policy.",
        "Too short.",
        "Cited here[12], and there [citation needed].",
    ]
    kept = verdict(c4_quality(C4Quality()), "\n".join([*noise, *lines]))
    assert kept == ("", "\n".join(["Cited here, and there .", *lines]))


@pytest.mark.parametrize(
    ("reason", "text"),
    [
        ("lorem_ipsum", f"{PROSE}\nLorem ipsum dolor sit amet."),
        ("curly_bracket", f"{PROSE}\nif (a) {{ b(); }}."),
        ("few_sentences", PROSE),
    ],
)
def test_c4_names_its_reason(reason: str, text: str) -> None:
    assert verdict(c4_quality(C4Quality()), text)[0] == reason


def test_c4_never_leaves_an_empty_document() -> None:
    assert verdict(c4_quality(C4Quality(min_sentences=None)), "no stop\nnone here")[0] == "empty"


@pytest.mark.parametrize(
    ("reason", "text"),
    [
        ("empty", ""),
        ("duplicate_paragraphs", "\n\n".join(["Again and again."] * 4 + ["Other " * 100])),
        ("duplicate_lines", "\n".join(["Again."] * 9 + [PROSE.replace(". ", ".\n")] * 1 + ["x"])),
        ("top_2_gram", " ".join(f"buy now {c}" for c in "abcdefghijklmnopqrstuvwxyz") + PROSE[:150]),
        ("", PROSE),
    ],
)
def test_gopher_repetition_names_its_reason(reason: str, text: str) -> None:
    assert verdict(gopher_repetition(GopherRepetition()), text)[0] == reason


NASTY = [
    "",
    " \n\t ",
    "\x00" * 50,
    "\ud800\udfff lone " * 20,
    "مرحبا بالعالم " * 60,
    "東京の夜は長い。" * 60,
    "x" * 200_000,
    "\n" * 5000,
    "." * 5000,
    "😀👩‍👩‍👧 " * 100,
]


@pytest.mark.parametrize("text", NASTY, ids=range(len(NASTY)))
def test_no_text_makes_a_rule_fail(text: str) -> None:
    for rule, limits in itertools.chain(
        [(gopher_quality, GopherQuality()), (gopher_quality, GopherQuality(min_words=None, min_alpha_words=None))],
        [(gopher_repetition, GopherRepetition()), (fineweb_quality, FinewebQuality()), (c4_quality, C4Quality())],
    ):
        verdict(rule(limits), text)  # type: ignore[operator]

"""What each cleaning rule can be told, with the value it takes where it is told nothing.

Owns the fields; the rules are in the other modules of this package, the table of them in ``data_tools.clean.rules``.
null switches a threshold off.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from cpt.schedule_fields import Section

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Above0 = Annotated[float, Field(gt=0.0)]
Words = Annotated[int, Field(ge=1)]

ENGLISH_STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")


class FixUnicode(Section):
    form: Literal["NFC", "NFKC"] = Field("NFC", description="Unicode normal form; NFKC also folds width and ligatures")
    unescape_html: bool = Field(True, description="&amp; to &, where the text has no < of mark-up or code")
    straighten_quotes: bool = Field(False, description="curly quotes to ASCII ones")


class Language(Section):
    keep: tuple[str, ...] = Field((), description="codes to keep, such as [en, de]; empty: label, drop nothing")
    min_score: Share = Field(0.65, description="below it a document is dropped as unsure")
    model: Path | None = Field(None, description="a fastText model of yours; else lid.176 of the package")
    annotate: bool = Field(True, description="write the fields language and language_score")


class Length(Section):
    min_characters: int | None = Field(None, ge=1, description="shorter documents are dropped")
    max_characters: int | None = Field(None, ge=1, description="longer documents are dropped")


class GopherQuality(Section):
    min_words: Words | None = Field(50, description="words that are not punctuation alone")
    max_words: Words | None = Field(100_000, description="words that are not punctuation alone")
    min_mean_word_length: Above0 | None = Field(3, description="characters")
    max_mean_word_length: Above0 | None = Field(10, description="characters")
    max_symbol_ratio: Above0 | None = Field(0.1, description="# per word, and ellipses per word")
    max_bullet_lines: Above0 | None = Field(0.9, description="share of lines that start with a bullet or -")
    max_ellipsis_lines: Above0 | None = Field(0.3, description="share of lines that end in an ellipsis")
    min_alpha_words: Share | None = Field(0.8, description="share of words with a letter")
    min_stop_words: int | None = Field(2, ge=0, description="different stop words the document must have")
    stop_words: tuple[str, ...] = Field(ENGLISH_STOP_WORDS, description="give those of your language")
    punctuation_counts: bool = Field(
        False, description="a mark of punctuation is a word in the ratios, as in datatrove; drops dialogue and lists"
    )


class GopherRepetition(Section):
    max_duplicate_lines: Above0 | None = Field(0.3, description="share of lines seen before in the document")
    max_duplicate_paragraphs: Above0 | None = Field(0.3, description="share of paragraphs")
    max_duplicate_line_characters: Above0 | None = Field(0.2, description="share of characters")
    max_duplicate_paragraph_characters: Above0 | None = Field(0.2, description="share of characters")
    max_top_ngram: dict[int, Above0] = Field(
        {2: 0.2, 3: 0.18, 4: 0.16}, description="words: share of characters in the most frequent n-gram"
    )
    max_duplicate_ngrams: dict[int, Above0] = Field(
        {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10},
        description="words: share of characters in n-grams seen before",
    )


class C4Quality(Section):
    min_sentences: int | None = Field(5, ge=1, description="after lines were taken out")
    min_words_per_line: Words | None = Field(3, description="shorter lines are taken out")
    max_word_length: Words | None = Field(1000, description="lines with a longer word are taken out")
    require_terminal_punctuation: bool = Field(True, description="take out lines that do not end a sentence")
    remove_citations: bool = Field(True, description="take out [1], [edit] and [citation needed]")
    drop_lorem_ipsum: bool = Field(True, description="drop documents with lorem ipsum")
    drop_curly_bracket: bool = Field(True, description="drop documents with {; off for code and LaTeX")
    remove_javascript: bool = Field(True, description="take out lines that say javascript")
    remove_policy: bool = Field(True, description="take out lines on cookies, privacy policy, terms of use")


class FinewebQuality(Section):
    min_lines_with_punctuation: Share | None = Field(0.12, description="share of lines that end a sentence")
    max_short_lines: Above0 | None = Field(0.67, description="share of short lines")
    short_line_characters: Words = Field(30, description="a line is short up to here")
    max_duplicate_line_characters: Above0 | None = Field(0.01, description="share of characters in lines seen before")
    max_newlines_per_word: Above0 | None = Field(0.3, description="above it the document is a list")


class Pii(Section):
    emails: bool = Field(True, description="mask e-mail addresses")
    ips: bool = Field(True, description="mask public IPv4 addresses; private ones stay")
    phones: bool = Field(False, description="mask telephone numbers of the forms +49 30 1234567 and (202) 555-0100")
    email_mask: str = Field("email@example.com", description="what stands there instead")
    ip_mask: str = Field("22.214.171.124", description="what stands there instead")
    phone_mask: str = Field("555-0100", description="what stands there instead")


class NgramPerplexity(Section):
    model: Path = Field(description="a model of cpt data train-ngram")
    max: Above0 | None = Field(None, description="documents above it are dropped")
    min: Above0 | None = Field(None, description="documents below it are dropped: boiler-plate, lists")
    annotate: bool = Field(True, description="write the field perplexity")

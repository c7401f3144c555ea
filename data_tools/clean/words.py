"""Text to words and sentences without a model, a download or a language: what the quality rules count.

A word is a run of letters or digits (``don't``, ``3.14`` and ``U.S.`` are one), a mark of punctuation is a word of its
own, as is a run of the same one (``...``, ``--``). Japanese and Chinese, which put no spaces, are cut where the script
changes: a run of kanji, of hiragana or of katakana is a word. Thai, Lao, Khmer and Burmese are not cut at all: rules
that count words need thresholds of their own there.
"""

import re
from functools import lru_cache

KANA_AND_KANJI = r"\u3005-\u3007\u3041-\u309f\u30a0-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f"
_LETTER = rf"[^\W\d_{KANA_AND_KANJI}]"
_WORD = re.compile(
    rf"(?:[A-Za-z]\.){{2,}}|{_LETTER}[^\W_{KANA_AND_KANJI}]*(?:['\u2019]{_LETTER}+)?"
    r"|\d+(?:[.,:]\d+)*"
    r"|[\u3005-\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]+|[\u3041-\u309f]+|[\u30a0-\u30ff\uff66-\uff9f]+"
    r"|\.\.+|--+|==+|\*\*+|##+|__+|\S"
)
# A stop behind a single letter belongs to an initial or an abbreviation (J. Smith, e.g., U.S.)
_SENTENCE_END = re.compile(
    r"(?:(?<!\b[^\W\d_])\.|[!?…])[.!?…]*[\"'”\u2019)\]]*(?=\s|$)|[。\uff01\uff1f｡]+[」』\uff09]*"
)


@lru_cache(maxsize=1)  # several rules ask for the words of one document, one after another
def split_words(text: str) -> tuple[str, ...]:
    """``"It isn't 3.5..."`` -> ``("It", "isn't", "3.5", "...")``; every character but white space is in a word."""
    return tuple(_WORD.findall(text))


def count_sentences(text: str) -> int:
    """At least 1; a rest without a full stop counts."""
    count = last = 0
    for match in _SENTENCE_END.finditer(text):
        count, last = count + 1, match.end()
    return max(count + bool(text[last:].strip()), 1)

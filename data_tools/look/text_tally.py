"""Counts over sampled texts, one after another: lines, words, languages, exact duplicates. Memory is bounded.

A text counts with its first ``MOST_CHARACTERS``. Lines are counted up to ``MOST_LINES`` different ones; beyond that,
those seen once are forgotten from time to time, so that a frequent line may be counted a little too low, never too
high.
"""

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from typing import Any

MOST_CHARACTERS = 100_000
MOST_LINES = 200_000
SHORTEST_LINE = 15  # characters; shorter ones (numbers, list markers) repeat everywhere
_TOP_LINES = 10
_SHOWN_LINE = 200
_LETTERS_PER_TEXT = 400
_WORD = re.compile(r"\w+")

Identify = Callable[[str], str]


class TextTally:
    """``identify``: a text's language, or what stands for it."""

    def __init__(self, identify: Identify) -> None:
        self._identify = identify
        self._lines: Counter[str] = Counter()
        self._languages: Counter[str] = Counter()
        self._seen: set[bytes] = set()
        self.documents = self.duplicates = self.shortened = 0
        self.words = self.characters = self.utf8_bytes = 0

    def add(self, text: str) -> str:
        """Count it; gives back the part that counted."""
        self.documents += 1
        self.shortened += len(text) > MOST_CHARACTERS
        text = text[:MOST_CHARACTERS]
        raw = text.encode(errors="replace")
        digest = hashlib.blake2b(raw, digest_size=16).digest()
        self.duplicates += digest in self._seen
        self._seen.add(digest)
        self.utf8_bytes += len(raw)
        self.characters += len(text)
        self.words += sum(1 for _ in _WORD.finditer(text))
        self._languages[self._identify(text)] += 1
        self._lines.update(line for raw_line in text.splitlines() if len(line := raw_line.strip()) >= SHORTEST_LINE)
        if len(self._lines) > MOST_LINES:
            self._lines = Counter({line: count for line, count in self._lines.items() if count > 1})
        return text

    def facts(self) -> dict[str, Any]:
        repeated = [{"line": line[:_SHOWN_LINE], "count": count}
                    for line, count in self._lines.most_common(_TOP_LINES) if count > 1]  # fmt: skip
        return {
            "repeated_lines": repeated,
            "languages": [{"name": name, "documents": count, "share": round(count / self.documents, 4)}
                          for name, count in self._languages.most_common()],
            "duplicates": {
                "documents": self.duplicates,
                "share": round(self.duplicates / self.documents, 4) if self.documents else 0.0,
            },
        }  # fmt: skip


def language_rule() -> tuple[str, Identify]:
    """What tells languages here: ("language", ...) with the identifier of `cpt data clean`, else ("script", ...)."""
    from data_tools.clean.language import load_identifier

    try:
        identify = load_identifier()
    except RuntimeError:  # the optional package is missing: letters still tell something
        return "script", script_of
    return "language", lambda text: identify(text)[0]


def script_of(text: str) -> str:
    """The script most of the first letters are of, by the names Unicode gives them: "LATIN", "CJK", "HIRAGANA" ..."""
    letters = [character for character in text[: 4 * _LETTERS_PER_TEXT] if character.isalpha()][:_LETTERS_PER_TEXT]
    names = Counter(unicodedata.name(letter, "UNKNOWN").split()[0] for letter in letters)
    return names.most_common(1)[0][0] if names else "no letters"

"""Long texts in pieces: bounded memory for encoders that need 40 to 100 bytes of it per byte of text.

Measured before there was cutting: 5.4 GB (`tokenizers`) and 2.1 GB (`sentencepiece`) for one text of 50 MB. A text is
cut only at kinds of places where a sample of the corpus proved that cutting changes no id: between two words, behind a
line break, behind an ideographic full stop. A text without any such place stays whole.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_PROBE_PIECE = 200  # characters
_PROBE_TEXT = 4_000
_PROBE_TEXTS = 64
# Every pattern is of zero width, or of one space that belongs to the next piece (byte-level BPE) or to none (models
# that put a space before every text).
_CANDIDATES = (
    (r"(?<=[A-Za-z])(?= [A-Za-z])", r"(?<=[A-Za-z]) (?=[A-Za-z])"),
    (r"(?<=\n)(?=[^\s])",),
    ("(?<=\u3002)(?=\\w)",),
)


@dataclass(frozen=True)
class Cut:
    """Where texts may be cut: what ``pattern`` matches is left out, which is nothing, or a space the model restores."""

    pattern: re.Pattern[str]

    def pieces(self, text: str, size: int) -> Iterator[str]:
        """Pieces of at least ``size`` characters but for the last; longer where no place for a cut follows."""
        start = 0
        while cut := self.pattern.search(text, start + size):
            yield text[start : cut.start()]
            start = cut.end()
        yield text[start:]


def find_cut(encode: Callable[[Sequence[str]], NDArray[np.uint32]], sample: Sequence[str]) -> Cut | None:
    """The places proved by ``sample`` under ``encode(texts)`` -> all ids end to end; None where there are none."""
    probe = [text[:_PROBE_TEXT] for text in sample[:_PROBE_TEXTS]]
    proved = []
    for candidates in _CANDIDATES:
        exact = (pattern for pattern in candidates if _is_exact(encode, probe, Cut(re.compile(pattern))))
        proved += [pattern for pattern in exact][:1]
    return Cut(re.compile("|".join(proved))) if proved else None


def _is_exact(encode: Callable[[Sequence[str]], NDArray[np.uint32]], probe: Sequence[str], cut: Cut) -> bool:
    probe = [text for text in probe if cut.pattern.search(text, _PROBE_PIECE)]
    pieces = [piece for text in probe for piece in cut.pieces(text, _PROBE_PIECE)]
    return bool(probe) and np.array_equal(encode(probe), encode(pieces))

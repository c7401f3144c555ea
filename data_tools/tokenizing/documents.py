"""A job's texts to stored tokens: split into train and held out, encoded, BOS before and EOS behind every document."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_tools.encoders import Encoder
from data_tools.tokenizing.jobs import Piece, is_heldout


@dataclass(frozen=True)
class Encoded:
    """Documents of one split, their tokens end to end in the store's dtype; or one piece of a long document."""

    tokens: NDArray[Any]
    lengths: NDArray[np.int64]
    utf8_bytes: int


Halves = tuple[Encoded, Encoded]


@dataclass(frozen=True)
class DocumentEncoder:
    """(texts of a job, which piece they are) -> its (train, heldout) halves; runs wherever it is sent."""

    encoder: Encoder
    heldout_fraction: float

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(np.uint16 if self.encoder.vocab_size <= 1 << 16 else np.uint32)

    def __call__(self, texts: Sequence[bytes], piece: Piece | None) -> Halves:
        halves: tuple[list[bytes], list[bytes]] = ([], [])
        for text in texts:
            side = is_heldout(text, self.heldout_fraction) if piece is None else piece.side
            halves[side].append(text)
        bos = self.encoder.bos_id if piece is None or piece.first else None
        eos = self.encoder.eos_id if piece is None or piece.last else None
        return self._encode(halves[0], bos, eos), self._encode(halves[1], bos, eos)

    def _encode(self, texts: Sequence[bytes], bos: int | None, eos: int | None) -> Encoded:
        if not texts:
            return Encoded(np.empty(0, self.dtype), np.empty(0, np.int64), 0)
        ids, lengths = self.encoder.encode_batch(texts)
        size = self.encoder.vocab_size
        assert not len(ids) or ids.max() < size, f"id {ids.max()} from a vocabulary of {size}"
        tokens, lengths = surround(ids.astype(self.dtype), lengths, bos, eos)
        return Encoded(tokens, lengths, sum(map(len, texts)))


def surround(
    ids: NDArray[Any], lengths: NDArray[np.int64], bos: int | None, eos: int | None
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Put ``bos`` before and ``eos`` behind every document.

    ids 5 7 9, lengths 2 1, bos 1, eos 0 -> 1 5 7 0 1 9 0, lengths 4 3
    """
    longer = lengths + (bos is not None) + (eos is not None)
    tokens = np.empty(len(ids) + int((longer - lengths).sum()), ids.dtype)
    is_text = np.ones(len(tokens), bool)
    ends = longer.cumsum()
    if bos is not None:
        starts = ends - longer
        tokens[starts], is_text[starts] = bos, False
    if eos is not None:
        tokens[ends - 1], is_text[ends - 1] = eos, False
    tokens[is_text] = ids
    return tokens, longer

"""Greedy byte-pair merges on top of a finished segmentation: which neighbours to join next, again and again.

Words are rows of symbols (token ids of the base tokenizer, ids above them for characters it has no token for). Each
round joins the pair that occurs most often, everywhere and from the left, as a BPE encoder does with its merges in
this order. A pair's count can only fall while others are joined, so a count found too high is put back with what is
left of it (lazy greedy), and places are looked up in numpy arrays: 2,000 merges over 10 M symbols take seconds, and
about 30 bytes of memory per symbol.

Example: words ``low low lower`` as ``l o w / l o w / l o w er``: ``l+o`` (3, ties go to the smaller ids) gives
``lo w``, then ``lo+w`` (3), then ``low+er`` (1).
"""

import heapq
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.int64]
Places = NDArray[np.int32]
BORDER = -1  # between words
_GONE = -2  # the right half of something joined

# What a symbol holds decides what it may be joined with; 0 is never joined.
NEVER, PLAIN, SPACE_PLAIN, MARKS, SPACE_MARKS, SPACE, SPACES = range(7)
_JOINS = (
    *((PLAIN, PLAIN), (SPACE_PLAIN, PLAIN), (SPACE, PLAIN)),
    *((MARKS, MARKS), (SPACE_MARKS, MARKS), (SPACE, MARKS)),
    *((SPACE, SPACE), (SPACE, SPACES), (SPACES, SPACE), (SPACES, SPACES)),
)


@dataclass(frozen=True)
class NewToken:
    """A learned token: its text in the tokenizer's own spelling; ``parts`` are symbols, none for a single character."""

    symbol: int
    text: str
    parts: tuple[int, int] | None


@dataclass
class Learned:
    """Tokens in the order of their merges, and how often each symbol stands in the words after the last of them."""

    tokens: list[NewToken]
    counts: Array


@dataclass
class Symbols:
    """``texts[i]`` spells symbol i; symbols from ``num_known`` on are characters without a token."""

    texts: list[str]
    num_known: int
    kind_of: Callable[[str], int]
    taken: set[str]  # spellings no new token may have


def learn_merges(words: Mapping[bytes, int], symbols: Symbols, *, num_tokens: int, min_count: int) -> Learned:
    """At most ``num_tokens`` tokens, each standing at least ``min_count`` times in the words when it is made.

    ``words``: int32 symbols as bytes -> how often the word occurs.
    """
    return _Learner(words, symbols, num_tokens, min_count).run()


class _Learner:
    def __init__(self, words: Mapping[bytes, int], symbols: Symbols, num_tokens: int, min_count: int) -> None:
        self.symbols, self.num_tokens, self.min_count = symbols, num_tokens, max(1, min_count)
        self.texts, self.taken = list(symbols.texts), set(symbols.taken)
        self.width = len(self.texts) + num_tokens + 1
        self.known = np.zeros(self.width, bool)
        self.known[: symbols.num_known] = True
        self.kind = np.zeros(self.width, np.int8)
        self.kind[: len(self.texts)] = [symbols.kind_of(text) for text in self.texts]
        self.joins = np.zeros((7, 7), bool)
        self.joins[tuple(zip(*_JOINS, strict=True))] = True
        self.at, self.weight = _lay_out(words)
        self.next = np.arange(1, len(self.at) + 1, dtype=np.int32)
        self.previous = np.arange(-1, len(self.at) - 1, dtype=np.int32)
        self.places: dict[int, Places] = {}  # by pair code
        self.heap: list[tuple[int, int]] = []

    def run(self) -> Learned:
        self._add_pairs(np.arange(len(self.at) - 1, dtype=np.int32))
        self._add_characters()
        learned: list[NewToken] = []
        while self.heap and len(learned) < self.num_tokens:
            stated, code = heapq.heappop(self.heap)
            first, second = divmod(code, self.width)
            text = self.texts[first] + (self.texts[second] if second < self.width - 1 else "")
            standing = self._standing(first, second, self.places.pop(code))
            places = self._apart(standing) if first == second else standing
            gain = self._gain(places, first, second)
            if text in self.taken or self.weight[places].sum() < self.min_count:
                continue
            if gain < -stated:
                self.places[code] = standing
                heapq.heappush(self.heap, (-gain, code))
                continue
            self.taken.add(text)
            if second == self.width - 1:
                self.known[first] = True
                learned.append(NewToken(first, text, None))
                self._add_neighbours(places, first)
            else:
                symbol = self._join(places, text)
                learned.append(NewToken(symbol, text, (first, second)))
                self._add_neighbours(places, symbol)
        alive = self.at >= 0
        counts = np.bincount(self.at[alive], weights=self.weight[alive], minlength=self.width).astype(np.int64)
        return Learned(learned, counts)

    def _gain(self, places: Places, first: int, second: int) -> int:
        """Tokens saved: one per joined pair; a character without a token costs its UTF-8 bytes."""
        saved = len(self.texts[first].encode()) - 1 if second == self.width - 1 else 1
        return int(self.weight[places].sum()) * saved

    def _standing(self, first: int, second: int, places: Places) -> Places:
        """Those of ``places`` where the pair still stands."""
        places = places[self.at[places] == first]
        return places if second == self.width - 1 else places[self.at[self.next[places]] == second]

    def _apart(self, places: Places) -> Places:
        """Of overlapping places (a a a) the left one."""
        kept, blocked = [], -1
        for place in places.tolist():
            if place != blocked:
                kept.append(place)
                blocked = int(self.next[place])
        return np.array(kept, np.int32)

    def _join(self, places: Places, text: str) -> int:
        symbol = len(self.texts)
        self.texts.append(text)
        self.known[symbol] = True
        self.kind[symbol] = self.symbols.kind_of(text)
        rights = self.next[places]
        behind = self.next[rights]
        self.at[places] = symbol
        self.at[rights] = _GONE
        self.next[places] = behind
        self.previous[behind] = places
        return symbol

    def _add_neighbours(self, places: Places, symbol: int) -> None:
        before = self.previous[places]
        before = before[self.at[before] != symbol]  # those pairs are seen from their left half
        self._add_pairs(np.sort(np.concatenate([places, before])))

    def _add_pairs(self, lefts: Places) -> None:
        """Note the pairs that start at ``lefts`` (ascending)."""
        first, second = self.at[lefts], self.at[self.next[lefts]]
        usable = (first >= 0) & (second >= 0)  # where not, the index below is a wrong one, and the answer unused
        usable &= self.known[first] & self.known[second] & self.joins[self.kind[first], self.kind[second]]
        self._note(first[usable].astype(np.int64) * self.width + second[usable], lefts[usable])

    def _add_characters(self) -> None:
        """Characters without a token are candidates by themselves; ``width - 1`` stands for 'no second half'."""
        places = np.flatnonzero(self.at >= self.symbols.num_known).astype(np.int32)
        self._note(self.at[places].astype(np.int64) * self.width + self.width - 1, places)

    def _note(self, codes: Array, places: Places) -> None:
        if not len(codes):
            return
        order = np.argsort(codes, kind="stable")
        codes, places = codes[order], places[order]
        starts = np.flatnonzero(np.r_[True, codes[1:] != codes[:-1]])
        counts = np.add.reduceat(self.weight[places], starts)
        ends = np.r_[starts[1:], len(codes)]
        for i in np.flatnonzero(counts >= self.min_count).tolist():
            code, found = int(codes[starts[i]]), places[starts[i] : ends[i]].copy()
            self.places[code] = found
            heapq.heappush(self.heap, (-self._gain(found, *divmod(code, self.width)), code))


def _lay_out(words: Mapping[bytes, int]) -> tuple[NDArray[np.int32], Array]:
    """All words end to end, a border before, between and behind them, and at each place how often its word occurs."""
    border = np.array([BORDER], np.int32).tobytes()
    at = np.frombuffer(border + b"".join(word + border for word in words), np.int32).copy()
    lengths = np.fromiter((len(word) // 4 + 1 for word in words), np.int64, len(words))
    counts = np.fromiter(words.values(), np.int64, len(words))
    return at, np.concatenate([np.zeros(1, np.int64), np.repeat(counts, lengths)])

"""The n-grams of texts that must not be trained on, in sorted arrays: which of them a document holds, and where.

Every n-gram of a text is in the index; a shorter text is, as a whole, unless it is too short to tell. Texts in scripts
without spaces go by characters. Memory is some 20 bytes per n-gram, whatever is searched.

    index.find("... the quick brown fox ...")  ->  starts, ends (characters), grams (numbers into ``index.hashes``)
    index.owners(gram)                         ->  numbers of the items that hold it

A search hashes the first few words from each place once and asks a bit table; only what passes it (one in 200,
and what is there) is looked up.
"""

import contextlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpt.rundir import DataError
from data_tools.decontaminate.ngrams import (
    Hashes,
    Joined,
    Places,
    Units,
    are_numbers,
    characters_of,
    extend_grams,
    is_unspaced,
    mixed,
    pieces_of,
    unfinished_grams,
    words_of,
)

INDEX_VERSION = 1
_BITS_PER_GRAM = 32
_NPY_HEADER = 128
_ARRAYS = (
    *("hashes", "owners", "first_owner", "item_sets"),
    *("word_lengths", "word_bits", "character_lengths", "character_bits"),
)
_DEFECT = "fix: delete it and run the command again"


@dataclass(frozen=True)
class GramRule:
    """(shortest text that counts, n) for each kind of text; of the n-grams of a text about one in ``every`` is kept."""

    words: tuple[int, int] = (8, 13)
    characters: tuple[int, int] = (24, 24)
    every: int = 1


@dataclass(frozen=True)
class Found:
    """Occurrences of indexed n-grams in one text, in order of their start."""

    starts: Places
    ends: Places
    grams: Places

    def __len__(self) -> int:
        return len(self.grams)


class GramIndex:
    """Immutable; made by :class:`IndexBuilder` or :meth:`load`."""

    def __init__(self, arrays: dict[str, NDArray[Any]], sets: list[str], item_keys: list[str]) -> None:
        self.sets = sets
        self.item_keys = item_keys
        self.item_sets: NDArray[np.int32] = arrays["item_sets"]
        self.hashes: Hashes = arrays["hashes"]
        self._first_owner: Places = arrays["first_owner"]
        self._owners: NDArray[np.int32] = arrays["owners"]
        self._words = _Searcher(arrays["word_lengths"], arrays["word_bits"])
        self._characters = _Searcher(arrays["character_lengths"], arrays["character_bits"])
        self._arrays = arrays

    def owners(self, gram: int) -> NDArray[np.int32]:
        return self._owners[self._first_owner[gram] : self._first_owner[gram + 1]]

    def items_with_grams(self) -> NDArray[np.int32]:
        """Numbers of the items that have a text long enough to be found."""
        return np.unique(self._owners)

    def find(self, text: str) -> Found:
        """Every occurrence of every n-gram; time is that of hashing the text, memory that of its largest piece."""
        found = []
        for piece in pieces_of(text, max(self._words.longest - 1, 0), max(self._characters.longest - 1, 0)):
            if self._words.longest:
                found.append(self._words.search(piece.words, self.hashes))
            if self._characters.longest and piece.characters is not None:
                found.append(self._characters.search(piece.characters, self.hashes))
        starts, ends, numbers = (
            np.concatenate([getattr(piece, name) for piece in found]) if found else np.empty(0, np.int64)
            for name in ("starts", "ends", "grams")
        )
        order = np.argsort(starts, kind="stable")
        return Found(starts[order], ends[order], numbers[order])

    def save(self, folder: Path) -> None:
        """One ``.npy`` file per array, so that all processes of a machine map the same memory."""
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        partial.chmod(0o755)
        try:
            for name, array in self._arrays.items():
                np.save(partial / f"{name}.npy", array)
            content = {"version": INDEX_VERSION, "sets": self.sets, "item_keys": self.item_keys}
            (partial / "items.json").write_text(json.dumps(content), encoding="utf-8")
            with contextlib.suppress(OSError):  # another task was first, with the same content
                partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    @classmethod
    def load(cls, folder: Path) -> "GramIndex":
        """Raises DataError: not an index, or one of another version."""
        try:
            content = json.loads((folder / "items.json").read_text(encoding="utf-8"))
            arrays = {name: _mapped(folder / f"{name}.npy") for name in _ARRAYS}
            version, sets, keys = content["version"], content["sets"], content["item_keys"]
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise DataError(f"{folder}: not an n-gram index ({error!r:.200}); {_DEFECT}") from None
        if version != INDEX_VERSION:
            raise DataError(f"{folder}: version {version!r}, this program reads {INDEX_VERSION}; {_DEFECT}")
        if not _fit_together(arrays, len(sets), len(keys)):
            raise DataError(f"{folder}: its files do not fit together; {_DEFECT}")
        return cls(arrays, sets, keys)


def _fit_together(arrays: dict[str, NDArray[Any]], num_sets: int, num_items: int) -> bool:
    """So that nothing a search looks up is out of bounds, also in files that somebody mixed up."""
    first, owners, sets = arrays["first_owner"], arrays["owners"], arrays["item_sets"]
    tables = [arrays["word_bits"], arrays["character_bits"]]
    return (
        len(first) == len(arrays["hashes"]) + 1
        and first[0] == 0
        and first[-1] == len(owners)
        and len(sets) == num_items
        and (not len(owners) or 0 <= owners.min() <= owners.max() < num_items)
        and (not num_items or 0 <= sets.min() <= sets.max() < num_sets)
        and all(len(table) == 0 or len(table) & (len(table) - 1) == 0 for table in tables)
    )


def _mapped(file: Path) -> NDArray[Any]:
    # asarray: np.memmap objects cost microseconds per operation in subclass hooks; an empty file cannot be mapped
    return np.asarray(np.load(file, mmap_mode="r" if file.stat().st_size > _NPY_HEADER else None))


class _Searcher:
    """Finds the n-grams of one kind (words, or characters) and of every length there is."""

    def __init__(self, lengths: Places, bits: NDArray[np.uint8]) -> None:
        """``lengths``: of the beginnings in the bit table, then of the n-grams; empty where there are none."""
        self._prefix = int(lengths[0]) if len(lengths) else 0
        self._lengths: list[int] = lengths[1:].tolist()
        self.longest = max(self._lengths, default=0)
        self._bits = bits

    def search(self, joined: Joined, known: Hashes) -> Found:
        """Occurrences that are not wholly among the carried units, which an earlier piece showed."""
        units = joined.units
        if len(units) < self._prefix:
            return _nothing()
        state = unfinished_grams(units.hashes, self._prefix)
        beginnings = mixed(state)
        at = np.flatnonzero(_bits_set(self._bits, beginnings))
        at = at[_bits_set(self._bits, _halves_exchanged(beginnings[at]))]
        return self._check(joined, known, at, state[at])

    def _check(self, joined: Joined, known: Hashes, at: Places, state: Hashes) -> Found:
        units, carried = joined.units, joined.carried
        pieces = []
        for length in range(self._prefix, self.longest + 1):
            if length > self._prefix:
                inside = at + length <= len(units)
                at, state = at[inside], state[inside]
                extend_grams(state, units.hashes[at + (length - 1)])
            if length in self._lengths and len(at):
                places = np.searchsorted(known, wanted := mixed(state))
                places[places == len(known)] = 0
                hit = (known[places] == wanted) & (at + length > carried)
                pieces.append((at[hit], at[hit] + (length - 1), places[hit]))
        if not pieces:
            return _nothing()
        first, last, number = (np.concatenate(column) for column in zip(*pieces, strict=True))
        return Found(units.starts[first], units.ends[last], number)


class IndexBuilder:
    """Takes texts of items, gives the index; some 60 bytes per n-gram while it builds."""

    def __init__(self, *, shortest_words: int = 8, shortest_characters: int = 24) -> None:
        """Lengths that no rule of an item goes below."""
        self._sets: list[str] = []
        self._keys: list[str] = []
        self._item_sets: list[int] = []
        self._fewest_characters = min(2 * shortest_words - 1, shortest_characters)
        self._kinds = {"word": _Gathered(shortest_words), "character": _Gathered(shortest_characters)}

    def add(self, set_name: str, key: str, texts: Iterable[str], rule: GramRule) -> None:
        """One item; ``key`` names it for people."""
        if set_name not in self._sets:
            self._sets.append(set_name)
        number = len(self._keys)
        self._keys.append(key)
        self._item_sets.append(self._sets.index(set_name))
        for text in texts:
            if len(text) >= self._fewest_characters:
                kind, of, lengths = self._kind_of(text, rule)
                kind.add(units := of(text), are_numbers(text, units), number, (lengths, rule.every))

    def _kind_of(self, text: str, rule: GramRule) -> tuple["_Gathered", Callable[[str], Units], tuple[int, int]]:
        if is_unspaced(text):
            return self._kinds["character"], characters_of, rule.characters
        return self._kinds["word"], words_of, rule.words

    def build(self) -> GramIndex:
        arrays: dict[str, NDArray[Any]] = {"item_sets": np.array(self._item_sets, np.int32)}
        for name, kind in self._kinds.items():
            arrays[f"{name}_lengths"] = kind.all_lengths()
            arrays[f"{name}_bits"] = kind.bit_table()
        hashes = np.concatenate([piece for kind in self._kinds.values() for piece in kind.hashes] or [_NO_HASHES])
        owners = np.concatenate([piece for kind in self._kinds.values() for piece in kind.owners] or [_NO_OWNERS])
        order = np.lexsort((owners, hashes))
        hashes, owners = hashes[order], owners[order]
        repeated = np.zeros(len(hashes), np.bool_)
        repeated[1:] = (hashes[1:] == hashes[:-1]) & (owners[1:] == owners[:-1])
        hashes, owners = hashes[~repeated], owners[~repeated]
        unique, first = np.unique(hashes, return_index=True)
        arrays |= {"hashes": unique, "owners": owners, "first_owner": np.append(first, len(owners)).astype(np.int64)}
        return GramIndex(arrays, self._sets, self._keys)


_NO_HASHES = np.empty(0, np.uint64)
_NO_OWNERS = np.empty(0, np.int32)


class _Gathered:
    """N-grams of one kind as they come, with the ``prefix`` units each begins with, for the bit table."""

    def __init__(self, prefix: int) -> None:
        self._prefix = prefix
        self.hashes: list[Hashes] = []
        self.owners: list[NDArray[np.int32]] = []
        self._lengths: set[int] = set()
        self._beginnings: list[Hashes] = []

    def add(self, units: Units, numbers: NDArray[np.bool_], owner: int, how: tuple[tuple[int, int], int]) -> None:
        """``numbers``: which units have no letter; a row of nothing but such is no quotation of anything."""
        (shortest, n), every = how
        assert shortest >= self._prefix, f"a rule goes below {self._prefix} units: {shortest}"
        if len(units) < shortest:
            return
        length = min(n, len(units))
        state = unfinished_grams(units.hashes, self._prefix)
        beginnings = mixed(state)
        for reached in range(self._prefix, length):
            state = state[: len(units) - reached]
            extend_grams(state, units.hashes[reached:])
        found = mixed(state)
        telling = np.cumsum(np.concatenate([[0], ~numbers]))
        at = np.flatnonzero(telling[length:] > telling[:-length])
        if every > 1 and len(at) > 1:
            at = at[(found[at] % np.uint64(every) == 0) | (found[at] == found[at].min())]
        self.hashes.append(found[at])
        self.owners.append(np.full(len(at), owner, np.int32))
        self._lengths.add(length)
        self._beginnings.append(beginnings[at])

    def all_lengths(self) -> Places:
        return np.array([self._prefix, *sorted(self._lengths)] if self._lengths else [], np.int64)

    def bit_table(self) -> NDArray[np.uint8]:
        if not self._lengths:
            return np.empty(0, np.uint8)
        beginnings = np.concatenate(self._beginnings)
        bits = max(10, int(len(beginnings) * _BITS_PER_GRAM - 1).bit_length())
        table = np.zeros(1 << bits, np.bool_)
        for hashes in (beginnings, _halves_exchanged(beginnings)):
            table[hashes >> np.uint64(64 - bits)] = True
        return np.packbits(table, bitorder="little")


def _halves_exchanged(hashes: Hashes) -> Hashes:
    """Halves exchanged: for a second, independent look into a table that goes by the first bits."""
    return (hashes << np.uint64(32)) | (hashes >> np.uint64(32))


def _bits_set(table: NDArray[np.uint8], hashes: Hashes) -> NDArray[np.bool_]:
    bits = (len(table) * 8).bit_length() - 1
    places = hashes >> np.uint64(64 - bits)
    bits_there = table[places >> np.uint64(3)] >> (places & np.uint64(7)).astype(np.uint8)
    answer: NDArray[np.bool_] = (bits_there & np.uint8(1)) == 1
    return answer


def _nothing() -> Found:
    return Found(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.int64))

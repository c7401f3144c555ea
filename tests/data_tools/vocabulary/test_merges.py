"""Greedy merges: the example by hand, and equality with the same thing done the slow way."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_tools.vocabulary.merges import BORDER, PLAIN, Learned, Symbols, learn_merges

LETTERS = list("abcde")


def symbols(texts: list[str], *, num_known: int | None = None, taken: set[str] | None = None) -> Symbols:
    known = len(texts) if num_known is None else num_known
    return Symbols(texts, known, lambda text: PLAIN if text.isalpha() else 0, taken or set())


def as_words(rows: dict[tuple[int, ...], int]) -> dict[bytes, int]:
    return {np.array(row, np.int32).tobytes(): count for row, count in rows.items()}


def learn(rows: dict[tuple[int, ...], int], texts: list[str], *, num_tokens: int = 10, min_count: int = 1) -> Learned:
    return learn_merges(as_words(rows), symbols(texts), num_tokens=num_tokens, min_count=min_count)


def test_the_example_of_the_module() -> None:
    texts = ["l", "o", "w", "er"]
    learned = learn({(0, 1, 2): 2, (0, 1, 2, 3): 1}, texts)
    assert [(token.text, token.parts) for token in learned.tokens] == [
        ("lo", (0, 1)),
        ("low", (4, 2)),
        ("lower", (5, 3)),
    ]
    assert learned.counts[[4, 5, 6]].tolist() == [0, 2, 1]


def test_three_equal_symbols_are_joined_from_the_left() -> None:
    learned = learn({(0, 0, 0): 5}, ["a"])
    assert [token.text for token in learned.tokens] == ["aa", "aaa"]
    assert learned.counts.tolist()[:3] == [0, 0, 5]


def test_rare_pairs_and_spellings_that_exist_already_are_left_alone() -> None:
    rows = {(0, 1): 9, (1, 2): 3}
    found = learn_merges(as_words(rows), symbols(["a", "b", "c"], taken={"ab"}), num_tokens=5, min_count=4)
    assert not found.tokens
    assert [token.text for token in learn(rows, ["a", "b", "c"], min_count=4).tokens] == ["ab"]


def test_a_character_without_a_token_becomes_one_where_its_bytes_cost_more_than_any_pair() -> None:
    rows = {(0, 1, 2): 3, (0, 1): 2}  # 2 is a character of three bytes: 3 times 2 tokens saved, the pair saves 5
    learned = learn_merges(as_words(rows), symbols(["a", "b", "語"], num_known=2), num_tokens=3, min_count=1)
    assert [(token.text, token.parts) for token in learned.tokens] == [("語", None), ("ab", (0, 1)), ("ab語", (3, 2))]


def test_numbers_are_not_joined() -> None:
    assert not learn({(0, 1): 100}, ["1", "2"]).tokens


def slowly(rows: dict[tuple[int, ...], int], texts: list[str], num_tokens: int, min_count: int) -> list[str]:
    """The same greedy rule over lists: count every pair, join the first of the most frequent, again."""
    texts, words = list(texts), [(list(row), count) for row, count in rows.items()]
    while len(texts) < len(LETTERS) + num_tokens:
        counts: Counter[tuple[int, int]] = Counter()
        for row, count in words:
            blocked = -1
            for i, pair in enumerate(pairwise(row)):
                if not (pair[0] == pair[1] and blocked == i):
                    counts[pair] += count
                    blocked = i + 1 if pair[0] == pair[1] else -1
        usable = {pair: n for pair, n in counts.items() if texts[pair[0]] + texts[pair[1]] not in texts}
        if not usable or max(usable.values()) < min_count:
            break
        best = min(usable, key=lambda pair: (-usable[pair], pair))
        for row, _ in words:
            i = 0
            while i + 1 < len(row):
                if (row[i], row[i + 1]) == best:
                    row[i : i + 2] = [len(texts)]
                i += 1
        texts.append(texts[best[0]] + texts[best[1]])
    return texts[len(LETTERS) :]


@given(
    st.dictionaries(st.lists(st.integers(0, 4), min_size=1, max_size=12).map(tuple), st.integers(1, 5), min_size=1),
    st.integers(1, 12),
    st.integers(1, 4),
)
def test_it_learns_what_counting_everything_again_each_time_learns(
    rows: dict[tuple[int, ...], int], num_tokens: int, min_count: int
) -> None:
    learned = learn_merges(
        as_words(rows), symbols(LETTERS, taken=set(LETTERS)), num_tokens=num_tokens, min_count=min_count
    )
    assert [token.text for token in learned.tokens] == slowly(rows, LETTERS, num_tokens, min_count)


@pytest.mark.parametrize("seed", range(3))
def test_counts_add_up_to_the_words(seed: int) -> None:
    random = np.random.default_rng(seed)
    rows = {
        tuple(random.integers(0, 5, random.integers(1, 30)).tolist()): int(random.integers(1, 4)) for _ in range(50)
    }
    learned = learn(rows, LETTERS, num_tokens=20)
    lengths = [1] * len(LETTERS)
    for token in learned.tokens:
        lengths.append(sum(lengths[part] for part in token.parts or ()))
    held = sum(int(n) * length for n, length in zip(learned.counts.tolist(), lengths, strict=False))
    assert held == sum(len(row) * count for row, count in rows.items())
    assert BORDER < 0

"""The index of n-grams: what a document holds of the protected texts, where, and of whom."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpt.rundir import DataError
from data_tools.decontaminate import ngrams
from data_tools.decontaminate.gram_index import GramIndex, GramRule, IndexBuilder

LONG = "a well regulated militia being necessary to the security of a free state the right"
SHORT = "which of these statements about cells is false"  # 8 words
JAPANESE = "主に子ども向けのもので、イラストのついた物語が書かれているものはどれか。"


def index_of(*texts: str, rule: GramRule = GramRule()) -> GramIndex:  # noqa: B008 - frozen
    builder = IndexBuilder()
    for number, text in enumerate(texts):
        builder.add("set", f"set|file|{number}", [text], rule)
    return builder.build()


def found_items(index: GramIndex, text: str) -> set[int]:
    return {int(owner) for gram in index.find(text).grams.tolist() for owner in index.owners(gram)}


def test_thirteen_words_in_a_row_are_found_with_their_place_twelve_are_not() -> None:
    index = index_of(LONG)
    text = "He said: “A well-regulated Militia, being necessary to the security of a free State”."
    found = index.find(text)
    assert [text[s:e] for s, e in zip(found.starts, found.ends, strict=True)] == [text[10:-2]]
    assert not len(index.find("well regulated militia being necessary to the security of a free state"))


def test_a_short_text_is_found_as_a_whole_only() -> None:
    index = index_of(SHORT)
    assert found_items(index, f"12. {SHORT.title()}? (a)") == {0}
    assert not len(index.find("which of these statements about cells is true"))
    assert not len(index_of("seven words are too few to tell").hashes)


def test_texts_without_spaces_are_found_by_24_characters() -> None:
    index = index_of(JAPANESE)
    assert found_items(index, f"問: {JAPANESE[:30]}") == {0}
    assert not len(index.find(JAPANESE[:24]))  # 23 letters and a comma
    assert not len(index.find("plain English"))


def test_rows_of_numbers_are_no_quotation() -> None:
    numbers = " ".join(map(str, range(20)))
    assert not len(index_of(numbers).hashes)
    assert len(index_of(f"{numbers} apples").hashes) == 1


def test_all_owners_of_a_gram_are_known_once() -> None:
    index = index_of(LONG, "nothing to see here at all today my dear friends", f"{LONG} {LONG}")
    assert found_items(index, LONG) == {0, 2}
    assert all(len(set(index.owners(g).tolist())) == len(index.owners(g)) for g in range(len(index.hashes)))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.integers(0, 40))
def test_a_copied_run_is_found_exactly_where_it_reaches_n_words(length: int, before: int) -> None:
    item = [f"w{i}" for i in range(60)]
    text = " ".join([f"x{i}" for i in range(before)] + item[:length] + ["y"])
    assert len(index_of(" ".join(item)).find(text)) == max(length - 12, 0)


def test_a_long_document_gives_what_its_text_gives_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    index = index_of(LONG, SHORT, JAPANESE)
    text = f"some words before. {LONG}. {SHORT} {JAPANESE} and some after " * 3
    whole = index.find(text)
    monkeypatch.setattr(ngrams, "CHUNK_CHARACTERS", 64)
    pieces = index.find(text)
    for name in ("starts", "ends", "grams"):
        assert sorted(getattr(whole, name).tolist()) == sorted(getattr(pieces, name).tolist())
    assert len(whole) == 3 * (3 + 1 + 11)


def test_a_sample_of_the_grams_still_finds_whole_copies() -> None:
    texts = [" ".join(f"t{n}w{i}" for i in range(400)) for n in range(5)]
    rule = GramRule((13, 50), (24, 92), every=8)
    index = index_of(*texts, rule=rule)
    assert 5 * 20 < len(index.hashes) < 5 * 80
    assert all(found_items(index, f"intro {text} outro") == {n} for n, text in enumerate(texts))


def test_an_index_comes_back_from_disk_and_a_damaged_one_is_refused(tmp_path: Path) -> None:
    index = index_of(LONG, SHORT)
    index.save(tmp_path / "index")
    index.save(tmp_path / "index")  # by another task
    again = GramIndex.load(tmp_path / "index")
    assert found_items(again, f"{SHORT}. {LONG}") == {0, 1} and again.item_keys == index.item_keys
    assert np.array_equal(again.hashes, index.hashes) and [f.name for f in tmp_path.iterdir()] == ["index"]
    np.save(tmp_path / "index" / "owners.npy", again.owners(0))
    with pytest.raises(DataError, match="do not fit together"):
        GramIndex.load(tmp_path / "index")
    (tmp_path / "index" / "owners.npy").write_bytes(b"no array")
    with pytest.raises(DataError, match="not an n-gram index"):
        GramIndex.load(tmp_path / "index")

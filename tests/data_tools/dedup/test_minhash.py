import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.dedup import minhash as module
from data_tools.dedup.minhash import (
    Banding,
    at_most,
    band_keys,
    band_keys_of_pieces,
    choose_banding,
    similarity,
    sketch,
)
from data_tools.dedup.shingles import Shingles

SETS = st.lists(st.integers(1, 40), max_size=30)


def hashes(values: list[int]) -> np.ndarray:
    from data_tools.dedup.shingles import mix

    return mix(np.array(values, np.uint64))


def pairs(shared: int, total: int, count: int) -> tuple[Shingles, Shingles]:
    """``count`` pairs of random sets of ``total``, of which ``shared`` are in both."""
    generator = np.random.default_rng(1)
    left = generator.integers(0, 2**64, (count, total), np.uint64)
    right = generator.integers(0, 2**64, (count, total), np.uint64)
    right[:, :shared] = left[:, :shared]
    starts = np.arange(count + 1) * total
    return Shingles(left.ravel(), starts), Shingles(right.ravel(), starts)


@pytest.mark.parametrize(("threshold", "rows"), [(0.5, 2), (0.7, 4), (0.8, 6), (0.9, 14), (0.99, 16), (0.4, 1)])
def test_rows_are_as_many_as_leave_98_percent_of_the_pairs_at_the_threshold(threshold: float, rows: int) -> None:
    banding = choose_banding(threshold)
    assert (banding.bands, banding.rows) == (16, rows)
    assert banding.recall(threshold) >= 0.98


@pytest.mark.parametrize(("shared", "expected"), [(89, 0.992), (67, 0.226), (18, 0.0001)])
def test_candidates_come_as_often_as_the_formula_says(shared: int, expected: float) -> None:
    left, right = pairs(shared, 100, 3000)
    banding = choose_banding(0.8)
    found = (band_keys(left, banding) == band_keys(right, banding)).any(axis=0).mean()
    assert found == pytest.approx(expected, abs=0.02)
    assert banding.recall(shared / (200 - shared)) == pytest.approx(expected, abs=0.01)


def test_a_document_without_shingles_is_nobodys_candidate() -> None:
    keys = band_keys(Shingles(hashes([1, 2, 3]), np.array([0, 0, 2, 2, 3, 3])), Banding(4, 2))
    assert (keys == 0).any(axis=0).tolist() == [True, False, True, False, True]
    assert not band_keys_of_pieces([], Banding(4, 2)).any()


@given(st.lists(SETS, max_size=12), st.integers(2, 30))
def test_keys_do_not_depend_on_the_documents_around_nor_on_chunks(sets: list[list[int]], chunk: int) -> None:
    starts = np.concatenate([[0], np.cumsum([len(one) for one in sets], dtype=np.int64)]).astype(np.int64)
    banding = Banding(3, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CHUNK", chunk)
        together = band_keys(Shingles(hashes([v for one in sets for v in one]), starts), banding)
    for place, one in enumerate(sets):
        parts = [hashes(one[:3]), hashes(one[3:])]
        alone = band_keys_of_pieces([part for part in parts if len(part)], banding)
        assert np.array_equal(together[:, place], alone)


@given(SETS.filter(bool), SETS.filter(bool))
def test_similarity_is_shared_over_all_distinct_shingles(a: list[int], b: list[int]) -> None:
    left, right = sketch([hashes(a)]), sketch([hashes(b[:2]), hashes(b[2:])])
    assert similarity(left, right) == len(set(a) & set(b)) / len(set(a) | set(b))
    assert similarity(left, right) <= at_most(left, right)


@settings(max_examples=20)
@given(st.integers(1, 999))
def test_beyond_the_sketch_size_the_similarity_is_estimated(shared: int) -> None:
    left, right = pairs(shared, 1000, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SKETCH", 500)
        found = similarity(sketch([left.hashes]), sketch([right.hashes]))
    assert found == pytest.approx(shared / (2000 - shared), abs=0.09)

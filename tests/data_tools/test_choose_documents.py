"""Choosing the documents of a view by score, length and number, and `cpt data view` around it."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpt.data.store_selection import is_ordered, open_split
from cpt.rundir import DataError
from data_tools.choose_documents import Choice, choose, parse_quantile, read_documents

Workshop = Any  # the fixtures of tests/conftest.py
SCORES = np.array([3, 1, 2, np.nan, 1], np.float32)
LENGTHS = np.array([10, 20, 30, 40, 50], np.int64)


@pytest.mark.parametrize(
    ("choice", "chosen"),
    [
        (Choice(keep_best=0.5), [1, 4]),
        (Choice(quantile=(0.5, 1)), [0, 2]),
        (Choice(order="ascending"), [1, 4, 2, 0]),
        (Choice(order="descending"), [0, 2, 1, 4]),
        (Choice(max_score=2), [1, 2, 4]),
        (Choice(keep_tokens=70), [1, 4]),
        (Choice(keep_tokens=69, order="ascending"), [1]),
        (Choice(keep_best=0.01), [1]),
        (Choice(min_length=20, max_length=30), [1, 2]),
        (Choice(min_length=25, keep_best=0.5, order="descending"), [4]),
        (Choice(documents=(4, 0, 3)), [0, 4]),
    ],
)
def test_rules_choose_as_in_the_module_docstring(choice: Choice, chosen: list[int]) -> None:
    assert choose(LENGTHS, SCORES, choice).tolist() == chosen


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 200), st.integers(1, 200))
def test_a_share_that_is_a_whole_number_of_documents_keeps_that_many(kept: int, others: int) -> None:
    number = kept + others
    scores, lengths = np.arange(number, dtype=np.float32), np.ones(number, np.int64)
    assert len(choose(lengths, scores, Choice(keep_best=kept / number))) == kept
    assert len(choose(np.ones(100, np.int64), np.arange(100, dtype=np.float32), Choice(keep_best=0.07))) == 7


def test_without_scores_only_lengths_and_numbers_choose() -> None:
    assert choose(LENGTHS, None, Choice(documents=(4, 3, 0), max_length=45)).tolist() == [0, 3]
    for choice in (Choice(keep_best=0.5), Choice(max_score=1), Choice(order="ascending")):
        with pytest.raises(DataError, match=f"{choice.by_score[0]} needs --scores"):
            choose(LENGTHS, None, choice)
    with pytest.raises(DataError, match="document 5 is listed; the store has 5"):
        choose(LENGTHS, None, Choice(documents=(5,)))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=50), st.lists(st.floats(0, 1), max_size=4))
def test_adjacent_quantiles_share_no_document_and_leave_none_out(values: list[int], cuts: list[float]) -> None:
    scores, lengths = np.array(values, np.float32), np.ones(len(values), np.int64)
    edges = sorted({0.0, 1.0, *cuts})
    buckets = [choose(lengths, scores, Choice(quantile=(low, high))) for low, high in itertools.pairwise(edges)]
    assert sorted(np.concatenate(buckets).tolist()) == list(range(len(values)))
    full = [bucket for bucket in buckets if len(bucket)]
    assert all(scores[a].max() <= scores[b].min() for a, b in itertools.pairwise(full))


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"keep_best": 0}, "keep_best is 0"),
        ({"keep_best": 1.5}, "keep_best is 1.5"),
        ({"keep_tokens": 0}, "keep_tokens is 0"),
        ({"quantile": (0.5, 0.5)}, r"quantile is 0.5:0.5; it must be LO:HI"),
        ({"keep_best": 0.5, "quantile": (0, 1)}, "keep_best and quantile both choose by rank"),
    ],
)
def test_rules_that_make_no_sense_are_refused(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(DataError, match=told):
        Choice(**fields)


def test_a_quantile_and_lists_of_documents_are_read_or_refused(tmp_path: Path) -> None:
    assert parse_quantile("0.1:0.5") == (0.1, 0.5)
    for text in ("0.1", "a:b", "0:1:2"):
        with pytest.raises(DataError, match="it must be LO:HI"):
            parse_quantile(text)
    np.save(tmp_path / "list.npy", np.array([3, 1]))
    (tmp_path / "list.txt").write_text("3\n1\n")
    assert [read_documents(tmp_path / name).tolist() for name in ("list.npy", "list.txt")] == [[3, 1], [3, 1]]
    np.save(tmp_path / "floats.npy", np.array([3.5]))
    (tmp_path / "words.txt").write_text("three")
    for name in ("floats.npy", "words.txt", "gone.txt"):
        with pytest.raises(DataError, match=name):
            read_documents(tmp_path / name)


def score(shop: Workshop, split: str = "train") -> Path:
    """Scores of ``code``: the last document is the best."""
    store = open_split(shop.root / "code" / split)
    file: Path = shop.root / f"{split}_scores.npy"
    np.save(file, -np.arange(store.num_documents, dtype=np.float32))
    facts = {
        "store_content_hash": store.manifest.content_hash,
        "documents": store.num_documents,
        "kind": "n",
        "model": "m",
    }
    file.with_suffix(".json").write_text(json.dumps(facts))
    return file


@pytest.fixture
def shop(workshop: Workshop) -> Workshop:
    workshop.stores()
    return workshop


def test_the_verb_makes_a_bucket_of_the_best_documents_and_keeps_the_heldout_split(shop: Workshop) -> None:
    out = shop.root / "best"
    done = shop.cpt(
        "data", "view", shop.root / "code", "--scores", score(shop), "--keep-best", 0.1, "--out", out, "--json"
    )
    facts = json.loads(done.out)
    assert (done.code, facts["splits"]["train"]["documents"], facts["splits"]["train"]["of_documents"]) == (0, 40, 400)
    assert facts["splits"]["train"]["scores"] == {"lowest": -399.0, "highest": -360.0}
    train, heldout, whole = (
        open_split(path) for path in (out / "train", out / "heldout", shop.root / "code" / "heldout")
    )
    assert train.document_lengths().sum() == train.num_tokens == 40 * 41 and not is_ordered(train)
    assert heldout.read(0, 50).tolist() == whole.read(0, 50).tolist()
    assert (heldout.num_tokens, heldout.manifest.utf8_bytes) == (whole.num_tokens, whole.manifest.utf8_bytes)
    table = shop.cpt("data", "view", shop.root / "code", "--scores", score(shop), "--keep-best", 0.1, "--out", out)
    assert table.code == 0 and "view of" in table.out and "10.0%" in table.out


def test_held_out_documents_are_chosen_where_they_have_scores(shop: Workshop) -> None:
    scores = ("--scores", score(shop), "--heldout-scores", score(shop, "heldout"))
    done = shop.cpt(
        "data",
        "view",
        shop.root / "code",
        *scores,
        "--quantile",
        "0:0.5",
        "--order",
        "ascending",
        "--out",
        shop.root / "v",
    )
    assert done.code == 0, done.text
    train, heldout = (open_split(shop.root / "v" / split) for split in ("train", "heldout"))
    assert (train.num_documents, heldout.num_documents) == (200, 15)
    assert is_ordered(train) and not is_ordered(heldout)


def test_scores_of_another_store_or_split_and_of_another_number_are_refused(shop: Workshop) -> None:
    view = ("data", "view", shop.root / "code", "--keep-best", 0.5, "--out", shop.root / "v", "--scores")
    done = shop.cpt(*view, score(shop, "heldout"))
    assert done.code == 2 and "of another store or split" in done.text
    file = score(shop)
    np.save(file, np.zeros(3, np.float32))
    assert "400 documents, one floating-point score each" in shop.cpt(*view, file).text.replace("\n", " ")
    file.write_bytes(b"junk")
    assert "cannot be read" in shop.cpt(*view, file).text
    assert shop.cpt(*view, shop.root / "gone.npy").code == 2
    assert not (shop.root / "v").exists()


def test_a_view_of_nothing_and_one_inside_its_store_are_refused(shop: Workshop) -> None:
    code = shop.root / "code"
    done = shop.cpt("data", "view", code, "--min-length", 1000, "--out", shop.root / "v")
    assert done.code == 2 and "no document of 400 is left" in done.text and "min_length" in done.text
    assert "lies inside the store" in shop.cpt("data", "view", code, "--out", code / "view").text


@pytest.mark.parametrize("tokens", ["inf", "nan", "-inf"])
def test_a_number_of_tokens_is_finite(shop: Workshop, tokens: str) -> None:
    view = ("data", "view", shop.root / "code", "--scores", score(shop), "--out", shop.root / "v")
    done = shop.cpt(*view, f"--keep-tokens={tokens}")
    assert done.code == 2 and f"keep_tokens is {tokens}" in done.text


def test_a_view_is_verified_like_a_store(shop: Workshop) -> None:
    view = shop.root / "v"
    assert shop.cpt("data", "view", shop.root / "code", "--min-length", 1, "--out", view).code == 0
    done = shop.cpt("data", "verify", view)
    assert done.code == 0 and "train: 400 documents" in done.out and "heldout: 30 documents" in done.out
    assert shop.cpt("data", "verify", view / "train").code == 0
    file = view / "heldout" / "documents.bin"
    file.write_bytes(file.read_bytes()[:-8] + bytes(8))
    refused = shop.cpt("data", "verify", view)
    assert refused.code == 2 and "documents.bin: sha256 is" in refused.text

"""What `cpt data inspect` says about a token store."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from cpt.data.store_selection import ViewRequest, open_split, write_view
from cpt.data.token_store import StoreLabel, TokenizerFacts, TokenStore, write_split
from cpt.rundir import DataError
from data_tools.look import store_facts
from data_tools.look.inspection import inspect_sources
from data_tools.look.store_facts import Look
from data_tools.look.terminal import render_inspection
from data_tools.store_builder import StoreRequest, build_store
from data_tools.train_tokenizer import train_bpe

TEXTS = ["one cat", "two cats and a dog", "three", "one cat"]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    train_bpe(TEXTS, out=tmp_path / "bpe", vocab_size=270)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    request = StoreRequest((str(tmp_path / "a.jsonl"),), tmp_path / "bpe", tmp_path / "store", "pets", "animals", 0.0)
    build_store(request)
    return request.out


def inspect(*paths: Path, **given: Any) -> list[dict[str, Any]]:
    sources: list[dict[str, Any]] = json.loads(json.dumps(inspect_sources(paths, Look(**given))))["sources"]
    return sources


def printed(*paths: Path, **given: Any) -> str:
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(render_inspection(inspect_sources(paths, Look(**given))))
    return console.export_text()


def test_the_facts_are_counted_and_fit_into_json(store: Path) -> None:
    heldout, train = inspect(store, tokenizer=store.parent / "bpe", num_documents=2)
    assert (heldout["split"], heldout["documents"], heldout["bytes_per_token"]) == ("heldout", 0, None)
    assert (train["documents"], train["utf8_bytes"], train["num_shards"]) == (4, 37, 1)
    lengths = train["document_tokens"]
    assert lengths["p0"] <= lengths["p50"] <= lengths["p100"] < 20
    first, second = train["first_documents"]
    assert first["text"] == "one cat<|endoftext|>" and second["text"] == "two cats and a dog<|endoftext|>"
    assert second["start"] == first["tokens"] == len(first["ids"])


def test_the_sample_tells_duplicates_words_and_repeated_lines(store: Path) -> None:
    train = inspect(store / "train", tokenizer=store.parent / "bpe")[0]
    assert train["sample"] == {"documents": 4, "of": 4, "how": "evenly spaced", "shortened": 0}
    assert train["duplicates"] == {"documents": 1, "share": 0.25}
    assert train["tokens_per_word"] == round((train["tokens"] - 4) / 10, 4)
    assert inspect(store / "train")[0]["duplicates"] == train["duplicates"]  # by ids where there is no text
    assert sum(entry["documents"] for entry in train["languages"]) == 4


def test_token_counts_are_those_of_the_store(store: Path) -> None:
    seen = inspect(store / "train", tokenizer=store.parent / "bpe")[0]["tokens_seen"]
    tokens = TokenStore.open(store / "train")
    ids, counts = np.unique(tokens.read(0, tokens.num_tokens), return_counts=True)
    assert seen["counted"] == seen["of"] == tokens.num_tokens and seen["used"] == len(ids)
    assert seen["top"][0]["count"] == counts.max() == seen["ranks"][0][1]
    assert not {entry["id"] for entry in seen["never_seen"]} & set(ids.tolist())


def test_rows_show_where_documents_open_and_end(store: Path) -> None:
    (row,) = inspect(store / "train", tokenizer=store.parent / "bpe", seq_len=8)[0]["rows"]
    assert sum(piece["tokens"] for piece in row["pieces"]) == 8
    assert [piece["opens"] for piece in row["pieces"]] == [True] * len(row["pieces"])
    assert row["pieces"][0]["text"] == "one cat" and row["pieces"][0]["ends"]
    assert "▏one cat⏹EOS▏two" in printed(store / "train", tokenizer=store.parent / "bpe", seq_len=8)


def label(vocab_size: int = 10) -> StoreLabel:
    return StoreLabel("s", "d", "train", vocab_size, 0, TokenizerFacts("t", "f" * 64, "BPE"))


def test_large_stores_are_sampled_and_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [[number % 9 + 1] * (number % 5) + [0] for number in range(6000)]
    write_split(tmp_path / "train", label(), [documents[:3500], documents[3500:]])
    whole = inspect(tmp_path)[0]
    monkeypatch.setattr(store_facts, "MOST_LENGTHS", 3000)
    monkeypatch.setattr(store_facts, "MOST_COUNTED", 4000)
    monkeypatch.setattr(store_facts, "_BLOCK", 1000)
    sampled = inspect(tmp_path, sample=50)[0]
    assert sampled["lengths"]["documents"] == 3000 and sampled["lengths"]["of"] == 6000
    assert sampled["document_tokens"] == whole["document_tokens"]
    assert sampled["tokens_seen"]["counted"] == 4000 < sampled["tokens_seen"]["of"]
    assert (sampled["sample"]["documents"], sampled["sample"]["of"]) == (50, 6000)
    assert "4,000 tokens" in printed(tmp_path, sample=50)


def test_a_store_of_nothing_and_one_without_whole_rows_are_shown_too(tmp_path: Path) -> None:
    write_split(tmp_path / "empty" / "train", label(), [])
    write_split(tmp_path / "tiny" / "train", label(), [[[1, 2, 0]]])
    empty, tiny = inspect(tmp_path / "empty", tmp_path / "tiny")
    assert empty["rows"] == tiny["rows"] == [] and empty["lengths"]["bins"] == []
    assert tiny["lengths"]["bins"] == [{"from": 2, "below": 4, "documents": 1}]
    assert "needs --tokenizer" in printed(tmp_path / "empty", tmp_path / "tiny")


def test_the_table_shows_counts_and_one_panel_per_document(store: Path) -> None:
    text = printed(store) + printed(store / "train", tokenizer=store.parent / "bpe")
    assert "pets / animals" in text and "train document 2 · from token" in text
    assert "two cats and a dog<|endoftext|>" in text


def test_a_view_is_shown_as_a_store_is_and_names_it(store: Path, tmp_path: Path) -> None:
    whole = open_split(store / "train")
    write_view(tmp_path / "view", {"train": ViewRequest(whole, np.array([2, 0]), {"first": 2}, "ascending")})
    (view,) = inspect(tmp_path / "view", tokenizer=tmp_path / "bpe")
    assert (view["documents"], view["view"]["of_documents"], view["view"]["order"]) == (2, 4, "ascending")
    assert [entry["text"] for entry in view["first_documents"]] == ["three<|endoftext|>", "one cat<|endoftext|>"]
    (again,) = inspect(tmp_path / "view" / "train")
    assert again["tokens"] == sum(entry["tokens"] for entry in view["first_documents"])
    text = printed(tmp_path / "view")
    assert "view of" in text and "(4 documents), order" in text and "shard" not in text


def test_the_sample_counts_neither_bos_nor_eos(tmp_path: Path) -> None:
    train_bpe(TEXTS, out=tmp_path / "bpe", vocab_size=270)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    inputs = (str(tmp_path / "a.jsonl"),)
    build_store(StoreRequest(inputs, tmp_path / "bpe", tmp_path / "store", "p", "a", 0.0, bos_token="o"))
    (train,) = inspect(tmp_path / "store" / "train", tokenizer=tmp_path / "bpe")
    assert train["tokens_per_word"] == round((train["tokens"] - 2 * 4) / 10, 4)


def test_another_tokenizer_is_refused(store: Path, tmp_path: Path) -> None:
    other = train_bpe(TEXTS, out=tmp_path / "other", vocab_size=258)
    with pytest.raises(DataError, match=r"other: fingerprint \w{16}, but .* was made with bpe"):
        inspect(store, tokenizer=other)


def test_a_folder_without_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no manifest.json there"):
        inspect(tmp_path)
    with pytest.raises(DataError, match="--seq-len is 1"):
        inspect(tmp_path, seq_len=1)

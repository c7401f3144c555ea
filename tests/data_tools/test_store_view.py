"""What `cpt data inspect` says about a store."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from cpt.rundir import DataError
from data_tools.store_builder import StoreRequest, build_store
from data_tools.store_view import inspect_store, render_inspection
from data_tools.train_tokenizer import train_bpe

TEXTS = ["one cat", "two cats and a dog", "three"]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    train_bpe(TEXTS, out=tmp_path / "bpe", vocab_size=270)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    request = StoreRequest((str(tmp_path / "a.jsonl"),), tmp_path / "bpe", tmp_path / "store", "pets", "animals", 0.0)
    build_store(request)
    return request.out


def test_the_facts_are_counted_and_fit_into_json(store: Path) -> None:
    inspection = json.loads(json.dumps(inspect_store(store, tokenizer=store.parent / "bpe", num_documents=2)))
    heldout, train = inspection["splits"]
    assert (heldout["split"], heldout["documents"], heldout["bytes_per_token"]) == ("heldout", 0, None)
    assert (train["documents"], train["utf8_bytes"], train["num_shards"]) == (3, 30, 1)
    lengths = train["document_tokens"]
    assert lengths["p0"] <= lengths["p50"] <= lengths["p100"] < 20
    first, second = train["first_documents"]
    assert first["text"] == "one cat<|endoftext|>" and second["text"] == "two cats and a dog<|endoftext|>"
    assert second["start"] == first["tokens"] == len(first["ids"])


def test_the_table_shows_counts_and_one_panel_per_document(store: Path) -> None:
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(render_inspection(inspect_store(store)))
    console.print(render_inspection(inspect_store(store / "train", tokenizer=store.parent / "bpe")))
    text = console.export_text()
    assert "pets / animals" in text and "train document 2 · from token" in text
    assert "two cats and a dog<|endoftext|>" in text


def test_another_tokenizer_is_refused(store: Path, tmp_path: Path) -> None:
    other = train_bpe(TEXTS, out=tmp_path / "other", vocab_size=258)
    with pytest.raises(DataError, match=r"other: fingerprint \w{16}, but .* was made with bpe"):
        inspect_store(store, tokenizer=other)


def test_a_folder_without_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no manifest.json there"):
        inspect_store(tmp_path)

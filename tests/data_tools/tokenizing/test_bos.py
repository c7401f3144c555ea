"""BOS before and EOS behind every document, exactly once, also where a document comes in pieces."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpt.data.token_store import TokenStore
from cpt.rundir import DataError
from data_tools.encoders import load_encoder
from data_tools.store_builder import StoreRequest, build_store
from data_tools.tokenizing import jobs
from data_tools.tokenizing.documents import surround

ids = st.lists(st.lists(st.integers(2, 9), max_size=4), max_size=5)
special = st.one_of(st.none(), st.integers(0, 1))


@given(documents=ids, bos=special, eos=special)
def test_surround_equals_the_plain_loop(documents: list[list[int]], bos: int | None, eos: int | None) -> None:
    flat = np.array([token for document in documents for token in document], np.uint16)
    lengths = np.array([len(document) for document in documents], np.int64)
    tokens, longer = surround(flat, lengths, bos, eos)
    left, right = [[token] if token is not None else [] for token in (bos, eos)]
    expected = [[*left, *document, *right] for document in documents]
    assert tokens.tolist() == [token for document in expected for token in document]
    assert longer.tolist() == [len(document) for document in expected]


def with_bos(bpe: Path, folder: Path) -> Path:
    """The same tokenizer with a token <s> that it puts before every text."""
    folder.mkdir()
    content = json.loads((bpe / "tokenizer.json").read_text())
    bos_id = 1 + max(content["model"]["vocab"].values())
    content["added_tokens"].append(
        {"id": bos_id, "content": "<s>", "special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    )  # fmt: skip
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [bos_id], "tokens": ["<s>"]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_bytes((bpe / "tokenizer_config.json").read_bytes())
    return folder


def test_auto_is_what_the_tokenizer_itself_puts_before_a_text(bpe: Path, tmp_path: Path) -> None:
    folder = with_bos(bpe, tmp_path / "bos")
    assert load_encoder(bpe).bos_id is None
    encoder = load_encoder(folder)
    assert encoder.bos_id == encoder.vocab_size - 1
    assert load_encoder(folder, bos_token="none").bos_id is None
    assert load_encoder(bpe, bos_token="<|endoftext|>").bos_id == 0
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"add_bos_token": False, "bos_token": "<s>"}))
    assert load_encoder(folder).bos_id is None


def test_an_unknown_bos_is_refused_with_a_list(bpe: Path) -> None:
    with pytest.raises(
        DataError, match=r"has no token '<s>' to start documents with; fix: --bos-token auto, none or one"
    ):
        load_encoder(bpe, bos_token="<s>")


@pytest.mark.parametrize("workers", [1, 2])
def test_every_document_starts_with_bos_and_bytes_do_not_count_it(
    tales: StoreRequest, bpe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    plain = build_store(tales)
    monkeypatch.setattr(jobs, "LONG_TEXT", 100)
    monkeypatch.setattr(jobs, "PIECE", 30)
    request = replace(tales, tokenizer=with_bos(bpe, tmp_path / "bos"), out=tmp_path / "marked", workers=workers)
    marked = build_store(request)
    for split in ("train", "heldout"):
        store, without = TokenStore.open(request.out / split), TokenStore.open(tales.out / split)
        bos_id = store.manifest.bos_id
        assert bos_id is not None and without.manifest.bos_id is None
        pairs = zip(store.documents(), without.documents(), strict=True)
        assert all(found.tolist() == [bos_id, *expected.tolist()] for found, expected in pairs)
        assert marked.splits[split].utf8_bytes == plain.splits[split].utf8_bytes
        store.verify()
    with pytest.raises(DataError, match="bos_id: 300 there, null now"):
        build_store(replace(request, bos_token="none"))


def test_long_documents_in_pieces_leave_the_content_hash_alone(
    tales: StoreRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = build_store(tales)
    monkeypatch.setattr(jobs, "LONG_TEXT", 60)
    monkeypatch.setattr(jobs, "PIECE", 20)
    in_pieces = build_store(replace(tales, out=tales.out.with_name("pieces"), workers=2))
    assert in_pieces.splits == whole.splits

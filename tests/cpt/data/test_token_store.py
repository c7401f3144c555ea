"""The store format against plain lists: what is written is what is read, and damage is named."""

import json
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cpt.data.token_store import SplitState, SplitWriter, StoreLabel, TokenizerFacts, TokenStore, write_split
from cpt.rundir import DataError

LABEL = StoreLabel("tales", "general", "train", 100, 0, TokenizerFacts("toy", "f" * 64, "Toy"))
SHARDS = [[[5, 7, 0], [9, 0]], [], [[4, 0]]]

documents = st.lists(st.integers(1, 99), max_size=5).map(lambda ids: [*ids, 0])
shards = st.lists(st.lists(documents, max_size=4), max_size=5)


def flat(shards: list[list[list[int]]]) -> list[int]:
    return [token for shard in shards for document in shard for token in document]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shards=shards, cuts=st.tuples(st.integers(0, 120), st.integers(0, 120)))
def test_any_range_reads_like_the_plain_list(
    tmp_path_factory: pytest.TempPathFactory, shards: list[list[list[int]]], cuts: tuple[int, int]
) -> None:
    folder = tmp_path_factory.mktemp("store")
    write_split(folder, LABEL, shards)
    store, tokens = TokenStore.open(folder), flat(shards)
    start, stop = sorted(min(cut, len(tokens)) for cut in cuts)
    lengths = [len(document) for shard in shards for document in shard]
    starts = list(accumulate(lengths, initial=0))[:-1]

    assert store.num_tokens == len(tokens) and store.num_documents == len(lengths)
    assert store.read(start, stop).tolist() == tokens[start:stop]
    assert store.document_starts(start, stop).tolist() == [p for p in starts if start <= p < stop]
    assert [d.tolist() for d in store.documents()] == [d for shard in shards for d in shard]
    assert store.document_lengths().tolist() == lengths
    first, last = sorted(cut % (len(lengths) + 1) for cut in cuts)
    assert first == last or store.document_bounds(first, last).tolist() == [*starts, len(tokens)][first : last + 1]
    store.verify()


def test_the_example_of_the_module_docstring_holds(tmp_path: Path) -> None:
    write_split(tmp_path, LABEL, SHARDS)
    store = TokenStore.open(tmp_path)
    assert store.read(3, 7).tolist() == [9, 0, 4, 0]
    assert store.document_starts(1, 7).tolist() == [3, 5]
    assert store.document_starts(1, 7).dtype == np.int64


def test_the_content_hash_ignores_shard_borders_but_not_document_borders(tmp_path: Path) -> None:
    def content_hash(name: str, shards: list[list[list[int]]]) -> str:
        return write_split(tmp_path / name, LABEL, shards).content_hash

    assert content_hash("a", [[[5, 0], [6, 0]]]) == content_hash("b", [[[5, 0]], [], [[6, 0]]])
    assert content_hash("c", [[[5, 0, 6, 0]]]) != content_hash("a", [[[5, 0], [6, 0]]])
    assert content_hash("d", [[[6, 0], [5, 0]]]) != content_hash("a", [[[5, 0], [6, 0]]])


def test_a_writer_continued_from_its_state_gives_the_same_manifest(tmp_path: Path) -> None:
    whole = write_split(tmp_path / "whole", LABEL, SHARDS)
    first = SplitWriter(tmp_path / "cut", LABEL)
    first.append(np.array([5, 7, 0, 9, 0]), np.array([3, 2]), utf8_bytes=0)
    first.finish_shard()
    state = json.loads(json.dumps(first.state.to_dict()))
    second = SplitWriter(tmp_path / "cut", LABEL, SplitState.from_dict(state))
    second.finish_shard()
    second.append(np.array([4, 0]), np.array([2]), utf8_bytes=0)
    second.finish_shard()
    assert second.write_manifest() == whole


def test_a_document_written_in_pieces_is_the_same_document(tmp_path: Path) -> None:
    whole = write_split(tmp_path / "whole", LABEL, [[[5, 7, 0], [1, 2, 3, 4, 0], [9, 0]]])
    writer = SplitWriter(tmp_path / "pieces", LABEL)
    writer.append(np.array([5, 7, 0]), np.array([3]), utf8_bytes=0)
    for piece, ends in (([1, 2], False), ([], False), ([3, 4, 0], True)):
        writer.append_piece(np.array(piece, np.int64), utf8_bytes=0, ends_document=ends)
    writer.append(np.array([9, 0]), np.array([2]), utf8_bytes=0)
    writer.finish_shard()
    assert writer.write_manifest() == whole
    TokenStore.open(tmp_path / "pieces").verify()


def test_the_manifest_names_the_bos_token(tmp_path: Path) -> None:
    assert write_split(tmp_path / "without", LABEL, SHARDS).bos_id is None
    write_split(tmp_path / "with", replace(LABEL, bos_id=1), SHARDS)
    assert TokenStore.open(tmp_path / "with").manifest.bos_id == 1


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_536, np.uint16), (65_537, np.uint32)])
def test_the_largest_id_decides_the_dtype(tmp_path: Path, vocab_size: int, dtype: type) -> None:
    label = StoreLabel("s", "general", "train", vocab_size, 0, LABEL.tokenizer)
    write_split(tmp_path, label, [[[vocab_size - 1, 0]]])
    store = TokenStore.open(tmp_path)
    assert store.dtype == dtype and store.read(0, 2).dtype == dtype
    assert store.read(0, 2).tolist() == [vocab_size - 1, 0]


def test_an_empty_split_opens_and_reads_nothing(tmp_path: Path) -> None:
    write_split(tmp_path, LABEL, [[]])
    store = TokenStore.open(tmp_path)
    assert store.num_tokens == 0 and len(store.read(0, 0)) == 0 and not list(store.documents())
    assert len(store.document_starts(0, 0)) == 0
    store.verify()


def test_a_read_past_the_end_is_an_index_error(tmp_path: Path) -> None:
    write_split(tmp_path, LABEL, SHARDS)
    with pytest.raises(IndexError, match="which has 7"):
        TokenStore.open(tmp_path).read(0, 8)


@pytest.mark.parametrize("name", ["tokens_00000.bin", "documents_00002.bin"])
def test_a_file_cut_short_is_refused_with_its_name(tmp_path: Path, name: str) -> None:
    write_split(tmp_path, LABEL, SHARDS)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[:-1])
    with pytest.raises(DataError, match=rf"{name}: has {len(content) - 1} bytes, the manifest says {len(content)}"):
        TokenStore.open(tmp_path)


def test_a_file_with_extra_bytes_is_refused_with_its_name(tmp_path: Path) -> None:
    write_split(tmp_path, LABEL, SHARDS)
    with (tmp_path / "tokens_00002.bin").open("ab") as file:
        file.write(b"xx")
    with pytest.raises(DataError, match=r"tokens_00002.bin: has 6 bytes, the manifest says 4"):
        TokenStore.open(tmp_path)


def test_a_missing_shard_is_refused_with_its_name(tmp_path: Path) -> None:
    write_split(tmp_path, LABEL, SHARDS)
    (tmp_path / "tokens_00000.bin").unlink()
    with pytest.raises(DataError, match=r"tokens_00000.bin: is missing"):
        TokenStore.open(tmp_path)


def test_a_flipped_bit_is_found_by_verify(tmp_path: Path) -> None:
    write_split(tmp_path, LABEL, SHARDS)
    file = tmp_path / "tokens_00000.bin"
    file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:])
    with pytest.raises(DataError, match=r"tokens_00000.bin: sha256 is"):
        TokenStore.open(tmp_path).verify()


def test_an_edited_content_hash_is_found_by_verify(tmp_path: Path) -> None:
    write_split(tmp_path, LABEL, SHARDS)
    edit_manifest(tmp_path, content_hash="0" * 64)
    with pytest.raises(DataError, match="content_hash is 000"):
        TokenStore.open(tmp_path).verify()


def edit_manifest(folder: Path, **changes: object) -> None:
    file = folder / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_another_format_version_is_refused(tmp_path: Path) -> None:
    write_split(tmp_path, LABEL, SHARDS)
    edit_manifest(tmp_path, format_version=1)
    with pytest.raises(DataError, match="format_version is 1, this program reads 2"):
        TokenStore.open(tmp_path)


def test_an_unknown_manifest_key_is_refused(tmp_path: Path) -> None:
    write_split(tmp_path, LABEL, SHARDS)
    edit_manifest(tmp_path, colour="red")
    with pytest.raises(DataError, match=r"unknown keys \['colour'\]"):
        TokenStore.open(tmp_path)


def test_a_manifest_that_is_no_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(DataError, match="not a token store manifest"):
        TokenStore.open(tmp_path)


def test_opening_the_store_instead_of_a_split_names_the_splits(tmp_path: Path) -> None:
    write_split(tmp_path / "train", LABEL, SHARDS)
    with pytest.raises(DataError, match=r"the splits \['train'\]"):
        TokenStore.open(tmp_path)


def test_an_unfinished_store_says_how_to_finish_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="same `cpt data tokenize` command"):
        TokenStore.open(tmp_path)

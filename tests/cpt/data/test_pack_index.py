"""The index of a best-fit packing: built once, whole or not at all, and never trusted further than the store."""

import contextlib
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cpt.data import pack_index
from cpt.data.pack_index import ensure_index, index_folder, open_rows
from cpt.data.token_store import StoreLabel, TokenizerFacts, TokenStore, write_split
from cpt.rundir import DataError

LABEL = StoreLabel("s", "general", "train", 100, 0, TokenizerFacts("t", "f", "c"))


def make_store(folder: Path, *, documents: int = 50) -> TokenStore:
    texts = [[1 + (i * j) % 99 for j in range(i * 7 % 23)] + [0] for i in range(documents)]
    write_split(folder, LABEL, [texts[:20], [], texts[20:]])
    return TokenStore.open(folder)


@pytest.fixture
def store(tmp_path: Path) -> TokenStore:
    return make_store(tmp_path / "store" / "train")


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_rows_hold_every_document_once_in_pieces_that_the_index_names(store: TokenStore) -> None:
    rows = open_rows(store, "best_fit", 16)
    index = ensure_index(store, 16)
    assert rows.num_rows == index.manifest.rows and rows.num_tokens == store.num_tokens
    tokens = sorted(
        token for row in range(rows.num_rows) for start, n in index.pieces(row) for token in range(start, start + n)
    )
    assert tokens == list(range(store.num_tokens))
    start, length = index.pieces(3)[0].tolist()
    assert rows.row(3).input_ids[:length].tolist() == store.read(start, start + length).tolist()


def test_an_index_is_built_once_and_the_same_in_any_folder(store: TokenStore, tmp_path: Path) -> None:
    first = ensure_index(store, 16)
    assert first.path == store.path / "packs" / "best_fit_16"
    when = (first.path / "index.json").stat().st_mtime_ns
    assert ensure_index(store, 16).path == first.path and (first.path / "index.json").stat().st_mtime_ns == when
    elsewhere = ensure_index(store, 16, tmp_path / "packs")
    assert elsewhere.path.parent.parent == tmp_path / "packs"
    assert contents(elsewhere.path) == contents(first.path)
    assert ensure_index(store, 8).manifest.seq_len == 8
    store.verify()  # the store itself is untouched


@pytest.mark.parametrize("damage", ["cut", "longer", "gone", "json", "keys", "other store", "not an object"])
def test_a_damaged_index_is_built_again(store: TokenStore, damage: str) -> None:
    folder = ensure_index(store, 16).path
    whole = contents(folder)
    pieces, about = folder / "pieces.bin", folder / "index.json"
    raw = json.loads(about.read_text())
    if damage == "cut":
        pieces.write_bytes(whole["pieces.bin"][:-16])
    elif damage == "longer":
        pieces.write_bytes(whole["pieces.bin"] + b"x" * 16)
    elif damage == "gone":
        (folder / "rows.bin").unlink()
    else:
        edits = {"json": "{", "keys": "{}", "not an object": "[1]"}
        about.write_text(edits.get(damage) or json.dumps(raw | {"store_content_hash": "other"}))
    ensure_index(store, 16)
    assert contents(folder) == whole


def test_flipped_bits_are_found_when_asked_for_and_a_row_of_nonsense_is_refused(store: TokenStore) -> None:
    folder = ensure_index(store, 16).path
    whole = contents(folder)
    broken = np.frombuffer(whole["pieces.bin"], "<i8").copy()
    broken[1] = 10**9
    (folder / "pieces.bin").write_bytes(broken.tobytes())
    with pytest.raises(DataError, match=r"pieces of \[1000000000"):
        open_rows(store, "best_fit", 16).row(0)
    ensure_index(store, 16, verify=True)
    assert contents(folder) == whole


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(["index.json", "pieces.bin", "rows.bin"]), data=st.data())
def test_an_index_with_damaged_bytes_is_rebuilt_refused_or_harmless(
    store: TokenStore, name: str, data: st.DataObject
) -> None:
    file = ensure_index(store, 16).path / name
    whole = file.read_bytes()
    broken = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        broken[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(broken)
    rows = open_rows(store, "best_fit", 16)
    for row in range(rows.num_rows):
        with contextlib.suppress(DataError):
            assert rows.row(row).input_ids.shape == (16,)
    ensure_index(store, 16, verify=True)
    assert file.read_bytes() == whole or name == "index.json"


def test_an_index_of_a_store_that_was_made_again_is_replaced(tmp_path: Path) -> None:
    first = ensure_index(make_store(tmp_path / "train"), 16)
    second = ensure_index(make_store(tmp_path / "train", documents=60), 16)
    assert second.path == first.path and second.manifest != first.manifest


def test_a_place_that_cannot_be_written_is_named_with_the_field_to_set(store: TokenStore, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"file/.*cannot be written.*data\.pack_dir"):
        open_rows(store, "best_fit", 16, tmp_path / "file")


def test_an_empty_store_has_nothing_to_pack(tmp_path: Path) -> None:
    write_split(tmp_path / "train", LABEL, [[]])
    with pytest.raises(DataError, match="holds no document"):
        ensure_index(TokenStore.open(tmp_path / "train"), 16)


def build_slowly(folder: Path, started: "multiprocessing.synchronize.Event") -> None:
    def progress(done: int, total: int) -> None:
        started.set()
        time.sleep(0.05)

    pack_index.DOCUMENTS_AT_ONCE = 10
    ensure_index(TokenStore.open(folder), 16, progress=progress)


def test_two_builders_at_once_and_a_killed_one_leave_one_whole_index(store: TokenStore, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    started = context.Event()
    killed = context.Process(target=build_slowly, args=(store.path, started))
    killed.start()
    assert started.wait(20) and killed.pid
    os.kill(killed.pid, signal.SIGKILL)
    killed.join()
    folder = index_folder(store, 16)
    assert not folder.exists() and list(folder.parent.glob(".*.part"))
    both = [context.Process(target=build_slowly, args=(store.path, context.Event())) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(20)
    assert [process.exitcode for process in both] == [0, 0]
    assert sorted(file.name for file in folder.iterdir()) == ["index.json", "pieces.bin", "rows.bin"]
    assert not list(folder.parent.glob(".*.part"))
    ensure_index(store, 16, verify=True)


def test_chunks_are_bounded_in_documents_and_in_pieces(store: TokenStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack_index, "DOCUMENTS_AT_ONCE", 7)
    monkeypatch.setattr(pack_index, "PIECES_AT_ONCE", 9)
    chunks = list(pack_index.document_chunks(store, 4))
    assert np.concatenate([lengths for _, lengths in chunks]).tolist() == store.document_lengths().tolist()
    assert (
        np.concatenate([starts for starts, _ in chunks]).tolist() == store.document_starts(0, store.num_tokens).tolist()
    )
    assert all(len(n) == 1 or (len(n) <= 7 and int((n // 4 + 1).sum()) <= 9) for _, n in chunks)

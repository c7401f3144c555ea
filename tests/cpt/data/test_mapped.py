"""A file that is cut short under a running job is an error that names it: not a bus error, not wrong numbers."""

import os
import threading
from pathlib import Path

import numpy as np
import pytest

from cpt.data import mapped
from cpt.data.mapped import NumberFiles
from cpt.data.pack_index import PIECES_NAME, ensure_index, open_rows
from cpt.data.store_selection import ViewRequest, open_split, write_view
from cpt.data.token_store import StoreLabel, TokenizerFacts, TokenStore, documents_name, tokens_name, write_split
from cpt.rundir import DataError

PAGE = 4096
SIXTEEN = np.dtype("<u2")


def store_of(folder: Path) -> TokenStore:
    """40,000 documents of 3 tokens: 60 pages of tokens, 79 of documents."""
    label = StoreLabel("web", "general", "train", 1000, 0, TokenizerFacts("tiny", "f" * 8, "tiny"))
    write_split(folder, label, [[[i % 900 + 1, 7, 0] for i in range(40_000)]])
    return TokenStore.open(folder)


def test_a_range_is_read_and_a_range_behind_the_end_is_an_error(tmp_path: Path) -> None:
    np.arange(100, dtype=SIXTEEN).tofile(tmp_path / "a")
    files = NumberFiles(tmp_path)
    assert files.read("a", SIXTEEN, 10, 13).tolist() == [10, 11, 12]
    assert files.read("a", SIXTEEN, 100, 100).size == 0
    with pytest.raises(DataError, match="a: was cut short while it is in use, 200 bytes where 202 are needed"):
        files.read("a", SIXTEEN, 90, 101)


def test_more_files_than_may_be_open_are_read_in_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped, "OPEN_FILES", 3)
    for number in range(12):
        np.full(50, number, dtype=SIXTEEN).tofile(tmp_path / str(number))
    files, wrong = NumberFiles(tmp_path), []

    def read(first: int) -> None:
        for turn in range(300):
            number = (first + turn) % 12
            if set(files.read(str(number), SIXTEEN, 5, 9).tolist()) != {number}:
                wrong.append(number)

    before = len(os.listdir("/proc/self/fd"))
    threads = [threading.Thread(target=read, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert not wrong
    assert len(os.listdir("/proc/self/fd")) <= before + 3


@pytest.mark.parametrize("name", [tokens_name(0), documents_name(0)])
def test_a_shard_truncated_after_the_start_is_a_data_error(tmp_path: Path, name: str) -> None:
    rows = open_rows(store_of(tmp_path / "train"), "concat", 64)
    rows.row(0)
    os.truncate(tmp_path / "train" / name, PAGE)
    with pytest.raises(DataError, match=f"{name}: was cut short"):
        rows.row(rows.num_rows - 1)  # read through a memory map, this page would end the process


def test_a_truncated_index_and_a_truncated_view_are_data_errors(tmp_path: Path) -> None:
    store = store_of(tmp_path / "train")
    index = ensure_index(store, 64, tmp_path / "packs")
    last = index.manifest.rows - 1
    index.pieces(last)
    os.truncate(index.path / PIECES_NAME, PAGE)
    with pytest.raises(DataError, match=r"pieces.bin: was cut short"):
        index.pieces(last)
    numbers = np.arange(20_000, dtype=np.int64)[::-1]
    write_view(tmp_path / "view", {"train": ViewRequest(store, numbers, {"all": True})})
    view = open_split(tmp_path / "view" / "train")
    view.read(59_000, 59_010)
    os.truncate(tmp_path / "view" / "train" / "starts.bin", PAGE)
    with pytest.raises(DataError, match=r"starts.bin: was cut short"):
        view.read(59_000, 59_010)

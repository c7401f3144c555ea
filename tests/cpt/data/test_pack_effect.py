"""What packing does to documents, against counting it row by row."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cpt.data import pack_index
from cpt.data.pack_effect import packing_effect
from cpt.data.pack_index import open_rows
from cpt.data.store_selection import open_split
from cpt.data.token_store import StoreLabel, TokenizerFacts, TokenStore, write_split

LABEL = StoreLabel("s", "general", "train", 100, 0, TokenizerFacts("t", "f", "c"))


def store_of(folder: Path, lengths: list[int]) -> TokenStore:
    folder.mkdir(exist_ok=True)
    for file in folder.iterdir():
        file.unlink()
    write_split(folder, LABEL, [[[1] * (length - 1) + [0] for length in lengths]])
    return TokenStore.open(folder)


def test_the_example_of_the_module_docstring_holds(tmp_path: Path) -> None:
    store = store_of(tmp_path / "s", [4, 3, 6])
    concat, best = packing_effect(store, "concat", 6), packing_effect(store, "best_fit", 6)
    assert (concat.rows, concat.cut_documents, concat.cut_needlessly, concat.lost_tokens) == (2, 2, 2, 1)
    assert (best.rows, best.cut_documents, best.cut_needlessly, best.fill) == (3, 0, 0, 13 / 18)


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=25), seq_len=st.integers(2, 12))
def test_counts_are_those_of_the_rows_themselves(
    tmp_path: Path, packing: str, lengths: list[int], seq_len: int
) -> None:
    store = store_of(tmp_path / "s", lengths)
    found = packing_effect(store, packing, seq_len)
    rows = open_rows(store, packing, seq_len, tmp_path / "packs")
    assert (found.rows, found.documents, found.tokens) == (rows.num_rows, len(lengths), sum(lengths))
    if packing == "best_fit":
        # padding is EOS without a label in a segment of its own; pieces are what the index holds
        index = pack_index.ensure_index(store, seq_len, tmp_path / "packs")
        pieces = np.concatenate([index.pieces(row) for row in range(rows.num_rows)])
        assert found.pieces == len(pieces)
        assert found.fill == pytest.approx(pieces[:, 1].sum() / (rows.num_rows * seq_len))
        assert found.cut_documents == sum(length > seq_len for length in lengths)
        assert found.cut_needlessly == 0
    else:
        first = [sum(lengths[:i]) for i in range(len(lengths))]
        is_cut = [s // seq_len != (s + n - 1) // seq_len for s, n in zip(first, lengths, strict=True)]
        assert found.cut_documents == sum(is_cut)
        assert found.cut_needlessly == sum(c and n <= seq_len for c, n in zip(is_cut, lengths, strict=True))
        assert found.tokens_in_cut_documents == sum(n for c, n in zip(is_cut, lengths, strict=True) if c)
        assert found.lost_tokens == sum(lengths) - rows.num_rows * seq_len


def test_chunks_change_neither_counts_nor_tokens_but_the_number_of_rows_a_little(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = store_of(tmp_path / "s", [1 + (7 * i * i) % 23 for i in range(300)])
    whole = packing_effect(store, "best_fit", 16)
    monkeypatch.setattr(pack_index, "DOCUMENTS_AT_ONCE", 64)
    cut = packing_effect(store, "best_fit", 16)
    assert (cut.pieces, cut.cut_documents, cut.tokens) == (whole.pieces, whole.cut_documents, whole.tokens)
    assert whole.rows <= cut.rows <= whole.rows + 5
    assert open_rows(open_split(tmp_path / "s"), "best_fit", 16, tmp_path / "p").num_rows == cut.rows

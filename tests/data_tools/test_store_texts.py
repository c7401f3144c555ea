"""The text of a split's documents: what the store put around them is gone, what was in them is not."""

from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cpt.data.manifest import Manifest
from cpt.data.store_selection import open_split
from cpt.data.token_store import StoreLabel, TokenizerFacts, write_split
from data_tools.store_builder import StoreRequest, build_store
from data_tools.store_texts import is_split, split_texts, text_ids
from data_tools.train_tokenizer import train_bpe


def manifest(bos_id: int | None) -> Manifest:
    return Manifest("s", "d", "train", "uint16", 10, 1, bos_id, TokenizerFacts("t", "f" * 64, "BPE"), 0, 0, 0, "", ())


@given(text=st.lists(st.integers(0, 9), max_size=4), bos=st.sampled_from([None, 0, 1, 2]))
def test_one_bos_and_one_eos_are_taken_off(text: list[int], bos: int | None) -> None:
    before = [] if bos is None else [bos]
    assert text_ids(np.array([*before, *text, 1], np.uint16), manifest(bos)).tolist() == text


def test_documents_without_either_stay_as_they_are() -> None:
    for ids in ([], [3], [3, 1, 4]):
        assert text_ids(np.array(ids, np.uint16), manifest(0)).tolist() == ids


def test_the_texts_of_a_store_with_bos_are_those_that_went_in(tmp_path: Path) -> None:
    texts = ["a cat", "", "<|endoftext|> inside <|endoftext|>", "aa"]
    train_bpe(texts, out=tmp_path / "bpe", vocab_size=270)
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "{text}"}}\n' for text in texts))
    inputs = (str(tmp_path / "a.jsonl"),)
    build_store(StoreRequest(inputs, tmp_path / "bpe", tmp_path / "store", "s", "d", 0.0, bos_token="a"))
    store = open_split(tmp_path / "store" / "train")
    assert list(split_texts(store, tmp_path / "bpe")) == [text for text in texts if text]


def test_a_split_is_told_from_a_folder_of_splits(tmp_path: Path) -> None:
    write_split(tmp_path / "train", StoreLabel("s", "d", "train", 10, 0, TokenizerFacts("t", "f" * 64, "BPE")), [])
    assert is_split(tmp_path / "train") and not is_split(tmp_path) and not is_split(tmp_path / "none")

"""A store seen as a Hugging Face dataset: the same documents, from the mapped files themselves."""

from pathlib import Path

import pytest

from cpt.data.token_store import StoreLabel, TokenizerFacts, write_split
from cpt.rundir import DataError
from data_tools.interop.datasets_view import as_dataset

FACTS = TokenizerFacts("t", "f" * 64, "T")
SHARDS = [[[5, 7, 0], [9, 0]], [], [[4, 0]]]


@pytest.mark.parametrize("vocab_size", [100, 70_000])
def test_rows_are_the_documents_of_all_shards(tmp_path: Path, vocab_size: int) -> None:
    write_split(tmp_path, StoreLabel("s", "general", "train", vocab_size, 0, FACTS), SHARDS)
    rows = as_dataset(tmp_path)
    assert rows["input_ids"][:] == [[5, 7, 0], [9, 0], [4, 0]]
    assert rows["document"][:] == [0, 1, 2]
    assert rows.select([2])[0] == {"input_ids": [4, 0], "document": 2}
    assert [row["document"] for row in rows.shuffle(seed=1)] != []
    assert rows.map(lambda row: {"size": len(row["input_ids"])}, load_from_cache_file=False)["size"][:] == [3, 2, 2]


def test_nothing_is_copied(tmp_path: Path) -> None:
    import pyarrow as pa

    write_split(tmp_path, StoreLabel("s", "general", "train", 100, 0, FACTS), [[[1] * 100_000, [2] * 100_000]])
    before = pa.total_allocated_bytes()
    rows = as_dataset(tmp_path)
    assert len(rows) == 2 and pa.total_allocated_bytes() - before < 10_000


def test_an_unfinished_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no manifest.json there"):
        as_dataset(tmp_path)

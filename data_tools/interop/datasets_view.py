"""A token store as a Hugging Face ``datasets.Dataset``: one row per document, nothing copied.

The column ``input_ids`` is a list array over the memory-mapped token shards themselves, so opening costs no memory and
a row costs its own pages; ``document`` is the number of the document in the split. For looking, sampling and other
people's tools; the trainer reads the store itself. The view follows the files: delete the store and it is gone.
"""

from pathlib import Path
from typing import Any

import numpy as np

from cpt.data.token_store import TokenStore, documents_name, tokens_name
from cpt.rundir import DataError


def as_dataset(store: Path) -> Any:
    """``STORE/train`` as a ``datasets.Dataset`` with the columns ``input_ids`` (EOS included) and ``document``.

        from data_tools.interop.datasets_view import as_dataset
        rows = as_dataset(Path("stores/medical/train"))
        rows[0]["input_ids"]

    Raises:
        DataError: no finished split there, or document positions that leave the files.
    """
    import datasets
    import pyarrow as pa

    split = TokenStore.open(store)
    first, batches = 0, []
    for index, shard in enumerate(split.manifest.shards):
        if shard.documents:
            batches.append(_batch(split, index, first))
            first += shard.documents
    value = pa.from_numpy_dtype(split.dtype)
    schema = pa.schema({"input_ids": pa.large_list(value), "document": pa.int64()})
    table = pa.Table.from_batches(batches, schema)
    features = datasets.Features(
        {"input_ids": datasets.LargeList(datasets.Value(str(value))), "document": datasets.Value("int64")}
    )
    fingerprint = split.manifest.content_hash[:16]  # datasets would hash all tokens to make one
    return datasets.Dataset(
        datasets.table.InMemoryTable(table), info=datasets.DatasetInfo(features=features), fingerprint=fingerprint
    )


def _batch(split: TokenStore, index: int, first: int) -> Any:
    """One shard as a record batch whose buffers are the mapped files."""
    import pyarrow as pa

    shard = split.manifest.shards[index]
    tokens = pa.py_buffer(np.memmap(split.path / tokens_name(index), dtype=np.uint8, mode="r"))
    positions = np.memmap(split.path / documents_name(index), dtype="<i8", mode="r")
    kind = pa.from_numpy_dtype(split.dtype)
    values = pa.Array.from_buffers(kind, shard.tokens, [None, tokens])
    try:
        starts = pa.py_buffer(positions)
        lists = pa.Array.from_buffers(pa.large_list(kind), shard.documents, [None, starts], children=[values])
        lists.validate(full=True)
        if positions[0] != 0 or positions[-1] != shard.tokens:
            raise pa.ArrowInvalid(f"they span {positions[0]} to {positions[-1]} of {shard.tokens}")
    except pa.ArrowInvalid as error:
        problem = f"its positions do not fit its tokens ({error})"
        raise DataError(f"{split.path / documents_name(index)}: {problem}; fix: copy the store again") from None
    numbers = pa.array(np.arange(first, first + shard.documents, dtype=np.int64))
    return pa.record_batch([lists, numbers], names=["input_ids", "document"])

import numpy as np
import pytest
import torch

from cpt.data.batch import collate
from cpt.data.packing import IGNORE_INDEX, PackedRow


def row(first: int) -> PackedRow:
    ids = np.arange(first, first + 3)
    labels = np.array([first + 1, IGNORE_INDEX, first + 3])
    return PackedRow(ids, labels, np.array([0, 1, 0]), np.array([0, 0, 1]))


def test_rows_become_int64_tensors_in_order_with_their_sources() -> None:
    batch = collate([row(10), row(20)], [1, 0])
    assert batch.input_ids_BT.tolist() == [[10, 11, 12], [20, 21, 22]]
    assert batch.labels_BT.tolist() == [[11, -100, 13], [21, -100, 23]]
    assert batch.positions_BT.tolist() == [[0, 1, 0]] * 2
    assert batch.segments_BT.tolist() == [[0, 0, 1]] * 2
    assert batch.source_ids_B.tolist() == [1, 0]
    assert all(tensor.dtype == torch.int64 for tensor in vars(batch).values())


def test_only_labels_that_count_are_counted() -> None:
    batch = collate([row(10), row(20)], [1, 0])
    assert (batch.num_counted, batch.num_tokens) == (4, 6)


def test_moving_a_batch_moves_every_tensor() -> None:
    moved = collate([row(10)], [0]).to("meta")
    assert {tensor.device.type for tensor in vars(moved).values()} == {"meta"}
    stays = collate([row(10)], [0])
    assert stays.to("cpu").input_ids_BT.data_ptr() == stays.input_ids_BT.data_ptr()  # nothing to copy


def test_rows_without_sources_are_our_bug() -> None:
    with pytest.raises(AssertionError, match="1 rows but 2 source ids"):
        collate([row(10)], [0, 1])
    with pytest.raises(AssertionError, match="0 rows"):
        collate([], [])

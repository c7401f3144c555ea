import numpy as np
import pytest
import torch

from cpt.data.batch import collate
from cpt.data.packing import IGNORE_INDEX, PackedRow
from cpt.data.place import Place


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
    assert all(tensor.dtype == torch.int64 for tensor in vars(batch).values() if tensor is not None)
    assert batch.layout is None  # a CPU can ask when it needs it


def test_only_labels_that_count_are_counted() -> None:
    batch = collate([row(10), row(20)], [1, 0])
    assert (batch.num_counted, batch.num_tokens) == (4, 6)


def test_moving_a_batch_moves_every_tensor() -> None:
    moved = collate([row(10)], [0]).to("meta")
    layout = moved.layout  # asked on the CPU: no device was waited for
    assert layout is not None and layout.cu_seqlens.device.type == "meta"
    assert {tensor.device.type for name, tensor in vars(moved).items() if name != "layout"} == {"meta"}
    stays = collate([row(10)], [0])
    assert stays.to("cpu").input_ids_BT.data_ptr() == stays.input_ids_BT.data_ptr()  # nothing to copy


def test_rows_without_sources_are_our_bug() -> None:
    with pytest.raises(AssertionError, match="1 rows but 2 source ids"):
        collate([row(10)], [0, 1])
    with pytest.raises(AssertionError, match="0 rows"):
        collate([], [])


def long_row(length: int) -> PackedRow:
    """Two documents of half the row each."""
    place = np.arange(length)
    return PackedRow(place + 1, place + 2, place % (length // 2), place // (length // 2))


def test_ranks_that_share_rows_hold_each_position_once_and_all_see_the_whole_segments() -> None:
    whole = collate([long_row(8), long_row(8)], [1, 0])
    parts = [whole.held_by(Place(rank, 4, 4)) for rank in range(4)]
    for name in ("input_ids_BT", "labels_BT", "positions_BT"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts], dim=1), getattr(whole, name))
    assert all(torch.equal(part.segments_BT, whole.segments_BT) for part in parts)
    assert sum(part.attended_pairs for part in parts) == whole.attended_pairs == 2 * 2 * (1 + 2 + 3 + 4)
    assert sum(part.num_counted for part in parts) == whole.num_counted
    assert whole.held_by(Place(3, 4)) is whole


def test_padding_is_blank_and_in_a_segment_of_its_own() -> None:
    padded = collate([row(10)], [0]).padded(5)
    assert padded.input_ids_BT.tolist() == [[10, 11, 12, 0, 0]]
    assert padded.labels_BT.tolist() == [[11, -100, 13, -100, -100]]
    assert padded.positions_BT.tolist() == [[0, 1, 0, 0, 1]]
    assert padded.segments_BT.tolist() == [[0, 0, 1, 2, 2]]
    assert padded.padded(5) is padded

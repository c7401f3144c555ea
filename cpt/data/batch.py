"""What the model is fed: packed rows as tensors, with the source of each row.

Owns the tensor layout of a micro-batch. Refuses nothing; rows of unequal length are our bug.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cpt.data.packing import IGNORE_INDEX, PackedRow


@dataclass(frozen=True)
class Batch:
    """B rows of T tokens, all int64: token ids, labels (IGNORE_INDEX does not count), position in the document piece,
    number of the piece in the row, and for each row its source as an index into ``plan.sources``.
    """

    input_ids_BT: torch.Tensor
    labels_BT: torch.Tensor
    positions_BT: torch.Tensor
    segments_BT: torch.Tensor
    source_ids_B: torch.Tensor

    @property
    def num_counted(self) -> int:
        """Labels that count in the loss. Waits for the device if the batch is on one."""
        return int((self.labels_BT != IGNORE_INDEX).sum())

    @property
    def num_tokens(self) -> int:
        """B * T, counted or not."""
        return self.input_ids_BT.numel()

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch there; from pinned memory the copy does not wait for the device."""
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in self._tensors()))

    def pin_memory(self) -> "Batch":
        return Batch(*(tensor.pin_memory() for tensor in self._tensors()))

    def _tensors(self) -> tuple[torch.Tensor, ...]:
        return self.input_ids_BT, self.labels_BT, self.positions_BT, self.segments_BT, self.source_ids_B


def collate(rows: Sequence[PackedRow], source_ids: Sequence[int]) -> Batch:
    """Stack rows, in order, with one copy; the tensors share the arrays' memory. ``source_ids``: one per row."""
    assert len(rows) == len(source_ids) > 0, f"{len(rows)} rows but {len(source_ids)} source ids"
    return Batch(
        input_ids_BT=torch.from_numpy(np.stack([row.input_ids for row in rows])),
        labels_BT=torch.from_numpy(np.stack([row.labels for row in rows])),
        positions_BT=torch.from_numpy(np.stack([row.positions for row in rows])),
        segments_BT=torch.from_numpy(np.stack([row.segments for row in rows])),
        source_ids_B=torch.tensor(source_ids, dtype=torch.int64),
    )

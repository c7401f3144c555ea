"""What the model is fed: packed rows as tensors, with the source of each row.

Owns the tensor layout of a micro-batch, also where ranks share its rows: then a rank's batch has the positions that it
holds, and the segments of the whole rows, because attention sees those. Refuses nothing; rows of unequal length are our
bug.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.nn.functional import pad

from cpt.data.packing import IGNORE_INDEX, PackedRow
from cpt.data.place import Place


@dataclass(frozen=True)
class PackedLayout:
    """Where documents lie in the flattened batch, as kernels of variable length take it.

    Worked example, two rows of four tokens (``segments_BT``):

        [[0, 0, 0, 1],      cu_seqlens = [0, 3, 4, 6, 8]: documents in the flattened batch; a row's end always ends one
         [0, 0, 1, 1]]      max_length = 3
    """

    cu_seqlens: torch.Tensor  # int32 [documents + 1]
    max_length: int
    one_document_per_row: bool


def packed_layout(segments_BT: torch.Tensor) -> PackedLayout:
    """Document borders of a batch from its segment numbers (see the example of ``PackedLayout``)."""
    starts_BT = torch.ones_like(segments_BT, dtype=torch.bool)
    starts_BT[:, 1:] = segments_BT[:, 1:] != segments_BT[:, :-1]
    starts = starts_BT.flatten().nonzero().flatten()
    cu_seqlens = torch.cat([starts, starts.new_tensor([segments_BT.numel()])]).to(torch.int32)
    return PackedLayout(
        cu_seqlens=cu_seqlens,
        max_length=int(cu_seqlens.diff().max()),
        one_document_per_row=starts.numel() == segments_BT.shape[0],
    )


@dataclass(frozen=True)
class Batch:
    """B rows of T tokens, all int64: token ids, labels (IGNORE_INDEX does not count), position in the document piece,
    number of the piece in the row, and for each row its source as an index into ``plan.sources``. Where P ranks share
    a row, T is the rank's part of it, and ``segments_BT`` alone has all P * T positions.
    """

    input_ids_BT: torch.Tensor
    labels_BT: torch.Tensor
    positions_BT: torch.Tensor
    segments_BT: torch.Tensor
    source_ids_B: torch.Tensor
    layout: PackedLayout | None = None  # of the segments; known without waiting once the batch has left the CPU

    @property
    def num_counted(self) -> int:
        """Labels that count in the loss. Waits for the device if the batch is on one."""
        return int((self.labels_BT != IGNORE_INDEX).sum())

    @property
    def attended_pairs(self) -> int:
        """(query, key) pairs of causal attention inside documents: a token at position p of its piece sees p + 1."""
        return int((self.positions_BT + 1).sum())

    def pairs_within(self, window: int) -> int:
        """The same under a sliding window, which holds the query itself."""
        return int((self.positions_BT + 1).clamp(max=window).sum())

    @property
    def num_tokens(self) -> int:
        """B * T, counted or not."""
        return self.input_ids_BT.numel()

    def held_by(self, place: Place) -> "Batch":
        """What ``place`` holds of whole rows: everything, or its part of the positions."""
        if place.sequence_parallel == 1:
            return self
        part = place.positions(self.input_ids_BT.shape[1])
        ids_BT, labels_BT, positions_BT = (x[:, part].contiguous() for x in self._tensors()[:3])
        return Batch(ids_BT, labels_BT, positions_BT, self.segments_BT, self.source_ids_B)

    def padded(self, seq_len: int) -> "Batch":
        """The same rows with blanks behind them up to ``seq_len``: token 0 without a label, in a segment of its own."""
        more = seq_len - self.input_ids_BT.shape[1]
        if more <= 0:
            return self
        blank = self.segments_BT[:, -1:] + 1
        return Batch(
            pad(self.input_ids_BT, (0, more)),
            pad(self.labels_BT, (0, more), value=IGNORE_INDEX),
            torch.cat([self.positions_BT, torch.arange(more, device=blank.device).expand(len(blank), more)], dim=1),
            torch.cat([self.segments_BT, blank.expand(len(blank), more)], dim=1),
            self.source_ids_B,
        )

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch there; from pinned memory the copy does not wait for the device."""
        there = self._with(tensor.to(device, non_blocking=True) for tensor in self._tensors())
        if not self.segments_BT.is_cpu or there.segments_BT.is_cpu:
            return there
        layout = packed_layout(self.segments_BT)  # asked for there, the host would have to wait for the device
        borders = layout.cu_seqlens.to(device, non_blocking=True)
        return replace(there, layout=replace(layout, cu_seqlens=borders))

    def pin_memory(self) -> "Batch":
        return self._with(tensor.pin_memory() for tensor in self._tensors())

    def _with(self, tensors: Iterable[torch.Tensor]) -> "Batch":
        ids_BT, labels_BT, positions_BT, segments_BT, source_ids_B = tensors
        return Batch(ids_BT, labels_BT, positions_BT, segments_BT, source_ids_B)

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

"""Held-out loss per source: the same rows at every step, on every world size, under every ZeRO stage.

Rows are spread evenly over the held-out store, ``tokens_per_source`` in all, packed like training rows. They are dealt
to ranks like training rows, and every rank makes the same number of forward passes: the last ones are filled with
dummy rows whose labels are all ignored, so that the collectives of ZeRO-3 stay in step. Sums are kept in fp64, per row
for the loss and per piece of a document (row x document) for its standard error; they are reduced over ranks, then
added in row order. Which pieces there are follows from the store and the rows alone (:mod:`cpt.eval.document_pieces`).

Example, 5 rows, 2 ranks, 2 rows a pass: rank 0 evaluates [0 1] [4 -], rank 1 evaluates [2 3] [- -].
Refuses a held-out split without a predictable token.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch.nn.functional import pad

from cpt.data.batch import Batch, collate
from cpt.data.packing import IGNORE_INDEX, PackedRow, TokenReader, concat_num_rows, concat_row
from cpt.data.place import Place
from cpt.data.store_selection import Split
from cpt.eval.document_pieces import Pieces, by_document, ratio_stderr
from cpt.eval.records import EvalRecord, SourceEval, aggregate, bits_per_byte, perplexity
from cpt.rundir import DataError
from cpt.train.loss_head import forward_losses


@dataclass(frozen=True)
class HeldOut:
    """One source's held-out tokens, its group (general or domain) and tokens per UTF-8 byte of its text."""

    reader: TokenReader
    group: str
    tokens_per_byte: float


def held_out(store: Split) -> HeldOut:
    """A store's held-out split as a source: the group from its domain label, tokens per byte over the whole split."""
    manifest = store.manifest
    group = "general" if manifest.domain == "general" else "domain"
    return HeldOut(store, group, manifest.tokens / max(manifest.utf8_bytes, 1))


@dataclass(frozen=True)
class EvalSpec:
    """How to evaluate: rows of ``seq_len`` tokens up to ``tokens_per_source``, ``micro_batch_size`` rows a pass and
    rank, or group of ``sequence_parallel`` ranks that share rows.
    """

    seq_len: int
    tokens_per_source: int
    micro_batch_size: int
    backend: str
    device: torch.device | str = "cpu"
    sequence_parallel: int = 1


@dataclass(frozen=True)
class Evaluated:
    """What is kept of an evaluation: its record, and the pieces of documents behind it, by source."""

    record: EvalRecord
    pieces: Mapping[str, Pieces]


@dataclass(frozen=True)
class Sums:
    """Over all ranks: per row summed loss (nats) and number of counted tokens, per piece summed loss."""

    loss: list[float]
    tokens: list[int]
    piece_nats: NDArray[np.float64]


def evaluate(
    model: torch.nn.Module,
    sources: Mapping[str, HeldOut],
    spec: EvalSpec,
    *,
    step: int = 0,
    tokens_seen: int = 0,
    should_stop: Callable[[], bool] | None = None,
) -> Evaluated | None:
    """Evaluate all sources; every rank calls it and every rank gets the same, or None when a stop was asked for.

    ``should_stop`` is asked before every forward pass, on every rank equally often; one rank that says yes stops all
    of them.

    Raises:
        DataError: a source without a predictable token.
    """
    was_training = model.training
    model.eval()
    results: dict[str, SourceEval] = {}
    pieces: dict[str, Pieces] = {}
    errors: list[str] = []
    try:
        for name in sorted(sources):
            extent = _extent(name, sources[name].reader, spec)
            layout = _lay_out(sources[name].reader, extent)
            sums = _sums(model, sources[name].reader, spec, layout=layout, should_stop=should_stop)
            if sums is None:
                return None
            pieces[name] = layout.measured(sums.piece_nats)
            results[name], error = _summarise(name, sources[name], sums, layout, pieces[name])
            errors += error
    finally:
        model.train(was_training)
    return Evaluated(EvalRecord(step, tokens_seen, results, aggregate(results), tuple(errors)), pieces)


@dataclass(frozen=True)
class _Extent:
    """Which rows of a held-out store are evaluated."""

    seq_len: int
    rows: tuple[int, ...]


def _extent(name: str, reader: TokenReader, spec: EvalSpec) -> _Extent:
    """Rows at even distances, for held-out documents stand in the order of the input files and the first files need not
    be like the others; a split shorter than a row is evaluated as one shorter row.
    """
    if reader.num_tokens < 2:
        raise DataError(
            f"held-out split of source {name!r}: {reader.num_tokens} tokens, at least 2 are needed to predict one; "
            "tokenize with a larger held-out share"
        )
    available = concat_num_rows(reader.num_tokens, spec.seq_len)
    if available == 0:
        return _Extent(reader.num_tokens - 1, (0,))
    number = min(available, max(1, math.ceil(spec.tokens_per_source / spec.seq_len)))
    return _Extent(spec.seq_len, tuple(index * available // number for index in range(number)))


@dataclass(frozen=True)
class _Layout:
    """Pieces of documents in the rows of an extent, end to end: ``document`` and ``tokens`` (counted) of each piece;
    ``first``: number of each row's first piece.
    """

    extent: _Extent
    document: NDArray[np.int64]
    tokens: NDArray[np.int32]
    first: NDArray[np.int64]

    def measured(self, nats: NDArray[np.float64]) -> Pieces:
        """Those pieces in which a token is counted."""
        counted = self.tokens > 0
        return Pieces(self.document[counted], self.tokens[counted], nats[counted])


def _lay_out(reader: TokenReader, extent: _Extent) -> _Layout:
    """From the borders of documents alone, hence the same on every rank and at every step.

    A document's last token predicts nothing; so does a row's last token where the next one opens a document.
    """
    documents, tokens, first = [], [], []
    begun = seen = pieces = 0  # documents that start in [0, seen)
    for row in extent.rows:
        start, stop = row * extent.seq_len, (row + 1) * extent.seq_len
        begun += len(reader.document_starts(seen, start + 1))
        seen = start + 1
        borders = reader.document_starts(start + 1, stop + 1)
        inner = borders[borders < stop]
        counted = np.diff(np.concatenate([[start], inner, [stop]]))
        counted[: len(borders)] -= 1
        documents.append(begun - 1 + np.arange(len(counted)))
        tokens.append(counted)
        first.append(pieces)
        pieces += len(counted)
    return _Layout(
        extent, np.concatenate(documents), np.concatenate(tokens).astype(np.int32), np.array(first, dtype=np.int64)
    )


@torch.no_grad()
def _sums(
    model: torch.nn.Module,
    reader: TokenReader,
    spec: EvalSpec,
    *,
    layout: _Layout,
    should_stop: Callable[[], bool] | None,
) -> Sums | None:
    num_rows, seq_len = len(layout.extent.rows), layout.extent.seq_len
    ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    place = Place(*ranks, spec.sequence_parallel)
    rows_per_pass = place.num_readers * spec.micro_batch_size
    padded = -(-seq_len // spec.sequence_parallel) * spec.sequence_parallel
    sums = torch.zeros(2, num_rows, dtype=torch.float64, device=spec.device)
    of_pieces = torch.zeros(len(layout.tokens), dtype=torch.float64, device=spec.device)
    for first in range(0, num_rows, rows_per_pass):
        if should_stop is not None and _any_rank(should_stop(), spec.device):
            return None
        start = first + place.reader * spec.micro_batch_size
        own = range(start, start + spec.micro_batch_size)
        batch = _batch(reader, own, layout.extent)
        # Blanks and dummy rows count nothing: they may name any piece.
        pieces_BT = batch.segments_BT + torch.from_numpy(layout.first[np.array(own) % num_rows])[:, None]
        pieces_BT = pad(pieces_BT, (0, padded - seq_len))[:, place.positions(padded)]
        batch = batch.padded(padded).held_by(place).to(spec.device)
        losses_BT = forward_losses(model, batch, spec.backend).per_token_BT.double()
        real = max(0, min(num_rows - start, spec.micro_batch_size))
        sums[0, start : start + real] = losses_BT.sum(dim=1)[:real]
        sums[1, start : start + real] = (batch.labels_BT != IGNORE_INDEX).sum(dim=1).double()[:real]
        of_pieces.index_add_(0, pieces_BT.to(spec.device, non_blocking=True).flatten(), losses_BT.flatten())
    if place.world_size > 1:  # where ranks share rows, each has a part of their sums
        dist.all_reduce(sums)
        dist.all_reduce(of_pieces)
    return Sums(sums[0].tolist(), [int(count) for count in sums[1].tolist()], of_pieces.cpu().numpy())


def _batch(reader: TokenReader, places: Sequence[int], extent: _Extent) -> Batch:
    packed = []
    for place in places:
        row = concat_row(reader, extent.rows[place % len(extent.rows)], extent.seq_len)
        if place >= len(extent.rows):
            row = PackedRow(row.input_ids, np.full_like(row.labels, IGNORE_INDEX), row.positions, row.segments)
        packed.append(row)
    return collate(packed, [0] * len(packed))


def _any_rank(stop: bool, device: torch.device | str) -> bool:
    """Whether any rank wants to stop: ranks must leave together, or the others wait in a collective for ever."""
    if not dist.is_initialized():
        return stop
    flag = torch.tensor(int(stop), device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag.item())


def _summarise(name: str, source: HeldOut, sums: Sums, layout: _Layout, pieces: Pieces) -> tuple[SourceEval, list[str]]:
    tokens, length = sum(sums.tokens), layout.extent.seq_len
    documents = sum(len(source.reader.document_starts(row * length, (row + 1) * length)) for row in layout.extent.rows)
    bad = [row for row, loss in enumerate(sums.loss) if not math.isfinite(loss)]
    loss: float | None = None
    stderr: float | None = None
    errors = []
    if bad:
        errors = [
            f"source {name!r}: the loss is not finite in {len(bad)} of {len(sums.loss)} rows, first in row {bad[0]}"
        ]
    elif tokens == 0:
        errors = [f"source {name!r}: no counted token, every held-out document is one token long"]
    else:
        loss = math.fsum(sums.loss) / tokens
        stderr = ratio_stderr(by_document(pieces))
    bpb = bits_per_byte(loss, source.tokens_per_byte)
    return SourceEval(source.group, loss, bpb, perplexity(loss), tokens, documents, stderr), errors

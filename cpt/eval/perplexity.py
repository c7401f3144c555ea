"""Held-out loss per source: the same rows at every step, on every world size, under every ZeRO stage.

Rows are spread evenly over the held-out store, ``tokens_per_source`` in all, packed like training rows. They are dealt
to ranks like training rows, and every rank makes the same number of forward passes: the last ones are filled with
dummy rows whose labels are all ignored, so that the collectives of ZeRO-3 stay in step. Sums are kept per row in
fp64, reduced over ranks, then added in row order.

Example, 5 rows, 2 ranks, 2 rows a pass: rank 0 evaluates [0 1] [4 -], rank 1 evaluates [2 3] [- -].
Refuses a held-out split without a predictable token.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from cpt.data.batch import Batch, collate
from cpt.data.packing import IGNORE_INDEX, PackedRow, TokenReader, concat_num_rows, concat_row
from cpt.data.place import Place
from cpt.data.store_selection import Split
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
class RowSums:
    """Per row: summed loss (nats) and number of counted tokens, over all ranks."""

    loss: list[float]
    tokens: list[int]


def evaluate(
    model: torch.nn.Module,
    sources: Mapping[str, HeldOut],
    spec: EvalSpec,
    *,
    step: int = 0,
    tokens_seen: int = 0,
    should_stop: Callable[[], bool] | None = None,
) -> EvalRecord | None:
    """Evaluate all sources; every rank calls it and every rank gets the same record, or None when a stop was asked for.

    ``should_stop`` is asked before every forward pass, on every rank equally often; one rank that says yes stops all
    of them.

    Raises:
        DataError: a source without a predictable token.
    """
    was_training = model.training
    model.eval()
    results: dict[str, SourceEval] = {}
    errors: list[str] = []
    try:
        for name in sorted(sources):
            extent = _extent(name, sources[name].reader, spec)
            sums = _row_sums(model, sources[name].reader, spec, extent=extent, should_stop=should_stop)
            if sums is None:
                return None
            results[name], error = _summarise(name, sources[name], sums, extent)
            errors += error
    finally:
        model.train(was_training)
    return EvalRecord(step, tokens_seen, results, aggregate(results), tuple(errors))


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


def _row_sums(
    model: torch.nn.Module,
    reader: TokenReader,
    spec: EvalSpec,
    *,
    extent: _Extent,
    should_stop: Callable[[], bool] | None,
) -> RowSums | None:
    num_rows = len(extent.rows)
    ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    place = Place(*ranks, spec.sequence_parallel)
    rows_per_pass = place.num_readers * spec.micro_batch_size
    sums = torch.zeros(2, num_rows, dtype=torch.float64, device=spec.device)
    for first in range(0, num_rows, rows_per_pass):
        if should_stop is not None and _any_rank(should_stop(), spec.device):
            return None
        start = first + place.reader * spec.micro_batch_size
        own = range(start, start + spec.micro_batch_size)
        batch = _batch(reader, own, extent)
        shared = -(-extent.seq_len // spec.sequence_parallel) * spec.sequence_parallel
        batch = batch.padded(shared).held_by(place)
        loss_B, tokens_B = row_losses(model, batch.to(spec.device), spec.backend)
        real = max(0, min(num_rows - start, spec.micro_batch_size))
        sums[0, start : start + real] = loss_B[:real]
        sums[1, start : start + real] = tokens_B[:real]
    if place.world_size > 1:
        dist.all_reduce(sums)  # where ranks share rows, each has a part of their sums
    return RowSums(sums[0].tolist(), [int(count) for count in sums[1].tolist()])


def _batch(reader: TokenReader, places: Sequence[int], extent: _Extent) -> Batch:
    packed = []
    for place in places:
        row = concat_row(reader, extent.rows[place % len(extent.rows)], extent.seq_len)
        if place >= len(extent.rows):
            row = PackedRow(row.input_ids, np.full_like(row.labels, IGNORE_INDEX), row.positions, row.segments)
        packed.append(row)
    return collate(packed, [0] * len(packed))


@torch.no_grad()
def row_losses(model: torch.nn.Module, batch: Batch, backend: str) -> tuple[Tensor, Tensor]:
    """Summed loss (nats, fp64) and counted tokens (fp64) of each row, both (B,); logits go to fp32 before the
    softmax, a chunk of tokens at a time where the model has a ``LossHead``.
    """
    loss_B = forward_losses(model, batch, backend).per_token_BT.double().sum(dim=1)
    return loss_B, (batch.labels_BT != IGNORE_INDEX).sum(dim=1).double()


def _any_rank(stop: bool, device: torch.device | str) -> bool:
    """Whether any rank wants to stop: ranks must leave together, or the others wait in a collective for ever."""
    if not dist.is_initialized():
        return stop
    flag = torch.tensor(int(stop), device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag.item())


def _summarise(name: str, source: HeldOut, sums: RowSums, extent: _Extent) -> tuple[SourceEval, list[str]]:
    tokens, length = sum(sums.tokens), extent.seq_len
    documents = sum(len(source.reader.document_starts(row * length, (row + 1) * length)) for row in extent.rows)
    bad = [row for row, loss in enumerate(sums.loss) if not math.isfinite(loss)]
    loss: float | None = None
    errors = []
    if bad:
        errors = [
            f"source {name!r}: the loss is not finite in {len(bad)} of {len(sums.loss)} rows, first in row {bad[0]}"
        ]
    elif tokens == 0:
        errors = [f"source {name!r}: no counted token, every held-out document is one token long"]
    else:
        loss = math.fsum(sums.loss) / tokens
    bpb = bits_per_byte(loss, source.tokens_per_byte)
    return SourceEval(source.group, loss, bpb, perplexity(loss), tokens, documents), errors

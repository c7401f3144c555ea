"""The micro-batches of a step for one rank, read ahead by threads.

Owns reading and prefetching. The order of data is the sampler's, so nothing here is state: any step may be asked for
at any time, and a resumed run simply asks for a later one. Refuses stores that are not the ones the plan was made for.

    plan, step --sampler--> (source, row) --Rows of the source--> PackedRow --collate--> list[Batch]
"""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import torch

from cpt.data.batch import Batch, collate
from cpt.data.packing import PackedRow, Rows
from cpt.data.place import Place
from cpt.data.sampler import IntArray, locate, rows_of_rank
from cpt.plan import Plan
from cpt.plan_parts import micro_rows
from cpt.rundir import DataError


class Loader:
    """Answers ``step(n)`` and prepares the ``prefetch_steps`` steps after it in ``threads`` background threads, a
    micro-batch at a time; what comes does not depend on their number.

    ``rows``: by source, and for a plan with several row lengths by (source, seq_len). ``sequence_parallel`` consecutive
    ranks read the same rows, each its part of their positions. At most ``prefetch_steps + 1`` steps are held. A failed
    read is raised by the ``step`` call that asks for it, not before, and is tried again when the step is asked for
    again. Batches are pinned where CUDA is present.

    Raises:
        DataError: a source without a store, a store of another size than planned, or a batch that does not divide.
    """

    def __init__(  # noqa: PLR0913 - each is a number of its own
        self,
        plan: Plan,
        rows: Mapping[str, Rows] | Mapping[tuple[str, int], Rows],
        *,
        rank: int,
        world_size: int,
        micro_batch_size: int,
        sequence_parallel: int = 1,
        prefetch_steps: int = 2,
        threads: int = 1,
    ) -> None:
        assert prefetch_steps >= 0, f"prefetch_steps is {prefetch_steps}"
        self._plan = plan
        self._place = Place(rank, world_size, sequence_parallel)
        self._micro_batch_size = micro_batch_size
        self._rows = _rows_by_length(plan, rows)
        for first in {plan.seq_len_of(i): plan.first_step(i) for i in range(len(plan.stages))}.values():
            self._rows_of(first)
        self._prefetch_steps = prefetch_steps
        self._pin = torch.cuda.is_available()
        self._pending: dict[int, list[Future[Batch]]] = {}
        self._threads = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="cpt-loader")

    def step(self, step: int) -> list[Batch]:
        """The rank's micro-batches of a step, in order.

        Raises:
            DataError: a row cannot be read from its store; names source, row and cause.
            RuntimeError: the same, where the machine is at fault (disk, permissions).
        """
        wanted = range(step, min(step + self._prefetch_steps + 1, self._plan.num_steps))
        assert step in wanted, f"step {step} lies outside the plan's {self._plan.num_steps} steps"
        for old in self._pending.keys() - set(wanted):
            for reading in self._pending.pop(old):
                reading.cancel()
        for new in wanted:
            if new not in self._pending:
                self._pending[new] = [self._threads.submit(self._read, new, rows) for rows in self._rows_of(new)]
        return [reading.result() for reading in self._pending.pop(step)]

    def global_rows(self, step: int) -> list[list[int]]:
        """Which of the plan's rows each micro-batch of a step holds, in order."""
        found: list[list[int]] = self._rows_of(step).tolist()
        return found

    def first_rows(self, source: int) -> Batch:
        """A micro-batch of one source alone, in the longest rows that it has: its first ones, other ones for each
        reader.
        """
        plan = self._plan
        seq_len = max(length for length in plan.seq_lens if plan.epoch_rows(source, length))
        rows = micro_rows(self._micro_batch_size, seq_len=seq_len, stated_for=plan.seq_len)
        wanted = range(self._place.reader * rows, (self._place.reader + 1) * rows)
        packed = [self._read_row(source, row % plan.epoch_rows(source, seq_len), seq_len) for row in wanted]
        return collate(packed, [source] * rows).held_by(self._place)

    def close(self) -> None:
        """Stop reading ahead and wait for the threads; a second call does nothing."""
        self._pending.clear()
        self._threads.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> "Loader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _rows_of(self, step: int) -> IntArray:
        readers = {"rank": self._place.reader, "world_size": self._place.num_readers}
        return rows_of_rank(self._plan, step, **readers, micro_batch_size=self._micro_batch_size)

    def _read(self, step: int, rows: IntArray) -> Batch:
        seq_len = self._plan.seq_len_of(self._plan.stage_of_step(step))
        where = locate(self._plan, rows)
        sources = where.source_index.tolist()
        packed = [
            self._read_row(source, row, seq_len)
            for source, row in zip(sources, where.row_in_source.tolist(), strict=True)
        ]
        batch = collate(packed, sources).held_by(self._place)
        return batch.pin_memory() if self._pin else batch

    def _read_row(self, source: int, row: int, seq_len: int) -> PackedRow:
        name = self._plan.sources[source].name
        try:
            return self._rows[name, seq_len].row(row)
        except (ValueError, OSError) as error:
            kind = RuntimeError if isinstance(error, OSError) else DataError
            raise kind(f"source {name!r}, row {row} of {seq_len} tokens: {error}") from error


def _rows_by_length(
    plan: Plan, rows: Mapping[str, Rows] | Mapping[tuple[str, int], Rows]
) -> dict[tuple[str, int], Rows]:
    """By source and row length. All problems at once: nothing is worse than the second one after an hour in the
    queue.
    """
    given = {name if isinstance(name, tuple) else (name, plan.seq_len): found for name, found in rows.items()}
    problems = []
    for index, source in enumerate(plan.sources):
        for seq_len in plan.seq_lens:
            planned, found = plan.epoch_rows(index, seq_len), given.get((source.name, seq_len))
            of = "" if seq_len == plan.seq_len else f" of {seq_len} tokens"
            if found is None:
                if planned:
                    problems.append(
                        f"source {source.name!r} of the plan has no store{of and f' with rows{of}'}; name its folder "
                        "under data.stores"
                    )
            elif found.num_tokens != source.num_tokens:
                problems.append(
                    f"the store of source {source.name!r} holds {found.num_tokens} tokens, the plan was made for "
                    f"{source.num_tokens}; use the store of the plan, or plan a new run"
                )
            elif found.num_rows != planned:
                problems.append(
                    f"source {source.name!r} has {found.num_rows} rows{of} by packing, the plan says {planned}"
                )
    if problems:
        raise DataError("; ".join(dict.fromkeys(problems)))
    return given

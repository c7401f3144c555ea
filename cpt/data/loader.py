"""The micro-batches of a step for one rank, read ahead by a thread.

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
from cpt.data.sampler import locate, rows_of_rank
from cpt.plan import Plan
from cpt.rundir import DataError


class Loader:
    """Answers ``step(n)`` and prepares the ``prefetch_steps`` steps after it in one background thread.

    At most ``prefetch_steps + 1`` steps are held. A failed read is raised by the ``step`` call that asks for it, not
    before, and is tried again when the step is asked for again. Batches are pinned where CUDA is present.

    Raises:
        DataError: a source without a store, a store of another size than planned, or a batch that does not divide.
    """

    def __init__(
        self,
        plan: Plan,
        rows: Mapping[str, Rows],
        *,
        rank: int,
        world_size: int,
        micro_batch_size: int,
        prefetch_steps: int = 2,
    ) -> None:
        assert prefetch_steps >= 0, f"prefetch_steps is {prefetch_steps}"
        _check_rows(plan, rows)
        rows_of_rank(plan, 0, rank=rank, world_size=world_size, micro_batch_size=micro_batch_size)
        self._plan = plan
        self._rows = [rows[source.name] for source in plan.sources]
        self._rank = rank
        self._world_size = world_size
        self._micro_batch_size = micro_batch_size
        self._prefetch_steps = prefetch_steps
        self._pin = torch.cuda.is_available()
        self._pending: dict[int, Future[list[Batch]]] = {}
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="cpt-loader")

    def step(self, step: int) -> list[Batch]:
        """The rank's micro-batches of a step, in order.

        Raises:
            DataError: a row cannot be read from its store; names source, row and cause.
            RuntimeError: the same, where the machine is at fault (disk, permissions).
        """
        wanted = range(step, min(step + self._prefetch_steps + 1, self._plan.num_steps))
        assert step in wanted, f"step {step} lies outside the plan's {self._plan.num_steps} steps"
        for old in self._pending.keys() - set(wanted):
            self._pending.pop(old).cancel()
        for new in wanted:
            if new not in self._pending:
                self._pending[new] = self._thread.submit(self._read_step, new)
        return self._pending.pop(step).result()

    def close(self) -> None:
        """Stop reading ahead and wait for the thread; a second call does nothing."""
        self._pending.clear()
        self._thread.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> "Loader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read_step(self, step: int) -> list[Batch]:
        rows = rows_of_rank(
            self._plan, step, rank=self._rank, world_size=self._world_size, micro_batch_size=self._micro_batch_size
        )
        where = locate(self._plan, rows)
        batches = []
        for sources, indices in zip(where.source_index.tolist(), where.row_in_source.tolist(), strict=True):
            packed = [self._read_row(source, row) for source, row in zip(sources, indices, strict=True)]
            batch = collate(packed, sources)
            batches.append(batch.pin_memory() if self._pin else batch)
        return batches

    def _read_row(self, source: int, row: int) -> PackedRow:
        try:
            return self._rows[source].row(row)
        except (ValueError, OSError) as error:
            kind = RuntimeError if isinstance(error, OSError) else DataError
            name = self._plan.sources[source].name
            raise kind(f"source {name!r}, row {row} of {self._plan.seq_len} tokens: {error}") from error


def _check_rows(plan: Plan, rows: Mapping[str, Rows]) -> None:
    """All problems at once: nothing is worse than the second one after an hour in the queue."""
    problems = []
    for source in plan.sources:
        found = rows.get(source.name)
        if found is None:
            problems.append(f"source {source.name!r} of the plan has no store; name its folder under data.stores")
        elif found.num_tokens != source.num_tokens:
            problems.append(
                f"the store of source {source.name!r} holds {found.num_tokens} tokens, the plan was made for "
                f"{source.num_tokens}; use the store of the plan, or plan a new run"
            )
        elif found.num_rows != source.num_rows:
            problems.append(
                f"source {source.name!r} has {found.num_rows} rows by packing, the plan says {source.num_rows}"
            )
    if problems:
        raise DataError("; ".join(problems))

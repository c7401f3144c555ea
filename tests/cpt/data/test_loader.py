import threading
import time
from collections.abc import Iterator, Mapping

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from cpt.data.batch import Batch
from cpt.data.loader import Loader
from cpt.data.packing import Rows, TokenReader, concat_num_rows, concat_row, concat_rows
from cpt.data.sampler import locate, rows_of_rank
from cpt.plan import Plan, PlanSource, StageWish, build_plan
from cpt.rundir import DataError

SEQ_LEN = 8


class CountingStore:
    """Token p is ``first + p``; a document starts every 11 tokens. Notes what was read and fails when told."""

    def __init__(self, num_tokens: int, first: int = 0) -> None:
        self.num_tokens = num_tokens
        self.first = first
        self.reads: list[int] = []
        self.error: Exception | None = None

    def read(self, start: int, stop: int) -> NDArray[np.int64]:
        self.reads.append(start)
        if self.error:
            raise self.error
        return np.arange(self.first + start, self.first + stop)

    def document_starts(self, start: int, stop: int) -> NDArray[np.int64]:
        return np.arange(-(-start // 11) * 11, stop, 11, dtype=np.int64)


def make_plan() -> tuple[Plan, dict[str, CountingStore]]:
    stores = {"web": CountingStore(2001), "med": CountingStore(501, first=10_000)}
    sources = [
        PlanSource("web", "general", concat_num_rows(2001, SEQ_LEN), 2001, "w"),
        PlanSource("med", "domain", concat_num_rows(501, SEQ_LEN), 501, "m"),
    ]
    wish = StageWish(12 * 20 * SEQ_LEN, 0.3)
    plan, _ = build_plan(sources, [wish], seed=1, seq_len=SEQ_LEN, global_batch_rows=12, max_epochs=9)
    return plan, stores


@pytest.fixture
def parts() -> Iterator[tuple[Plan, dict[str, CountingStore]]]:
    before = threading.active_count()
    yield make_plan()
    assert threading.active_count() == before  # every loader of the test was closed


def rows_of(stores: Mapping[str, TokenReader]) -> dict[str, Rows]:
    return {name: concat_rows(store, SEQ_LEN) for name, store in stores.items()}


def same(first: list[Batch], second: list[Batch]) -> bool:
    pairs = [(vars(a), vars(b)) for a, b in zip(first, second, strict=True)]
    return all(torch.equal(a[name], b[name]) for a, b in pairs for name in a)


def directly(plan: Plan, stores: Mapping[str, TokenReader], step: int, shape: tuple[int, int, int]) -> list[list[int]]:
    rank, world_size, micro_batch_size = shape
    at = locate(plan, rows_of_rank(plan, step, rank=rank, world_size=world_size, micro_batch_size=micro_batch_size))
    pairs = zip(at.source_index.ravel().tolist(), at.row_in_source.ravel().tolist(), strict=True)
    return [concat_row(stores[plan.sources[i].name], row, SEQ_LEN).input_ids.tolist() for i, row in pairs]


@pytest.mark.parametrize("prefetch_steps", [0, 1, 2, 5, 100])
@pytest.mark.parametrize("shape", [(0, 1, 12), (0, 1, 3), (1, 2, 2), (2, 4, 1)])
def test_batches_equal_a_direct_computation_whatever_is_prefetched(
    parts: tuple[Plan, dict[str, CountingStore]], shape: tuple[int, int, int], prefetch_steps: int
) -> None:
    plan, stores = parts
    rank, world_size, micro = shape
    with Loader(
        plan, rows_of(stores), rank=rank, world_size=world_size, micro_batch_size=micro, prefetch_steps=prefetch_steps
    ) as loader:
        for step in [0, 1, 2, 3, 15, 16, 4, 19, 19, 0]:
            batches = loader.step(step)
            assert [batch.input_ids_BT.shape for batch in batches] == [(micro, SEQ_LEN)] * (12 // world_size // micro)
            assert torch.cat([b.input_ids_BT for b in batches]).tolist() == directly(plan, stores, step, shape)
            ids = torch.cat([b.input_ids_BT[:, 0] for b in batches])
            assert torch.cat([b.source_ids_B for b in batches]).tolist() == (ids >= 10_000).long().tolist()


def test_ranks_together_hold_the_rows_of_one_rank_alone(parts: tuple[Plan, dict[str, CountingStore]]) -> None:
    plan, stores = parts

    def rows(rank: int, world_size: int) -> torch.Tensor:
        with Loader(plan, rows_of(stores), rank=rank, world_size=world_size, micro_batch_size=2) as loader:
            return torch.stack([batch.input_ids_BT for batch in loader.step(7)])

    split = torch.stack([rows(rank, 3) for rank in range(3)], dim=1)
    assert torch.equal(split.reshape(12, SEQ_LEN), rows(0, 1).reshape(12, SEQ_LEN))


def num_reads(stores: Mapping[str, CountingStore], *, at_least: int) -> int:
    """Reads so far, once there are that many and the thread had time to do more."""
    deadline = time.monotonic() + 10
    while sum(len(store.reads) for store in stores.values()) < at_least and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(0.02)
    return sum(len(store.reads) for store in stores.values())


def test_prefetch_is_bounded_and_follows_a_jump(parts: tuple[Plan, dict[str, CountingStore]]) -> None:
    plan, stores = parts
    with Loader(plan, rows_of(stores), rank=0, world_size=1, micro_batch_size=12, prefetch_steps=2) as loader:
        loader.step(0)
        assert num_reads(stores, at_least=3 * 12) == 3 * 12  # the step itself and two more
        loader.step(1)
        assert num_reads(stores, at_least=4 * 12) == 4 * 12  # each row is read once
        loader.step(10)
        assert num_reads(stores, at_least=7 * 12) == 7 * 12
        loader.step(19)
        assert num_reads(stores, at_least=8 * 12) == 8 * 12  # nothing after the last step


@pytest.mark.parametrize(
    ("cause", "kind"), [(ValueError("torn page"), DataError), (OSError("disk gone"), RuntimeError)]
)
def test_a_failed_read_surfaces_with_source_and_row_and_can_be_tried_again(
    parts: tuple[Plan, dict[str, CountingStore]], cause: Exception, kind: type[Exception]
) -> None:
    plan, stores = parts
    with Loader(plan, rows_of(stores), rank=0, world_size=1, micro_batch_size=12, prefetch_steps=1) as loader:
        first = loader.step(0)
        num_reads(stores, at_least=24)
        stores["med"].error = cause
        loader.step(1)  # was read before the fault
        with pytest.raises(kind, match=rf"source 'med', row \d+ of 8 tokens: {cause}"):
            loader.step(2)
        stores["med"].error = None
        assert len(loader.step(2)) == 1
        assert same(loader.step(0), first)


def test_stores_that_do_not_fit_the_plan_are_all_named(parts: tuple[Plan, dict[str, CountingStore]]) -> None:
    plan, _ = parts
    wrong = {"web": CountingStore(1999)}
    with pytest.raises(
        DataError, match=r"'web' holds 1999 tokens, the plan was made for 2001.*'med' of the plan has no"
    ):
        Loader(plan, rows_of(wrong), rank=0, world_size=1, micro_batch_size=1)


def test_a_micro_batch_that_does_not_divide_is_refused_before_any_read(
    parts: tuple[Plan, dict[str, CountingStore]],
) -> None:
    plan, stores = parts
    with pytest.raises(DataError, match="micro_batch_size 5"):
        Loader(plan, rows_of(stores), rank=0, world_size=1, micro_batch_size=5)
    assert not stores["web"].reads


def test_a_step_outside_the_plan_and_a_closed_loader_are_our_bugs(parts: tuple[Plan, dict[str, CountingStore]]) -> None:
    plan, stores = parts
    loader = Loader(plan, rows_of(stores), rank=0, world_size=1, micro_batch_size=12)
    with pytest.raises(AssertionError, match="step 20 lies outside the plan's 20 steps"):
        loader.step(20)
    loader.step(0)
    loader.close()
    loader.close()
    with pytest.raises(RuntimeError, match="shutdown"):
        loader.step(1)


def test_closing_in_the_middle_of_reading_waits_for_the_thread() -> None:
    plan, stores = make_plan()
    gate = threading.Event()
    fast = stores["web"].read
    stores["web"].read = lambda start, stop: (gate.wait(5), fast(start, stop))[1]  # type: ignore[method-assign]
    loader = Loader(plan, rows_of(stores), rank=0, world_size=1, micro_batch_size=12, prefetch_steps=5)
    gate.set()
    loader.step(0)
    gate.clear()
    closing = threading.Thread(target=loader.close)
    closing.start()
    gate.set()
    closing.join(timeout=5)
    assert not closing.is_alive()

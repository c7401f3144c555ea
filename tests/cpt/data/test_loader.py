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
    return all(torch.equal(a[name], b[name]) for a, b in pairs for name in a if a[name] is not None)


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


@pytest.mark.parametrize("threads", [2, 5])
def test_any_number_of_threads_gives_the_same_batches_in_the_same_order(
    parts: tuple[Plan, dict[str, CountingStore]], threads: int
) -> None:
    plan, stores = parts
    delays = iter(np.random.default_rng(1).random(10_000))
    shape = {"rank": 0, "world_size": 1, "micro_batch_size": 3}

    def slowly(store: CountingStore) -> None:
        fast = store.read
        store.read = lambda a, b: (time.sleep(next(delays) / 1000), fast(a, b))[1]  # type: ignore[method-assign]

    with Loader(plan, rows_of(stores), **shape) as one:
        expected = [one.step(step) for step in (*range(6), 3)]
    for store in stores.values():
        slowly(store)
    with Loader(plan, rows_of(stores), **shape, threads=threads) as many:
        assert all(same(many.step(step), batches) for step, batches in zip((*range(6), 3), expected, strict=True))


def test_ranks_that_share_rows_read_the_same_ones_and_hold_their_part(
    parts: tuple[Plan, dict[str, CountingStore]],
) -> None:
    plan, stores = parts

    def rows(rank: int, world_size: int, shared: int) -> list[torch.Tensor]:
        place = {"rank": rank, "world_size": world_size, "sequence_parallel": shared}
        with Loader(plan, rows_of(stores), **place, micro_batch_size=2) as loader:
            return [batch.input_ids_BT for batch in loader.step(5)]

    for reader in range(2):
        parts_of = [rows(2 * reader + part, 4, 2) for part in range(2)]
        whole = [torch.cat(pair, dim=1) for pair in zip(*parts_of, strict=True)]
        assert all(torch.equal(a, b) for a, b in zip(whole, rows(reader, 2, 1), strict=True))


def staged() -> tuple[Plan, dict[str, CountingStore], dict[tuple[str, int], Rows]]:
    """Five steps of 12 rows of 8 tokens, then five of 3 rows of 32."""
    _, stores = make_plan()
    sources = [
        PlanSource(
            name,
            "general" if name == "web" else "domain",
            concat_num_rows(store.num_tokens, SEQ_LEN),
            store.num_tokens,
            name,
            rows_by_length=((32, concat_num_rows(store.num_tokens, 32)),),
        )
        for name, store in stores.items()
    ]
    wishes = [StageWish(5 * 96, 0.3), StageWish(5 * 96, 0.5, seq_len=32)]
    plan, _ = build_plan(sources, wishes, seed=1, seq_len=SEQ_LEN, global_batch_rows=12, max_epochs=9)
    rows = {(name, n): concat_rows(store, n) for name, store in stores.items() for n in (SEQ_LEN, 32)}
    return plan, stores, rows


def test_a_stage_of_longer_rows_has_fewer_of_them_in_a_step_and_in_a_micro_batch() -> None:
    plan, stores, rows = staged()
    with Loader(plan, rows, rank=0, world_size=1, micro_batch_size=4, threads=3) as loader:
        assert [batch.input_ids_BT.shape for batch in loader.step(4)] == [(4, 8)] * 3
        assert [batch.input_ids_BT.shape for batch in loader.step(5)] == [(1, 32)] * 3
        for step in (9, 4, 5, 6):
            wanted = locate(plan, rows_of_rank(plan, step, rank=0, world_size=1, micro_batch_size=12).ravel())
            seq_len = 8 if step < 5 else 32
            expected = [
                concat_row(stores[plan.sources[i].name], row, seq_len).input_ids.tolist()
                for i, row in zip(wanted.source_index.tolist(), wanted.row_in_source.tolist(), strict=True)
            ]
            assert torch.cat([batch.input_ids_BT for batch in loader.step(step)]).tolist() == expected
            held = [row for rows in loader.global_rows(step) for row in rows]
            assert held == list(range(plan.rows_before(step), plan.rows_before(step + 1)))


def test_rows_of_a_length_that_nobody_opened_are_named_with_their_length() -> None:
    plan, stores, _ = staged()
    with pytest.raises(DataError, match="source 'web' of the plan has no store with rows of 32 tokens"):
        Loader(plan, rows_of(stores), rank=0, world_size=1, micro_batch_size=1)


def test_a_micro_batch_that_does_not_divide_a_later_stage_is_refused_at_once() -> None:
    plan, _, rows = staged()
    with pytest.raises(DataError, match="a step of 3 rows of 32 tokens cannot be split over world_size 2"):
        Loader(plan, rows, rank=0, world_size=2, micro_batch_size=1)

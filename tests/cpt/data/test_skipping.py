"""Rows that broke a step are blank from then on, at that step alone; everything else comes as it was."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from cpt.data.loader import Loader
from cpt.data.packing import IGNORE_INDEX, PackedRow, Rows
from cpt.data.skipping import (
    SkippedRow,
    SkippedRows,
    SkippingLoader,
    identities_of_step,
    read_skipped,
    write_skipped,
)
from cpt.plan import Plan, PlanSource, StageWish, build_plan
from cpt.rundir import DataError

SEQ_LEN, ROWS = 4, 6


def row(number: int) -> PackedRow:
    ids = np.arange(number * 10 + 1, number * 10 + 1 + SEQ_LEN)
    positions = np.array([0, 1, 0, 1])
    return PackedRow(ids, ids + 1, positions, np.array([0, 0, 1, 1]))


def plan() -> Plan:
    sources = [
        PlanSource(name, group, 8, 8 * SEQ_LEN + 1, name) for name, group in (("web", "general"), ("law", "domain"))
    ]
    made, _ = build_plan(
        sources, [StageWish(4 * ROWS * SEQ_LEN, 0.5)], seed=1, seq_len=SEQ_LEN, global_batch_rows=ROWS, max_epochs=9
    )
    return made


def loader(*, rank: int = 0, world_size: int = 1, micro: int = 3) -> Loader:
    rows = {name: Rows(8, 8 * SEQ_LEN + 1, row) for name in ("web", "law")}
    return Loader(plan(), rows, rank=rank, world_size=world_size, micro_batch_size=micro)


def skipped(step: int, places: list[int]) -> SkippedRows:
    names = identities_of_step(plan(), step - 1)
    return SkippedRows(SkippedRow(step, *names[place], None, 9.0, "a test") for place in places)


def rows_of(loader: Loader | SkippingLoader, step: int) -> list[torch.Tensor]:
    return [labels for batch in loader.step(step) for labels in batch.labels_BT]


def test_skipped_rows_are_blank_and_the_others_as_they_were() -> None:
    with loader() as plain, loader() as inner:
        blanked = SkippingLoader(inner, plan(), skipped(2, [0, 4]))
        for step in range(3):
            for place, (before, after) in enumerate(zip(rows_of(plain, step), rows_of(blanked, step), strict=True)):
                blank = step == 1 and place in (0, 4)
                assert torch.equal(after, torch.full_like(before, IGNORE_INDEX) if blank else before)


def test_a_blank_keeps_the_shape_of_its_documents_and_none_of_its_tokens() -> None:
    with loader() as inner:
        before = inner.step(1)[0]
        after = SkippingLoader(inner, plan(), skipped(2, [0])).step(1)[0]
    assert (after.input_ids_BT[0] == 0).all() and torch.equal(after.input_ids_BT[1:], before.input_ids_BT[1:])
    assert torch.equal(after.positions_BT, before.positions_BT) and torch.equal(after.segments_BT, before.segments_BT)
    assert after.num_counted == before.num_counted - SEQ_LEN


@pytest.mark.parametrize(("world_size", "micro"), [(1, 6), (2, 3), (3, 1)])
def test_the_same_rows_are_blank_for_any_number_of_ranks(world_size: int, micro: int) -> None:
    blank = 0
    for rank in range(world_size):
        with loader(rank=rank, world_size=world_size, micro=micro) as inner:
            found = rows_of(SkippingLoader(inner, plan(), skipped(2, [1, 5])), 1)
            blank += sum(bool((labels == IGNORE_INDEX).all()) for labels in found)
    assert blank == 2


def test_rows_may_be_added_while_training_goes_on() -> None:
    with loader() as inner:
        rows = SkippedRows()
        served = SkippingLoader(inner, plan(), rows)
        assert not any((labels == IGNORE_INDEX).all() for labels in rows_of(served, 1))
        assert len(rows.add(skipped(2, [3]).rows)) == 1
        assert len(rows.add(skipped(2, [3]).rows)) == 0  # known already
        assert [(labels == IGNORE_INDEX).all().item() for labels in rows_of(served, 1)].index(True) == 3


def test_tokens_that_were_left_out_do_not_count_as_seen() -> None:
    rows, whole = skipped(2, [0, 1, 2]), SkippedRows()
    assert rows.tokens_seen(plan(), 1) == whole.tokens_seen(plan(), 1)
    missing = sum(whole.tokens_seen(plan(), 2).values()) - sum(rows.tokens_seen(plan(), 2).values())
    assert missing == 3 * SEQ_LEN


def test_the_list_comes_back_from_its_file(tmp_path: Path) -> None:
    rows = (SkippedRow(7, "law", 12, 3, None, "not finite"), SkippedRow(7, "web", 1, None, 8.5, "a spike"))
    assert read_skipped(tmp_path / "skipped_rows.json") == ()
    write_skipped(tmp_path / "skipped_rows.json", rows)
    assert read_skipped(tmp_path / "skipped_rows.json") == rows


@pytest.mark.parametrize(
    "content",
    ["", "[]", '{"format_version": 2, "rows": []}', '{"format_version": 1}', '{"format_version": 1, "rows": [{}]}'],
)
def test_a_damaged_list_is_refused_by_name(tmp_path: Path, content: str) -> None:
    (tmp_path / "skipped_rows.json").write_text(content)
    with pytest.raises(DataError, match=r"skipped_rows\.json: not a list of skipped rows .*restore it"):
        read_skipped(tmp_path / "skipped_rows.json")


def test_the_file_says_what_a_person_asks(tmp_path: Path) -> None:
    write_skipped(tmp_path / "s.json", [SkippedRow(7, "law", 12, 3, 8.5, "a spike")])
    (found,) = json.loads((tmp_path / "s.json").read_text())["rows"]
    assert found == {"step": 7, "source": "law", "row": 12, "document": 3, "loss": 8.5, "reason": "a spike"}


def test_first_rows_of_a_source_are_its_own_and_differ_between_ranks() -> None:
    seen = []
    for rank in range(2):
        with loader(rank=rank, world_size=2, micro=3) as served:
            batch = served.first_rows(1)
            assert batch.source_ids_B.tolist() == [1, 1, 1]
            seen += batch.input_ids_BT[:, 0].tolist()
    assert seen == [1, 11, 21, 31, 41, 51]

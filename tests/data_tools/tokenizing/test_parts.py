"""Many tasks and one merge make the store that one process makes, whatever happens to the merge on its way."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpt.data.token_store import TokenStore
from cpt.rundir import DataError
from data_tools.store_builder import StoreRequest, StoreResult, build_store, merge_store, verify_store
from data_tools.tokenizing import parts
from data_tools.tokenizing.parts import share_of


def build_parts(request: StoreRequest, tasks: int) -> None:
    for index in reversed(range(tasks)):  # in any order
        build_store(replace(request, task=(index, tasks)))


def whole(request: StoreRequest) -> StoreResult:
    return build_store(replace(request, out=request.out.with_name("whole")))


@given(sizes=st.lists(st.integers(0, 1000), min_size=1, max_size=40), data=st.data())
def test_shares_are_consecutive_cover_all_inputs_and_are_never_empty(sizes: list[int], data: st.DataObject) -> None:
    tasks = data.draw(st.integers(1, len(sizes)))
    shares = [share_of(sizes, (index, tasks)) for index in range(tasks)]
    assert [index for share in shares for index in share] == list(range(len(sizes)))
    assert all(len(share) for share in shares)


def test_shares_are_of_about_equal_size() -> None:
    assert [list(share_of([5, 1, 1, 5], (task, 2))) for task in (0, 1)] == [[0, 1], [2, 3]]
    sizes = [len(share_of([1] * 100, (task, 8))) for task in range(8)]
    assert max(sizes) - min(sizes) <= 1


def test_more_tasks_than_inputs_are_refused(tales: StoreRequest) -> None:
    with pytest.raises(DataError, match=r"--task 4/5: there are 4 inputs, .*at most 4 tasks"):
        build_store(replace(tales, task=(4, 5)))


@pytest.mark.parametrize("tasks", [1, 3, 4])
def test_a_merged_store_has_the_content_of_one_process(tales: StoreRequest, tasks: int) -> None:
    build_parts(tales, tasks)
    merged = merge_store(tales.out)
    assert merged.splits == whole(tales).splits == verify_store(tales.out)
    assert not (tales.out / "parts").exists()
    assert merge_store(tales.out).splits == merged.splits
    for again in (tales, replace(tales, task=(0, tasks))):
        assert build_store(again).already_done


def test_shards_are_moved_and_not_copied(tales: StoreRequest) -> None:
    build_parts(tales, 2)
    inode = (tales.out / "parts/00001-of-00002/train/tokens_00000.bin").stat().st_ino
    merge_store(tales.out)
    assert inode in {file.stat().st_ino for file in (tales.out / "train").iterdir()}


class Killed(BaseException):
    """Stands for the end of the process."""


def test_a_merge_killed_before_any_of_its_moves_goes_on(tales: StoreRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    build_parts(tales, 3)
    expected, replaced = whole(tales).splits, os.replace
    kill_at = 0

    def replace_until_killed(source: Path, target: Path) -> None:
        nonlocal moves
        if moves == kill_at:
            raise Killed
        moves += 1
        replaced(source, target)

    monkeypatch.setattr(os, "replace", replace_until_killed)
    kept = tales.out.with_name("kept")
    shutil.copytree(tales.out, kept)
    while True:
        shutil.rmtree(tales.out)
        shutil.copytree(kept, tales.out)
        moves = 0
        try:
            merge_store(tales.out)
            break
        except Killed:
            with monkeypatch.context() as unhurt:
                unhurt.setattr(os, "replace", replaced)
                assert merge_store(tales.out).splits == expected == verify_store(tales.out)
        kill_at += 7
    assert kill_at > 30


def test_a_merge_killed_while_it_cleans_up_is_finished(tales: StoreRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    build_parts(tales, 2)
    with monkeypatch.context() as hurt, pytest.raises(Killed):
        hurt.setattr(parts.shutil, "rmtree", lambda *_, **__: (_ for _ in ()).throw(Killed()))
        merge_store(tales.out)
    merge_store(tales.out)
    assert not (tales.out / "parts").exists()


def test_missing_and_unfinished_parts_are_named(tales: StoreRequest) -> None:
    with pytest.raises(DataError, match=r"holds no parts|no such folder"):
        merge_store(tales.out)
    build_store(replace(tales, task=(1, 3)))
    with pytest.raises(DataError, match=r"2 of 3 parts are missing; fix: run --task 0/3, 2/3"):
        merge_store(tales.out)
    build_parts(tales, 3)
    file = tales.out / "parts/00002-of-00003/build.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"finished": False}))
    with pytest.raises(DataError, match=r"00002-of-00003: this part is unfinished; fix: run --task 2/3 again"):
        merge_store(tales.out)


def test_parts_of_two_commands_or_of_two_numbers_of_tasks_are_refused(tales: StoreRequest) -> None:
    build_parts(tales, 2)
    build_store(replace(tales, task=(0, 3)))
    with pytest.raises(DataError, match="parts of 2 and of 3 tasks"):
        merge_store(tales.out)
    shutil.rmtree(tales.out)
    build_store(replace(tales, task=(0, 2)))
    build_store(replace(tales, task=(1, 2), heldout_fraction=0.2))
    with pytest.raises(DataError, match=r"00001-of-00002: a part of another command .*heldout_fraction: 0.1 there"):
        merge_store(tales.out)


def test_a_damaged_part_is_named_and_nothing_is_moved(tales: StoreRequest) -> None:
    build_parts(tales, 2)
    file = tales.out / "parts/00001-of-00002/train/tokens_00000.bin"
    content = file.read_bytes()
    file.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    with pytest.raises(DataError, match=r"00001-of-00002/train/tokens_00000.bin: sha256 .*delete .*00001-of-00002"):
        merge_store(tales.out)
    assert not (tales.out / "train").exists()
    shutil.rmtree(file.parents[1])
    build_store(replace(tales, task=(1, 2)))
    assert merge_store(tales.out).splits == whole(tales).splits


def test_whole_stores_and_parts_do_not_share_a_folder(tales: StoreRequest) -> None:
    build_store(replace(tales, task=(0, 2)))
    with pytest.raises(DataError, match=r"holds parts made with --task; fix: finish the tasks, then `cpt data merge"):
        build_store(tales)


def test_a_part_without_text_is_no_error_but_a_store_without_is(tales: StoreRequest, tmp_path: Path) -> None:
    for number in range(4):
        (tmp_path / f"{number}.jsonl").write_text("\n")
    build_parts(tales, 2)
    with pytest.raises(DataError, match="no document with text in any part"):
        merge_store(tales.out)
    (tmp_path / "3.jsonl").write_text('{"text": "something"}\n')
    shutil.rmtree(tales.out)
    build_parts(tales, 2)
    merged = merge_store(tales.out)
    assert sum(split.documents for split in merged.splits.values()) == 1 and merged.empty_documents == 3


def test_rejects_of_all_parts_are_joined(tales: StoreRequest, tmp_path: Path) -> None:
    for number in (0, 3):
        with (tmp_path / f"{number}.jsonl").open("ab") as file:
            file.write(b'{"text": "caf\xe9"}\n{"title": "no text"}\n')
    request = replace(tales, bad_records="reject")
    build_parts(request, 2)
    merged = merge_store(tales.out)
    assert merged.rejected == {"bad_record.invalid_utf8": 2, "bad_record.no_text_key": 2}
    assert merged.rejected == whole(request).rejected and merged.splits == whole(request).splits
    lines = [json.loads(line) for line in (tales.out / "rejects.jsonl").read_bytes().splitlines()]
    assert [Path(line["origin"].rpartition(":")[0]).name for line in lines] == ["0.jsonl"] * 2 + ["3.jsonl"] * 2
    assert TokenStore.open(tales.out / "train").num_documents > 100

"""Which lines of an item file are known to be in the training corpora."""

import json
from pathlib import Path

import pytest

from cpt.eval.overlap_list import lines_known, read_overlaps
from cpt.rundir import DataError


def test_lines_count_from_one_and_belong_to_a_set_and_a_file(tmp_path: Path) -> None:
    path = tmp_path / "contaminated_items.json"
    path.write_text(json.dumps({"mmlu|anatomy_test|0": ["a"], "mmlu|anatomy_test|20": ["b"], "boolq|test|3": ["c"],
                                "boolq|v1.2|5": ["d"]}))  # fmt: skip
    overlaps = read_overlaps(path)
    assert lines_known(overlaps, tmp_path / "mmlu" / "anatomy_test.jsonl", ()) == {1, 21}
    assert lines_known(overlaps, tmp_path / "elsewhere" / "anatomy_test.jsonl", ("mmlu",)) == {1, 21}
    assert lines_known(overlaps, tmp_path / "elsewhere" / "test.jsonl", ("boolq",)) == {4}
    assert lines_known(overlaps, tmp_path / "boolq" / "v1.2.parquet", ()) == {6}
    assert lines_known(overlaps, tmp_path / "piqa" / "test.jsonl", ("piqa",)) == frozenset()


@pytest.mark.parametrize("text", ["", "[]", '{"mmlu|anatomy": []}', '{"mmlu|anatomy|x": []}', "\xff", "[" * 100_000])
def test_another_file_is_refused_with_what_it_should_be(tmp_path: Path, text: str) -> None:
    path = tmp_path / "list.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=r"list\.json: .*contaminated_items\.json"):
        read_overlaps(path)

"""Evaluation records: aggregation by hand, round trip, strict JSON."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from cpt.eval.records import (
    EvalRecord,
    SourceEval,
    aggregate,
    bits_per_byte,
    perplexity,
    read_eval,
    read_evals,
    write_eval,
)
from cpt.rundir import DataError, RunDir


def source(group: str, loss: float | None, tokens: int, tokens_per_byte: float = 0.25) -> SourceEval:
    return SourceEval(group, loss, bits_per_byte(loss, tokens_per_byte), perplexity(loss), tokens, documents=2)


def test_a_group_weighs_its_sources_by_tokens() -> None:
    groups = aggregate(
        {"a": source("general", 2.0, 30), "b": source("general", 4.0, 10), "c": source("domain", 1.0, 5)}
    )
    assert groups["general"].loss == pytest.approx(2.5)
    assert groups["general"].ppl == pytest.approx(math.exp(2.5))
    assert groups["general"].tokens == 40
    assert groups["domain"].loss == 1.0


def test_bits_per_byte_of_a_group_are_total_bits_over_total_bytes() -> None:
    # 30 tokens of 4 bytes at 2 nats, 10 tokens of 2 bytes at 4 nats: 100 nats over 140 bytes.
    groups = aggregate({"a": source("general", 2.0, 30, 0.25), "b": source("general", 4.0, 10, 0.5)})
    assert groups["general"].bpb == pytest.approx(100 / math.log(2) / 140)


def test_one_nat_per_four_byte_token_is_a_third_of_a_bit_per_byte() -> None:
    assert bits_per_byte(1.0, 0.25) == pytest.approx(0.36067, abs=1e-5)


def test_a_source_without_a_loss_leaves_its_group_without_one() -> None:
    groups = aggregate({"a": source("general", None, 30), "b": source("general", 4.0, 10)})
    assert groups["general"].loss is None


def test_a_perplexity_beyond_floating_point_is_none() -> None:
    assert perplexity(800.0) is None


def test_records_are_read_back_as_written_and_in_order(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    sources = {"a": source("general", 2.0, 30), "b": source("domain", None, 10)}
    records = [EvalRecord(step, step * 8, sources, aggregate(sources), ("source 'b': nan",)) for step in (0, 500)]
    for record in reversed(records):
        write_eval(run.eval_file(record.step), record)
    assert read_evals(run.evals) == records
    raw = json.loads(run.eval_file(500).read_text())
    assert raw["sources"]["b"]["loss"] is None
    assert set(raw) == {"step", "tokens_seen", "sources", "groups", "errors"}


def test_a_record_of_an_older_version_has_no_standard_error(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    sources = {"a": replace(source("general", 2.0, 30), stderr=0.25)}
    write_eval(run.eval_file(4), EvalRecord(4, 32, sources, aggregate(sources)))
    assert read_eval(run.eval_file(4)).sources["a"].stderr == 0.25
    raw = json.loads(run.eval_file(4).read_text())
    del raw["sources"]["a"]["stderr"]
    run.eval_file(4).write_text(json.dumps(raw))
    assert read_eval(run.eval_file(4)).sources["a"] == source("general", 2.0, 30)


def test_tables_beside_the_records_are_not_taken_for_records(tmp_path: Path) -> None:
    sources = {"a": source("general", 2.0, 30)}
    write_eval(tmp_path / "step_00000004.json", EvalRecord(4, 32, sources, aggregate(sources)))
    (tmp_path / "step_00000004.documents.parquet").write_bytes(b"PAR1")
    (tmp_path / "step_00000008.documents.parquet").write_bytes(b"PAR1")
    assert [record.step for record in read_evals(tmp_path)] == [4]


def test_a_folder_that_is_not_there_holds_no_records(tmp_path: Path) -> None:
    assert read_evals(tmp_path / "evals") == []


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"\xff\xfe",
        b'{"step": 1}',
        b'{"step": 1, "tokens_seen": 0, "sources": {"a": 1}, "groups": {}}',
        b'{"step": Infinity, "tokens_seen": 0, "sources": {}, "groups": {}}',
        b'{"step": 7, "tokens_seen": 0, "sources": {}, "groups": {}}',
    ],
)
def test_a_file_of_another_shape_or_step_is_refused_with_its_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "step_00000001.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"step_00000001\.json.*run `cpt eval` again"):
        read_eval(path)


@pytest.mark.parametrize(("field", "value"), [("loss", "2.0"), ("loss", True), ("tokens", None), ("tokens", 1.5)])
def test_a_value_of_another_type_is_refused_with_its_place(tmp_path: Path, field: str, value: object) -> None:
    path = tmp_path / "step_00000004.json"
    sources = {"a": source("general", 2.0, 30)}
    write_eval(path, EvalRecord(4, 32, sources, aggregate(sources)))
    raw = json.loads(path.read_text())
    raw["sources"]["a"][field] = value
    path.write_text(json.dumps(raw))
    with pytest.raises(DataError, match=rf"sources\.a\.{field}"):
        read_eval(path)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_another_tool_wrote_and_is_not_finite_is_unknown(tmp_path: Path, loss: float) -> None:
    path = tmp_path / "step_00000004.json"
    sources = {"a": source("general", 2.0, 30)}
    write_eval(path, EvalRecord(4, 32, sources, aggregate(sources)))
    raw = json.loads(path.read_text())
    raw["sources"]["a"]["loss"] = raw["groups"]["general"]["loss"] = loss
    path.write_text(json.dumps(raw))
    assert read_eval(path).sources["a"].loss is None
    assert read_eval(path).groups["general"].loss is None


def test_a_missing_file_is_refused_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"step_00000002\.json"):
        read_eval(tmp_path / "step_00000002.json")

"""A stage loses nothing silently, goes on where it was killed, and ends with the same bytes however it was run."""

import base64
import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import orjson
import pytest
import zstandard

from cpt.rundir import DataError
from data_tools.corpus.document import Document, Reject, Step
from data_tools.corpus.stage import StageRequest, finish_stage, run_stage
from data_tools.sources import ReadOptions, read_documents, resolve_inputs


def no_short_ones(least: int, pause: float = 0.0) -> Step:
    def step(document: Document) -> Reject | None:
        time.sleep(pause)
        document.text = document.text.upper()
        return Reject("length.too_short", f"{len(document.text)} < {least}") if len(document.text) < least else None

    return step


def every_other(unit: int) -> Step:
    seen = [unit]

    def step(document: Document) -> Reject | None:
        seen[0] += 1
        return Reject("position.odd") if seen[0] % 2 == 0 else None

    return step


def write_inputs(folder: Path, files: int = 3, documents: int = 4) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(files):
        lines = [
            orjson.dumps({"text": f"text {number} " + "word " * index, "id": index, "source": f"s{number}"})
            for index in range(documents)
        ]
        (folder / f"{number}.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    return str(folder / "*.jsonl")


def request(inputs: str, out: Path, **changes: Any) -> StageRequest:
    standard = {"verb": "clean", "identity": {"least": 12}, "make_step": functools.partial(no_short_ones, 12)}
    return StageRequest(inputs=(inputs,), out=out, **(standard | changes))


def lines_of(folder: Path) -> list[dict[str, Any]]:
    raw = b"".join(
        zstandard.ZstdDecompressor().stream_reader(file.open("rb")).read() for file in sorted(folder.iterdir())
    )
    return [orjson.loads(line) for line in raw.splitlines()]


def test_records_read_are_documents_kept_plus_rejects_with_their_reasons(tmp_path: Path) -> None:
    summary = run_stage(request(write_inputs(tmp_path / "in"), tmp_path / "out"))
    kept, dropped = lines_of(tmp_path / "out" / "documents"), lines_of(tmp_path / "out" / "rejects")
    assert summary["records"] == 12 == len(kept) + len(dropped) and summary["documents"] == len(kept) == 9
    assert kept[0] == {"text": "TEXT 0 WORD ", "id": 1, "source": "s0"}
    assert dropped[0]["reason"] == "length.too_short" and dropped[0]["detail"] == "7 < 12"
    assert dropped[0]["id"] == 0 and dropped[0]["origin"].endswith("0.jsonl:1")
    assert summary["reasons"]["length.too_short"]["documents"] == 3
    assert len(summary["reasons"]["length.too_short"]["examples"]) == 3
    assert summary["bytes_read"] == summary["bytes_kept"] + summary["reasons"]["length.too_short"]["bytes"]


def test_workers_and_tasks_change_nothing_in_the_output(tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path / "in", files=4)
    one = run_stage(request(inputs, tmp_path / "one"))
    two = run_stage(request(inputs, tmp_path / "two", workers=2))
    assert run_stage(request(inputs, tmp_path / "tasks", task=(0, 2))) == {}
    split = run_stage(request(inputs, tmp_path / "tasks", task=(1, 2)))
    assert one["content_hash"] == two["content_hash"] == split["content_hash"]
    assert finish_stage(tmp_path / "tasks") == split


def test_a_finished_stage_is_found_finished(tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path / "in")
    first = run_stage(request(inputs, tmp_path / "out"))
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "out" / "documents").iterdir()}
    assert run_stage(request(inputs, tmp_path / "out")) == first
    assert before == {file: file.stat().st_mtime_ns for file in (tmp_path / "out" / "documents").iterdir()}


@pytest.mark.parametrize(
    "change",
    [
        {"identity": {"least": 13}},
        {"bad_records": "fail"},
        {"verb": "dedup"},
        {"read": ReadOptions(txt_documents="blank-line")},
    ],
)
def test_the_folder_of_another_command_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    inputs = write_inputs(tmp_path / "in")
    run_stage(request(inputs, tmp_path / "out"))
    with pytest.raises(DataError, match="output of another command"):
        run_stage(request(inputs, tmp_path / "out", **change))


def test_a_changed_input_is_noticed(tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path / "in")
    run_stage(request(inputs, tmp_path / "out"))
    with (tmp_path / "in" / "0.jsonl").open("a") as file:
        file.write('{"text": "one more"}\n')
    with pytest.raises(DataError, match="inputs"):
        run_stage(request(inputs, tmp_path / "out"))


def test_a_folder_with_foreign_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out" / "documents").mkdir(parents=True)
    (tmp_path / "out" / "documents" / "mine.txt").write_text("precious")
    with pytest.raises(DataError, match=r"mine\.txt"):
        run_stage(request(write_inputs(tmp_path / "in"), tmp_path / "out"))
    assert (tmp_path / "out" / "documents" / "mine.txt").read_text() == "precious"


def test_bad_records_are_rejects_or_end_the_stage_as_asked(tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path / "in", files=1)
    with (tmp_path / "in" / "0.jsonl").open("ab") as file:
        file.write(b'{"text": 5}\nnot json\n\xff\xfe\n')
    summary = run_stage(request(inputs, tmp_path / "out"))
    bad = {reason: entry["documents"] for reason, entry in summary["reasons"].items() if reason.startswith("bad_")}
    assert sum(bad.values()) == 3 and summary["records"] == 7
    kept = [line.get("raw_base64") for line in lines_of(tmp_path / "out" / "rejects")]
    assert base64.b64decode(kept[-1]) == b"\xff\xfe" and kept[-2] is None
    with pytest.raises(DataError, match=r"5.*--bad-records reject"):
        run_stage(request(inputs, tmp_path / "strict", bad_records="fail"))


def test_a_reject_keeps_its_own_fields_beside_the_reason(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "short", "reason": "mine", "origin": "web"}\n')
    run_stage(request(str(tmp_path / "in.jsonl"), tmp_path / "out"))
    dropped = lines_of(tmp_path / "out" / "rejects")[0]
    assert dropped["reason"] == "length.too_short" and dropped["fields.reason"] == "mine"
    assert dropped["fields.origin"] == "web"


def test_a_step_may_depend_on_the_unit(tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path / "in", files=2)
    run_stage(request(inputs, tmp_path / "out", make_step=None, make_unit_step=every_other))
    assert [line["id"] for line in lines_of(tmp_path / "out" / "documents")] == [0, 2, 1, 3]


def test_a_missing_shard_is_noticed_before_the_stage_counts_as_complete(tmp_path: Path) -> None:
    run_stage(request(write_inputs(tmp_path / "in"), tmp_path / "out"))
    (tmp_path / "out" / "documents" / "00001.jsonl.zst").unlink()
    with pytest.raises(DataError, match=r"00001\.jsonl\.zst: is missing.*delete .*00001\.json"):
        finish_stage(tmp_path / "out")


def test_a_merge_reads_the_documents_again(tmp_path: Path) -> None:
    run_stage(request(write_inputs(tmp_path / "in"), tmp_path / "out"))
    shard = tmp_path / "out" / "documents" / "00001.jsonl.zst"
    raw = bytearray(shard.read_bytes())
    raw[len(raw) // 2] ^= 1
    shard.write_bytes(raw)
    with pytest.raises(DataError, match=r"00001\.jsonl\.zst: is not what its unit wrote"):
        finish_stage(tmp_path / "out", verify=True)


@pytest.mark.parametrize("name", ["stage.json", "done/00000.json"])
@pytest.mark.parametrize("content", ["{}", '{"format_version": 1}', "[]", "nonsense"])
def test_a_damaged_state_file_is_named(tmp_path: Path, name: str, content: str) -> None:
    run_stage(request(write_inputs(tmp_path / "in"), tmp_path / "out"))
    (tmp_path / "out" / name).write_text(content)
    with pytest.raises(DataError, match=name.split("/")[-1]):
        finish_stage(tmp_path / "out")


def test_a_stage_folder_is_an_input_once_it_is_complete(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_stage(request(write_inputs(tmp_path / "in"), out))
    texts = [d.text for entry in resolve_inputs([str(out)]) for d in read_documents(entry, ReadOptions())]  # type: ignore[union-attr]
    assert len(texts) == 9
    (out / "summary.json").unlink()
    with pytest.raises(DataError, match="out"):
        resolve_inputs([str(out)])


def test_killed_at_any_moment_it_continues_to_the_same_bytes(tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path / "in", files=6, documents=20)
    whole = run_stage(request(inputs, tmp_path / "whole"))
    script = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import functools, pathlib, test_stage\n"
        "from data_tools.corpus.stage import run_stage\n"
        "if __name__ == '__main__':\n"
        "    step = functools.partial(test_stage.no_short_ones, 12, 0.005)\n"
        f"    run_stage(test_stage.request({inputs!r}, pathlib.Path({str(tmp_path / 'out')!r}), make_step=step))\n"
    )
    (tmp_path / "job.py").write_text(script)
    for done in (1, 3):
        with subprocess.Popen([sys.executable, str(tmp_path / "job.py")]) as job:
            deadline = time.monotonic() + 60
            while len(list((tmp_path / "out").glob("done/*.json"))) < done and time.monotonic() < deadline:
                time.sleep(0.01)
            os.kill(job.pid, signal.SIGKILL)
    assert not (tmp_path / "out" / "summary.json").exists()
    assert run_stage(request(inputs, tmp_path / "out"))["content_hash"] == whole["content_hash"]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["records"] == 120
    assert len(list((tmp_path / "out" / "documents").glob("*.zst"))) == 6

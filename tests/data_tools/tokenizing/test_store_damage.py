"""What goes wrong around a build: damaged records, kills, a full disk, a damaged store. Nothing is lost silently."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cpt.rundir import DataError
from data_tools.sources import ReadOptions, resolve_inputs
from data_tools.store_builder import StoreRequest, build_store, predict_store, verify_store
from data_tools.tokenizing import prediction
from data_tools.tokenizing.jobs import BATCH_BYTES, Reading, make_jobs
from data_tools.tokenizing.request import BadRecords

ROOT = Path(__file__).parents[3]
JOB = """
import sys, time
from pathlib import Path
from cpt.failures import explain
from data_tools import store_builder
from data_tools.tokenizing import jobs
{before}
jobs.BATCH_BYTES = 900
add = jobs._Held.add
jobs._Held.add = lambda self, raw: (time.sleep({pause}), add(self, raw))[1]
inputs, tokenizer, out, workers = sys.argv[1:]
try:
    store_builder.build_store(store_builder.StoreRequest((inputs,), Path(tokenizer), Path(out), "tales", "general",
                              heldout_fraction=0.1, segment_bytes=4000, workers=int(workers)))
except Exception as error:
    code, message = explain(error)
    print(message)
    sys.exit(code)
"""


def start(request: StoreRequest, *, pause: float = 0, before: str = "") -> subprocess.Popen[str]:
    arguments = [request.inputs[0], str(request.tokenizer), str(request.out), str(request.workers)]
    command = [sys.executable, "-c", JOB.format(pause=pause, before=before), *arguments]
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("workers", [1, 2])
def test_three_kills_at_any_moment_leave_the_content_alone(tales: StoreRequest, workers: int) -> None:
    whole = build_store(replace(tales, out=tales.out.with_name("whole")))
    draw, request = random.Random(workers), replace(tales, workers=workers)
    for segments in (1, 3, 5):
        with start(request, pause=0.005) as job:
            wait_for_segments(request.out, segments)
            time.sleep(draw.random() / 20)
            assert job.poll() is None
            job.send_signal(signal.SIGKILL)
    assert not (request.out / "train/manifest.json").exists()
    result = build_store(request)
    assert result.splits == whole.splits == verify_store(request.out) and result.resumed_segments >= 5


def wait_for_segments(store: Path, segments: int) -> None:
    deadline = time.monotonic() + 30
    while True:
        assert time.monotonic() < deadline, f"{store} did not come to {segments} segments"
        file = store / "build.json"
        if file.exists() and len(json.loads(file.read_text())["splits"]["train"]["shards"]) >= segments:
            return
        time.sleep(0.005)


def test_a_full_disk_says_how_much_is_missing_and_the_build_goes_on_later(tales: StoreRequest) -> None:
    whole = build_store(replace(tales, out=tales.out.with_name("whole"), segment_bytes=20_000))
    # a quota: no file may be larger than what the first segments need
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (4500, 4500))"
    with start(tales, before=limit) as job:
        printed, _ = job.communicate()
    assert job.returncode == 3, printed
    assert (
        printed.startswith(f"environment error: {tales.out}: File too large; about ") and " are free; fix: " in printed
    )
    assert build_store(tales).splits == whole.splits


def test_no_room_is_said_before_the_first_byte(tales: StoreRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    prediction = predict_store(tales)
    assert prediction.store_bytes is not None and not tales.out.exists()
    usage = shutil.disk_usage(tales.out.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=prediction.store_bytes // 2))
    with pytest.raises(
        RuntimeError, match=r"store: the store needs about \d+(\.\d)? kB, .* are free there; fix: free some"
    ):
        build_store(tales)
    assert not list(tales.out.glob("*/*"))


def test_the_predicted_size_is_near_the_real_one(tales: StoreRequest) -> None:
    prediction = predict_store(tales)
    assert not tales.out.exists()
    result = build_store(tales)
    tokens = sum(split.tokens for split in result.splits.values())
    assert prediction.tokens is not None and 0.9 * tokens < prediction.tokens < 1.1 * tokens
    assert prediction.sampled_documents == 200 and prediction.documents == 200
    size = sum(file.stat().st_size for file in tales.out.glob("*/*.bin"))
    assert prediction.store_bytes is not None and 0.9 * size < prediction.store_bytes < 1.1 * size


@pytest.mark.parametrize("workers", [1, 2])
def test_rejected_records_are_counted_and_kept_once_through_a_kill(tales: StoreRequest, workers: int) -> None:
    folder = tales.out.parent
    bad = [b'{"text": "caf\xe9"}\n', b"{\n", b'{"text": 3}\n', b'{"title": ""}\n', b'{"text": null}\n']
    for number in range(4):
        lines = (folder / f"{number}.jsonl").read_bytes().splitlines(keepends=True)
        (folder / f"{number}.jsonl").write_bytes(b"".join(line + bad[i % 5] for i, line in enumerate(lines)))
    request = replace(tales, bad_records="reject", workers=workers)
    with pytest.raises(DataError, match=r"0.jsonl: line 2: invalid UTF-8"):
        build_store(tales)
    # the other tests' job cannot be used: it stops at bad records; so the kill is an exception in this process
    stopped = replace(request, workers=1)
    with pytest.raises(KeyboardInterrupt):
        build_store(stopped, progress=interrupt_after(3))
    result = build_store(request)
    reasons = ("invalid_utf8", "not_json", "not_text", "no_text_key")
    assert result.rejected == {f"bad_record.{reason}": 40 for reason in reasons} and result.empty_documents == 40
    kept = [json.loads(line) for line in (request.out / "rejects.jsonl").read_bytes().splitlines()]
    assert len(kept) == 160 and {"raw_base64"} < kept[0].keys() and kept[1]["raw"] == "{"
    assert sum(split.documents for split in result.splits.values()) == 200


def interrupt_after(calls: int):  # type: ignore[no-untyped-def]
    left = iter(range(calls))

    def progress(done: int, total: int) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt

    return progress


def test_a_damaged_store_fails_verification_with_the_name_of_the_file(tales: StoreRequest) -> None:
    result = build_store(tales)
    assert verify_store(tales.out) == result.splits
    assert verify_store(tales.out / "heldout") == {"heldout": result.splits["heldout"]}
    file = tales.out / "heldout/documents_00000.bin"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(DataError, match=r"heldout/documents_00000.bin: sha256 is"):
        verify_store(tales.out)


def test_nothing_but_rejects_is_written_in_segments_of_bounded_size(tmp_path: Path) -> None:
    line = b'{"title": "' + b"x" * 2000 + b'"}\n'
    (tmp_path / "a.jsonl").write_bytes(line * 5000 + b'{"text": "end"}\n')
    reading = Reading(ReadOptions(), "reject", 0.0, 4 << 20, None)
    found = list(make_jobs(resolve_inputs([str(tmp_path / "a.jsonl")]), reading, 0, 0))
    sizes = [sum(len(reject.raw) for reject in job.rejects) for job in found]
    assert sum(map(len, (job.rejects for job in found))) == 5000 and max(sizes) <= BATCH_BYTES
    assert sum(job.ends_segment for job in found) >= 3 and found[-1].texts == [b"end"]


@pytest.mark.parametrize(
    ("line", "bad_records"),
    [
        (b'{"title": "' + b"x" * 2000 + b'"}\n', "reject"),
        (b'{"text": "", "title": "' + b"x" * 2000 + b'"}\n', "reject"),
        (b'{"text": ""}\n', "fail"),
        (b"\n", "fail"),
    ],
)
def test_the_look_at_an_input_without_text_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: bytes, bad_records: BadRecords
) -> None:
    monkeypatch.setattr(prediction, "_GIVE_UP_BYTES", 1 << 20)
    size = 4 << 20
    (tmp_path / "a.jsonl").write_bytes(line * (size // len(line)))
    inputs = resolve_inputs([str(tmp_path / "a.jsonl")])
    assert not prediction.take_sample(inputs, ReadOptions(), bad_records).texts
    assert inputs[0].done_bytes < size // 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: {"format_version": 2},
        lambda raw: [],
        lambda raw: raw | {"x": 1},
        lambda raw: raw | {"record": "1"},
        lambda raw: raw | {"request": {}},
        lambda raw: raw | {"label": {}},
        lambda raw: raw | {"rejected": {"a": None}},
        lambda raw: raw | {"splits": {"train": raw["splits"]["train"]}},
        lambda raw: raw | {"splits": raw["splits"] | {"train": {"shards": [{"tokens": 1}]}}},
    ],
)
def test_a_damaged_state_of_a_build_is_named(tales: StoreRequest, damage: Callable[[Any], Any]) -> None:
    build_store(tales)
    file = tales.out / "build.json"
    file.write_text(json.dumps(damage(json.loads(file.read_text()))))
    with pytest.raises(DataError, match=r"build.json: damaged .*fix: delete the folder and run again"):
        build_store(tales)

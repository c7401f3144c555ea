"""From raw text to a store: the same bytes whatever the workers and whatever happened on the way."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from cpt.data.token_store import TokenStore
from cpt.rundir import DataError
from data_tools.encoders import load_encoder
from data_tools.sources import ReadOptions
from data_tools.store_builder import StoreRequest, build_store, is_heldout
from data_tools.tokenizing import jobs
from data_tools.train_tokenizer import train_bpe

TEXTS = [f"Document {i} tells of {i * 7919 % 1009} cats and ünïcödé. " * (i % 5 + 1) for i in range(200)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_bpe(TEXTS, out=tmp_path_factory.mktemp("bpe"), vocab_size=300)


@pytest.fixture
def request_(tmp_path: Path, tokenizer: Path) -> StoreRequest:
    for name, texts in (("a", TEXTS[:120]), ("b", TEXTS[120:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return StoreRequest(
        inputs=(str(tmp_path / "*.jsonl"),), tokenizer=tokenizer, out=tmp_path / "store", source="tales", domain="general",
        heldout_fraction=0.1, segment_bytes=4000, workers=1,
    )  # fmt: skip


def file_hashes(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def test_every_document_is_in_one_split_and_ends_with_eos(request_: StoreRequest, tokenizer: Path) -> None:
    result = build_store(request_)
    encoder = load_encoder(tokenizer)
    for split, heldout in (("train", False), ("heldout", True)):
        store = TokenStore.open(request_.out / split)
        store.verify()
        texts = [text for text in TEXTS if is_heldout(text.encode(), 0.1) == heldout]
        expected = [[*encoder.encode_batch([text])[0].tolist(), encoder.eos_id] for text in texts]
        assert [document.tolist() for document in store.documents()] == expected
        assert store.manifest.utf8_bytes == sum(len(text.encode()) for text in texts)
        assert store.manifest.tokenizer.fingerprint == encoder.facts.fingerprint
        assert len(store.manifest.shards) > 3
        assert result.splits[split].documents == len(texts) > 5
    assert not result.warnings and result.empty_documents == 0


def test_one_and_two_workers_write_the_same_files(request_: StoreRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "BATCH_BYTES", 700)
    build_store(request_)
    build_store(replace(request_, out=request_.out.with_name("two"), workers=2))
    assert file_hashes(request_.out) == file_hashes(request_.out.with_name("two"))


def test_batches_and_segments_leave_the_content_hash_alone(
    request_: StoreRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build_store(request_)
    monkeypatch.setattr(jobs, "BATCH_BYTES", 300)
    second = build_store(replace(request_, out=request_.out.with_name("two"), segment_bytes=1 << 20))
    assert {name: split.content_hash for name, split in first.splits.items()} == {
        name: split.content_hash for name, split in second.splits.items()
    }


def test_the_split_does_not_depend_on_the_order_of_documents() -> None:
    assert [is_heldout(text.encode(), 0.1) for text in TEXTS[::-1]] == [is_heldout(t.encode(), 0.1) for t in TEXTS][
        ::-1
    ]
    share = sum(is_heldout(str(i).encode(), 0.1) for i in range(5000)) / 5000
    assert 0.08 < share < 0.12
    assert not any(is_heldout(text.encode(), 0.0) for text in TEXTS)


def test_progress_runs_up_to_all_bytes_of_the_inputs(request_: StoreRequest) -> None:
    seen: list[tuple[int, int]] = []
    build_store(request_, progress=lambda done, total: seen.append((done, total)))
    total = sum(file.stat().st_size for file in request_.out.parent.glob("*.jsonl"))
    assert seen[-1] == (total, total) and seen == sorted(seen)


KILLED_JOB = """
import os, sys, time
from pathlib import Path
from data_tools import store_builder
from data_tools.tokenizing import jobs
save = store_builder._Writers._finish_segment
def stop_after_two(self, job):
    if len(self._build.splits["train"].shards) == 2:
        Path(self._folder, "..", "ready").touch()
        time.sleep(60)
    save(self, job)
store_builder._Writers._finish_segment = stop_after_two
jobs.BATCH_BYTES = 900
inputs, tokenizer, out, workers = sys.argv[1:]
store_builder.build_store(store_builder.StoreRequest((inputs,), Path(tokenizer), Path(out), "tales", "general",
                          heldout_fraction=0.1, segment_bytes=4000, workers=int(workers)))
"""


def wait_for(file: Path) -> None:
    deadline = time.monotonic() + 30
    while not file.exists():
        assert time.monotonic() < deadline, f"{file} did not appear"
        time.sleep(0.01)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_job_goes_on_behind_the_last_finished_segment(request_: StoreRequest, workers: int) -> None:
    build_store(replace(request_, out=request_.out.with_name("whole")))
    command = [
        sys.executable,
        "-c",
        KILLED_JOB,
        request_.inputs[0],
        str(request_.tokenizer),
        str(request_.out),
        str(workers),
    ]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE) as job:
        try:
            wait_for(request_.out.parent / "ready")
            with pytest.raises(DataError, match=rf"process {job.pid} on .* is writing here"):
                build_store(request_)
        finally:
            job.send_signal(signal.SIGKILL)
    with pytest.raises(DataError, match="the store is unfinished"):
        TokenStore.open(request_.out / "train")

    result = build_store(request_)
    assert result.resumed_segments == 2 and not result.already_done
    assert file_hashes(request_.out) == file_hashes(request_.out.with_name("whole"))


def test_the_same_command_on_a_finished_store_changes_nothing(request_: StoreRequest) -> None:
    first = build_store(request_)
    before = file_hashes(request_.out)
    second = build_store(replace(request_, workers=2))
    assert second.already_done and second.splits == first.splits
    assert file_hashes(request_.out) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heldout_fraction": 0.2}, "heldout_fraction: 0.1 there, 0.2 now"),
        ({"source": "other"}, 'source: "tales" there, "other" now'),
        ({"read": ReadOptions(text_key="text", txt_documents="blank-line")}, "txt_documents"),
    ],
)
def test_another_command_on_a_store_is_refused(request_: StoreRequest, change: dict[str, object], message: str) -> None:
    build_store(request_)
    with pytest.raises(
        DataError, match=f"holds the store of another command .*{message}.*fix: --out with a new folder"
    ):
        build_store(replace(request_, **change))  # type: ignore[arg-type]


def test_another_tokenizer_or_a_changed_input_is_refused(request_: StoreRequest, tmp_path: Path) -> None:
    build_store(request_)
    other = train_bpe(TEXTS, out=tmp_path / "other", vocab_size=299)
    with pytest.raises(DataError, match=r"another command .*tokenizer: "):
        build_store(replace(request_, tokenizer=other))
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write('{"text": "one more"}\n')
    with pytest.raises(DataError, match=r"another command .*inputs: "):
        build_store(request_)


def test_a_folder_that_holds_something_else_is_refused(request_: StoreRequest) -> None:
    request_.out.mkdir()
    (request_.out / "thesis.tex").touch()
    with pytest.raises(DataError, match=r"holds \['thesis.tex'\] but no build.json"):
        build_store(request_)
    assert [file.name for file in request_.out.iterdir()] == ["thesis.tex"]


def test_a_corpus_without_text_is_refused_and_leaves_the_folder_usable(request_: StoreRequest, tmp_path: Path) -> None:
    for content in (b"", b'{"text": ""}\n\n'):
        (tmp_path / "empty.jsonl").write_bytes(content)
        with pytest.raises(DataError, match=r"empty.jsonl: no document with text in 1 inputs"):
            build_store(replace(request_, inputs=(str(tmp_path / "empty.jsonl"),)))
    build_store(request_)


def test_empty_documents_are_skipped_and_counted(request_: StoreRequest, tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text('{"text": ""}\n{"text": null}\n\n{"text": "last"}\n')
    result = build_store(request_)
    assert result.empty_documents == 3
    assert sum(split.documents for split in result.splits.values()) == len(TEXTS) + 1


def test_a_bad_line_far_in_is_reported_with_its_place(request_: StoreRequest, tmp_path: Path) -> None:
    with (tmp_path / "b.jsonl").open("ab") as file:
        file.write(b'{"text": "caf\xe9"}\n')
    with pytest.raises(DataError, match=r"b.jsonl: line 81: invalid UTF-8"):
        build_store(request_)


def test_an_empty_heldout_split_is_a_warning(request_: StoreRequest) -> None:
    result = build_store(replace(request_, heldout_fraction=1e-9))
    (warning,) = result.warnings
    assert "the heldout split is empty: too few documents for heldout_fraction 1e-09; give" in warning
    assert "--heldout-fraction" in warning and "--txt-documents blank-line" in warning
    assert TokenStore.open(request_.out / "heldout").num_tokens == 0


def test_all_wrong_settings_are_named_at_once(request_: StoreRequest) -> None:
    with pytest.raises(DataError, match=r"heldout_fraction is 1, must be 0 <= x < 1; workers is 0, must be at least 1"):
        build_store(replace(request_, heldout_fraction=1, workers=0))


def test_a_vocabulary_above_65536_is_stored_in_32_bits(request_: StoreRequest, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    wide = Tokenizer.from_file(str(request_.tokenizer / "tokenizer.json"))
    wide.add_tokens([f"<extra{i}>" for i in range(65_400)])
    wide.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "c.jsonl").write_text('{"text": "here <extra65399>"}\n')
    build_store(
        replace(
            request_,
            tokenizer=tmp_path,
            eos_token="<|endoftext|>",
            inputs=(str(tmp_path / "c.jsonl"),),
            heldout_fraction=0,
        )
    )
    [document] = TokenStore.open(request_.out / "train").documents()
    assert document.dtype == "uint32" and document[-2] == wide.token_to_id("<extra65399>") > 65_536


def test_a_stale_lock_file_does_not_block(request_: StoreRequest) -> None:
    request_.out.mkdir()
    (request_.out / "writer.lock").write_text("process 1 on elsewhere")
    build_store(request_)
    assert not (request_.out / "writer.lock").exists()


def test_a_document_of_50_mb_takes_bounded_memory(request_: StoreRequest, tmp_path: Path) -> None:
    (tmp_path / "big.jsonl").write_text(json.dumps({"text": "The quick brown fox sees 17 dogs. " * 1_500_000}))
    program = (  # VmHWM, because getrusage carries over the peak of the parent
        "import re, sys; from pathlib import Path; from data_tools.store_builder import *\n"
        "r = build_store(StoreRequest((sys.argv[1],), Path(sys.argv[2]), Path(sys.argv[3]), 's', 'd', workers=2))\n"
        "peak = re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1]\n"
        "print(r.splits['train'].documents + r.splits['heldout'].documents, peak)"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "big.jsonl"), str(request_.tokenizer), str(request_.out)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    documents, peak_kib = map(int, output.split())
    assert documents == 1 and peak_kib < 800_000

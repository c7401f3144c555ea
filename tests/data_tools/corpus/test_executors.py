"""A verb split into tasks gives what it gives in one piece: by local processes, and on Slurm where a cluster answers."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cpt.rundir import DataError
from data_tools.corpus.executors import Submission, out_of, submit
from data_tools.train_tokenizer import train_bpe


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    for number in range(3):
        texts = [f"text {number} {line} " + "some words " * 5 for line in range(20)]
        (tmp_path / f"{number}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    train_bpe(["text some words 0123456789"], out=tmp_path / "tokenizer", vocab_size=300)
    return tmp_path


def arguments(corpus: Path, out: str) -> tuple[str, ...]:
    options = {"input": "*.jsonl", "tokenizer": "tokenizer", "out": out}
    paths = [part for name, value in options.items() for part in (f"--{name}", str(corpus / value))]
    return ("tokenize", *paths, "--source", "s", "--domain", "d", "--heldout-fraction", "0.2")


def cpt_data(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cpt.cli", "data", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def content_hashes(store: Path) -> list[str]:
    return [json.loads((store / split / "manifest.json").read_text())["content_hash"] for split in ("train", "heldout")]


def test_local_tasks_make_the_store_that_one_process_makes(corpus: Path) -> None:
    whole = cpt_data(*arguments(corpus, "whole"))
    assert whole.returncode == 0, whole.stderr
    split = cpt_data("submit", "--executor", "local", "--tasks", "3", "--workers", "2", *arguments(corpus, "split"))
    assert split.returncode == 0 and "3 tasks done and merged" in split.stdout, split.stderr
    assert content_hashes(corpus / "split") == content_hashes(corpus / "whole")


def test_a_verb_of_several_passes_is_sent_until_its_tasks_have_done_them_all(corpus: Path) -> None:
    (corpus / "3.jsonl").write_bytes((corpus / "1.jsonl").read_bytes())
    dedup = ("dedup", "--source", f"a={corpus / '*.jsonl'}", "--workers", "1", "--out")
    split = cpt_data("submit", "--executor", "local", "--tasks", "2", *dedup, str(corpus / "split"))
    assert split.returncode == 0, split.stderr
    whole = cpt_data(*dedup, str(corpus / "whole"))
    assert whole.returncode == 0, whole.stderr
    one, other = ((corpus / name / "a" / "summary.json").read_text() for name in ("split", "whole"))
    assert json.loads(one)["content_hash"] == json.loads(other)["content_hash"]
    assert json.loads(one)["documents"] < 80


def test_a_failing_task_fails_the_submission_with_its_own_message(corpus: Path) -> None:
    (corpus / "9.jsonl").write_text('{"txt": 1}\n')
    failed = cpt_data("submit", "--executor", "local", "--tasks", "2", *arguments(corpus, "out"))
    assert failed.returncode == 2 and "9.jsonl: line 1: no text under 'text'" in failed.stderr
    assert not (corpus / "out" / "train" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("inspect", "store"), "cannot split 'inspect' into tasks; verbs that can be: "),
        ((), "cannot split 'nothing'"),
        (("tokenize", "--input", "x"), "Missing option"),
        (("tokenize", "--inputs", "x"), "No such option"),
    ],
)
def test_a_wrong_argument_is_found_before_any_task_starts(options: tuple[str, ...], message: str) -> None:
    refused = cpt_data("submit", "--executor", "local", "--tasks", "2", *options)
    assert refused.returncode == 2 and message in " ".join(refused.stderr.replace("│", " ").split())


@pytest.mark.parametrize(
    ("executor", "options", "message"),
    [
        ("slurm", {}, "partition and time"),
        ("slurm", {"partition": "cpu", "time": "1:00", "mem-per-cpu": "4000M"}, "mem-per-cpu is '4000M'.*e.g. 4G"),
        ("slurm", {"partition": "cpu", "time": "1:00", "cpus-per-task": "two"}, "cpus-per-task is 'two'"),
        ("ray", {"nodes": "2"}, "no option 'nodes'"),
        ("local", {"a": "1"}, "'a'"),
    ],
)
def test_options_an_executor_needs_or_does_not_have_are_named(
    tmp_path: Path, executor: str, options: dict[str, str], message: str
) -> None:
    if executor == "ray":
        pytest.importorskip("ray")
    with pytest.raises(DataError, match=message):
        submit(executor, Submission(("tokenize",), tmp_path / "out", 2, tmp_path / "logs", options=options))


def test_the_folder_to_merge_in_is_the_verbs_own_out() -> None:
    assert out_of(("tokenize", "--out", "a/b")) == out_of(("tokenize", "--out=a/b")) == Path("a/b")
    with pytest.raises(DataError, match="names no --out"):
        out_of(("tokenize", "--input", "x"))


def test_on_a_slurm_cluster_an_array_job_and_its_merge_make_the_same_store(corpus: Path) -> None:
    partitions = _partitions()
    if not partitions:
        pytest.skip("no Slurm cluster answers")
    cluster = ["--option", f"partition={partitions[0]}", "--option", "time=00:05:00", "--option", "mem-per-cpu=1"]
    whole = cpt_data(*arguments(corpus, "whole"))
    sent = cpt_data("submit", "--executor", "slurm", "--tasks", "2", *cluster, *arguments(corpus, "slurm"))
    assert whole.returncode == 0 == sent.returncode, sent.stderr
    deadline = time.monotonic() + 120
    while not (corpus / "slurm" / "heldout" / "manifest.json").is_file() and time.monotonic() < deadline:
        time.sleep(0.5)
    assert content_hashes(corpus / "slurm") == content_hashes(corpus / "whole")


def _partitions() -> list[str]:
    if shutil.which("sbatch") is None:
        return []
    listed = subprocess.run(["sinfo", "-h", "-o", "%R"], capture_output=True, text=True, timeout=20, check=False)
    return listed.stdout.split() if listed.returncode == 0 else []

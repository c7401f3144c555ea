"""A disk that fills up in the middle: a clear error, and with more room the same command ends with the same bytes."""

import hashlib
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cpt.checkpoint import writing
from cpt.checkpoint.portable import Checkpoint
from data_tools.train_tokenizer import train_bpe


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four files of 80 kB that hardly compress; rules that keep everything; a tokenizer."""
    folder = tmp_path_factory.mktemp("corpus")
    draw = random.Random(7)
    for number in range(4):
        texts = ["".join(draw.choices("abcdefghijklmnop ", k=2000)) for _ in range(40)]
        (folder / f"{number}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / "rules.yaml").write_text("rules:\n  - length: {min_characters: 10}\n")
    train_bpe(["abcdefghijklmnop"], out=folder / "tokenizer", vocab_size=258)
    return folder


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no right to mount a small disk here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


VERBS = {
    "clean": ("--config", "rules.yaml", "--input", "*.jsonl", "--workers", "1"),
    "dedup": ("--source", "a=*.jsonl", "--workers", "1"),
    "convert": ("--input", "*.jsonl"),
    "tokenize": ("--input", "*.jsonl", "--tokenizer", "tokenizer", "--source", "s", "--domain", "d", "--workers", "1"),
}


def run(verb: str, corpus: Path, out: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cpt.cli", "data", verb, *VERBS[verb], "--out", str(out)]
    return subprocess.run(command, cwd=corpus, capture_output=True, text=True, timeout=120, check=False)


def content(out: Path) -> dict[str, str]:
    """Hashes of what a user takes away: documents and tokens."""
    files = [file for file in out.rglob("*") if file.suffix in (".zst", ".bin") and not file.name.startswith(".")]
    return {str(file.relative_to(out)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.mark.parametrize("verb", VERBS)
def test_a_full_disk_is_an_error_that_loses_nothing(verb: str, corpus: Path, small_disk: Path, tmp_path: Path) -> None:
    full = run(verb, corpus, small_disk / "out")
    assert full.returncode == 3, full.stderr
    assert "Traceback" not in full.stderr and full.stderr.startswith(f"environment error: {small_disk / 'out'}")
    assert "are free there; fix: free some" in full.stderr, full.stderr
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    again = run(verb, corpus, small_disk / "out")
    assert again.returncode == 0, again.stderr
    whole = run(verb, corpus, tmp_path / "whole")
    assert whole.returncode == 0 and content(small_disk / "out") == content(tmp_path / "whole") != {}


@pytest.mark.parametrize("told", [True, False], ids=["the free space is told", "the free space is told wrong"])
def test_a_disk_too_small_for_the_next_checkpoint_costs_no_older_one_and_with_more_room_the_run_goes_on(
    workshop: Any, small_disk: Path, monkeypatch: pytest.MonkeyPatch, told: bool
) -> None:
    """Three checkpoints of 0.3 MB fit; told wrong (a quota, another job that writes), the fourth fails half written."""
    workshop.stores()
    fields = {"checkpoint.every_steps": 2, "checkpoint.keep_last": 9}
    subprocess.run(["mount", "-o", f"remount,size={'2m' if told else '1m'}", str(small_disk)], check=True)
    if not told:
        monkeypatch.setattr(writing.shutil, "disk_usage", lambda _: SimpleNamespace(free=2**40))
    full = workshop.cpt("train", workshop.run_file("full", fields | {"run.dir": str(small_disk)}))
    assert full.code == 3 and "Traceback" not in full.err, full.text
    assert ("are free; older ones are given up only after" if told else "No space left on device") in full.err
    checkpoints = small_disk / "full/checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == [f"step_0000000{step}" for step in (2, 4, 6)]
    assert all(Checkpoint.open(path).verify() == [] for path in checkpoints.iterdir())
    subprocess.run(["mount", "-o", "remount,size=16m", str(small_disk)], check=True)
    again = workshop.cpt("resume", small_disk / "full")
    assert again.code == 0, again.text
    workshop.cpt("train", workshop.run_file("whole", fields))
    whole = [
        Checkpoint.open(run / "checkpoints/step_00000008") for run in (small_disk / "full", workshop.run_dir("whole"))
    ]
    for (name, ours), (_, theirs) in zip(*(each.tensors("exp_avg_sq") for each in whole), strict=True):
        assert ours.equal(theirs), name

"""`cpt data tokenize --dry-run`, `--task`, `merge` and `verify`, as they are typed."""

import json
from pathlib import Path

from data_tools.store_builder import StoreRequest


def test_an_array_job_from_dry_run_to_verification(tales: StoreRequest, workshop) -> None:  # type: ignore[no-untyped-def]
    command = ["data", "tokenize", "--input", tales.inputs[0], "--tokenizer", tales.tokenizer, "--out", tales.out]
    command += ["--source", "tales", "--domain", "general", "--heldout-fraction", "0.1"]
    dry = workshop.cpt(*command, "--dry-run")
    assert dry.code == 0 and "200 documents sampled" in dry.out and "are free there" in dry.out, dry.text
    assert json.loads(workshop.cpt(*command, "--dry-run", "--json").out)["documents"] == 200
    assert not tales.out.exists()

    for task in ("0/2", "1/2"):
        done = workshop.cpt(*command, "--task", task)
        assert done.code == 0 and f"cpt data merge {tales.out}" in done.out, done.text
        unmerged = workshop.cpt("data", "merge", tales.out) if task == "0/2" else None
        assert unmerged is None or (unmerged.code == 2 and "run --task 1/2" in unmerged.err)
    merged = json.loads(workshop.cpt("data", "merge", tales.out, "--json").out)
    assert sum(split["documents"] for split in merged["splits"].values()) == 200

    verified = workshop.cpt("data", "verify", tales.out)
    assert verified.code == 0 and merged["splits"]["train"]["content_hash"] in verified.out
    Path(tales.out, "train", "tokens_00000.bin").write_bytes(b"xx")
    damaged = workshop.cpt("data", "verify", tales.out)
    assert damaged.code == 2 and "tokens_00000.bin: has 2 bytes" in damaged.err


def test_a_wrong_task_is_refused(tales: StoreRequest, workshop) -> None:  # type: ignore[no-untyped-def]
    command = ["data", "tokenize", "--input", tales.inputs[0], "--tokenizer", tales.tokenizer, "--out", tales.out]
    command += ["--source", "tales", "--domain", "general"]
    assert workshop.cpt(*command, "--task", "2/2").code == 2
    too_many = workshop.cpt(*command, "--task", "0/9")
    assert too_many.code == 2 and "at most 4 tasks" in too_many.err

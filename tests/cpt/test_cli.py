"""`cpt` from outside: help, JSON, and that every bad input ends with the right exit code and a message to act on."""

import fcntl
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

Workshop = Any  # the fixtures of tests/conftest.py
VERBS = ["train", "resume", "extend", "eval", "export", "report", "quickstart"]
NESTED = ["data tokenize", "data decontaminate", "data inspect", "config show", "config schema"]
NESTED += ["ckpt inspect", "ckpt verify", "ckpt convert"]


@pytest.fixture
def shop(workshop: Workshop) -> Workshop:
    workshop.stores()
    return workshop


@pytest.fixture(scope="session")
def trained(made_once: Callable[..., Workshop]) -> Workshop:
    """A run of 8 steps with checkpoints after 4 and 8; read only."""

    def make(shop: Workshop) -> None:
        shop.stores()
        done = shop.cpt("train", shop.run_file("run", {"checkpoint.every_steps": 4}))
        assert done.code == 0, done.text

    return made_once("trained", make)


@pytest.fixture
def own(trained: Workshop, tmp_path: Path) -> Workshop:
    """The trained run in a folder of this test's own; its stores stay where they are."""
    shutil.copytree(trained.root / "runs", tmp_path / "runs")
    return type(trained)(tmp_path)


def test_help_lists_every_verb_and_imports_no_torch() -> None:
    program = "import sys\nfrom cpt import cli\nsys.argv = ['cpt', '--help']\ntry:\n    cli.main()\nfinally:\n"
    program += "    assert not {'torch', 'deepspeed', 'transformers'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(verb in done.stdout for verb in [*VERBS, "data", "config"])


@pytest.mark.parametrize("verb", [*VERBS, *NESTED, "data", "config"])
def test_every_verb_explains_itself(workshop: Workshop, verb: str) -> None:
    done = workshop.cpt(*verb.split(), "--help")
    assert done.code == 0 and "Usage:" in done.out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["train"], "RUN.yaml"),
        (["trian"], "trian"),
        (["train", "run.yaml", "--nproc", "0"], "--nproc"),
        (["resume", "runs/x", "--nproc", "-1"], "--nproc"),
        (["export", "runs/x/checkpoints/step_00000001"], "--out"),
        (["data", "tokenize", "--workers", "0"], "--workers"),
    ],
)
def test_a_wrong_argument_ends_with_2_and_its_name(workshop: Workshop, arguments: list[str], named: str) -> None:
    done = workshop.cpt(*arguments)
    assert done.code == 2 and named in done.err


# --- configuration ----------------------------------------------------------------------------------------------------


def test_config_show_gives_yaml_that_gives_the_same_config_again(shop: Workshop) -> None:
    done = shop.cpt("config", "show", shop.run_file("run"), "train.peak_lr=2e-3", "deepspeed.zero_stage=2")
    again = shop.root / "again.yaml"
    again.write_text(done.out)
    raw = yaml.safe_load(done.out)
    assert (raw["train"]["peak_lr"], raw["deepspeed"]["zero_stage"], raw["data"]["max_epochs"]) == (2e-3, 2, 4.0)
    assert shop.cpt("config", "show", again).out == done.out


def test_config_show_and_schema_are_json_on_request(shop: Workshop) -> None:
    shown = json.loads(shop.cpt("config", "show", shop.run_file("run"), "--json").out)
    assert shown["train"]["tokens"] == 2048
    schema = json.loads(shop.cpt("config", "schema").out)
    assert {"run", "model", "data", "train"} <= set(schema["properties"])


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["train.peak_lrr=1"], ["train.peak_lrr", "unknown field", "train.peak_lr"]),
        (["train.peak_lr=fast"], ["train.peak_lr", "'fast'"]),
        (["replay.share_general=1.3"], ["replay.share_general", "1.3"]),
        (["train.global_batch_tokens=100"], ["train.global_batch_tokens", "100", "data.seq_len", "nearest is 96"]),
        (["data.stores.prose=nowhere"], ["data.stores.prose", "nowhere", "cpt data tokenize"]),
        (["noequalsign"], ["noequalsign", "section.field=value"]),
        (["train.peak_lrr=1", "data.seq_len=0"], ["train.peak_lrr", "data.seq_len"]),
    ],
)
def test_what_is_wrong_in_a_run_file_is_said_before_anything_starts(
    shop: Workshop, overrides: list[str], named: list[str]
) -> None:
    for more in ([], ["--dry-run"]):
        done = shop.cpt("train", shop.run_file("run"), *overrides, *more)
        assert done.code == 2 and "Traceback" not in done.text
        assert all(part in done.err for part in named), done.err
    assert not (shop.root / "runs").exists()


@pytest.mark.parametrize("content", [None, "", "- a\n- b\n", "run: {name: [", "\x00"])
def test_a_run_file_that_is_missing_empty_or_no_yaml_is_named(workshop: Workshop, content: str | None) -> None:
    file = workshop.root / "run.yaml"
    if content is not None:
        file.write_text(content)
    done = workshop.cpt("train", file)
    assert done.code == 2 and str(file) in done.err and "Traceback" not in done.text


def test_a_dry_run_shows_the_plan_as_table_or_json_and_leaves_nothing(shop: Workshop) -> None:
    table = shop.cpt("train", shop.run_file("run"), "--dry-run")
    assert table.code == 0 and "prose" in table.out and "25.0%" in table.out and "8 steps" in table.out
    facts = json.loads(shop.cpt("train", shop.run_file("run"), "--dry-run", "--json").out)
    assert facts["steps"] == 8 and [source["name"] for source in facts["sources"]] == ["prose", "code"]
    assert not (shop.root / "runs").exists()


def test_a_dry_run_tells_of_a_source_that_is_too_small_for_its_share(shop: Workshop) -> None:
    shop.store("little", domain="general", train=[list(range(1, 41))] * 10, heldout=[[1, 2, 3]])
    stores = {"little": str(shop.root / "little"), "code": str(shop.root / "code")}
    file = shop.run_file("run", {"data.stores": stores, "replay.share_general": 0.5, "data.max_epochs": 2.0})
    done = shop.cpt("train", file, "--dry-run")
    assert done.code == 0
    words = " ".join(done.out.split())
    assert "'little'" in words and "capped at max_epochs 2" in words and "2.67 epochs" in words


# --- starting ---------------------------------------------------------------------------------------------------------


def test_rows_longer_than_the_models_positions_are_refused(shop: Workshop) -> None:
    done = shop.cpt("train", shop.run_file("run"), "data.seq_len=64")
    assert done.code == 2 and "data.seq_len" in done.err and "64" in done.err and "32" in done.err


def test_a_model_with_fewer_tokens_than_the_stores_is_refused(shop: Workshop) -> None:
    done = shop.cpt("train", shop.run_file("run"), "model.fresh.vocab_size=50")
    assert done.code == 2 and "data.stores = 64" in done.err and "table of 50" in done.err


def test_a_refused_start_can_be_corrected_and_started_under_the_same_name(shop: Workshop) -> None:
    assert shop.cpt("train", shop.run_file("run"), "data.seq_len=64").code == 2
    done = shop.cpt("train", shop.run_file("run"), "train.tokens=256")
    assert done.code == 0, done.text


def test_a_batch_that_does_not_divide_over_ranks_and_micro_batches_is_refused_with_the_nearest(shop: Workshop) -> None:
    done = shop.cpt("train", shop.run_file("run"), "train.micro_batch_size=3")
    assert done.code == 2
    assert "train.global_batch_tokens = 256" in done.err and "1 ranks x 3 rows" in done.err and "288" in done.err


def test_a_run_folder_with_another_config_is_left_alone(trained: Workshop) -> None:
    config = (trained.run_dir("run") / "config.yaml").read_bytes()
    done = trained.cpt("train", trained.root / "run.yaml", "train.peak_lr=5e-3")
    assert done.code == 2 and "holds another config (differs in train.peak_lr)" in done.err
    assert f"cpt resume {trained.run_dir('run')}" in done.err and "run.name" in done.err
    assert (trained.run_dir("run") / "config.yaml").read_bytes() == config


def test_the_same_run_again_is_refused_with_the_way_to_continue_it(trained: Workshop) -> None:
    done = trained.cpt("train", trained.root / "run.yaml")
    assert done.code == 2 and "this run exists already" in done.err and "cpt resume" in done.err


def test_two_processes_in_one_run_folder_are_refused_with_3(own: Workshop) -> None:
    before = own.records("run")
    (own.run_dir("run") / "evals" / "step_00000008.json").unlink()  # a finished run is not started at all
    with (own.run_dir("run") / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = own.cpt("resume", own.run_dir("run"))
    assert done.code == 3 and str(own.run_dir("run")) in done.err and "another process" in done.err
    assert own.records("run") == before


def test_a_supervisor_does_not_take_the_signs_of_life_of_another_job_for_its_own(own: Workshop) -> None:
    """It would start it again and again, and write so into the other job's diary."""
    folder = own.run_dir("run")
    (folder / "evals" / "step_00000008.json").unlink()
    events = own.events("run")
    with (folder / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = own.cpt("resume", folder, "--supervise", "--max-restarts", "0")
    assert done.code == 3 and "another process is training in this run folder" in done.err
    assert own.events("run") == events


# --- resuming, evaluating, exporting ----------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["resume", "report"])
def test_a_folder_that_is_no_run_is_refused_by_name(workshop: Workshop, verb: str) -> None:
    for folder in (workshop.root, workshop.root / "missing"):
        done = workshop.cpt(verb, folder)
        assert done.code == 2 and str(folder) in done.err and "Traceback" not in done.text


def test_a_finished_run_resumes_to_nothing(own: Workshop) -> None:
    done = own.cpt("resume", own.run_dir("run"))
    assert done.code == 0 and "this run is finished: all 8 steps are done" in done.out
    assert [record["step"] for record in own.records("run")] == list(range(1, 9))


def test_a_resume_that_would_change_the_data_is_refused(own: Workshop) -> None:
    done = own.cpt("resume", own.run_dir("run"), "replay.share_general=0.5")
    assert done.code == 2 and "replay.share_general" in done.err and "init_from" in done.err


def test_a_run_whose_store_was_replaced_is_not_resumed_on_other_data(shop: Workshop) -> None:
    assert shop.cpt("train", shop.run_file("run", {"train.tokens": 512})).code == 0
    shop.store("code", domain="code", train=[[1, 2, 3] * 300], heldout=[[1, 2, 3]])
    (shop.run_dir("run") / "evals" / "step_00000002.json").unlink()  # a finished run is not started at all
    done = shop.cpt("resume", shop.run_dir("run"))
    assert done.code == 2 and "plan.json" in done.err and "put the stores back" in done.err


@pytest.mark.parametrize("verb", ["eval", "export"])
def test_a_path_that_is_no_checkpoint_is_refused_by_name(own: Workshop, verb: str) -> None:
    more = ["--out", own.root / "hf"] if verb == "export" else []
    unfinished = own.run_dir("run") / "checkpoints/step_00000004"
    (unfinished / "COMPLETE").unlink()
    for path, reason in ((own.root / "nowhere", "no such"), (own.run_dir("run"), "COMPLETE"), (unfinished, "COMPLETE")):
        done = own.cpt(verb, path, *more)
        assert done.code == 2 and str(path) in done.err and reason in done.err


def test_a_checkpoint_taken_out_of_its_run_is_refused_with_where_it_belongs(own: Workshop) -> None:
    alone = own.root / "alone"
    shutil.copytree(own.run_dir("run") / "checkpoints/step_00000008", alone)
    done = own.cpt("eval", alone)
    assert done.code == 2 and str(alone) in done.err and "RUN_DIR/checkpoints" in done.err


def test_eval_measures_a_checkpoint_against_step_0_as_table_or_json(own: Workshop) -> None:
    path = own.run_dir("run") / "checkpoints/step_00000004"
    (facts,) = json.loads(own.cpt("eval", path, "--json").out)
    assert facts["step"] == 4 and set(facts["sources"]) == {"prose", "code"}
    base = own.evaluation("run", 0)["sources"]["code"]["loss"]
    assert facts["sources"]["code"]["change"] == pytest.approx(facts["sources"]["code"]["loss"] - base)
    assert own.evaluation("run", 4)["sources"]["code"]["loss"] == facts["sources"]["code"]["loss"]
    table = own.cpt("eval", path)
    assert table.code == 0 and "perplexity" in table.out and "prose" in table.out


def test_export_is_json_on_request_and_refuses_a_folder_that_holds_something(own: Workshop) -> None:
    path, out = own.run_dir("run") / "checkpoints/step_00000008", own.root / "hf"
    written = json.loads(own.cpt("export", path, "--out", out, "--json").out)
    assert written["logit_difference"] < 1e-5 and "config.json" in written["files"]
    again = own.cpt("export", path, "--out", out)
    assert again.code == 2 and str(out) in again.err


def test_report_and_inspect_are_json_on_request(trained: Workshop) -> None:
    facts = json.loads(trained.cpt("report", trained.run_dir("run"), "--json").out)
    assert facts["runs"][0]["name"] == "run" and facts["verdict"]
    store = json.loads(trained.cpt("data", "inspect", trained.root / "code", "--json").out)
    assert str(16_400) in json.dumps(store)


def test_a_corpus_without_text_is_refused_with_the_file(workshop: Workshop) -> None:
    corpus, tokenizer = workshop.root / "corpus.jsonl", workshop.root / "tokenizer"
    corpus.write_text('{"text": ""}\n{"text": ""}\n')
    from data_tools.train_tokenizer import train_bpe

    train_bpe(["some text"], out=tokenizer, vocab_size=257)
    request = ["--tokenizer", tokenizer, "--out", workshop.root / "store", "--source", "x", "--domain", "law"]
    done = workshop.cpt("data", "tokenize", "--input", corpus, *request)
    assert done.code == 2 and str(corpus) in done.err and "no document with text" in done.err
    missing = workshop.cpt("data", "tokenize", "--input", workshop.root / "none.jsonl", *request)
    assert missing.code == 2 and "none.jsonl" in missing.err


# --- while it runs ----------------------------------------------------------------------------------------------------


def full_disk(folder: Path) -> Any:
    return shutil._ntuple_diskusage(2**40, 2**40, 0)


def test_a_full_disk_loses_a_periodic_checkpoint_with_a_warning_but_fails_the_last_one(
    shop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cpt.checkpoint.writing.shutil.disk_usage", full_disk)
    done = shop.cpt("train", shop.run_file("run", {"checkpoint.every_steps": 4}))
    assert done.code == 3
    assert "WARNING: no checkpoint after step 4" in done.err and "0.0 MiB are free" in done.err
    assert shop.records("run")[-1]["step"] == 8  # it went on
    assert done.err.splitlines()[-1].startswith("environment error:") and "Traceback" not in done.err
    assert [event["step"] for event in shop.events("run") if event["event"] == "checkpoint_failed"] == [4, 8]
    monkeypatch.undo()
    assert shop.cpt("resume", shop.run_dir("run")).code == 0  # nothing was saved, so all of it again


def test_a_loss_that_is_not_a_number_stops_the_run_with_3_and_leaves_the_last_checkpoint(
    shop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cpt import run
    from cpt.train.losses import Losses
    from cpt.train.trainer import Trainer

    real, step, steps = run.forward_losses, Trainer.step, []

    def noted(self: Any, done: int) -> Any:
        steps.append(done)
        return step(self, done)

    def poisoned(model: Any, batch: Any, backend: str) -> Any:
        found = real(model, batch, backend)
        wrong = math.nan if steps and steps[-1] >= 5 else 1.0
        return Losses(found.total * wrong, found.per_token_BT * wrong)

    file = shop.run_file("run", {"checkpoint.every_steps": 4, "guard.max_rollbacks": 0})
    monkeypatch.setattr(Trainer, "step", noted)
    monkeypatch.setattr(run, "forward_losses", poisoned)
    done = shop.cpt("train", file)
    assert done.code == 3 and "step 6" in done.err and "not finite" in done.err and "train.peak_lr" in done.err
    assert shop.records("run")[-1]["step"] == 5
    monkeypatch.undo()
    again = shop.cpt("resume", shop.run_dir("run"))
    assert again.code == 0 and "resumes after step 4 of 8" in again.out


def test_weights_that_are_not_numbers_are_refused_before_the_first_step(own: Workshop) -> None:
    """A checkpoint to start from that some program wrote so: sizes and hashes are right, only its values tell."""
    from cpt.checkpoint.marker import FileFacts, content_hash, read_marker, write_marker

    path = own.run_dir("run") / "checkpoints/step_00000008"
    shard = next(path.glob("shard_*.param.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-40_000:] = b"\xff" * 40_000  # all bits set is a NaN
    content[len(content) // 2 : len(content) // 2 + 4000] = b"\xff" * 4000
    shard.write_bytes(bytes(content))
    write_marker(path, read_marker(path) | {shard.name: FileFacts(len(content), content_hash(shard))})
    config = yaml.safe_load((own.run_dir("run") / "config.yaml").read_text())
    config["model"] = {"init_from": str(path)}
    config["run"] = {"name": "next", "dir": str(own.root / "runs")}
    file = own.root / "next.yaml"
    file.write_text(yaml.safe_dump(config))
    done = own.cpt("train", file)
    assert done.code == 2 and "nan" in done.err and "Traceback" not in done.err

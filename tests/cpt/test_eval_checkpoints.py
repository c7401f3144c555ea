"""Benchmarks for the checkpoints of a run: what is written where, whose tokenizer, and what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")

from cpt import eval_checkpoints
from cpt.checkpoint.marker import reduce_to_weights
from cpt.eval.results import read_items, read_suite_record, read_texts
from cpt.eval.suite import Suite, load_suite
from cpt.eval_checkpoints import (
    SuiteRun,
    checkpoint_hash,
    evaluate_base,
    evaluate_on_suite,
    folder_hash,
    held_out_if_missing,
)
from cpt.problems import ConfigError
from cpt.rundir import DataError

Workshop = Any  # the fixtures of tests/conftest.py


@pytest.fixture(scope="module")
def shop(made_once: Callable[..., Workshop], tiny_hf: Path, tiny_tokenizer: Path) -> Workshop:
    """A finished run of 8 steps from the tiny Hugging Face model, on stores that were made with its tokenizer."""

    def make(shop: Workshop) -> None:
        from cpt.data.token_store import StoreLabel, TokenizerFacts, write_split
        from data_tools.encoders import tokenizer_fingerprint

        shutil.copytree(tiny_tokenizer, shop.root / "tokenizer")
        shutil.copytree(tiny_hf, shop.root / "base")
        facts = TokenizerFacts("tiny", tokenizer_fingerprint(shop.root / "base"), "tiny")
        for name, domain in (("prose", "general"), ("code", "code")):
            for split, rows in (("train", range(200)), ("heldout", range(10))):
                documents = [[3 + (row + place) % 15 for place in range(40)] + [0] for row in rows]
                label = StoreLabel(name, domain, split, 64, 0, facts)
                write_split(shop.root / name / split, label, [documents], utf8_bytes=100)
        fields = {"model.fresh": None, "model.init_from": str(shop.root / "base"), "checkpoint.every_steps": 4}
        done = shop.cpt("train", shop.run_file("run", fields))
        assert done.code == 0, done.text

    return made_once("eval_checkpoints", make)


@pytest.fixture
def run_dir(shop: Workshop, tmp_path: Path) -> Path:
    """The run folder, to do with as a test likes."""
    return Path(shutil.copytree(shop.run_dir("run"), tmp_path / "runs" / "run"))


@pytest.fixture
def cache(shop: Workshop) -> Path:
    """One for all: what a test does to a copy of the run does not change its weights."""
    return Path(shop.root / "cache")


def small_suite(folder: Path, *, answer: str = "three") -> Suite:
    items = [{"prompt": "one two", "choices": [answer, "four"], "answer": 0}] * 2
    (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    task = {"name": "next", "file": "items.jsonl", "kind": "multiple_choice"}
    (folder / "suite.yaml").write_text(json.dumps({"name": "small", "groups": {"general": [task]}}))
    return load_suite(folder / "suite.yaml")


def last(run_dir: Path) -> Path:
    return run_dir / "checkpoints" / "step_00000008"


def nothing(*arguments: object, **fields: object) -> Any:
    raise AssertionError("lm_eval was asked")


def test_a_checkpoint_and_its_base_get_records_items_and_texts(run_dir: Path, tmp_path: Path, cache: Path) -> None:
    run = SuiteRun(small_suite(tmp_path), device="cpu", cache=cache)
    after, before = evaluate_on_suite(last(run_dir), run), evaluate_base(run_dir, run)
    folder = run_dir / "evals" / "small"
    assert (after.path, before.path) == (folder / "step_00000008.json", folder / "step_00000000.json")
    record = read_suite_record(after.path)
    assert record == after.record and (record.step, record.tokens_seen, record.dtype) == (8, 2048, "fp32")
    assert before.record.tokenizer == record.tokenizer and before.record.weights_hash != record.weights_hash
    assert before.record.tasks["next"].task_hash == record.tasks["next"].task_hash
    assert read_items(folder / "step_00000008.items.parquet").num_rows == read_texts(folder / "texts.parquet").num_rows
    assert record.groups["general"].items == 2


def test_what_is_known_of_a_checkpoint_is_not_scored_again(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    run = SuiteRun(small_suite(tmp_path), device="cpu", cache=cache)
    first = evaluate_on_suite(last(run_dir), run)
    shutil.rmtree(run_dir / "evals" / "small")
    reduce_to_weights(last(run_dir))  # its optimizer state says nothing of the model
    monkeypatch.setattr(eval_checkpoints, "_export", nothing)
    again = evaluate_on_suite(last(run_dir), run)
    assert again.scored == 0 and again.record == first.record


def test_a_tokenizer_that_begins_texts_with_another_token_makes_other_results(
    run_dir: Path, shop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    own = Path(shutil.copytree(shop.root / "tokenizer", tmp_path / "own"))
    config = run_dir / "config.yaml"
    config.write_text(config.read_text().replace("tokenizer: null", f"tokenizer: {own}"))
    run = SuiteRun(small_suite(tmp_path), device="cpu", cache=cache)
    evaluate_on_suite(last(run_dir), run)
    text = (own / "tokenizer_config.json").read_text()
    (own / "tokenizer_config.json").write_text(text.replace('"<s>"', '"w1"'))
    monkeypatch.setattr(eval_checkpoints, "_export", nothing)
    with pytest.raises(AssertionError, match="lm_eval was asked"):
        evaluate_on_suite(last(run_dir), run)


def test_a_base_with_a_tokenizer_from_elsewhere_keeps_its_own_files(
    run_dir: Path, shop: Workshop, tmp_path: Path, cache: Path
) -> None:
    base = Path(shutil.copytree(shop.root / "base", tmp_path / "base"))
    (base / "tokenizer.json").unlink()
    (base / "tokenizer_config.json").write_text('{"kept": true}')
    config = run_dir / "config.yaml"
    text = config.read_text().replace("tokenizer: null", f"tokenizer: {shop.root / 'tokenizer'}")
    config.write_text(text.replace(f"init_from: {shop.root / 'base'}", f"init_from: {base}"))
    found = evaluate_base(run_dir, SuiteRun(small_suite(tmp_path), device="cpu", cache=tmp_path / "empty"))
    assert found.scored == 1 and (base / "tokenizer_config.json").read_text() == '{"kept": true}'


def test_checkpoints_of_other_weights_have_other_hashes(run_dir: Path) -> None:
    assert checkpoint_hash(last(run_dir)) != checkpoint_hash(run_dir / "checkpoints" / "step_00000004")


def test_a_folder_is_known_by_its_weights_and_config_alone(shop: Workshop, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(shop.root / "base", tmp_path / "copy"))
    (copy / "README.md").write_text("notes")
    assert folder_hash(copy) == folder_hash(shop.root / "base")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "rope_theta": 5.0}))
    assert folder_hash(copy) != folder_hash(shop.root / "base")
    (copy / "model.safetensors").unlink()
    with pytest.raises(DataError, match=r"holds no config\.json with \.safetensors"):
        folder_hash(copy)


def test_a_checkpoint_that_disappears_while_it_is_read_leaves_nothing(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export = eval_checkpoints._export

    def too_late(checkpoint: Path, *arguments: Any) -> Path:
        shutil.rmtree(checkpoint)
        return export(checkpoint, *arguments)

    monkeypatch.setattr(eval_checkpoints, "_export", too_late)
    run = SuiteRun(small_suite(tmp_path), device="cpu", cache=tmp_path / "empty")
    with pytest.raises(DataError, match="step_00000008: was removed while it was read, nothing was written"):
        evaluate_on_suite(last(run_dir), run)
    assert not list((run_dir / "evals").glob("small/step_*"))


def test_an_incomplete_checkpoint_is_refused(run_dir: Path, tmp_path: Path, cache: Path) -> None:
    (last(run_dir) / "COMPLETE").unlink()
    with pytest.raises(DataError, match="step_00000008"):
        evaluate_on_suite(last(run_dir), SuiteRun(small_suite(tmp_path), device="cpu", cache=cache))


def test_two_suites_of_one_name_are_told_apart(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    evaluate_on_suite(last(run_dir), SuiteRun(small_suite(tmp_path), device="cpu", cache=cache))
    monkeypatch.setattr(eval_checkpoints, "run_suite", nothing)
    other = small_suite(tmp_path, answer="five")
    for evaluate, what in ((evaluate_on_suite, last(run_dir)), (evaluate_base, run_dir)):
        with pytest.raises(ConfigError, match="name = 'small': another suite of this name"):
            evaluate(what, SuiteRun(other, device="cpu", cache=cache))


def test_another_tokenizer_than_the_stores_is_refused(
    run_dir: Path, shop: Workshop, tmp_path: Path, cache: Path
) -> None:
    other = Path(shutil.copytree(shop.root / "tokenizer", tmp_path / "other"))
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace('"one"', '"uno"'))
    config = run_dir / "config.yaml"
    config.write_text(config.read_text().replace("tokenizer: null", f"tokenizer: {other}"))
    with pytest.raises(
        ConfigError, match=r"model\.tokenizer = .*is another tokenizer than store (prose|code) was made"
    ):
        evaluate_on_suite(last(run_dir), SuiteRun(small_suite(tmp_path), device="cpu", cache=cache))


def test_a_missing_tokenizer_is_told(run_dir: Path, tmp_path: Path, cache: Path) -> None:
    config = run_dir / "config.yaml"
    config.write_text(config.read_text().replace("tokenizer: null", f"tokenizer: {tmp_path / 'gone'}"))
    with pytest.raises(ConfigError, match=r"gone.*does not exist here; benchmarks are text"):
        evaluate_on_suite(last(run_dir), SuiteRun(small_suite(tmp_path), device="cpu", cache=cache))


@pytest.mark.parametrize(
    ("origin", "told"),
    [
        ("null", "started from fresh weights"),
        ("no/such-model", "neither a folder here nor a model that was downloaded"),
    ],
)
def test_a_base_that_is_not_here_is_told(
    run_dir: Path, shop: Workshop, tmp_path: Path, origin: str, told: str, cache: Path
) -> None:
    config = run_dir / "config.yaml"
    text = config.read_text().replace(f"init_from: {shop.root / 'base'}", f"init_from: {origin}")
    config.write_text(text.replace("fresh: null", "fresh: {model_type: llama}") if origin == "null" else text)
    with pytest.raises(ConfigError, match=rf"model\.init_from.*{told}"):
        evaluate_base(run_dir, SuiteRun(small_suite(tmp_path), device="cpu", cache=cache))


def test_a_checkpoint_outside_a_run_is_refused(run_dir: Path, tmp_path: Path) -> None:
    lone = Path(shutil.copytree(last(run_dir), tmp_path / "step_00000008"))
    with pytest.raises(DataError, match="lies in no run folder"):
        evaluate_on_suite(lone, SuiteRun(small_suite(tmp_path)))


def test_held_out_losses_are_made_where_they_are_missing(run_dir: Path, shop: Workshop) -> None:
    assert held_out_if_missing(last(run_dir)) == ""
    record = run_dir / "evals" / "step_00000008.json"
    before = json.loads(record.read_text())
    record.unlink()
    assert held_out_if_missing(last(run_dir)) == ""
    after = json.loads(record.read_text())
    assert after["sources"]["prose"]["loss"] == pytest.approx(before["sources"]["prose"]["loss"], rel=1e-6)


def test_a_copy_without_the_stores_says_why_there_are_no_held_out_losses(run_dir: Path, shop: Workshop) -> None:
    config = run_dir / "config.yaml"
    config.write_text(config.read_text().replace(str(shop.root / "prose"), str(shop.root / "elsewhere")))
    (run_dir / "evals" / "step_00000008.json").unlink()
    assert "no held-out losses of step_00000008:" in held_out_if_missing(last(run_dir))

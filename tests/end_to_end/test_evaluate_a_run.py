"""From a run to a verdict by commands: benchmarks of base and checkpoint, comparison, gate, lost items, one document, a
watcher.
"""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")

Workshop = Any  # the fixtures of tests/conftest.py
SEQ_LEN, STEPS = 32, 12
WORDS = {
    "prose": "the old house stood by a river and people walked over the bridge to the town",
    "code": "def return import class self yield lambda raise for in while if else None True False",
}


def write_texts(root: Path, name: str, words: list[str]) -> Path:
    """Every text goes through the words in their order, from a word of its own on: that can be learned at once."""
    chosen = random.Random(name)
    file = root / f"{name}.jsonl"
    starts = [chosen.randrange(len(words)) for _ in range(200)]
    texts = [" ".join((words * 5)[start : start + 40]) for start in starts]
    file.write_text("".join(json.dumps({"text": f"{number} {text}"}) + "\n" for number, text in enumerate(texts)))
    return file


def write_suite(root: Path) -> Path:
    """Is the next word of the text likelier than another? 60 pairs of either kind."""
    tasks = {}
    for name, words in ((name, words.split()) for name, words in WORDS.items()):
        rows = []
        for number in range(60):
            right = [words[(number + place) % len(words)] for place in range(6)]
            wrong = [*right[:-1], words[(number + 9) % len(words)]]
            rows.append({"sentence_good": " ".join(right), "sentence_bad": " ".join(wrong), "part": str(number % 2)})
        (root / f"{name}_pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        task = {"name": f"{name}_pairs", "file": f"{name}_pairs.jsonl", "kind": "minimal_pairs", "subset_field": "part"}
        tasks["general" if name == "prose" else "domain"] = [task]
    file = root / "suite.yaml"
    file.write_text(json.dumps({"name": "pairs", "batch_size": 64, "groups": tasks}))  # JSON is YAML
    return file


def make(shop: Workshop) -> None:
    """tok, base (learned the prose), and runs/learned: continued on code alone, with checkpoints after 6 and 12 steps."""

    def run(*arguments: object) -> None:
        done = shop.cpt(*arguments)
        assert done.code == 0, done.text

    files = {name: write_texts(shop.root, name, words.split()) for name, words in WORDS.items()}
    tokenizer = shop.root / "tok"
    run("data", "train-tokenizer", "--input", files["prose"], "--out", tokenizer, "--vocab-size", 300)
    for name, file in files.items():
        request = ["--tokenizer", tokenizer, "--out", shop.root / name, "--source", name]
        domain = "general" if name == "prose" else "code"
        run("data", "tokenize", "--input", file, *request, "--domain", domain, "--heldout-fraction", 0.2)
    tiny = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    tiny |= {"num_attention_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": True}
    common = {
        "data.seq_len": SEQ_LEN,
        "train.global_batch_tokens": 512,
        "train.micro_batch_size": 16,
        "train.peak_lr": 2e-2,
    }
    fresh = {"model.fresh": tiny, "model.tokenizer": str(tokenizer), "replay.share_general": 1.0}
    run("train", shop.run_file("base", common | fresh | {"train.tokens": 30 * 512}))
    run("export", shop.run_dir("base") / "checkpoints" / "step_00000030", "--out", shop.root / "base_hf")
    base = {"model.fresh": None, "model.init_from": str(shop.root / "base_hf"), "replay.share_general": 0.0}
    fields = common | base | {"train.tokens": STEPS * 512, "checkpoint.every_steps": 6, "checkpoint.keep_last": 9}
    run("train", shop.run_file("learned", fields))
    write_suite(shop.root)
    last = shop.run_dir("learned") / "checkpoints" / f"step_{STEPS:08d}"
    run("eval", last, "--suite", shop.root / "suite.yaml", "--device", "cpu", "--cache", shop.root / "cache")


@pytest.fixture(scope="session")
def evaluated(made_once: Callable[..., Workshop]) -> Workshop:
    return made_once("evaluated", make)


@pytest.fixture
def own(evaluated: Workshop, tmp_path: Path) -> Workshop:
    """The run in a folder of this test's own; stores, suite and cache stay where they are."""
    shutil.copytree(evaluated.root / "runs", tmp_path / "runs")
    return type(evaluated)(tmp_path)


def last_checkpoint(shop: Workshop) -> Path:
    return Path(shop.run_dir("learned") / "checkpoints" / f"step_{STEPS:08d}")


def test_base_and_checkpoint_have_results_and_held_out_losses(evaluated: Workshop) -> None:
    evals = evaluated.run_dir("learned") / "evals"
    assert {path.name for path in (evals / "pairs").glob("step_*.json")} == {
        "step_00000000.json",
        f"step_{STEPS:08d}.json",
    }
    assert (evals / f"step_{STEPS:08d}.json").is_file()


def test_what_was_learned_without_replay_and_what_was_forgotten_is_said(evaluated: Workshop) -> None:
    facts = json.loads(evaluated.cpt("eval", "compare", evaluated.run_dir("learned"), "--json").out)
    [run] = facts["runs"]
    words = {row["name"]: row["word"] for row in run["source_groups"]}
    assert words == {"general": "drop", "domain": "gain"}
    [before] = [row["change"]["before"] for row in run["groups"] if row["name"] == "general"]
    assert before > 0.6  # the base knows the order of the words


def test_a_second_call_scores_nothing_and_gives_the_same(own: Workshop, evaluated: Workshop) -> None:
    record = own.run_dir("learned") / "evals" / "pairs" / f"step_{STEPS:08d}.json"
    before = record.read_text()
    record.unlink()
    words = ["--suite", evaluated.root / "suite.yaml", "--device", "cpu", "--cache", evaluated.root / "cache", "--json"]
    done = own.cpt("eval", last_checkpoint(own), *words)
    assert done.code == 0 and record.read_text() == before
    [facts] = json.loads(done.out)
    assert facts["tasks"]["prose_pairs"]["items"] == 60


def test_gate_items_documents_and_tokens_work_on_a_real_run(evaluated: Workshop, tmp_path: Path) -> None:
    run = evaluated.run_dir("learned")
    assert evaluated.cpt("eval", "gate", run, "--require", "domain_gain.low > 0", "general.accuracy > 0").code == 0
    assert evaluated.cpt("eval", "gate", run, "--require", "general_forgetting.high <= 0").code == 4
    facts = json.loads(evaluated.cpt("eval", "items", run, "--json").out)
    assert {subset["task"] for subset in facts["subsets"]} == {"prose_pairs", "code_pairs"}
    changed = json.loads(evaluated.cpt("eval", "documents", run, "--json").out)
    number = changed["sources"]["prose"]["most_lost"][0]["document"]
    page = tmp_path / "page.html"
    done = evaluated.cpt("eval", "tokens", last_checkpoint(evaluated), "--document", f"prose:{number}", "--out", page)
    assert done.code == 0 and "<!doctype html>" in page.read_text()


def test_a_watcher_evaluates_what_is_missing_once_and_prints_pure_json(own: Workshop, evaluated: Workshop) -> None:
    words = [own.run_dir("learned"), "--suite", evaluated.root / "suite.yaml", "--device", "cpu", "--once", "--json"]
    words += ["--cache", evaluated.root / "cache", "--keep-best", "domain.accuracy"]
    done = own.cpt("eval", "watch", *words)
    assert done.code == 0, done.text
    assert json.loads(done.out)["evaluated"] == [6]
    assert list((own.run_dir("learned") / "checkpoints" / "pins").glob("*.json"))
    assert json.loads(own.cpt("eval", "watch", *words).out)["evaluated"] == []


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--keep-best", "generl"], "general"),
        (["--suite", "nowhere.yaml"], "nowhere.yaml"),
        (["--device", "cuda:99"], "cuda:99"),
    ],
)
def test_what_a_watcher_cannot_do_is_said_before_it_waits(
    own: Workshop, evaluated: Workshop, words: list[str], named: str
) -> None:
    given = ["--suite", evaluated.root / "suite.yaml"] if "--suite" not in words else []
    done = own.cpt("eval", "watch", own.run_dir("learned"), "--once", "--cache", own.root / "cache", *given, *words)
    assert done.code == 2 and named in done.err, done.text


def test_a_suite_changed_under_its_name_is_refused(own: Workshop, evaluated: Workshop) -> None:
    raw = json.loads((evaluated.root / "suite.yaml").read_text())
    raw["groups"]["general"][0] |= {"file": str(evaluated.root / "prose_pairs.jsonl"), "limit": 5}
    raw["groups"]["domain"][0]["file"] = str(evaluated.root / "code_pairs.jsonl")
    (own.root / "suite.yaml").write_text(json.dumps(raw))
    done = own.cpt("eval", last_checkpoint(own), "--suite", own.root / "suite.yaml", "--device", "cpu")
    assert done.code == 2 and "another suite of this name" in done.err

"""Benchmarks on the model while it trains: nothing of the training moves, and they say what ``cpt eval`` would say."""

import json
import random
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")
sys.path.insert(0, str(Path(__file__).parent))
from faulty_training import command, faults

Workshop = Any  # the fixtures of tests/conftest.py
STEPS, SEQ_LEN = 8, 32
WORDS = {
    "general": "the old house stood by a river and people walked over the bridge to the town",
    "medical": "myocarditis thrombocytopenia electrocardiogram tachycardia the and of by a river",
}
FIELDS: dict[str, Any] = {
    "model.fresh": {
        "model_type": "llama",
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
    },
    "data.seq_len": SEQ_LEN,
    "train.tokens": STEPS * 256,
    "checkpoint.every_steps": 2,
    "checkpoint.keep_last": 10,
    "guard.spike_sigma": None,
}
MEASURED = (0, 3, 6)  # of which no step but 0 has a held-out evaluation


def make(shop: Workshop) -> None:
    """A tokenizer, stores, a suite; ``bare``: a run without benchmarks, ``whole``: the same with them."""
    draw = random.Random(0)

    def text(name: str, words: int) -> str:
        return " ".join(draw.choices(WORDS[name].split(), k=words))

    for name in WORDS:
        lines = [json.dumps({"text": text(name, 40)}) for _ in range(120)]
        (shop.root / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    run(shop, "data", "train-tokenizer", "--input", shop.root / "general.jsonl", "--out", shop.root / "tok",
        "--vocab-size", 300)  # fmt: skip
    for name in WORDS:
        out = ["--tokenizer", shop.root / "tok", "--out", shop.root / "stores" / name, "--source", name]
        run(shop, "data", "tokenize", "--input", shop.root / f"{name}.jsonl", *out, "--domain", name,
            "--heldout-fraction", 0.2)  # fmt: skip
    items = {
        "pairs": [{"sentence_good": text("general", 5), "sentence_bad": text("medical", 5)} for _ in range(11)],
        "letters": [{"prompt": text("medical", 9), "choices": [" a", " the", " of"], "answer": 1} for _ in range(9)],
        "texts": [*({"text": text("medical", 60)} for _ in range(3)), {"text": "x" * 900}],  # the last: one long word
    }
    for name, rows in items.items():
        (shop.root / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    suite = {
        "name": "tiny",
        "copying_probe": True,
        "groups": {
            "general": [{"name": "pairs", "file": "pairs.jsonl", "kind": "minimal_pairs"}],
            "domain": [
                {"name": "letters", "file": "letters.jsonl", "kind": "multiple_choice", "delimiter": ""},
                {"name": "texts", "file": "texts.jsonl", "kind": "perplexity"},
            ],
        },
    }
    (shop.root / "suite.yaml").write_text(json.dumps(suite))
    run(shop, "train", run_file(shop, "bare", suite=False))
    run(shop, "train", run_file(shop, "whole"))


def run(shop: Workshop, *arguments: object) -> str:
    done = shop.cpt(*arguments)
    assert done.code == 0, done.text
    return str(done.text)


def run_file(shop: Workshop, name: str, *, suite: bool = True, **changes: Any) -> Path:
    stores = {source: str(shop.root / "stores" / source) for source in WORDS}
    own = {"data.stores": stores, "model.tokenizer": str(shop.root / "tok"), "eval.tokens_per_source": 256}
    asked = {"eval.suite": str(shop.root / "suite.yaml"), "eval.suite_steps": list(MEASURED[1:])} if suite else {}
    return Path(shop.run_file(name, {**FIELDS, **own, **asked, **changes}))


@pytest.fixture(scope="session")
def shop(made_once: Callable[..., Workshop]) -> Workshop:
    return made_once("benchmarks_in_training", make)


def record(shop: Workshop, name: str, step: int) -> dict[str, Any]:
    """Without the seconds, which differ."""
    found = json.loads((shop.run_dir(name) / f"evals/tiny/step_{step:08d}.json").read_text())
    for task in found["tasks"].values():
        task.pop("seconds")
    return dict(found)


def values(shop: Workshop, name: str, step: int) -> dict[str, float]:
    """Every metric of every task."""
    tasks = record(shop, name, step)["tasks"]
    return {f"{task} {key}": found["value"] for task, own in tasks.items() for key, found in own["metrics"].items()}


def test_the_losses_are_the_same_bits_with_benchmarks_and_without(shop: Workshop) -> None:
    assert shop.losses("whole") == shop.losses("bare")
    for step in (0, STEPS):
        assert shop.evaluation("whole", step) == shop.evaluation("bare", step)


def test_results_lie_where_cpt_eval_puts_them_for_the_asked_steps_and_the_base(shop: Workshop) -> None:
    from cpt.eval.results import read_items, read_suite_record, read_texts

    folder = shop.run_dir("whole") / "evals/tiny"
    records = [read_suite_record(path) for path in sorted(folder.glob("step_*.json"))]
    assert [each.step for each in records] == list(MEASURED)
    assert all(each.tokens_seen == each.step * 256 and each.weights_hash is None for each in records)
    assert {name: task.items for name, task in records[0].tasks.items()} == {"pairs": 11, "letters": 9, "texts": 4}
    assert records[0].groups.keys() == {"general", "domain"}
    items = [read_items(folder / f"step_{step:08d}.items.parquet") for step in MEASURED]
    assert [len(table) for table in items] == [24, 24, 24]
    assert len(read_texts(folder / "texts.parquet")) == 24
    # Training did something to them.
    assert records[2].tasks["texts"].value < records[0].tasks["texts"].value


def test_the_time_is_told_as_that_of_evaluations(shop: Workshop) -> None:
    events = [event for event in shop.events("whole") if event["event"] == "suite"]
    assert [event["step"] for event in events] == list(MEASURED)
    assert all(event["seconds"] > 0 and event["scores"].keys() == {"general", "domain"} for event in events)
    told = {line["step"]: line["phase_seconds"]["evaluation"] for line in shop.records("whole")}
    assert told[4] >= 0.5 * events[1]["seconds"] > told[3]  # after step 3, so a part of the time before step 4


def test_a_checkpoint_exported_and_evaluated_by_lm_eval_itself_says_the_same(shop: Workshop, tmp_path: Path) -> None:
    from cpt.eval.harness import ModelOnDisk, run_suite
    from cpt.eval.results import read_items
    from cpt.eval.suite import load_suite
    from cpt.offline import export

    run_dir = shop.run_dir("whole")
    export(run_dir / "checkpoints/step_00000006", tmp_path / "exported")
    on_disk = ModelOnDisk("weights", "tokenizer", "fp32", place=lambda scratch: tmp_path / "exported")
    outcome = run_suite(on_disk, load_suite(shop.root / "suite.yaml"), device="cpu", cache=tmp_path / "cache")
    live = record(shop, "whole", 6)["tasks"]
    assert outcome.copying is not None
    assert record(shop, "whole", 6)["copying"] == asdict(outcome.copying)  # shares of rows: counts, not rounded sums
    for name, task in outcome.tasks.items():
        own = live[name]
        assert own["value"] == pytest.approx(task.value, rel=1e-5) and own["stderr"] == pytest.approx(
            task.stderr, rel=1e-4
        )
        assert (own["items"], own["metric"], own["task_hash"]) == (task.items, task.metric, task.task_hash)
    mine = read_items(run_dir / "evals/tiny/step_00000006.items.parquet").to_pylist()
    for own, theirs in zip(mine, outcome.items.to_pylist(), strict=True):
        assert own["chosen"] == theirs["chosen"] and own["task"] == theirs["task"]
        assert own["score"] == pytest.approx(theirs["score"], rel=1e-5)
        assert own["margin"] == pytest.approx(theirs["margin"], abs=1e-4, nan_ok=True)


@pytest.mark.parametrize(("ranks", "stage"), [(1, 3), (2, 1), (2, 3)])
def test_ranks_and_zero_stages_agree(shop: Workshop, ranks: int, stage: int) -> None:
    name = f"on_{ranks}_zero_{stage}"
    file = run_file(shop, name, **{"deepspeed.zero_stage": stage, "train.micro_batch_size": 2})
    if ranks == 1:
        run(shop, "train", file)
    else:
        process = shop.start("train", file, "--nproc", ranks)
        out, _ = process.communicate(timeout=240)
        assert process.returncode == 0, out
    assert shop.losses(name) == pytest.approx(shop.losses("bare"), rel=1e-5)
    for step in MEASURED:
        assert values(shop, name, step) == pytest.approx(values(shop, "whole", step), rel=1e-3, abs=1e-3)
    assert values(shop, name, 0) == pytest.approx(values(shop, "whole", 0), rel=1e-5)


def test_ranks_that_share_rows_agree(shop: Workshop) -> None:
    file = run_file(shop, "shared", **{"deepspeed.sequence_parallel": 2})
    process = shop.start("train", file, "--nproc", "2")
    out, _ = process.communicate(timeout=240)
    assert process.returncode == 0, out
    assert values(shop, "shared", 0) == pytest.approx(values(shop, "whole", 0), rel=1e-5)


def test_a_resumed_run_measures_what_is_still_to_come(shop: Workshop) -> None:
    folder = Path(shop.run_dir("resumed"))
    shutil.copytree(shop.run_dir("whole"), folder)
    for path in [*(folder / "checkpoints").iterdir(), *(folder / "evals").rglob("step_*")]:
        if int(path.name.split(".")[0].removeprefix("step_")) > 4:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    run(shop, "resume", folder)
    assert shop.losses("resumed") == shop.losses("whole")
    for step in MEASURED:
        assert record(shop, "resumed", step) == record(shop, "whole", step)
    events = [event["step"] for event in shop.events("resumed") if event["event"] == "suite"]
    assert events == [*MEASURED, 6]  # the copied ones, and one more


@pytest.mark.parametrize("step", [0, 3])
def test_sigterm_while_benchmarks_run_saves_and_the_resumed_run_makes_up_for_them(shop: Workshop, step: int) -> None:
    name, at = f"stopped_{step}", {"kind": "signal", "step": step, "phase": "evaluation"}
    with faults(at):
        stopped = shop.cpt("train", run_file(shop, name))
    assert stopped.code == 143, stopped.text
    assert shop.events(name)[-1]["event"] == "sigterm" and shop.events(name)[-1]["step"] == step
    assert (shop.run_dir(name) / f"checkpoints/step_{step:08d}/COMPLETE").is_file()
    assert not (shop.run_dir(name) / f"evals/tiny/step_{step:08d}.json").exists()
    run(shop, "resume", shop.run_dir(name))
    assert shop.losses(name) == shop.losses("whole")
    for measured in MEASURED:
        assert record(shop, name, measured) == record(shop, "whole", measured)


def test_two_ranks_leave_benchmarks_together_where_only_one_was_asked(shop: Workshop) -> None:
    fault = {"kind": "signal", "step": 3, "phase": "evaluation", "rank": 1}
    file = run_file(shop, "pair", **{"train.micro_batch_size": 2})
    process = shop.start_command(command([fault], "train", file, "--nproc", "2"))
    out, _ = process.communicate(timeout=240)
    assert process.returncode == 143, out
    assert shop.events("pair")[-1]["step"] == 3
    assert not (shop.run_dir("pair") / "evals/tiny/step_00000003.json").exists()


def test_results_that_cannot_be_written_do_not_stop_the_run(shop: Workshop) -> None:
    file = run_file(shop, "full")
    evals = shop.run_dir("full") / "evals"
    evals.mkdir(parents=True)
    (evals / "tiny").write_text("")  # in the way of the folder
    done = shop.cpt("train", file)
    assert done.code == 0, done.text
    failed = [event for event in shop.events("full") if event["event"] == "suite_failed"]
    assert [event["step"] for event in failed] == list(MEASURED)
    assert "could not be written" in done.err
    assert shop.losses("full") == shop.losses("whole")


def test_a_task_that_fails_later_is_told_and_the_run_goes_on_but_at_step_0_it_ends(
    shop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cpt.eval.live_suite import LiveSuite

    measure, calls = LiveSuite.measure, []

    def fails_at(numbers: tuple[int, ...]) -> Callable[..., Any]:
        def instead(*arguments: Any) -> Any:
            calls.append(1)
            if len(calls) in numbers:
                raise ValueError("a metric of its own mind")
            return measure(*arguments)

        return instead

    monkeypatch.setattr(LiveSuite, "measure", fails_at((2,)))
    run(shop, "train", run_file(shop, "fails_later"))
    (failed,) = (event for event in shop.events("fails_later") if event["event"] == "suite_failed")
    assert failed["step"] == 3 and "a metric of its own mind" in failed["reason"]
    assert shop.losses("fails_later") == shop.losses("whole")
    assert values(shop, "fails_later", 6) == values(shop, "whole", 6)
    calls.clear()
    monkeypatch.setattr(LiveSuite, "measure", fails_at((1,)))
    done = shop.cpt("train", run_file(shop, "fails_first"))
    assert done.code == 1 and "a metric of its own mind" in done.err and shop.records("fails_first") == []


def refused(shop: Workshop, name: str, suite: dict[str, Any]) -> str:
    """What is said; nothing was trained and the run's name is still free."""
    (shop.root / f"{name}_suite.yaml").write_text(json.dumps(suite))
    done = shop.cpt("train", run_file(shop, name, **{"eval.suite": str(shop.root / f"{name}_suite.yaml")}))
    assert done.code == 2, done.text
    assert not (shop.run_dir(name) / "config.yaml").exists()
    return str(done.err)


def test_a_task_that_lm_eval_does_not_have_is_refused_before_training(shop: Workshop) -> None:
    said = refused(shop, "unknown", {"name": "x", "groups": {"general": [{"task": "arc_eazy"}]}})
    assert "arc_eazy" in said and "arc_easy" in said


def test_a_task_of_lm_eval_that_generates_is_refused_before_training(shop: Workshop) -> None:
    items = shop.root / "gsm.jsonl"
    items.write_text(json.dumps({"question": "1 + 1?", "answer": "2 #### 2"}) + "\n")
    task = {"task": "gsm8k", "data": {"test": str(items)}, "num_fewshot": 0}
    said = refused(shop, "generating", {"name": "x", "groups": {"general": [task]}})
    assert "does not generate, as gsm8k asks" in said and "cpt eval watch" in said


def test_another_suite_of_the_same_name_is_refused_on_resume(shop: Workshop) -> None:
    folder = Path(shop.run_dir("other_suite"))
    shutil.copytree(shop.run_dir("whole"), folder)
    shutil.rmtree(folder / "checkpoints/step_00000008")
    suite = json.loads((shop.root / "suite.yaml").read_text())
    suite["groups"].pop("general")
    (shop.root / "other.yaml").write_text(json.dumps(suite))
    done = shop.cpt("resume", folder, f"eval.suite={shop.root / 'other.yaml'}")
    assert done.code == 2 and "another suite of this name" in done.err, done.text

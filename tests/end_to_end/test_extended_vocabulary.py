"""New tokens from raw text to an exported model, by commands: extend, tokenize, train, resume, export."""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

Workshop = Any  # the fixtures of tests/conftest.py
SEQ_LEN = 32
WORDS = {
    "general": "the old house stood by a river and people walked over the bridge to the town",
    "medical": "myocarditis thrombocytopenia electrocardiogram tachycardia the and of by a river",
}


def write_corpus(file: Path, words: list[str]) -> Path:
    chosen = random.Random(file.name)
    texts = [" ".join(chosen.choices(words, k=40)) for _ in range(120)]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file


def run_file(shop: Workshop, name: str, fields: dict[str, Any]) -> Path:
    stores = {source: str(shop.root / "stores" / source) for source in WORDS}
    batch = {"train.tokens": 3 * 256, "train.global_batch_tokens": 256, "train.micro_batch_size": 4}
    data = {"data.stores": stores, "data.seq_len": SEQ_LEN, "eval.tokens_per_source": 256}
    return Path(shop.run_file(name, {"model.fresh": None, **data, **batch, **fields}))


def make(shop: Workshop) -> None:
    """tok_base, base_tied and base_untied (models of 320 rows, 300 of them in use), tok_ext, stores of tok_ext."""
    from cpt.config import ModelSection
    from cpt.model.build import Needs, build_model, named_tensors
    from cpt.model.export import ExportSpec, export_checkpoint

    def run(*arguments: object) -> None:
        done = shop.cpt(*arguments)
        assert done.code == 0, done.text

    files = {name: write_corpus(shop.root / f"{name}.jsonl", words.split()) for name, words in WORDS.items()}
    tokenizer = shop.root / "tok_base"
    run("data", "train-tokenizer", "--input", files["general"], "--out", tokenizer, "--vocab-size", 300)
    tiny = {"model_type": "llama", "vocab_size": 320, "hidden_size": 32, "intermediate_size": 64}
    tiny |= {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": SEQ_LEN}
    for name, tied in (("base_tied", True), ("base_untied", False)):
        section = ModelSection(fresh={**tiny, "tie_word_embeddings": tied})
        model: Any = build_model(section, Needs(SEQ_LEN, 320, seed=5)).model
        export_checkpoint(named_tensors(model), model.config, ExportSpec(shop.root / name, tokenizer=tokenizer))
    sources = [option for name, file in files.items() for option in ("--source", f"{name}={file}")]
    done = shop.cpt("data", "extend-tokenizer", "--tokenizer", shop.root / "base_tied", *sources, "--out",
                    shop.root / "tok_ext", "--num-tokens", 40, "--min-count", 20, "--json")  # fmt: skip
    assert done.code == 0, done.text
    (shop.root / "report.json").write_text(done.out)
    for name, file in files.items():
        request = ["--tokenizer", shop.root / "tok_ext", "--out", shop.root / "stores" / name, "--source", name]
        run("data", "tokenize", "--input", file, *request, "--domain", name, "--heldout-fraction", 0.2)


@pytest.fixture(scope="module")
def shop(made_once: Callable[..., Workshop]) -> Iterator[Workshop]:
    yield made_once("extended_vocabulary", make)


def weights(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(("base", "zero_stage"), [("base_tied", 0), ("base_untied", 3)])
def test_a_run_makes_trains_and_exports_the_new_rows(shop: Workshop, base: str, zero_stage: int) -> None:
    from transformers import AutoTokenizer

    report = json.loads((shop.root / "report.json").read_text())
    assert report["base_vocab_size"] == 300 and report["vocab_size"] == 340  # 20 land on padded rows, 20 behind them
    model = {"model.init_from": str(shop.root / base), "model.tokenizer": str(shop.root / "tok_ext")}
    file = run_file(shop, base, {**model, "deepspeed.zero_stage": zero_stage})
    assert shop.cpt("train", file, "--dry-run").code == 0
    done = shop.cpt("train", file)
    assert done.code == 0, done.text
    assert "340 tokens, 384 rows" in done.out and "40 rows made for new tokens" in done.out
    assert "trained: embeddings" in done.out and "FROZEN" not in done.out
    exported = shop.root / f"{base}_exported"
    last = shop.run_dir(base) / "checkpoints/step_00000003"
    assert (done := shop.cpt("export", last, "--out", exported)).code == 0, done.text
    assert (done := shop.cpt("extend-model", shop.root / base, "--tokenizer", shop.root / "tok_ext", "--out",
                             shop.root / f"{base}_start")).code == 0, done.text  # fmt: skip
    start, trained = weights(shop.root / f"{base}_start"), weights(exported)
    assert trained.config.vocab_size == 384 and len(AutoTokenizer.from_pretrained(exported)) == 340
    # 3 steps of Adam at 1e-2 move what has a gradient by about 1e-2 a step, weight decay alone by 1e-3 of its length
    seen = [row["id"] for row in report["tokens"] if row["in_sample"] > 200]
    tables = [(model.get_input_embeddings().weight, model.get_output_embeddings().weight) for model in (start, trained)]
    for before, after in zip(*tables, strict=True):
        moved = (after - before).abs().mean(1)[seen]
        assert len(seen) >= 4 and (moved > 2e-3).all(), moved


def test_an_extended_run_is_resumed_and_built_upon(shop: Workshop) -> None:
    model = {"model.init_from": str(shop.root / "base_tied"), "model.tokenizer": str(shop.root / "tok_ext")}
    whole = {**model, "checkpoint.every_steps": 1, "checkpoint.keep_last": 9}
    assert (done := shop.cpt("train", run_file(shop, "whole", whole))).code == 0, done.text
    losses = shop.losses("whole")
    for step in (2, 3):
        for file in (shop.run_dir("whole") / f"checkpoints/step_{step:08d}").iterdir():
            file.unlink()
    assert (done := shop.cpt("resume", shop.run_dir("whole"))).code == 0, done.text
    assert shop.losses("whole") == losses
    next_run = {"model.init_from": str(shop.run_dir("whole") / "checkpoints/step_00000003")}
    assert (done := shop.cpt("train", run_file(shop, "next", next_run))).code == 0, done.text
    assert "rows made for new tokens" not in done.out and "340 tokens, 384 rows" in done.out


def test_a_model_without_the_rows_is_told_what_to_state(shop: Workshop) -> None:
    done = shop.cpt("train", run_file(shop, "unstated", {"model.init_from": str(shop.root / "base_tied")}))
    assert done.code == 2 and "model.tokenizer" in done.err and "give the stores' tokenizer" in done.err


def test_the_verbs_print_tables_that_teach_the_next_step(shop: Workshop) -> None:
    source, tokenizer = f"medical={shop.root / 'medical.jsonl'}", shop.root / "tok_base"
    out = shop.root / "tok_table"
    done = shop.cpt("data", "extend-tokenizer", "--tokenizer", tokenizer, "--source", source, "--out", out,
                    "--num-tokens", 5, "--min-count", 20)  # fmt: skip
    said = " ".join(done.out.split())  # lines are wrapped
    assert done.code == 0 and "300 + 5 = 305 tokens" in said and "next: cpt data tokenize" in said
    done = shop.cpt("data", "fertility", "--tokenizer", tokenizer, "--tokenizer", out, "--source", source)
    assert done.code == 0 and done.out.count("medical") >= 2 and "bytes/token" in done.out
    done = shop.cpt("data", "train-tokenizer", "--input", source, "--out", shop.root / "few", "--vocab-size", 5000)
    assert done.code == 0 and "5,000 were asked for" in " ".join(done.out.split())
    done = shop.cpt("extend-model", shop.root / "base_tied", "--tokenizer", shop.root / "tok_ext", "--out",
                    shop.root / "grown", "--init", "mean_of_all")  # fmt: skip
    assert done.code == 0 and "40 new tokens; old tokens' logits changed by 0" in done.out

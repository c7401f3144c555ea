"""Raw text to report, by the commands of the README: tokenize, base, export, continue on two processes, eval, report, export."""

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

Workshop = Any  # the fixtures of tests/conftest.py
SEQ_LEN, VOCAB_SIZE, STEPS = 64, 300, 12
WORDS = {
    "general": "the old house stood by a river and every morning people walked over the bridge to the small town",
    "code": "def return self None for x in range ( ) : += yield import class if not value == [ ] else lambda",
}


def write_corpus(file: Path, words: list[str], *, num_documents: int) -> None:
    """Documents of 30 to 60 words; each word follows from the one before and the document's number."""
    with file.open("w") as lines:
        for number in range(num_documents):
            at, text = number % len(words), []
            for i in range(30 + number * 7 % 31):
                at = (at * 5 + 3 + (number * i) % 3) % len(words)
                text.append(words[at])
            lines.write(json.dumps({"text": " ".join(text), "id": number}) + "\n")


def run_file(shop: Workshop, name: str, fields: dict[str, Any]) -> Path:
    stores = {"general": str(shop.root / "stores/general"), "code": str(shop.root / "stores/code")}
    batch = {"train.tokens": STEPS * 512, "train.global_batch_tokens": 512, "train.micro_batch_size": 2}
    data = {"data.stores": stores, "data.seq_len": SEQ_LEN, "eval.tokens_per_source": 1024}
    return Path(shop.run_file(name, {**data, **batch, **fields}))


def make(shop: Workshop) -> None:
    """The whole pipeline; what each command printed is kept beside the runs."""
    from data_tools.train_tokenizer import train_bpe

    for name, words in WORDS.items():
        write_corpus(shop.root / f"{name}.jsonl", words.split(), num_documents=300)
    tokenizer = train_bpe([" ".join(WORDS.values())], out=shop.root / "tokenizer", vocab_size=VOCAB_SIZE)

    def run(step: str, *arguments: object) -> None:
        done = shop.cpt(*arguments)
        assert done.code == 0, done.text
        (shop.root / f"{step}.txt").write_text(done.out)

    for name, domain in (("general", "general"), ("code", "code")):
        request = ["--tokenizer", tokenizer, "--out", shop.root / "stores" / name, "--source", name, "--domain", domain]
        run(f"tokenize_{name}", "data", "tokenize", "--input", shop.root / f"{name}.jsonl", *request,
            "--heldout-fraction", "0.1")  # fmt: skip
    model = {"model_type": "llama", "vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 64}
    model |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    model |= {"max_position_embeddings": SEQ_LEN, "tie_word_embeddings": True}
    fresh = {"model.fresh": model, "model.tokenizer": str(tokenizer), "replay.share_general": 1.0}
    run("base", "train", run_file(shop, "base", fresh))
    run("export_base", "export", shop.run_dir("base") / f"checkpoints/step_{STEPS:08d}", "--out", shop.root / "base_hf")
    continued = {"model.fresh": None, "model.init_from": str(shop.root / "base_hf"), "replay.share_general": 0.25}
    run_file(shop, "continued", {**continued, "deepspeed.zero_stage": 2, "checkpoint.every_steps": 5})
    deepspeed = Path(sys.executable).parent / "deepspeed"
    literal = [str(deepspeed), "--num_gpus", "2", "--module", "cpt.train.main", str(shop.root / "continued.yaml")]
    process = shop.start_command(literal)
    out, _ = process.communicate(timeout=240)
    assert process.returncode == 0, out
    (shop.root / "continued.txt").write_text(out)
    shutil.copytree(shop.run_dir("continued") / "evals", shop.root / "evals_in_training")
    last = shop.run_dir("continued") / f"checkpoints/step_{STEPS:08d}"
    run("eval", "eval", last, "--json")
    run("report", "report", shop.run_dir("continued"))
    run("export", "export", last, "--out", shop.root / "continued_hf")


@pytest.fixture(scope="module")
def shop(made_once: Callable[..., Workshop]) -> Iterator[Workshop]:
    yield made_once("pipeline", make)


def read_evaluation(folder: Path, step: int) -> dict[str, Any]:
    return dict(json.loads((folder / f"step_{step:08d}.json").read_text()))


def test_tokenize_splits_every_document_to_one_side_and_says_how_many(shop: Workshop) -> None:
    from cpt.data.token_store import TokenStore

    splits = [TokenStore.open(shop.root / "stores/code" / split) for split in ("train", "heldout")]
    assert sum(store.num_documents for store in splits) == 300
    assert f"{splits[0].num_documents:,} documents, {splits[0].num_tokens:,} tokens" in (
        shop.root / "tokenize_code.txt"
    ).read_text().replace("\n", " ")
    assert all(tokens[-1] == store.manifest.eos_id for store in splits for tokens in store.documents())


def test_two_ranks_trained_every_step_of_the_plan(shop: Workshop) -> None:
    assert json.loads((shop.run_dir("continued") / "environment.json").read_text())["world_size"] == 2
    assert [record["step"] for record in shop.records("continued")] == list(range(1, STEPS + 1))
    assert [event["event"] for event in shop.events("continued")][-1] == "finish"
    assert (
        len(list((shop.run_dir("continued") / f"checkpoints/step_{STEPS:08d}").glob("shard_*-of-00002.param.*"))) == 2
    )


def test_the_shares_realised_are_the_planned_ones(shop: Workshop) -> None:
    from cpt.plan import read_plan

    plan = read_plan(shop.run_dir("continued") / "plan.json")
    assert plan.share_general() == pytest.approx(0.25, abs=0.001)
    for record in shop.records("continued"):
        seen = record["tokens_by_source"]
        assert sum(seen.values()) == record["tokens_seen"] == record["step"] * 512
        assert abs(seen["general"] - 0.25 * record["tokens_seen"]) <= SEQ_LEN  # one row
    assert seen == plan.tokens_by_source()


def test_both_sides_are_evaluated_before_and_after(shop: Workshop) -> None:
    before, after = (read_evaluation(shop.root / "evals_in_training", step) for step in (0, STEPS))
    base = read_evaluation(shop.run_dir("base") / "evals", STEPS)
    for name in ("general", "code"):
        assert before["sources"][name]["loss"] == pytest.approx(base["sources"][name]["loss"], rel=1e-5)
        assert before["sources"][name]["group"] == ("general" if name == "general" else "domain")
    assert after["groups"]["domain"]["loss"] < before["groups"]["domain"]["loss"] - 0.1


def test_cpt_eval_of_the_last_checkpoint_is_the_evaluation_made_in_training(shop: Workshop) -> None:
    (told,) = json.loads((shop.root / "eval.txt").read_text())
    trained = read_evaluation(shop.root / "evals_in_training", STEPS)
    base = read_evaluation(shop.root / "evals_in_training", 0)
    for name, source in trained["sources"].items():
        for key in ("loss", "bpb", "ppl"):
            assert told["sources"][name][key] == pytest.approx(source[key], rel=1e-6)
        assert told["sources"][name]["tokens"] == source["tokens"]
        assert told["sources"][name]["change"] == pytest.approx(
            source["loss"] - base["sources"][name]["loss"], abs=1e-5
        )


def test_the_report_leads_with_the_gain_and_shows_planned_and_realised_shares(shop: Workshop) -> None:
    html, markdown = (Path(line) for line in (shop.root / "report.txt").read_text().splitlines())
    before, after = (read_evaluation(shop.root / "evals_in_training", step) for step in (0, STEPS))
    gain = before["groups"]["domain"]["loss"] - after["groups"]["domain"]["loss"]
    for page in (html.read_text(), markdown.read_text()):
        assert f"{gain:.3f} nats" in page and "25.0%" in page
    (run,) = json.loads(shop.cpt("report", shop.run_dir("continued"), "--json").out)["runs"]
    assert run["share_general_planned"] == run["share_general_realised"] == pytest.approx(0.25, abs=0.001)


def test_the_export_loads_in_transformers_and_has_the_live_logits_and_the_tokenizer(shop: Workshop) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from cpt.data.batch import collate
    from cpt.data.packing import concat_row
    from cpt.model.kernels import forward_logits
    from cpt.offline import restore

    live = restore(shop.run_dir("continued") / f"checkpoints/step_{STEPS:08d}")
    row = concat_row(live.prepared.heldout_stores["code"], 0, SEQ_LEN)
    length = int((row.segments == 0).sum())
    batch = collate([row], [0])
    exported: Any = AutoModelForCausalLM.from_pretrained(shop.root / "continued_hf").eval()
    with torch.no_grad():
        wanted = forward_logits(live.loaded.model.eval(), batch, live.loaded.report.attention)[0, :length]
        found = exported(batch.input_ids_BT[:, :length]).logits[0]
    assert (found - wanted).abs().max() < 1e-5
    text = "people walked over the bridge"
    tokenizer: Any = AutoTokenizer.from_pretrained(shop.root / "continued_hf")
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert AutoModelForCausalLM.from_pretrained(shop.root / "base_hf").config.vocab_size == VOCAB_SIZE

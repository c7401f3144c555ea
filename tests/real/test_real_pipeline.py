"""Real text and real tokenizers, a byte-level BPE and a sentencepiece one: tokenize, tiny base, continue, eval."""

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

Workshop = Any  # the fixtures of tests/conftest.py
SHARED = Path(os.environ.get("CPT_SHARED_DATA", Path(__file__).parents[3] / "shared/data"))
pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is absent; set CPT_SHARED_DATA")
STEPS, STEP_TOKENS, SEQ_LEN = 10, 1024, 64
MEGABYTES = {"en_gov_web": 2.0, "law_uscode": 3.0}


def take(corpus: str, out: Path) -> Path:
    """The first megabytes of a corpus as .jsonl, in whole documents."""
    import zstandard

    with zstandard.open(SHARED / f"corpora/{corpus}/train.jsonl.zst", "rt", encoding="utf-8") as lines:
        taken, total = [], 0
        for line in lines:
            taken.append(line)
            total += len(line)
            if total > MEGABYTES[corpus] * 1e6:
                break
    out.write_text("".join(taken), encoding="utf-8")
    return out


@pytest.mark.parametrize(
    ("tokenizer", "vocab_size"), [("gpt_neox_20b", 50_277), ("mistral_v1/tokenizer.model", 32_000)]
)
def test_tokenize_base_continue_and_eval_on_real_text(workshop: Workshop, tokenizer: str, vocab_size: int) -> None:
    shop = workshop
    for corpus, domain in (("en_gov_web", "general"), ("law_uscode", "law")):
        file = take(corpus, shop.root / f"{corpus}.jsonl")
        request = ["--tokenizer", SHARED / "tokenizers" / tokenizer, "--source", corpus, "--domain", domain]
        out = ["--out", shop.root / corpus, "--heldout-fraction", "0.03", "--json"]
        done = shop.cpt("data", "tokenize", "--input", file, *request, *out)
        assert done.code == 0, done.text
        splits = json.loads(done.out)["splits"]
        assert 0.15 < splits["train"]["tokens"] / splits["train"]["utf8_bytes"] < 0.35
        assert splits["heldout"]["documents"] > 3
        shown = shop.cpt("data", "inspect", shop.root / corpus, "--tokenizer", SHARED / "tokenizers" / tokenizer)
        assert shown.code == 0, shown.text
    llama = {"model_type": "llama", "vocab_size": vocab_size, "hidden_size": 32, "intermediate_size": 64}
    llama |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    llama |= {"max_position_embeddings": SEQ_LEN, "tie_word_embeddings": True}
    fields = {
        "data.stores": {corpus: str(shop.root / corpus) for corpus in MEGABYTES},
        "data.seq_len": SEQ_LEN,
        "train.tokens": STEPS * STEP_TOKENS,
        "train.global_batch_tokens": STEP_TOKENS,
        "train.micro_batch_size": 4,
        "eval.tokens_per_source": 1024,
    }
    base = {**fields, "model.fresh": llama, "replay.share_general": 1.0}
    assert shop.cpt("train", shop.run_file("base", base)).code == 0
    origin = str(shop.run_dir("base") / f"checkpoints/step_{STEPS:08d}")
    continued = {**fields, "model.fresh": None, "model.init_from": origin, "replay.share_general": 0.25}
    done = shop.cpt("train", shop.run_file("continued", continued))
    assert done.code == 0, done.text
    first, last = (shop.evaluation("continued", step)["sources"] for step in (0, STEPS))
    assert first["law_uscode"]["loss"] < math.log(vocab_size) - 0.5  # the base has learned something
    assert last["law_uscode"]["loss"] < first["law_uscode"]["loss"] - 0.3
    assert shop.records("continued")[-1]["tokens_by_source"]["en_gov_web"] == pytest.approx(
        0.25 * STEPS * STEP_TOKENS, abs=SEQ_LEN
    )
    told = shop.cpt("eval", shop.run_dir("continued") / f"checkpoints/step_{STEPS:08d}", "--json")
    for corpus, source in json.loads(told.out)[0]["sources"].items():
        assert source["loss"] == pytest.approx(last[corpus]["loss"], rel=1e-6)
        assert 0.5 < source["bpb"] < 5

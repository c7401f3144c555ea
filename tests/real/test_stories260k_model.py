"""A real pre-trained Llama (stories260K): loads in full, has the loss it should have on its own kind of text, survives an export."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zstandard
from numpy.typing import NDArray
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from cpt.config import ModelSection
from cpt.eval.perplexity import EvalSpec, HeldOut, evaluate
from cpt.model.build import LoadedModel, Needs, build_model, named_tensors
from cpt.model.export import ExportSpec, export_checkpoint
from cpt.model.kernels import verify_packing

SHARED = Path(os.environ.get("CPT_SHARED_DATA", Path(__file__).parents[3] / "shared/data"))
WEIGHTS = SHARED / "weights/stories260K"
pytestmark = pytest.mark.skipif(not WEIGHTS.is_dir(), reason=f"{WEIGHTS} is absent; set CPT_SHARED_DATA")


class Documents:
    """A token reader over documents in memory."""

    def __init__(self, documents: list[list[int]]) -> None:
        self.tokens = np.array([token for document in documents for token in document], dtype=np.uint16)
        self.starts = np.cumsum([0, *map(len, documents)][:-1]).astype(np.int64)
        self.num_tokens = len(self.tokens)

    def read(self, start: int, stop: int) -> NDArray[Any]:
        return self.tokens[start:stop]

    def document_starts(self, start: int, stop: int) -> NDArray[np.int64]:
        return self.starts[(self.starts >= start) & (self.starts < stop)]


def texts(corpus: str) -> list[str]:
    with zstandard.open(SHARED / "corpora" / corpus / "valid.jsonl.zst", "rt", encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]


def held_out(corpus: str, group: str, limit: int) -> HeldOut:
    tokenizer = Tokenizer.from_file(str(WEIGHTS / "tokenizer.json"))
    chosen = texts(corpus)[:limit]
    documents = [[1, *tokenizer.encode(text, add_special_tokens=False).ids] for text in chosen]
    num_bytes = sum(len(text.encode()) for text in chosen)
    return HeldOut(Documents(documents), group, sum(map(len, documents)) / num_bytes)


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return build_model(ModelSection(init_from=str(WEIGHTS)), Needs(seq_len=512, vocab_size=512, seed=0))


def test_every_weight_of_stories260k_is_loaded(loaded: LoadedModel) -> None:
    assert loaded.report.loaded_fraction == 1.0
    assert loaded.report.unexpected == ()
    assert loaded.report.parameters == 260_032
    verify_packing(loaded.model, loaded.report.attention, vocab_size=512, device="cpu")


def test_its_loss_on_tiny_stories_is_the_known_one_and_foreign_text_is_harder(loaded: LoadedModel) -> None:
    sources = {"stories": held_out("en_tinystories", "general", 40), "medicine": held_out("med_qa", "domain", 10)}
    spec = EvalSpec(seq_len=512, tokens_per_source=16_384, micro_batch_size=4, backend=loaded.report.attention)
    found = evaluate(loaded.model, sources, spec)
    assert found is not None
    stories, medicine = found.record.sources["stories"], found.record.sources["medicine"]
    assert stories.loss == pytest.approx(1.6, abs=0.1)
    assert medicine.loss == pytest.approx(4.3, abs=0.4)
    assert stories.bpb is not None
    assert 0.5 < stories.bpb < 1.5


def test_its_export_is_the_same_model_with_its_tokenizer(loaded: LoadedModel, tmp_path: Path) -> None:
    config: Any = loaded.model.config
    spec = ExportSpec(tmp_path / "hf", tokenizer=WEIGHTS, generation_config=WEIGHTS / "generation_config.json")
    report = export_checkpoint(named_tensors(loaded.model), config, spec)
    assert report.logit_difference < 1e-5
    assert AutoTokenizer.from_pretrained(tmp_path / "hf").encode("Once upon a time") == AutoTokenizer.from_pretrained(
        WEIGHTS
    ).encode("Once upon a time")
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    for name, weight in loaded.model.named_parameters():
        assert torch.equal(again.get_parameter(name), weight)


def test_its_bf16_export_moves_logits_by_a_small_part_of_their_size(loaded: LoadedModel, tmp_path: Path) -> None:
    report = export_checkpoint(
        named_tensors(loaded.model), loaded.model.config, ExportSpec(tmp_path / "hf", dtype="bf16")
    )
    assert report.logit_difference < 1e-5
    assert 0.0 < report.rounding_difference < 0.5

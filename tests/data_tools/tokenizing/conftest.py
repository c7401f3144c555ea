"""A tiny tokenizer and four files of tales, and what a request for a store of them is."""

import json
from pathlib import Path

import pytest

from data_tools.store_builder import StoreRequest
from data_tools.train_tokenizer import train_bpe

TEXTS = [f"Document {i} tells of {i * 7919 % 1009} cats and ünïcödé. " * (i % 5 + 1) for i in range(200)]


@pytest.fixture(scope="session")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_bpe(TEXTS, out=tmp_path_factory.mktemp("bpe"), vocab_size=300)


@pytest.fixture
def tales(tmp_path: Path, bpe: Path) -> StoreRequest:
    for number in range(4):
        lines = (json.dumps({"text": text}) + "\n" for text in TEXTS[number * 50 : number * 50 + 50])
        (tmp_path / f"{number}.jsonl").write_text("".join(lines))
    return StoreRequest(
        inputs=(str(tmp_path / "*.jsonl"),), tokenizer=bpe, out=tmp_path / "store", source="tales", domain="general",
        heldout_fraction=0.1, segment_bytes=4000, workers=1,
    )  # fmt: skip

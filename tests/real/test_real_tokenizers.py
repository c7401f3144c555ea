"""Real tokenizers on real texts: the ids of a store are those of the tokenizer's own library, whatever did the work."""

from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from data_tools.encoders import load_encoder
from data_tools.sources import ReadOptions, read_texts, resolve_inputs

DATA = Path(__file__).parents[3] / "shared" / "data"
pytestmark = pytest.mark.skipif(not (DATA / "corpora").is_dir(), reason="needs the shared corpora")


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Two of every corpus: prose, code, law, mathematics, German and Japanese; and what programs trip over."""
    inputs = resolve_inputs([str(DATA / "corpora" / "*" / "valid.jsonl.zst")])
    found = [text[:20_000] for entry in inputs for text in islice(read_texts(entry, ReadOptions()), 2)]
    return [*found, "<s> is no token here </s>", "<|endoftext|>", "", " ", "\n\n", "a\u200bb \ufb01 \u212b"]


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox_20b"])
def test_a_real_tokenizer_json_gives_the_ids_of_tokenizers(name: str, texts: list[str]) -> None:
    from tokenizers import Tokenizer

    plain = Tokenizer.from_file(str(DATA / "tokenizers" / name / "tokenizer.json"))
    encoder = load_encoder(DATA / "tokenizers" / name, sample=texts[:20])
    expected = [id_ for text in texts for id_ in plain.encode(text, add_special_tokens=False).ids]
    assert encoder.encode_batch(texts)[0].tolist() == expected
    assert encoder.bos_id is None and encoder.cut is not None


@pytest.mark.parametrize(
    ("name", "bos_id"),
    [("t5/spiece.model", None), ("mistral_v1/tokenizer.model", 1), ("mistral_v3/tokenizer.model", 1)],
)
def test_a_real_sentencepiece_model_gives_the_ids_of_sentencepiece(
    name: str, bos_id: int | None, texts: list[str]
) -> None:
    from sentencepiece import SentencePieceProcessor

    plain = SentencePieceProcessor(model_file=str(DATA / "tokenizers" / name))
    encoder = load_encoder(DATA / "tokenizers" / name, sample=texts[:20])
    expected = np.concatenate([np.array(ids, np.uint32) for ids in plain.encode(texts)])
    assert np.array_equal(encoder.encode_batch(texts)[0], expected)
    assert encoder.bos_id == bos_id and encoder.cut is not None


@pytest.mark.parametrize("name", ["gpt_neox_20b", "t5/spiece.model", "mistral_v1/tokenizer.model"])
def test_long_real_texts_in_pieces_have_the_ids_of_the_whole(name: str, texts: list[str]) -> None:
    encoder = load_encoder(DATA / "tokenizers" / name, sample=texts[:20])
    assert encoder.cut is not None
    for text in texts:
        pieces = list(encoder.cut.pieces(text, 1000))
        assert np.array_equal(encoder.encode_batch(pieces)[0], encoder.encode_batch([text])[0])

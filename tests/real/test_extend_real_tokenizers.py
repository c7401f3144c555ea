"""Real tokenizers with tokens for real domains: fewer tokens, old ids where they were, every text comes back."""

import os
from pathlib import Path

import pytest

from cpt.data.vocabulary import read_extension
from data_tools.encoders import load_decoder, load_encoder
from data_tools.sources import ReadOptions, read_texts, resolve_inputs
from data_tools.vocabulary.extend import ExtendRequest, extend_tokenizer

SHARED = Path(os.environ.get("CPT_SHARED_DATA", Path(__file__).parents[3] / "shared/data"))
pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is absent; set CPT_SHARED_DATA")
CORPORA, TOKENIZERS = SHARED / "corpora", SHARED / "tokenizers"


def texts_of(corpus: str, *, documents: int = 6) -> list[str]:
    [source] = resolve_inputs([str(CORPORA / corpus / "test.jsonl.zst")])
    return [text[:20_000] for text, _ in zip(read_texts(source, ReadOptions()), range(documents), strict=False)]


@pytest.mark.parametrize(
    ("tokenizer", "domain", "saved"),
    [
        ("gpt2", "de_law", 0.1),
        ("gpt_neox_20b", "math_stacks", 0.005),
        ("mistral_v1", "ja_aozora", 0.05),
    ],
)
def test_a_real_tokenizer_is_extended_for_a_real_domain(
    tmp_path: Path, tokenizer: str, domain: str, saved: float
) -> None:
    base, out = TOKENIZERS / tokenizer, tmp_path / "out"
    sources = tuple(
        f"{name}={CORPORA / of}/valid.jsonl.zst" for name, of in ((domain, domain), ("general", "en_novels"))
    )
    report = extend_tokenizer(ExtendRequest(base, sources, out, num_tokens=300, min_count=20, sample_bytes=1_000_000))
    extension = read_extension(out)
    assert extension is not None and extension.vocab_size == report["vocab_size"]
    before, after = load_encoder(base), load_encoder(out)
    decode, decode_base = load_decoder(out), load_decoder(base)
    counts = [0, 0]
    for corpus in (domain, "en_novels", "code_python"):
        for text in texts_of(corpus):
            old, new = (encoder.encode_batch([text])[0].tolist() for encoder in (before, after))
            first = extension.base_vocab_size
            back = [part for i in new for part in ([i] if i < first else extension.subtokens[i - first])]
            assert back == old
            assert decode(new) == decode_base(old)
            if corpus == domain:
                counts[0] += len(old)
                counts[1] += len(new)
    assert counts[1] < (1 - saved) * counts[0], counts


def test_stories260k_starts_lower_on_german_law_with_new_tokens_than_without(tmp_path: Path) -> None:
    """Per byte, before any training: rows made of sub-tokens carry what the model knows."""
    import torch

    from cpt.config import ModelSection
    from cpt.model.build import Needs, build_model
    from cpt.model.vocab import extend_vocabulary

    base, out = SHARED / "weights/stories260K", tmp_path / "out"
    source = (f"law={CORPORA}/de_law/valid.jsonl.zst",)
    extend_tokenizer(ExtendRequest(base, source, out, num_tokens=128, min_count=50, sample_bytes=1_000_000))
    extension = read_extension(out)
    assert extension is not None
    section, needs = ModelSection(init_from=str(base)), Needs(256, 512, seed=0)
    models = [build_model(section, needs), extend_vocabulary(build_model(section, needs), extension)]
    totals = []
    for loaded, tokenizer in zip(models, (base, out), strict=True):
        ids = load_encoder(tokenizer).encode_batch(texts_of("de_law", documents=2))[0].astype("int64")
        rows = torch.from_numpy(ids[: len(ids) // 256 * 256]).reshape(-1, 256)
        with torch.no_grad():
            totals.append(loaded.model(input_ids=rows, labels=rows).loss.item() * rows.numel())
    assert totals[1] < totals[0]

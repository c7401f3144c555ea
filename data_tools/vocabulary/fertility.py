"""How finely a tokenizer cuts texts: tokens per word and bytes per token, per source."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from data_tools.encoders import Encoder, load_encoder
from data_tools.vocabulary.samples import Sample, batches


def fertility(encoder: Encoder, texts: Sequence[str]) -> dict[str, Any]:
    """Counts over ``texts``; a word is what white space separates, so tokens_per_word says nothing for Japanese."""
    tokens = sum(int(encoder.encode_batch(batch)[1].sum()) for batch in batches(texts))
    size = sum(len(text.encode()) for text in texts)
    words = sum(len(text.split()) for text in texts)
    return {
        "documents": len(texts),
        "bytes": size,
        "words": words,
        "tokens": tokens,
        "tokens_per_word": round(tokens / max(words, 1), 4),
        "bytes_per_token": round(size / max(tokens, 1), 4),
    }


def compare_tokenizers(
    tokenizers: Sequence[Path], samples: Sequence[Sample], *, eos_token: str | None = None
) -> dict[str, Any]:
    """Facts for ``cpt data fertility``: every tokenizer on the same held-back texts of every source."""
    texts = {}
    for sample in samples:
        for _ in sample.taught():
            pass
        texts[sample.name] = sample.measured_on()
    found: dict[str, Any] = {}
    for path in tokenizers:
        encoder = load_encoder(path, eos_token=eos_token, sample=[texts[name][0] for name in texts])
        sources = {name: fertility(encoder, of_source) for name, of_source in texts.items()}
        found[str(path)] = {"vocab_size": encoder.vocab_size, "encoder": encoder.note, "sources": sources}
    return {"tokenizers": found}


def render_comparison(facts: Mapping[str, Any]) -> Table:
    table = Table(title="fertility on held-back documents", title_justify="left")
    for column in ("source", "tokenizer"):
        table.add_column(column)
    for column in ("vocabulary", "tokens", "tokens/word", "bytes/token"):
        table.add_column(column, justify="right")
    rows = [
        (name, path, found["vocab_size"], measured)
        for path, found in facts["tokenizers"].items()
        for name, measured in found["sources"].items()
    ]
    for name, path, size, measured in sorted(rows, key=lambda row: row[0]):
        numbers = (f"{measured['tokens_per_word']:.3f}", f"{measured['bytes_per_token']:.3f}")
        table.add_row(Text(name), Text(path), f"{size:,}", f"{measured['tokens']:,}", *numbers)
    return table

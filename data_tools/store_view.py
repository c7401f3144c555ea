"""What a token store holds, as plain data and as a table; reads manifests and document lengths, not the tokens."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from cpt.data.token_store import MANIFEST_NAME, TokenStore
from cpt.rundir import DataError
from data_tools.encoders import Decode, load_decoder, tokenizer_fingerprint

PERCENTILES = (0, 10, 50, 90, 99, 100)
_SHOWN_TOKENS = 200


def inspect_store(path: Path, *, tokenizer: Path | None = None, num_documents: int = 3) -> dict[str, Any]:
    """Facts of every split and the first documents of each: ids, and text when ``tokenizer`` is given. JSON-able.

    Raises:
        DataError: no store there, a damaged one, or a tokenizer that is not the one the store was made with.
    """
    folders = (
        [path] if (path / MANIFEST_NAME).is_file() else sorted(file.parent for file in path.glob(f"*/{MANIFEST_NAME}"))
    )
    if not folders:
        TokenStore.open(path)  # raises, with the reason
    stores = [TokenStore.open(folder) for folder in folders]
    decode = _matching_decoder(tokenizer, stores[0]) if tokenizer is not None else None
    splits = [
        _split_facts(store) | {"first_documents": _first_documents(store, num_documents, decode)} for store in stores
    ]
    return {"path": str(path), "splits": splits}


def _matching_decoder(tokenizer: Path, store: TokenStore) -> Decode:
    made_with, given = store.manifest.tokenizer, tokenizer_fingerprint(tokenizer)
    if given != made_with.fingerprint:
        raise DataError(
            f"{tokenizer}: fingerprint {given[:16]}, but {store.path} was made with {made_with.name} "
            f"({made_with.fingerprint[:16]}); fix: name that tokenizer, or leave --tokenizer out"
        )
    return load_decoder(tokenizer)


def _split_facts(store: TokenStore) -> dict[str, Any]:
    facts = asdict(store.manifest)
    shards = facts.pop("shards")
    tokens, size = store.num_tokens, store.manifest.utf8_bytes
    return facts | {
        "num_shards": len(shards),
        "bytes_per_token": round(size / tokens, 4) if tokens else None,
        "document_tokens": _length_percentiles(store),
    }


def _length_percentiles(store: TokenStore) -> dict[str, int]:
    """Document lengths in tokens, EOS included, at ``PERCENTILES``; each a real document's, not interpolated."""
    lengths = store.document_lengths()
    if not len(lengths):
        return {}
    values = np.percentile(lengths, PERCENTILES, method="nearest")
    return {f"p{percentile}": int(value) for percentile, value in zip(PERCENTILES, values, strict=True)}


def _first_documents(store: TokenStore, num_documents: int, decode: Decode | None) -> list[dict[str, Any]]:
    shown = []
    starts = store.document_starts(0, store.num_tokens)[: num_documents + 1].tolist()
    ends = [*starts[1:], store.num_tokens]
    for number, (start, end) in enumerate(zip(starts[:num_documents], ends, strict=False)):
        ids = store.read(start, min(end, start + _SHOWN_TOKENS)).tolist()
        entry = {"document": number, "start": start, "tokens": end - start, "ids": ids}
        if decode is not None:
            entry["text"] = decode(ids)
        shown.append(entry)
    return shown


def render_inspection(inspection: dict[str, Any]) -> RenderableType:
    """A facts table with one column per split, then the first documents, one panel each: borders are visible."""
    splits = inspection["splits"]
    table = Table(title=inspection["path"], title_justify="left")
    table.add_column("")
    for split in splits:
        table.add_column(split["split"], justify="right")
    for label, render in _FACT_ROWS:
        table.add_row(label, *(render(split) for split in splits))
    panels = [_render_document(split["split"], entry) for split in splits for entry in split["first_documents"]]
    return Group(table, *panels)


def _render_document(split: str, entry: dict[str, Any]) -> RenderableType:
    body = entry.get("text", " ".join(str(token) for token in entry["ids"]))
    rest = entry["tokens"] - len(entry["ids"])
    suffix = f" ... {rest:,} more tokens" if rest else ""
    title = f"{split} document {entry['document']} · from token {entry['start']:,} · {entry['tokens']:,} tokens"
    return Panel(Text(body + suffix), title=Text(title), title_align="left")


def _percentile_line(split: dict[str, Any]) -> str:
    return " ".join(f"{name} {value:,}" for name, value in split["document_tokens"].items()) or "-"


_FACT_ROWS = (
    ("source / domain", lambda split: f"{split['source']} / {split['domain']}"),
    ("documents", lambda split: f"{split['documents']:,}"),
    ("tokens", lambda split: f"{split['tokens']:,}"),
    ("UTF-8 bytes of text", lambda split: f"{split['utf8_bytes']:,}"),
    ("bytes per token", lambda split: str(split["bytes_per_token"] or "-")),
    ("document length, tokens", _percentile_line),
    ("dtype, vocabulary, EOS id", lambda split: f"{split['dtype']}, {split['vocab_size']:,}, {split['eos_id']}"),
    ("tokenizer", lambda split: f"{split['tokenizer']['name']} ({split['tokenizer']['fingerprint'][:16]})"),
    ("content hash", lambda split: split["content_hash"][:16]),
    ("shards", lambda split: f"{split['num_shards']:,}"),
)

"""What a split of a token store or a view holds: its manifest, lengths, token frequencies, documents, packed rows.

What is cheap is exact (manifest, lengths up to ``MOST_LENGTHS`` documents). The rest rests on a sample, evenly spaced
over the split, and says on how much: tokens are counted in at most ``MOST_COUNTED``, texts are those of the sampled
documents. Text needs the tokenizer the store was made with; without it ids are shown.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpt.data.store_selection import Split, StoreView, open_split
from data_tools.encoders import Decode
from data_tools.look.lengths import length_facts, percentiles
from data_tools.look.text_tally import TextTally, language_rule
from data_tools.store_texts import is_split, matching_decoder, text_ids

MOST_LENGTHS = 5_000_000
MOST_COUNTED = 50_000_000
MOST_TOKENS_OF_A_DOCUMENT = 30_000
_BLOCK = 1_000_000
_SHOWN_TOKENS = 200
_TOP_TOKENS = 15
_NEVER_SHOWN = 20
_RANKS = 60
_BORDERS_LOOKED_AT = 1000


@dataclass(frozen=True)
class Look:
    """How much to look at. ``seq_len``, ``num_rows``: packed rows to show; ``sample``: documents."""

    tokenizer: Path | None = None
    num_documents: int = 3
    sample: int = 2000
    seq_len: int = 512
    num_rows: int = 1
    text_key: str = "text"


def find_splits(path: Path) -> list[Path]:
    """The split folders of a store or a view, or the one that ``path`` is; none where there is neither."""
    if is_split(path):
        return [path]
    return sorted(filter(is_split, path.iterdir())) if path.is_dir() else []


def store_facts(path: Path, look: Look) -> dict[str, Any]:
    """Raises DataError: no store there, a damaged one, a tokenizer that is not the one the store was made with."""
    store = open_split(path)
    decode = matching_decoder(store, look.tokenizer) if look.tokenizer is not None else None
    facts = asdict(store.manifest)
    shards = facts.pop("shards")
    lengths = _lengths(store)
    return {
        "kind": "store",
        "label": f"{facts['source']} {facts['split']}",
        "path": str(path),
        **facts,
        "num_shards": len(shards),
        **(_view_facts(store) if isinstance(store, StoreView) else {}),
        "bytes_per_token": round(store.manifest.utf8_bytes / store.num_tokens, 4) if store.num_tokens else None,
        "document_tokens": percentiles(lengths),
        "lengths": length_facts(lengths, "tokens", store.num_documents),
        "tokens_seen": _token_facts(store, decode),
        **_sample_facts(store, look, decode),
        "first_documents": _first_documents(store, look.num_documents, decode),
        "rows": list(_rows(store, look, decode)),
    }


def _view_facts(store: StoreView) -> dict[str, Any]:
    facts = {"store": str(store.store.path), "of_documents": store.store.num_documents, "order": store.view.order}
    return {"view": facts | {"rule": dict(store.view.rule)}}


def _lengths(store: Split) -> NDArray[np.int64]:
    """All lengths, or those of evenly spaced runs of documents."""
    if store.num_documents <= MOST_LENGTHS:
        return store.document_lengths()
    run = 1000
    firsts = np.linspace(0, store.num_documents - run, MOST_LENGTHS // run).astype(np.int64)
    return np.concatenate([np.diff(store.document_bounds(first, first + run)) for first in firsts.tolist()])


def _token_facts(store: Split, decode: Decode | None) -> dict[str, Any]:
    counts = np.zeros(store.vocab_size, np.int64)
    num_blocks = -(-store.num_tokens // _BLOCK)
    for block in _places(num_blocks, MOST_COUNTED // _BLOCK):
        tokens = store.read(block * _BLOCK, min((block + 1) * _BLOCK, store.num_tokens))
        counts += np.bincount(tokens, minlength=store.vocab_size)
    counted = int(counts.sum())
    by_count = np.argsort(-counts, kind="stable")
    used = int(np.count_nonzero(counts))
    never = np.flatnonzero(counts == 0)
    return {
        "counted": counted,
        "of": store.num_tokens,
        "vocab_size": store.vocab_size,
        "used": used,
        "used_share": round(used / store.vocab_size, 4),
        "top": [_token(token, decode) | {"count": int(counts[token]), "share": round(int(counts[token]) / counted, 5)}
                for token in by_count[:_TOP_TOKENS].tolist() if counts[token]],
        "never_seen": [_token(token, decode) for token in _evenly(never, _NEVER_SHOWN)],
        "ranks": _rank_curve(counts[by_count][:used]),
    }  # fmt: skip


def _token(token: int, decode: Decode | None) -> dict[str, Any]:
    if decode is None:
        return {"id": token}
    text = decode([token])
    # part of a character alone has no text: all such tokens would look the same
    return {"id": token, "text": f"<bytes, id {token}>" if "\ufffd" in text else text}


def _evenly(values: NDArray[Any], most: int) -> list[int]:
    return [int(values[place]) for place in _places(len(values), most)]


def _places(count: int, most: int) -> list[int]:
    """At most ``most`` of the numbers below ``count``, evenly spaced, both ends among them."""
    return np.linspace(0, count - 1, min(count, most)).astype(np.int64).tolist() if count else []


def _rank_curve(sorted_counts: NDArray[np.int64]) -> list[list[int]]:
    """[rank from 1, count] at evenly spaced places of a logarithmic axis."""
    if not len(sorted_counts):
        return []
    ranks = np.unique(np.geomspace(1, len(sorted_counts), _RANKS).round().astype(np.int64))
    return [[rank, int(sorted_counts[rank - 1])] for rank in ranks.tolist()]


def _sample_facts(store: Split, look: Look, decode: Decode | None) -> dict[str, Any]:
    rule, identify = language_rule() if decode else ("", str)
    tally = TextTally(identify)
    tokens = 0
    seen: set[bytes] = set()
    duplicates = 0
    for document in _places(store.num_documents, look.sample):
        start, end = store.document_bounds(document, document + 1).tolist()
        ids = store.read(start, min(end, start + MOST_TOKENS_OF_A_DOCUMENT))
        content = text_ids(ids, store.manifest)
        tokens += len(content)
        if decode:
            tally.add(decode(content.tolist()))
        else:
            key = ids.tobytes()
            duplicates += key in seen
            seen.add(key)
    sampled = min(look.sample, store.num_documents)
    facts: dict[str, Any] = {
        "sample": {
            "documents": sampled,
            "of": store.num_documents,
            "how": "evenly spaced",
            "shortened": tally.shortened,
        }
    }
    if decode is None:
        share = round(duplicates / sampled, 4) if sampled else 0.0
        return facts | {"duplicates": {"documents": duplicates, "share": share}}
    return facts | {
        **tally.facts(),
        "language_rule": rule,
        "tokens_per_word": round(tokens / tally.words, 4) if tally.words else None,
        "characters_per_token": round(tally.characters / tokens, 4) if tokens else None,
    }


def _first_documents(store: Split, num_documents: int, decode: Decode | None) -> list[dict[str, Any]]:
    shown = []
    last = min(num_documents, store.num_documents)
    bounds = store.document_bounds(0, last).tolist() if last else []
    for number, (start, end) in enumerate(pairwise(bounds)):
        ids = store.read(start, min(end, start + _SHOWN_TOKENS)).tolist()
        entry = {"document": number, "start": start, "tokens": end - start, "ids": ids}
        if decode is not None:
            entry["text"] = decode(ids)
        shown.append(entry)
    return shown


def _rows(store: Split, look: Look, decode: Decode | None) -> Iterator[dict[str, Any]]:
    """Rows as ``concat`` packs them, cut into their pieces of documents: the first ones with a border inside."""
    for row in _rows_with_borders(store, look):
        start, stop = row * look.seq_len, (row + 1) * look.seq_len
        opens = store.document_starts(start, stop).tolist()
        borders = sorted({start, *opens, stop})
        pieces = [_piece(store, low, high, decode) | {"opens": low in opens}
                  for low, high in pairwise(borders)]  # fmt: skip
        yield {"row": row, "start": start, "seq_len": look.seq_len, "pieces": pieces}


def _rows_with_borders(store: Split, look: Look) -> list[int]:
    num_rows = store.num_tokens // look.seq_len
    starts = store.document_bounds(0, min(store.num_documents, _BORDERS_LOOKED_AT)).tolist()
    inside = [start // look.seq_len for start in starts if start % look.seq_len]
    with_borders = [row for row in dict.fromkeys(inside) if row < num_rows]
    return (with_borders or list(range(num_rows)))[: look.num_rows]


def _piece(store: Split, start: int, stop: int, decode: Decode | None) -> dict[str, Any]:
    ids = store.read(start, stop).tolist()
    closed = ids[-1] == store.manifest.eos_id
    content = ids[:-1] if closed else ids
    text = decode(content) if decode else " ".join(map(str, content))
    return {"tokens": len(ids), "ends": closed, "text": text}

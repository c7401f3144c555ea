"""What a packing rule does to a store, from the lengths of its documents alone: rows, fill, documents cut, tokens lost.

Builds nothing and reads no token. Example, documents of 4 3 6 tokens in rows of 6: ``concat`` makes 2 rows, cuts the
last two documents although each would fit a row, and leaves one token over (predicted, never read); ``best_fit`` makes
3 rows, cuts none, and fills 13 of 18 places.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cpt.data.best_fit import cut, num_best_fit_rows
from cpt.data.pack_index import document_chunks
from cpt.data.packing import concat_num_rows
from cpt.data.store_selection import Split


@dataclass(frozen=True)
class PackingEffect:
    """Counts of one store, rule and row length. ``pieces``: document pieces in all rows."""

    packing: str
    seq_len: int
    documents: int
    tokens: int
    rows: int
    pieces: int
    cut_documents: int  # that stand in more than one row
    cut_needlessly: int  # of these, the ones no longer than a row
    tokens_in_cut_documents: int
    lost_tokens: int  # in no row: the tail behind the last whole row

    @property
    def fill(self) -> float:
        """Share of the rows' places that hold a token of a document."""
        return (self.tokens - self.lost_tokens) / max(self.rows * self.seq_len, 1)


def effect_facts(source: str, effect: PackingEffect) -> dict[str, Any]:
    """For --json: counts, and the shares they make."""
    return {
        "source": source,
        **asdict(effect),
        "fill": effect.fill,
        "cut_share": effect.cut_documents / max(effect.documents, 1),
        "tokens_in_cut_share": effect.tokens_in_cut_documents / max(effect.tokens, 1),
        "pieces_per_row": effect.pieces / max(effect.rows, 1),
        "pad_tokens": effect.rows * effect.seq_len - effect.tokens + effect.lost_tokens,
    }


def render_effects(effects: Sequence[Mapping[str, Any]]) -> RenderableType:
    """A table of ``effect_facts``."""
    table = Table(box=None, pad_edge=False)
    for name in ("source", "packing"):
        table.add_column(name)
    for name in ("seq_len", "rows", "fill", "cut", "needless", "their tokens", "pieces"):
        table.add_column(name, justify="right")
    for facts in effects:
        shares = (
            facts["cut_share"],
            facts["cut_needlessly"] / max(facts["documents"], 1),
            facts["tokens_in_cut_share"],
        )
        table.add_row(
            Text(facts["source"]),  # a name may look like markup
            facts["packing"],
            f"{facts['seq_len']:,}",
            f"{facts['rows']:,}",
            f"{facts['fill']:.2%}",
            *(f"{share:.1%}" for share in shares),
            f"{facts['pieces_per_row']:.1f}",
        )
    legend = "cut: documents in several rows; needless: of these, all that fit one; pieces: documents or parts per row"
    return Group(table, Text(legend, style="dim"))


def packing_effect(store: Split, packing: str, seq_len: int) -> PackingEffect:
    """The effect of ``concat`` or ``best_fit`` on a store; memory is bounded."""
    rows = pieces = num_cut = needless = tokens_cut = 0
    for starts, lengths in document_chunks(store, seq_len):
        if packing == "concat":
            crossings = (starts + lengths - 1) // seq_len - starts // seq_len
            is_cut = crossings > 0
            pieces += len(lengths) + int(crossings.sum())
        else:
            found = cut(starts, lengths, seq_len)
            is_cut = lengths > seq_len
            rows += len(found.whole) + num_best_fit_rows(found.lengths, seq_len)
            pieces += len(found.whole) + len(found.lengths)
        num_cut += int(is_cut.sum())
        needless += int((is_cut & (lengths <= seq_len)).sum())
        tokens_cut += int(np.sum(lengths, where=is_cut))
    if packing == "concat":
        rows = concat_num_rows(store.num_tokens, seq_len)
    return PackingEffect(
        packing=packing,
        seq_len=seq_len,
        documents=store.num_documents,
        tokens=store.num_tokens,
        rows=rows,
        pieces=pieces,
        cut_documents=num_cut,
        cut_needlessly=needless,
        tokens_in_cut_documents=tokens_cut,
        lost_tokens=store.num_tokens - rows * seq_len if packing == "concat" else 0,
    )

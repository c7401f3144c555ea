"""``cpt data pack``: what packing would do to stores, before anyone trains; and the best-fit index, built ahead.

Owns the facts (lengths of documents, the effect of both rules at several row lengths), their tables and picture.
Refuses a store without documents.
"""

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from cpt.data.pack_effect import effect_facts, packing_effect, render_effects
from cpt.data.pack_index import document_chunks, ensure_index
from cpt.data.store_selection import Split, is_ordered, open_split
from cpt.rundir import DataError, write_atomic

LONGEST = 1 << 20  # lengths are counted one by one up to here
PERCENTILES = (5, 25, 50, 75, 95, 99)
BAR = 20


def pack_facts(
    stores: Sequence[Path], seq_lens: Sequence[int], *, build: bool, pack_dir: Path | None = None
) -> dict[str, Any]:
    """Facts of every store's train split; with ``build`` its best-fit indexes are there afterwards, and verified.

    Raises:
        DataError: no store, one without documents, a place that cannot be written.
    """
    for seq_len in seq_lens:
        if seq_len < 2:
            raise DataError(f"seq_len is {seq_len}; a row needs at least 2 tokens")
    return {"stores": [_store_facts(path, seq_lens, build=build, pack_dir=pack_dir) for path in stores]}


def _store_facts(path: Path, seq_lens: Sequence[int], *, build: bool, pack_dir: Path | None) -> dict[str, Any]:
    store = open_split(path / "train" if (path / "train").is_dir() else path)
    if not store.num_documents:
        raise DataError(f"{store.path}: holds no document")
    effects = [
        effect_facts(store.manifest.source, packing_effect(store, packing, seq_len))
        for seq_len in seq_lens
        for packing in ("concat", "best_fit")
    ]
    may_build = build and not is_ordered(store)
    return {
        "store": str(path),
        "source": store.manifest.source,
        "documents": store.num_documents,
        "tokens": store.num_tokens,
        "in_order": is_ordered(store),
        "lengths": _length_facts(store),
        "effects": effects,
        "indexes": [_build(store, seq_len, pack_dir) for seq_len in seq_lens] if may_build else [],
    }


def _build(store: Split, seq_len: int, pack_dir: Path | None) -> dict[str, Any]:
    columns = (TextColumn("packing {task.description}", markup=False), BarColumn(), MofNCompleteColumn())
    started = time.perf_counter()
    console = Console(stderr=True)
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(f"{store.manifest.source} into rows of {seq_len}", total=store.num_documents)
        index = ensure_index(
            store, seq_len, pack_dir, verify=True, progress=lambda done, _: bar.update(task, completed=done)
        )
    size = sum(file.stat().st_size for file in index.path.iterdir())
    seconds = round(time.perf_counter() - started, 3)
    return {"seq_len": seq_len, "path": str(index.path), "rows": index.manifest.rows, "bytes": size, "seconds": seconds}


def _length_facts(store: Split) -> dict[str, Any]:
    """Mean, percentiles and a histogram by powers of two; ``to`` is exclusive."""
    counts = np.zeros(LONGEST + 1, np.int64)
    longest = 0
    tokens_by_bucket = np.zeros(64, np.int64)
    documents_by_bucket = np.zeros(64, np.int64)
    for _, lengths in document_chunks(store, LONGEST):
        counts += np.bincount(np.minimum(lengths, LONGEST), minlength=LONGEST + 1)
        longest = max(longest, int(lengths.max()))
        bucket = np.frexp(lengths.astype(np.float64))[1] - 1  # floor of log2, exact below 2^53
        np.add.at(tokens_by_bucket, bucket, lengths)
        documents_by_bucket += np.bincount(bucket, minlength=64)
    used = np.flatnonzero(documents_by_bucket)
    return {
        "mean": store.num_tokens / store.num_documents,
        "longest": longest,
        "percentiles": {str(percent): _percentile(counts, percent, store.num_documents) for percent in PERCENTILES},
        "histogram": [
            {
                "from": 1 << b,
                "to": 2 << b,
                "documents": int(documents_by_bucket[b]),
                "tokens": int(tokens_by_bucket[b]),
            }
            for b in range(int(used[0]), int(used[-1]) + 1)
        ],
    }


def _percentile(counts: NDArray[np.int64], percent: int, number: int) -> int:
    """The smallest length that at least ``percent`` % of the documents do not exceed; LONGEST stands for more."""
    return int(np.searchsorted(np.cumsum(counts), -(-percent * number // 100)))


def check_figure(file: Path) -> None:
    """Before the work: can ``write_figure`` write there?

    Raises:
        DataError: a suffix other than .svg, a folder that is not there.
    """
    if file.suffix != ".svg":
        raise DataError(f"{file}: the picture is an .svg; name it {file.with_suffix('.svg').name}")
    if not file.absolute().parent.is_dir():
        raise DataError(f"{file}: its folder is not there; make it first")


def write_figure(file: Path, facts: Mapping[str, Any]) -> None:
    """Documents by length for each store, the row lengths, and what each rule cuts at them, as SVG."""
    from cpt.report.drawing import FONT, blank, ink, run_colour, to_chart
    from cpt.report.plot_svg import standalone

    stores = facts["stores"]
    figure, axes = blank("tokens per document", "share of documents", height=300 + 16 * len(stores))
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda tokens, _: f"{tokens:,.0f}")
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    for index, store in enumerate(stores):
        rows = store["lengths"]["histogram"]
        edges = [row["from"] for row in rows] + [rows[-1]["to"]]
        label = f"{Path(store['store']).name}: {_cuts_in_words(store['effects'])}"
        shares = [row["documents"] / store["documents"] for row in rows]
        axes.stairs(shares, edges, color=run_colour(index), linewidth=2, label=label)
    for seq_len in sorted({effect["seq_len"] for effect in stores[0]["effects"]}):
        axes.axvline(seq_len, color=ink("soft"), linewidth=0.8, linestyle="--")
    axes.set_ylim(bottom=0)
    figure.legend(loc="outside lower left", frameon=False, fontsize=FONT * 0.8, labelcolor=ink("ink"))
    chart = to_chart("packing", "Documents by length", "Dashed: row lengths.", figure)
    write_atomic(file.absolute(), standalone(chart))


def _cuts_in_words(effects: Sequence[Mapping[str, Any]]) -> str:
    """``cut by concat → best_fit, rows of 2,048: 29.0% → 5.2%``"""
    pairs = zip(effects[::2], effects[1::2], strict=True)
    cuts = [f"{old['seq_len']:,}: {old['cut_share']:.1%} → {new['cut_share']:.1%}" for old, new in pairs]
    return f"cut by concat → best_fit, rows of {'; '.join(cuts)}"


def render_packing(facts: Mapping[str, Any]) -> RenderableType:
    """Lengths, the effect of both rules, and where the indexes are."""
    return Group(*(part for store in facts["stores"] for part in _render_store(store)))


def _render_store(store: Mapping[str, Any]) -> list[RenderableType]:
    lengths = store["lengths"]
    points = ", ".join(f"{percent}% {value:,}" for percent, value in lengths["percentiles"].items())
    head = f"{store['store']}: {store['documents']:,} documents, {store['tokens']:,} tokens"
    spread = f"tokens per document: mean {lengths['mean']:,.1f}, longest {lengths['longest']:,}; percentiles {points}"
    parts: list[RenderableType] = [Text(head, style="bold"), Text(spread), _histogram(store), Text("")]
    parts.append(render_effects(store["effects"]))
    if store["in_order"]:
        parts.append(Text("an ordered view is always packed by concat: best_fit would undo its order"))
    parts += [
        Text(f"{index['path']}: {index['rows']:,} rows, {index['bytes']:,} bytes, {index['seconds']:.1f} s")
        for index in store["indexes"]
    ]
    return [*parts, Text("")]


def _histogram(store: Mapping[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("tokens per document", "documents", "", "tokens", ""):
        table.add_column(name, justify="left" if not name else "right")
    for row in store["lengths"]["histogram"]:
        shares = row["documents"] / store["documents"], row["tokens"] / store["tokens"]
        bars = ["█" * round(BAR * share) or "▏" * (share > 0) for share in shares]
        counts = f"{row['documents']:,}", f"{row['tokens']:,}"
        table.add_row(f"{row['from']:,} to {row['to'] - 1:,}", counts[0], bars[0], counts[1], bars[1])
    return table

"""Which held-out documents a run forgot and which it learned: loss per document, base against checkpoint. No torch.

Reads two ``evals/step_*.documents.parquet`` of one run and pairs them piece by piece; gives facts for programs and the
report, and a table for the terminal. One sign: ``change`` = after - before in nats per token, negative where the
document got better.

The change of a source comes with the paired interval of :mod:`cpt.eval.significance`. That of one document is exact for
that document; its interval says how far a document of its length scatters by chance. The scatter of one token is
estimated from all n documents of the source, s^2 = sum(tokens_d * (change_d - change)^2) / (n - 1), hence
change_d +- t(n - 1) * s / sqrt(tokens_d). Documents are ranked by the end of their interval that is nearer to zero:
otherwise the shortest ones would lead every list. Refuses evaluations of different pieces of text.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Group
from rich.table import Table
from rich.text import Text
from scipy.special import stdtrit

from cpt.eval.document_pieces import DocumentSums, Pieces, by_document, by_source
from cpt.eval.document_texts import document_texts_file, one_line, read_document_texts
from cpt.eval.results import pieces_file, read_pieces
from cpt.eval.significance import RESAMPLES, TAIL, difference, pair_ratios
from cpt.rundir import DataError, step_of

SHOWN = 5  # documents in each list
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_ENDING = ".documents.parquet"

Facts = dict[str, Any]
Texts = Mapping[tuple[str, int], str]


def measured_steps(evals: Path) -> list[int]:
    """Steps whose pieces of documents are there, in order."""
    found = (step_of(Path(file.name.removesuffix(_ENDING))) for file in evals.glob(f"step_*{_ENDING}"))
    return sorted(step for step in found if step is not None)


def document_facts(
    evals: Path, *, step: int | None = None, base: int = 0, shown: int = SHOWN, resamples: int = RESAMPLES
) -> Facts:
    """Change of every source and the ``shown`` documents that lost and gained most, from ``base`` to ``step`` (default:
    the last one measured). JSON-able; what is not finite is None.

    ``left_out``: source -> why it cannot be compared. ``texts`` of documents are "" where they were not kept.

    Raises:
        DataError: no such evaluation with documents, or a damaged file.
    """
    steps = measured_steps(evals)
    last = max(steps, default=base) if step is None else step
    for wanted in (base, last):
        if wanted not in steps:
            raise DataError(f"{evals}: {_missing(wanted, steps)}; evaluate it: cpt eval RUN_DIR/checkpoints/step_N")
    if last == base:
        raise DataError(f"{evals}: step {base:,} is what is compared with; give another step, or evaluate a checkpoint")
    before, after = (by_source(read_pieces(pieces_file(evals, each))) for each in (base, last))
    texts = read_document_texts(document_texts_file(evals))
    sources, left_out = {}, {}
    for name in sorted(before.keys() | after.keys()):
        reason = _not_comparable(before.get(name), after.get(name), base=base, step=last)
        if reason:
            left_out[name] = reason
        else:
            sources[name] = source_facts(
                before[name], after[name], name=name, texts=texts, shown=shown, resamples=resamples
            )
    return {"base_step": base, "step": last, "sources": sources, "left_out": left_out}


def _missing(step: int, steps: list[int]) -> str:
    what = "the base, step 0," if step == 0 else f"step {step:,}"
    there = f"only of {', '.join(f'{each:,}' for each in steps[:8])}" if steps else "of no step"
    return f"{what} has no losses by document; there are some {there}" if steps else f"losses by document are {there}"


def _not_comparable(before: Pieces | None, after: Pieces | None, *, base: int, step: int) -> str:
    if before is None or after is None:
        return f"it was measured at step {base if after is None else step:,} only"
    if not before.are_those_of(after):
        return (
            f"steps {base:,} and {step:,} measured different pieces of it (eval.tokens_per_source, the row length or "
            "the store was changed between them); evaluate both again"
        )
    return ""


def source_facts(
    before: Pieces, after: Pieces, *, name: str, texts: Texts, shown: int = SHOWN, resamples: int = RESAMPLES
) -> Facts:
    """One source of ``document_facts``. Documents without two finite losses count as ``unmeasured`` only."""
    old, new = by_document(before), by_document(after)
    finite = np.isfinite(old.nats) & np.isfinite(new.nats)
    sums = DocumentSums(old.number[finite], old.tokens[finite], old.nats[finite])
    change = (new.nats[finite] - sums.nats) / sums.tokens
    stratum = pair_ratios(sums.nats, new.nats[finite], sums.tokens, name=name, resamples=resamples)
    whole = difference([stratum] if stratum else [])
    reach = _reach(change, sums.tokens, whole.value)
    entries = [
        _entry(sums, place, change=change, reach=reach) | {"text": texts.get((name, int(sums.number[place])), "")}
        for place in range(len(change))
    ]
    worse = sorted((e for e in entries if e["change"] > 0), key=lambda e: (-e["rank"], e["document"]))
    better = sorted((e for e in entries if e["change"] < 0), key=lambda e: (e["rank"], e["document"]))
    return {
        "documents": len(change),
        "unmeasured": int((~finite).sum()),
        "tokens": int(sums.tokens.sum()),
        "before": whole.before,
        "after": whole.after,
        "change": whole.value,
        "low": whole.low,
        "high": whole.high,
        "p": whole.p,
        "change_quantiles": [float(each) for each in np.quantile(change, QUANTILES)] if len(change) else [],
        "worse": sum(entry["rank"] > 0 for entry in worse),
        "better": sum(entry["rank"] < 0 for entry in better),
        "most_lost": [_without_rank(entry) for entry in worse[:shown]],
        "most_gained": [_without_rank(entry) for entry in better[:shown]],
    }


def _reach(change: NDArray[np.float64], tokens: NDArray[np.int64], mean: float | None) -> NDArray[np.float64]:
    """Half the length of each document's interval; NaN where one document is all there is."""
    number = len(change)
    if mean is None or number < 2:
        return np.full(number, math.nan)
    scatter = float(np.sum(tokens * np.square(change - mean))) / (number - 1)
    found: NDArray[np.float64] = -float(stdtrit(number - 1, TAIL)) * np.sqrt(scatter / tokens)
    return found


def _entry(sums: DocumentSums, place: int, *, change: NDArray[np.float64], reach: NDArray[np.float64]) -> Facts:
    tokens, moved, half = int(sums.tokens[place]), float(change[place]), float(reach[place])
    before = float(sums.nats[place]) / tokens
    known = math.isfinite(half)
    low, high = (moved - half, moved + half) if known else (None, None)
    return {
        "document": int(sums.number[place]),
        "tokens": tokens,
        "before": before,
        "after": before + moved,
        "change": moved,
        "low": low,
        "high": high,
        "rank": (low if moved > 0 else high) or 0.0,
    }


def _without_rank(entry: Facts) -> Facts:
    return {key: value for key, value in entry.items() if key != "rank"}


def render_documents(facts: Facts) -> Group:
    """A table per source for the terminal."""
    parts = [_render_source(name, source, facts) for name, source in facts["sources"].items()]
    notes = [Text(f"{name}: not compared, {reason}") for name, reason in facts["left_out"].items()]
    if not any(source["text"] for part in facts["sources"].values() for source in _listed(part)):
        notes.append(Text("The documents' texts were not kept: the run does not know its tokenizer (model.tokenizer)."))
    return Group(*parts, *notes)


def _listed(source: Facts) -> list[Facts]:
    return [*source["most_lost"], *source["most_gained"]]


def _render_source(name: str, source: Facts, facts: Facts) -> Table:
    table = Table(title=Text(f"{name}: {_headline(source)}"), title_justify="left", show_edge=False)
    table.caption = Text(
        f"change in nats per token, step {facts['base_step']:,} to step {facts['step']:,}, with 95% intervals; "
        "that of a document says how far one of its length scatters. Look closer: cpt eval tokens CKPT "
        "--document SOURCE:N"
    )
    table.caption_justify = "left"
    table.add_column("document", no_wrap=True)
    for column in ("tokens", "before", "after", "change", "interval"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("begins", overflow="fold")
    for label, entries in (("lost most", source["most_lost"]), ("gained most", source["most_gained"])):
        if entries:
            table.add_section()
            table.add_row(Text(label, style="bold"))
        for entry in entries:
            document, tokens = Text(f"{name}:{entry['document']}"), f"{entry['tokens']:,}"
            numbers = (tokens, f"{entry['before']:.3f}", f"{entry['after']:.3f}", f"{entry['change']:+.3f}")
            interval = "" if entry["low"] is None else f"{entry['low']:+.2f} to {entry['high']:+.2f}"
            table.add_row(document, *numbers, interval, Text(one_line(entry["text"], 100)))
    return table


def _headline(source: Facts) -> str:
    if source["change"] is None:
        return "no document with a finite loss"
    interval = "" if source["low"] is None else f" ({source['low']:+.4f} to {source['high']:+.4f})"
    unclear = source["documents"] - source["worse"] - source["better"]
    counts = f"{source['worse']:,} worse, {source['better']:,} better, {unclear:,} within noise"
    unmeasured = f", {source['unmeasured']:,} without a finite loss" if source["unmeasured"] else ""
    return f"{source['change']:+.4f} nats per token{interval}; {source['documents']:,} documents: {counts}{unmeasured}"

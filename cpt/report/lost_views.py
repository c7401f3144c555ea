"""What exactly was forgotten: items right before and wrong now, and back, with examples; documents that lost most."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cpt.eval.document_texts import visible
from cpt.eval.item_diff import Example, SubsetDiff
from cpt.report.cells import NO_VALUE, Row, Table, percent
from cpt.report.outcomes import Outcomes
from cpt.report.summary import Summary, signed

MOST_EXAMPLES = 24  # blocks of examples on a page: those that lost most
LONGEST = 700  # characters of a prompt: its end, where the question stands


@dataclass(frozen=True)
class Shown:
    """One item that changed, as text: ``facts`` are (what, value) pairs."""

    prompt: str
    facts: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Block:
    """Examples of one subset of one run: those lost, those regained."""

    title: str
    run: int
    lost: tuple[Shown, ...]
    gained: tuple[Shown, ...]


def diff_table(runs: Sequence[Summary], outcomes: Outcomes, suite: str) -> Table | None:
    """One line per run, task and subset in which an answer changed."""
    rows = []
    for number, diffs in outcomes.diffs.get(suite, {}).items():
        for diff in diffs:
            if diff.lost or diff.gained:
                rows.append(_diff_row(runs[number].label, number, diff))
    if not rows:
        return None
    head = ("Run", "Task", "Subset", "Items", "Right before", "Right now", "Forgotten", "Learned", "Net")
    kept = [i for i in range(len(head)) if not (i == 0 and len(runs) == 1) and not (i == 2 and _same(rows, i))]
    shown = tuple(row.only(kept) for row in rows)
    note = (
        "Forgotten: right before and wrong now. Learned: the other way. Counts, not tests: the table above has those."
    )
    return Table(
        f"Answers that changed: {suite}",
        tuple(head[i] for i in kept),
        shown,
        "diff",
        note,
        noun="subsets",
        choose=tuple(place for place, i in enumerate(kept) if i == 0),
        brief=shown[:20] if len(shown) > 20 else None,
    )


def _same(rows: Sequence[Row], column: int) -> bool:
    return len({row.cells[column] for row in rows}) == 1


def _diff_row(label: str, number: int, diff: SubsetDiff) -> Row:
    net = diff.gained - diff.lost
    before, after = (percent(right / diff.items) for right in (diff.right_before, diff.right_after))
    counts = (f"{diff.lost:,}", f"{diff.gained:,}", f"{net:+,}".replace("-", "\u2212"))
    cells = (label, diff.task, diff.subset or NO_VALUE, f"{diff.items:,}", before, after, *counts)
    shares = (diff.right_before / diff.items, diff.right_after / diff.items)
    values = (None, None, None, diff.items, *shares, diff.lost, diff.gained, net)
    return Row(cells, values=values, run=number)


def example_blocks(runs: Sequence[Summary], outcomes: Outcomes, suite: str) -> list[Block]:
    """Examples of the subsets that lost most, over all runs."""
    diffs = [(number, diff) for number, own in outcomes.diffs.get(suite, {}).items() for diff in own]
    chosen = sorted((pair for pair in diffs if pair[1].lost), key=lambda pair: pair[1].gained - pair[1].lost)
    blocks = []
    for number, diff in chosen[:MOST_EXAMPLES]:
        where = diff.task + (f", {diff.subset}" if diff.subset else "")
        named = f"{runs[number].label}: {where}" if len(runs) > 1 else where
        blocks.append(
            Block(
                f"{named} ({diff.lost:,} forgotten, {diff.gained:,} learned)",
                number,
                tuple(map(_shown, diff.lost_examples)),
                tuple(map(_shown, diff.gained_examples)),
            )
        )
    return blocks


def _shown(example: Example) -> Shown:
    prompt = visible(example.prompt)
    cut = prompt if len(prompt) <= LONGEST else f"… {prompt[-LONGEST:]}"
    facts = [
        ("right", example.gold),
        ("before", _answer(example.chosen_before, example.margin_before)),
        ("now", _answer(example.chosen_after, example.margin_after)),
    ]
    if example.overlap:
        facts.append(("note", "known to be in the training corpora"))
    return Shown(cut or f"item {example.item}", tuple((what, visible(value)) for what, value in facts))


def _answer(chosen: str, margin: float | None) -> str:
    return chosen + ("" if margin is None else f"  ({signed(margin)} for the right one)")


def document_table(item: Summary, facts: Mapping[str, Any] | None) -> Table | None:
    """Held-out documents whose loss rose most, and those where it fell most, by source."""
    if not facts or not facts["sources"]:
        return None
    rows = []
    for name, source in facts["sources"].items():
        for words, listed in (("lost most", source["most_lost"]), ("gained most", source["most_gained"])):
            rows += [_document_row(name, words, entry) for entry in listed]
    if not rows:
        return None
    counts = " ".join(
        f"{name}: of {source['documents']:,} documents {source['worse']:,} worse and {source['better']:,} better "
        "beyond noise."
        for name, source in facts["sources"].items()
    )
    head = ("Source", "List", "Document", "Tokens", "Before", "After", "Change", "95% interval", "Begins")
    note = (
        f"Nats per token, step {facts['base_step']:,} to step {facts['step']:,}. {counts} A document's interval says "
        "how far one of its length scatters; the lists are ordered by its nearer end."
    )
    title = f"Documents that changed most: {item.label}"
    return Table(title, head, tuple(rows), "documents", note, noun="documents", choose=(0, 1))


def _document_row(source: str, words: str, entry: Mapping[str, Any]) -> Row:
    interval = NO_VALUE
    if entry["low"] is not None:
        interval = f"{entry['low']:+.2f} to {entry['high']:+.2f}".replace("-", "\u2212")
    text = visible(" ".join(entry["text"].split()))
    cells = (
        source,
        words,
        f"{entry['document']:,}",
        f"{entry['tokens']:,}",
        f"{entry['before']:.3f}",
        f"{entry['after']:.3f}",
        signed(entry["change"], ""),
        interval,
        (text if len(text) <= 120 else f"{text[:119]}…") or NO_VALUE,
    )
    numbers = (entry["document"], entry["tokens"], entry["before"], entry["after"], entry["change"], entry["change"])
    return Row(cells, values=(None, None, *numbers, None))

"""One held-out document token by token: what the base model lost on each token, what the checkpoint does.

Owns the losses (``token_losses``), the text of single tokens (``token_texts``) and two pictures: coloured text for the
terminal, a self-contained HTML page. Losses are in nats; ``change`` = after - before, negative where the token became
easier. A document longer than a row is cut into rows of ``seq_len`` predictions, and each starts anew, as in the
evaluation, whose cuts lie elsewhere. Text of documents is shown, never interpreted: control characters are made
visible in a terminal and everything is escaped on the page.
"""

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text

from cpt.data.batch import collate
from cpt.data.packing import PackedRow
from cpt.eval.document_texts import visible
from cpt.train.loss_head import forward_losses

MOST_TOKENS = 16_384  # of one document; a page of more is no longer read
STEPS = (0.1, 0.5, 1.0, 2.0)  # nats of change at which the colour gets stronger
SHOWN = 8  # tokens in the lists of the largest changes
CONTEXT = 6  # tokens shown before each of them
PENDING = 8  # tokens without a whole character between them before they are shown as they are

Loss = float | None
Decode = Callable[[Sequence[int]], str]
Facts = dict[str, Any]

# Orange and blue, told apart under all common colour blindness; from weak to strong.
LOST = ("#ffe8d1", "#ffc68d", "#ff9d45", "#d95f02")
GAINED = ("#dbeafe", "#aacdfb", "#6ea8f5", "#1f68c8")


@dataclass(frozen=True)
class TokenView:
    """``texts``, ``before`` and ``after`` of each token, in order. The first token is not predicted and has no loss, as
    has none whose loss is not finite. ``document_tokens`` are those of the whole document, also where it is cut here.
    """

    source: str
    document: int
    step: int
    document_tokens: int
    texts: tuple[str, ...]
    before: tuple[Loss, ...]
    after: tuple[Loss, ...]

    @property
    def changes(self) -> list[Loss]:
        return [
            None if old is None or new is None else new - old for old, new in zip(self.before, self.after, strict=True)
        ]


def token_losses(
    model: torch.nn.Module, ids: Sequence[int], *, seq_len: int, backend: str, device: torch.device | str
) -> tuple[Loss, ...]:
    """Loss of every token of one document, (len(ids),); None for the first one and where it is not finite."""
    tokens = np.asarray(ids, dtype=np.int64)
    was_training = model.training
    model.eval()
    found: list[Loss] = [None for _ in tokens[:1]]
    with torch.no_grad():
        for start in range(0, len(tokens) - 1, seq_len):
            window = tokens[start : start + seq_len + 1]
            positions = np.arange(len(window) - 1)
            row = PackedRow(window[:-1], window[1:], positions, np.zeros_like(positions))
            losses = forward_losses(model, collate([row], [0]).to(device), backend).per_token_BT[0].tolist()
            found += [loss if math.isfinite(loss) else None for loss in losses]
    model.train(was_training)
    return tuple(found)


def token_texts(ids: Sequence[int], decode: Decode | None) -> tuple[str, ...]:
    """What each token adds to the text; together they are the document.

    Decoded behind their neighbours, because tokenizers drop a space at the start of a text. Of tokens that only
    together make a character all but the last add "". Without ``decode`` a token's number stands for it.
    """
    if decode is None:
        return tuple(f"⟨{token}⟩" for token in ids)
    texts: list[str] = []
    context = shown = 0  # ids[context:shown] is decoded and shown, and what follows is read behind it
    for end in range(1, len(ids) + 1):
        known = decode(ids[context:shown]) if shown > context else ""
        text = decode(ids[context:end])
        whole = not text.endswith("\ufffd") or end - shown >= PENDING or end == len(ids)
        texts.append(text[len(known) :] if whole else "")
        if whole:
            context, shown = shown, end
    return tuple(texts)


def view_facts(view: TokenView) -> Facts:
    """For --json: means over the tokens that both models have a loss of, and every token."""
    pairs = [
        (old, new) for old, new in zip(view.before, view.after, strict=True) if old is not None and new is not None
    ]
    count = len(pairs)
    before = math.fsum(old for old, _ in pairs) / count if count else None
    after = math.fsum(new for _, new in pairs) / count if count else None
    rows = zip(view.texts, view.before, view.after, view.changes, strict=True)
    return {
        "source": view.source,
        "document": view.document,
        "step": view.step,
        "document_tokens": view.document_tokens,
        "compared_tokens": count,
        "before": before,
        "after": after,
        "change": after - before if before is not None and after is not None else None,
        "tokens": [dict(zip(("text", "before", "after", "change"), row, strict=True)) for row in rows],
    }


def strength(change: Loss) -> int:
    """0 (no colour) to 4; ``STEPS`` are the borders."""
    return 0 if change is None else sum(abs(change) >= step for step in STEPS)


def largest(view: TokenView, *, lost: bool) -> list[int]:
    """Places of the tokens that lost (or gained) most, largest change first."""
    sign = 1 if lost else -1
    moved = [(sign * change, place) for place, change in enumerate(view.changes) if change is not None]
    ordered = sorted((pair for pair in moved if pair[0] > 0), key=lambda pair: (-pair[0], pair[1]))
    return [place for _, place in ordered[:SHOWN]]


def headline(view: TokenView) -> str:
    facts = view_facts(view)
    rest = view.document_tokens - len(view.texts)
    cut = f"; {rest:,} more tokens are not shown" if rest else ""
    if facts["change"] is None:
        return f"{view.source} document {view.document:,}: no token with a finite loss under both models{cut}"
    return (
        f"{view.source} document {view.document:,}, base to step {view.step:,}: {facts['change']:+.4f} nats per token "
        f"({facts['before']:.4f} to {facts['after']:.4f} over {facts['compared_tokens']:,} tokens){cut}"
    )


# --- terminal


def render_tokens(view: TokenView) -> Group:
    """The text with its changes as background colours, and the largest of them as a table."""
    body = Text()
    for text, change in zip(view.texts, view.changes, strict=True):
        body.append(_shown(text), style=_style(change))
    legend = Text("harder: ")
    for colours, name in ((LOST, ""), (GAINED, "   easier: ")):
        legend.append(name)
        for step, colour in zip(STEPS, colours, strict=True):
            legend.append(f" {step:g} ", style=f"{_ink(colour)} on {colour}")
    legend.append("   nats")
    return Group(Text(headline(view), style="bold"), legend, Text(), body, Text(), _table(view))


def _table(view: TokenView) -> Table:
    table = Table(show_edge=False)
    for column in ("before", "after", "change"):
        table.add_column(column, justify="right")
    table.add_column("token, with what stands before it", overflow="fold")
    for lost in (True, False):
        places = largest(view, lost=lost)
        if places:
            table.add_section()
        for place in places:
            before, after = view.before[place], view.after[place]
            assert before is not None and after is not None, "a token with a change has both losses"
            context = _flat("".join(view.texts[max(0, place - CONTEXT) : place]))
            words = Text(context, style="dim").append(_flat(view.texts[place]), style=_style(after - before))
            table.add_row(f"{before:.3f}", f"{after:.3f}", f"{after - before:+.3f}", words)
    return table


def _style(change: Loss) -> str:
    level = strength(change)
    if change is None or not level:
        return ""
    colour = (LOST if change > 0 else GAINED)[level - 1]
    return f"{_ink(colour)} on {colour}"


def _ink(colour: str) -> str:
    return "white" if colour in (LOST[-1], GAINED[-1]) else "black"


def _shown(text: str) -> str:
    """A token for reading: line ends keep their line, a token without a character of its own leaves a dot."""
    return visible(text).replace("\n", "↵\n").replace("\t", "→") or "·"


def _flat(text: str) -> str:
    return _shown(text).replace("↵\n", "↵")


# --- page

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2330; --soft: #646e80; --page: #ffffff; --grid: #e3e6eb;
  --lost: 217, 95, 2; --gained: 31, 104, 200; --on-gained: #ffffff; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaee; --soft: #9aa4b5; --page: #14181f; --grid: #2c3340;
  --lost: 240, 136, 62; --gained: 92, 157, 245; --on-gained: #14181f; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, -apple-system, "Segoe UI",
  Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1000px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 18px; overflow-wrap: anywhere; } h2 { font-size: 16px; margin-top: 32px; }
.soft { color: var(--soft); font-size: 14px; }
.text { font: 15px/1.9 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; border: 1px solid var(--grid); border-radius: 8px; padding: 16px; }
.l1 { background: rgba(var(--lost), .16); } .l2 { background: rgba(var(--lost), .34); }
.l3 { background: rgba(var(--lost), .56); } .l4 { background: rgba(var(--lost), .92); color: #14181f; }
.g1 { background: rgba(var(--gained), .16); } .g2 { background: rgba(var(--gained), .34); }
.g3 { background: rgba(var(--gained), .56); } .g4 { background: rgba(var(--gained), .92); color: var(--on-gained); }
.key span { padding: 1px 6px; } .key span:not(.l4):not(.g4) { color: var(--ink); }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; width: 100%; }
th, td { text-align: right; padding: 4px 14px 4px 0; border-bottom: 1px solid var(--grid); vertical-align: baseline; }
th:last-child, td:last-child { text-align: left; overflow-wrap: anywhere; width: 99%; white-space: pre-wrap; }
@media print { span { print-color-adjust: exact; -webkit-print-color-adjust: exact; } .text { border: 0; padding: 0; } }
"""
_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
<main>
<h1>{title}</h1>
<p class="soft key">Orange became harder, blue easier; a stronger colour from {steps} nats on: {key}
Point at a token for its losses.</p>
<div class="text">{body}</div>
{lists}
</main>
</html>
"""


def html_page(view: TokenView) -> str:
    """A page of its own, without scripts and without a reference to anything outside."""
    key = "".join(
        f'<span class="{side}{level}">{step:g}</span>' for side in "lg" for level, step in enumerate(STEPS, start=1)
    )
    rows = zip(view.texts, view.before, view.after, strict=True)
    return _PAGE.format(
        title=html.escape(headline(view)),
        style=_STYLE,
        steps=", ".join(f"{step:g}" for step in STEPS),
        key=key,
        body="".join(_span(*row) for row in rows),
        lists="".join(_list(view, lost=lost) for lost in (True, False)),
    )


def _span(text: str, before: Loss, after: Loss) -> str:
    shown = html.escape(_shown(text))
    if before is None or after is None:
        return f'<span title="no loss">{shown}</span>'
    change = after - before
    level = strength(change)
    kind = f' class="{"l" if change > 0 else "g"}{level}"' if level else ""
    return f'<span{kind} title="{before:.3f} to {after:.3f} ({change:+.3f})">{shown}</span>'


def _list(view: TokenView, *, lost: bool) -> str:
    rows = []
    for place in largest(view, lost=lost):
        before, after = view.before[place], view.after[place]
        assert before is not None and after is not None, "a token with a change has both losses"
        context = html.escape(_flat("".join(view.texts[max(0, place - CONTEXT) : place])))
        numbers = f"<td>{before:.3f}</td><td>{after:.3f}</td><td>{after - before:+.3f}</td>"
        words = f'<span class="soft">{context}</span>{_span(_flat(view.texts[place]), before, after)}'
        rows.append(f"<tr>{numbers}<td>{words}</td></tr>")
    if not rows:
        return ""
    head = "<tr><th>before</th><th>after</th><th>change</th><th>token, with what stands before it</th></tr>"
    name = "harder" if lost else "easier"
    return f"<h2>Tokens that became much {name}</h2><table><thead>{head}</thead><tbody>{''.join(rows)}</tbody></table>"

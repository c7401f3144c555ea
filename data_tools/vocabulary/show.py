"""Tables of what ``cpt data train-tokenizer`` and ``cpt data extend-tokenizer`` found.

Tokens, names and paths are ``Text``: a token such as ``[/]`` is no markup.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

_TOKENS_SHOWN = 20


@contextmanager
def spoken_progress() -> Iterator[Callable[[str], None]]:
    """What goes on, on a terminal; silent elsewhere."""
    console = Console(stderr=True)
    if not sys.stderr.isatty():
        yield lambda said: None
        return
    with console.status("starting") as status:
        yield lambda said: status.update(Text(said))


def render_training(facts: Mapping[str, Any]) -> Group:
    table = Table(title="fertility on held-back documents", title_justify="left")
    table.add_column("source")
    for column in ("learned from, bytes", "tokens/word", "bytes/token"):
        table.add_column(column, justify="right")
    for name, source in facts["sources"].items():
        found = source["fertility"]
        shown = (f"{found['tokens_per_word']:.3f}", f"{found['bytes_per_token']:.3f}")
        table.add_row(Text(name + _doubt(source)), f"{source['sample_bytes']:,}", *shown)
    lines = [f"{facts['out']}: {facts['kind']}, {facts['vocab_size']:,} tokens", f"encoder: {facts['encoder']}"]
    if facts["vocab_size"] < facts["asked_for"]:
        lines.append(f"the sample has no more than that: {facts['asked_for']:,} were asked for")
    return Group(table, *map(Text, lines))


def render_extension(facts: Mapping[str, Any]) -> Group:
    lines = [
        f"{facts['out']}: {facts['base_vocab_size']:,} + {facts['new_tokens']:,} = {facts['vocab_size']:,} tokens",
        f"{facts['scaffold_tokens']:,} of the new ones stand almost only inside longer ones: their rows see little "
        f"training; {facts['old_tokens_never_seen']:,} old tokens are in none of the samples",
        f"encoder: {facts['encoder']}",
        f"next: cpt data tokenize --tokenizer {facts['out']} ..., and model.tokenizer={facts['out']} in the run file",
    ]
    if facts["new_tokens"] < facts["asked_for"]:
        lines.insert(1, f"no more occur often enough: {facts['asked_for']:,} were asked for")
    if facts["left_out"]:
        lines.append(f"not copied, they spell the old vocabulary: {', '.join(facts['left_out'])}")
    return Group(_before_and_after(facts), _new_tokens(facts), *map(Text, lines))


def _before_and_after(facts: Mapping[str, Any]) -> Table:
    table = Table(title="fertility on held-back documents, before and after", title_justify="left")
    table.add_column("source")
    for column in ("tokens/word", "", "bytes/token", "", "tokens"):
        table.add_column(column, justify="right")
    for name, source in facts["sources"].items():
        before, after = source["before"], source["after"]
        numbers = [f"{of[key]:.3f}" for key in ("tokens_per_word", "bytes_per_token") for of in (before, after)]
        change = after["tokens"] / max(before["tokens"], 1) - 1
        table.add_row(Text(name + _doubt(source)), *numbers, f"{change:+.1%}")
    return table


def _new_tokens(facts: Mapping[str, Any]) -> Table:
    sources = list(facts["sources"])
    table = Table(title="new tokens that save most", title_justify="left")
    for column in ("id", "text", "in the sample", "tokens saved", *(f"held-back {name}" for name in sources)):
        table.add_column(Text(column), justify="left" if column == "text" else "right")
    for row in facts["tokens"][:_TOKENS_SHOWN]:
        held_back = [f"{row['held_back'][name]:,}" for name in sources]
        saved = f"{row['tokens_saved_in_sample']:,}"
        table.add_row(str(row["id"]), Text(repr(row["text"])), f"{row['in_sample']:,}", saved, *held_back)
    return table


def _doubt(source: Mapping[str, Any]) -> str:
    return "" if source["held_back"] else " (too small to hold back: measured on its first documents)"

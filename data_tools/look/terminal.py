"""An inspection on the terminal: one column per source, then rows and documents with their borders visible.

Text comes from strangers: control characters are shown, never sent, so that none moves the cursor or hides a line.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from data_tools.look.inspection import Facts, counted, fact_rows, missing_text, short_name

_BAR = 16
_SHOWN_TOKENS = 10
_SHOWN_VALUES = 4
_BIDI = frozenset(range(0x202A, 0x202F)) | frozenset(range(0x2066, 0x206A))


def render_inspection(inspection: dict[str, list[Facts]]) -> RenderableType:
    sources = inspection["sources"]
    title = ", ".join(dict.fromkeys(source["path"] for source in sources))
    table = Table(title=Text(visible(title)), title_justify="left")
    table.add_column("")
    for source in sources:
        table.add_column(Text(visible(source["label"])), overflow="fold")
    for label, values in fact_rows(sources):
        table.add_row(label, *(Text(visible(value)) for value in values))
    for label, cells in _blocks(sources):
        if any(cell.plain for cell in cells):
            table.add_section()
            table.add_row(label, *cells)
    panels = [panel for source in sources for panel in (*_row_panels(source), *_document_panels(source))]
    return Group(table, *panels)


def visible(text: str) -> str:
    """Control characters as their pictures, marks that reverse the direction as their numbers; line ends stay."""
    if text.isprintable():
        return text
    return "".join(map(_visible, text))


def _visible(character: str) -> str:
    code = ord(character)
    if character in "\n\t":
        return character
    if code < 0x20:
        return chr(0x2400 + code)
    if 0x7F <= code < 0xA0 or code in _BIDI or 0xD800 <= code < 0xE000:
        return f"<U+{code:04X}>"
    return character


def one_line(text: str) -> str:
    return visible(text).replace("\n", "⏎").replace("\t", "⇥")


def _blocks(sources: Sequence[Facts]) -> Iterable[tuple[str, list[Text]]]:
    yield "documents by length", [_histogram(source) for source in sources]
    yield "frequent tokens", [_top_tokens(source) for source in sources]
    yield "tokens never seen", [_never(source) for source in sources]
    yield "repeated lines", [_lines(source) for source in sources]
    yield "fields and files", [_origins(source) for source in sources]


def _histogram(source: Facts) -> Text:
    bins = source["lengths"]["bins"]
    most = max((entry["documents"] for entry in bins), default=1)
    rows = [(f"{entry['from']:>11,}", entry["documents"]) for entry in bins]
    return Text("\n".join(f"{name} {_bar(count, most)} {count:,}" for name, count in rows))


def _bar(count: int, most: int) -> str:
    eighths = round(8 * _BAR * count / most) if count else 0
    return ("█" * (eighths // 8) + "▏▎▍▌▋▊▉█"[max(eighths % 8 - 1, 0)] * (eighths % 8 > 0) or "▏" * (count > 0)).ljust(
        _BAR
    )


def _top_tokens(source: Facts) -> Text:
    top = source.get("tokens_seen", {}).get("top", ())[:_SHOWN_TOKENS]
    return Text("\n".join(f"{entry['share']:6.2%} {_token(entry)}" for entry in top))


def _token(entry: dict[str, Any]) -> str:
    return f"{one_line(entry['text'])!r}" if "text" in entry else f"id {entry['id']}"


def _never(source: Facts) -> Text:
    seen = source.get("tokens_seen")
    if not seen or not seen["never_seen"]:
        return Text("")
    some = ", ".join(_token(entry) for entry in seen["never_seen"][:_SHOWN_TOKENS])
    return Text(f"{seen['vocab_size'] - seen['used']:,}, such as {some}")


def _lines(source: Facts) -> Text:
    lines = source.get("repeated_lines")
    if lines is None:
        return Text(missing_text(source), style="dim")
    return Text("\n".join(f"{entry['count']:,}x {one_line(entry['line'])[:80]}" for entry in lines))


def _origins(source: Facts) -> Text:
    parts = [f"{name}: " + ", ".join(f"{one_line(value)[:30]} {count:,}" for value, count in values[:_SHOWN_VALUES])
             for name, values in source.get("fields", {}).items()]  # fmt: skip
    files = source.get("files", ())
    if len(files) > 1:
        parts += [f"{visible(short_name(name))} {count:,}" for name, count in files[:_SHOWN_VALUES]]
    return Text("\n".join(parts))


def _row_panels(source: Facts) -> Iterable[RenderableType]:
    for row in source.get("rows", ()):
        body = Text()
        for number, piece in enumerate(row["pieces"]):
            style = ("", "cyan")[number % 2]
            body.append("▏" if piece["opens"] else "┄", style="bold yellow")
            body.append(visible(piece["text"]), style=style)
            body.append("⏹EOS" if piece["ends"] else "", style="bold yellow")
        pieces = counted(len(row["pieces"]), "piece")
        title = f"{source['label']} row {row['row']}, {row['seq_len']} tokens, {pieces}"
        yield Panel(body, title=Text(visible(title)), title_align="left")


def _document_panels(source: Facts) -> Iterable[RenderableType]:
    for entry in source["first_documents"]:
        if source["kind"] == "store":
            body = entry.get("text", " ".join(str(token) for token in entry["ids"]))
            rest = entry["tokens"] - len(entry["ids"])
            suffix = f" ... {rest:,} more tokens" if rest else ""
            size = f"document {entry['document']} · from token {entry['start']:,} · {entry['tokens']:,} tokens"
            title = f"{source['label']} {size}"
        else:
            body, rest = entry["text"], entry["characters"] - len(entry["text"])
            suffix = f" ... {rest:,} more characters" if rest else ""
            title = f"{short_name(entry['origin'])} · {entry['characters']:,} characters"
        yield Panel(Text(visible(body) + suffix), title=Text(visible(title)), title_align="left")

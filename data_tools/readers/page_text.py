"""Visible text of an HTML page: tags, comments, scripts and styles gone, a line break where a block begins or ends.

One pass over the page, linear in its length whatever is in it: the standard library's parser takes seconds for 24 KB of
unfinished tags, and whoever writes web pages decides how long a crawl is read. Nothing finer than that: boilerplate
removal is a job for tools made for it. What is never closed (a comment, a tag, a script) hides the rest of the page,
as in a browser.
"""

import html
import re
from collections.abc import Iterator
from dataclasses import dataclass

# No element begins inside of these: they end at their end tag and nowhere else.
_RAW = frozenset({"script", "style", "title", "textarea", "iframe", "noembed", "noframes", "xmp"})
_HIDDEN = frozenset({"noscript", "template", "svg", "math", "head"})
_INLINE = frozenset(
    {"a", "abbr", "b", "bdi", "bdo", "cite", "code", "del", "dfn", "em", "font", "i", "ins", "kbd", "mark", "q"}
    | {"s", "samp", "script", "small", "span", "strong", "style", "sub", "sup", "svg", "time", "tt", "u", "var", "wbr"}
)
_TAG = re.compile(r"<(?:(/?)([a-zA-Z][a-zA-Z0-9:_-]{0,60})|[!?/])")
_RAW_ENDS = {tag: re.compile(f"</{tag}", re.IGNORECASE) for tag in _RAW}
_LONGEST_VALUE = 4096  # characters of a quoted attribute value that are searched for its end


@dataclass(frozen=True)
class _Tag:
    """``name`` in small letters, "" for declarations; ``opens`` whether content follows."""

    name: str
    closes: bool
    opens: bool


def html_text(page: str) -> str:
    """One block per line, white space inside of a line collapsed."""
    pieces: list[str] = []
    hidden, depth, preformatted = "", 0, False
    for item in _scan(page):
        if isinstance(item, str):
            if not hidden:
                pieces.append(_unescaped(item) if preformatted else _unescaped(item).replace("\n", " "))
            continue
        if item.name == hidden or (item.name in _HIDDEN and not hidden):
            depth += item.opens - item.closes
            hidden = item.name if depth > 0 else ""
            depth = max(depth, 0)
        elif item.name == "body" and hidden == "head":  # nothing closed the head
            hidden, depth = "", 0
        if item.name == "pre":
            preformatted = item.opens
        if item.name not in _INLINE and not hidden:
            pieces.append("\n")
    lines = (" ".join(line.split()) for line in "".join(pieces).split("\n"))
    return "\n".join(line for line in lines if line)


def _scan(page: str) -> Iterator[str | _Tag]:
    """Texts and tags; of raw elements the tags only."""
    at = 0
    while True:
        start = page.find("<", at)
        yield page[at:start] if start >= 0 else page[at:]
        if start < 0:
            return
        at = start
        if page.startswith("<!--", at):
            at = page.find("-->", at + 4) + 3
            if at < 3:
                return
            continue
        found = _TAG.match(page, at)
        if not found:
            yield "<"
            at += 1
            continue
        end = _end_of_tag(page, found.end())
        if end < 0:
            return
        name, closes = (found[2] or "").lower(), bool(found[1])
        opens = not closes and (name in _RAW or page[end - 1] != "/")
        yield _Tag(name, closes, opens)
        at = end + 1
        if opens and name in _RAW:
            raw_end = _RAW_ENDS[name].search(page, at)
            if not raw_end:
                return
            at = raw_end.start()


def _end_of_tag(page: str, at: int) -> int:
    """Where ``>`` stands; one inside of a quoted value does not count, if the quote ends nearby."""
    end = page.find(">", at)
    for quote in ('"', "'"):
        if end >= 0 and page.count(quote, max(at, end - _LONGEST_VALUE), end) % 2:
            closing = page.find(quote, end, end + _LONGEST_VALUE)
            end = page.find(">", closing) if closing >= 0 else end
    return end


def _unescaped(text: str) -> str:
    try:
        return html.unescape(text)
    except ValueError:  # a character number of thousands of digits
        return text

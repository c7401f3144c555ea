"""English prose out of docstrings: paragraphs of sentences; code, examples, tables and parameter heads left out."""

import inspect
import re
from collections.abc import Iterator

MIN_WORDS = 8
_SECTION_RULE = re.compile(r"^\s*([-=~^*#])\1{2,}\s*$")
# "x : array_like", "axis : {0, 1}, optional", "name (str): text", ":param x: text", ".. note::", "@param x", "* text"
_PARAMETER_HEAD = re.compile(
    r"^\s*(\*{0,2}\w[\w.,* ]* : |:\w[\w ]*:|\.\. |@\w+|\w[\w.]* ?\(`?[^)]*\)`?: |[A-Za-z ]{3,20}:$|\[\d+\])"
)
_ROLE = re.compile(r"(?::[\w:+.-]+:)?(`{1,2})~?([^`<>]+?)(?:\s*<[^>]*>)?\1_{0,2}")
_LINK = re.compile(r"\[([^\]]+)\](?:\([^)]*\))?|<?https?://\S+")
_EMPHASIS = re.compile(r"(?<!\w)(\*{1,2}|_)(\w[\w ,.-]*?)\1(?!\w)")
_BULLET = re.compile(r"^\s*(?:[-*+]|\d+[.)])\s+")
_WORD = re.compile(r"[A-Za-z]+(?:['-][A-Za-z]+)*[.,;:!?)]?")
_CODE_CHARACTERS = re.compile(r"[=_{}\[\]<>*`|+\\#$%@/~^&]")
_FUNCTION_WORDS = re.compile(
    r"(a|an|and|are|as|at|be|been|but|by|can|do|does|for|from|has|have|if|in|into|is|it|its|may|must|no|not|of|on|one|only"
    r"|or|other|should|so|such|than|that|the|their|them|then|there|these|they|this|to|use|used|was|when|where|which|will"
    r"|with|you)",
    re.IGNORECASE,
)


def prose_paragraphs(docstring: str) -> Iterator[str]:
    """The paragraphs that read as English, each on one line, reStructuredText and Markdown marks taken off."""
    for block in re.split(r"\n\s*\n", inspect.cleandoc(docstring)):
        if ">>>" in block or "```" in block:
            continue
        for item in _items(block.split("\n")):
            paragraph = _plain(" ".join(item))
            if is_prose(paragraph):
                yield paragraph


def _items(lines: list[str]) -> Iterator[list[str]]:
    """A block cut at list marks and parameter heads; the heads themselves are no sentences and are left out."""
    held: list[str] = []
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if _is_bare_head(line, following):
            continue
        head = _PARAMETER_HEAD.match(line)
        if head or _BULLET.match(line) or _SECTION_RULE.match(line):
            yield held
            held = []
            line = line[head.end() :] if head else _BULLET.sub("", line)
            # "x : Type" and ":param x: text": only what starts like a sentence is one
            line = line if not head or (len(line.split()) > 3 and line[:1].isupper()) else ""
        if line.strip() and not _SECTION_RULE.match(line):
            held.append(line.strip())
    yield held


def _is_bare_head(line: str, following: str) -> bool:
    """A name alone on its line above an indented description, as numpydoc lists results and exceptions."""
    return len(line.split()) <= 2 and line[-1:] not in ".!?:;)" and _indent(following) > _indent(line)


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _plain(text: str) -> str:
    text = _ROLE.sub(r"\2", text)
    text = _LINK.sub(lambda match: match.group(1) or "", text)
    text = _EMPHASIS.sub(r"\2", text)
    return re.sub(r"\s+", " ", text).strip()


def is_prose(paragraph: str) -> bool:
    """Eight words or more, nearly all plain, a fair share of function words, few marks of code, ends as a sentence."""
    words = paragraph.split()
    if len(words) < MIN_WORDS or paragraph[-1] not in ".!?:;)" or not paragraph[0].isalnum():
        return False
    plain = sum(1 for word in words if _WORD.fullmatch(word.lstrip("(\"'")))
    function = sum(1 for word in words if _FUNCTION_WORDS.fullmatch(word))
    code = len(_CODE_CHARACTERS.findall(paragraph))
    return plain >= 0.85 * len(words) and function >= 0.2 * len(words) and code <= 0.015 * len(paragraph)


def paragraph_key(paragraph: str) -> str:
    """Equal for paragraphs that start with the same ten plain words: a template filled with names is one paragraph."""
    return " ".join(re.findall(r"\b[a-z]+\b", paragraph)[:10])

"""Quality rules on lines and words: Gopher's, FineWeb's and C4's.

Each gives the decisions of datatrove's filter of the same name when that one is given the words and sentences of
``data_tools.clean.words`` (a test compares them), at several times its speed: what depends on one word only is looked
up per distinct word. One default differs: Gopher's words are what stands between spaces, datatrove's are tokens, and
where each comma and quotation mark counts as a word without a letter, one chapter of a novel in seven is dropped
(``punctuation_counts``). Refused: nothing; a text without words is rejected as short or empty.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator

from data_tools.clean.settings import C4Quality, FinewebQuality, GopherQuality
from data_tools.clean.words import count_sentences, split_words
from data_tools.corpus.document import Document, Reject, Step

Measure = tuple[str, float, float | None, float | None]  # reason, value, lowest, highest allowed
_REMEMBERED_WORDS = 500_000
_CITATION = re.compile(r"\[\d*]|\[edit]|\[citation needed]")
_C4_ENDS = (".", "?", "!", '"', "'")
_POLICY = re.compile("terms of use|privacy policy|cookie policy|uses cookies|use of cookies|use cookies")


def first_broken(rule: str, measures: Iterable[Measure]) -> Reject | None:
    """The first measure outside its limits; measures after it are not computed."""
    for reason, value, low, high in measures:
        if low is not None and value < low:
            return Reject(f"{rule}.{reason}", f"{value:.4g} < {low:g}")
        if high is not None and value > high:
            return Reject(f"{rule}.{reason}", f"{value:.4g} > {high:g}")
    return None


class _WordFacts(dict[str, tuple[int, int]]):
    """Per word: 1 if it is more than punctuation, 1 if it has a letter."""

    def __init__(self, punctuation: Iterable[str]) -> None:
        self._other = re.compile(f"[^{re.escape(''.join(sorted(punctuation)))}]")

    def __missing__(self, word: str) -> tuple[int, int]:
        facts = (int(self._other.search(word) is not None), int(any(map(str.isalpha, word))))
        if len(self) >= _REMEMBERED_WORDS:  # bounds the memory of a worker that meets ever new words
            self.clear()
        self[word] = facts
        return facts


def gopher_quality(settings: GopherQuality) -> Step:
    facts = _WordFacts(_marks()[0])
    stop_words = frozenset(settings.stop_words)

    def step(document: Document) -> Reject | None:
        counts = Counter(split_words(document.text))
        if not counts:
            return Reject("gopher_quality.short_doc", "0 words")
        measures = _gopher_measures(document.text, counts, facts, settings)
        broken = first_broken("gopher_quality", measures)
        if broken is None and settings.min_stop_words:
            found = len(stop_words & counts.keys())
            broken = first_broken("gopher_quality", [("few_stop_words", found, settings.min_stop_words, None)])
        return broken

    return step


def _gopher_measures(text: str, counts: Counter[str], facts: _WordFacts, limits: GopherQuality) -> Iterator[Measure]:
    num_words = num_real = num_alpha = characters = 0
    for word, count in counts.items():
        real, alpha = facts[word]
        num_words += count
        num_alpha += count * alpha
        if real:
            num_real += count
            characters += count * len(word)
    yield "short_doc", num_real, limits.min_words, None
    yield "long_doc", num_real, None, limits.max_words
    mean_length = characters / max(num_real, 1)
    num_words = num_words if limits.punctuation_counts else max(num_real, 1)
    yield "mean_word_length", mean_length, limits.min_mean_word_length, limits.max_mean_word_length
    yield "hashes", text.count("#") / num_words, None, limits.max_symbol_ratio
    yield "ellipses", (text.count("...") + text.count("…")) / num_words, None, limits.max_symbol_ratio
    lines = text.splitlines()
    bullets = sum(line.lstrip().startswith(("•", "-")) for line in lines)
    yield "bullet_lines", bullets / len(lines), None, limits.max_bullet_lines
    ellipses = sum(line.rstrip().endswith(("...", "…")) for line in lines)
    yield "ellipsis_lines", ellipses / len(lines), None, limits.max_ellipsis_lines
    yield "few_alpha_words", num_alpha / num_words, limits.min_alpha_words, None


def fineweb_quality(settings: FinewebQuality) -> Step:
    _, ends = _marks()

    def step(document: Document) -> Reject | None:
        lines = [line for line in document.text.split("\n") if line.strip()]
        if not lines:
            return Reject("fineweb_quality.empty")
        return first_broken("fineweb_quality", _fineweb_measures(document.text, lines, ends, settings))

    return step


def _fineweb_measures(text: str, lines: list[str], ends: frozenset[str], limits: FinewebQuality) -> Iterator[Measure]:
    ended = sum(line[-1] in ends for line in lines)
    yield "line_punctuation", ended / len(lines), limits.min_lines_with_punctuation, None
    short = sum(len(line) <= limits.short_line_characters for line in lines)
    yield "short_lines", short / len(lines), None, limits.max_short_lines
    newlines = text.count("\n")
    repeated = duplicates(lines)[1]
    yield "duplicate_lines", repeated / (len(text) - newlines), None, limits.max_duplicate_line_characters
    if limits.max_newlines_per_word is not None and newlines:
        yield "list", newlines / len(split_words(text)), None, limits.max_newlines_per_word


def duplicates(pieces: list[str]) -> tuple[int, int]:
    """(pieces seen before, their characters)."""
    unique = set(pieces)
    if len(unique) == len(pieces):
        return 0, 0
    return len(pieces) - len(unique), sum(map(len, pieces)) - sum(map(len, unique))


def c4_quality(settings: C4Quality) -> Step:
    def step(document: Document) -> Reject | None:
        kept: list[str] = []
        for line in _c4_lines(document.text, settings):
            lowered = line.lower()
            if settings.drop_lorem_ipsum and "lorem ipsum" in lowered:
                return Reject("c4_quality.lorem_ipsum", line[:80])
            if settings.remove_javascript and "javascript" in lowered:
                continue
            if settings.drop_curly_bracket and "{" in line:
                return Reject("c4_quality.curly_bracket", line[:80])
            if not (settings.remove_policy and _POLICY.search(lowered)):
                kept.append(line)
        sentences = sum(map(count_sentences, kept)) if settings.min_sentences is not None else 0
        document.text = "\n".join(kept).strip()
        broken = first_broken("c4_quality", [("few_sentences", sentences, settings.min_sentences, None)])
        return broken or (None if document.text else Reject("c4_quality.empty"))

    return step


def _c4_lines(text: str, settings: C4Quality) -> Iterator[str]:
    """Lines that are sentences of words, without their citations."""
    longest = settings.max_word_length
    for line in map(str.strip, text.splitlines()):
        words = line.split()
        if longest is not None and len(line) > longest and any(len(word) > longest for word in words):
            continue
        if settings.remove_citations and "[" in line:
            line = _CITATION.sub("", line)
        if settings.require_terminal_punctuation and (not line.endswith(_C4_ENDS) or line.endswith("...")):
            continue
        if settings.min_words_per_line is None or len(words) >= settings.min_words_per_line:
            yield line


def _marks() -> tuple[frozenset[str], frozenset[str]]:
    """datatrove's lists: characters of punctuation, characters that end a sentence."""
    try:
        from datatrove.utils.text import PUNCTUATION_SET, TERMINAL_PUNCTUATION
    except ModuleNotFoundError as error:
        raise RuntimeError(f"the quality rules need {error.name}; fix: pip install 'cpt[data]'") from None
    return frozenset(PUNCTUATION_SET), frozenset(TERMINAL_PUNCTUATION)

"""Claim: the quality rules decide as datatrove's filters do on the same words, at several times their speed.

CPU seconds of one core over documents in memory. datatrove's filters are given the words and sentences of
``data_tools.clean.words``; its default word splitter, spaCy, would cost it more. Both sides split the text themselves.
The other rules are timed alone.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_tools.clean.quality import c4_quality, fineweb_quality, gopher_quality
from data_tools.clean.repetition import gopher_repetition
from data_tools.clean.rules import RULES
from data_tools.clean.settings import (
    C4Quality,
    FinewebQuality,
    FixUnicode,
    GopherQuality,
    GopherRepetition,
    Language,
    Pii,
)
from data_tools.clean.words import count_sentences, split_words
from data_tools.corpus.document import Document, Step
from data_tools.sources import ReadOptions, read_texts, resolve_inputs

RESULT = Path(__file__).parents[1] / "results" / "data_clean_rules.json"
CORPORA = ("en_gov_web", "med_qa", "en_novels", "code_python", "de_novels", "ja_aozora")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    corpora = Path("..") / "shared" / "data" / "corpora"
    parser.add_argument("--corpora", type=Path, default=corpora, help="folder of NAME/train.jsonl.zst")
    parser.add_argument("--megabytes", type=float, default=1.5, help="text of each corpus")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    texts = [text for name in CORPORA for text in sample(arguments.corpora / name, arguments.megabytes * 1e6)]
    size = sum(len(text.encode()) for text in texts) / 1e6
    result = {
        "claim": "the rules decide as datatrove's filters, faster",
        "megabytes": size,
        "compared": {name: compare(ours, theirs, texts, size) for name, (ours, theirs) in pairs().items()},
        "alone": {
            name: size / timed(keeps(RULES[name].build(told)), texts)[1]
            for name, told in (("fix_unicode", FixUnicode()), ("language", Language()), ("pii", Pii()))
        },
        "cpu_count": os.cpu_count(),
        "python": platform.python_version(),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def sample(folder: Path, num_bytes: float) -> list[str]:
    [source] = resolve_inputs([str(folder / "train.jsonl.zst")])
    taken: list[str] = []
    for text in read_texts(source, ReadOptions()):
        taken.append(text)
        num_bytes -= len(text.encode())
        if num_bytes <= 0:
            break
    return taken


def pairs() -> dict[str, tuple[Step, Any]]:
    from datatrove.pipeline import filters
    from datatrove.utils.word_tokenizers import WordTokenizer

    class OurWords(WordTokenizer):
        def word_tokenize(self, text: str) -> list[str]:
            return list(split_words.__wrapped__(text))

        def sent_tokenize(self, text: str) -> list[str]:
            return [""] * count_sentences(text)

        def span_tokenize(self, text: str) -> list[tuple[int, int]]:
            return [(0, 1)] * count_sentences(text)

    words: Any = OurWords()
    return {
        "gopher_quality": (
            gopher_quality(GopherQuality(punctuation_counts=True)),
            filters.GopherQualityFilter(language=words),
        ),
        "gopher_repetition": (gopher_repetition(GopherRepetition()), filters.GopherRepetitionFilter(language=words)),
        "fineweb_quality": (fineweb_quality(FinewebQuality()), filters.FineWebQualityFilter(language=words)),
        "c4_quality": (c4_quality(C4Quality()), filters.C4QualityFilter(language=words)),
    }


def keeps(step: Step) -> Callable[[str], bool]:
    return lambda text: step(Document(text)) is None


def timed(keep: Callable[[str], bool], texts: list[str]) -> tuple[list[bool], float]:
    split_words.cache_clear()
    start = time.process_time()
    return [keep(text) for text in texts], time.process_time() - start


def compare(ours: Step, theirs: Any, texts: list[str], size: float) -> dict[str, Any]:
    from datatrove.data import Document as TheirDocument
    from datatrove.utils.text import split_into_parts

    split_into_parts.cache_clear()
    mine, our_seconds = timed(keeps(ours), texts)
    other, their_seconds = timed(lambda text: theirs.filter(TheirDocument(text=text, id="0")) is True, texts)
    return {
        "megabytes_per_second": size / our_seconds,
        "datatrove_megabytes_per_second": size / their_seconds,
        "ratio": their_seconds / our_seconds,
        "documents": len(texts),
        "dropped": mine.count(False),
        "different_decisions": sum(a != b for a, b in zip(mine, other, strict=True)),
    }


if __name__ == "__main__":
    main()

"""Tiny corpora for the deduplication tests."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import orjson
import pytest

Write = Callable[[str, Sequence[str]], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes texts as JSON lines with an id; the file."""

    def write(name: str, texts: Sequence[str]) -> Path:
        path = tmp_path / f"{name}.jsonl"
        path.write_bytes(b"".join(orjson.dumps({"text": t, "id": f"{name}{i}"}) + b"\n" for i, t in enumerate(texts)))
        return path

    return write


@pytest.fixture
def make_text() -> Callable[..., str]:
    """``num_words`` words of their own for every seed; with ``fresh``, that many at the end are others."""

    def make_text(seed: int, *, num_words: int = 60, fresh: int = 0, version: int = 0) -> str:
        words = [f"w{random.Random(seed * 1000 + i).randrange(10**6)}" for i in range(num_words - fresh)]
        return " ".join([*words, *(f"x{version}y{seed}z{i}" for i in range(fresh))])

    return make_text

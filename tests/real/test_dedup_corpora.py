"""Real corpora, which hold no near duplicates, with planted copies: in English, German and Japanese, across sources."""

import os
import random
from pathlib import Path

import orjson
import pytest

from data_tools.dedup.minhash import similarity, sketch
from data_tools.dedup.pipeline import dedup
from data_tools.dedup.request import DedupRequest, Source
from data_tools.dedup.shingles import Shingler, is_spaceless
from data_tools.sources import ReadOptions, read_documents, read_texts, resolve_inputs

SHARED = Path(os.environ.get("CPT_SHARED_DATA", Path(__file__).parents[3] / "shared/data"))
CORPORA = SHARED / "corpora"
NAMES = ("en_factbook", "law_uscode", "de_novels", "ja_aozora")

pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is absent; set CPT_SHARED_DATA")


def damaged(text: str, draw: random.Random, *, edits_per_1000: int) -> str:
    """The text with words, or characters where there are no spaces, replaced here and there."""
    spaceless = is_spaceless(text)
    parts = list(text) if spaceless else text.split(" ")
    for _ in range(round(len(parts) * edits_per_1000 / 1000)):
        parts[draw.randrange(len(parts))] = "誤" if spaceless else "misprint"
    return ("" if spaceless else " ").join(parts)


def test_planted_copies_of_real_texts_are_found_and_little_else_goes(tmp_path: Path) -> None:
    draw, shingler = random.Random(5), Shingler(5)
    copies, similarities = [], []
    for name in NAMES:
        for text in read_texts(resolve_inputs([str(CORPORA / name / "valid.jsonl.zst")])[0], ReadOptions()):
            copies.append(damaged(text[:20_000], draw, edits_per_1000=draw.choice((0, 5, 10, 15, 20, 60))))
            sketches = [sketch(shingler.of_document(one)) for one in (text, copies[-1])]
            similarities.append(similarity(*sketches))
    file = tmp_path / "copies.jsonl"
    file.write_bytes(b"".join(orjson.dumps({"text": text, "id": str(i)}) + b"\n" for i, text in enumerate(copies)))
    originals = Source("originals", tuple(str(CORPORA / name / "valid.jsonl.zst") for name in NAMES))
    report = dedup(DedupRequest((originals, Source("copies", (str(file),))), tmp_path / "out", workers=1))
    clean, planted = report["sources"]
    assert clean["kept_documents"] >= 0.98 * clean["documents"]
    inputs = resolve_inputs([str(tmp_path / "out" / "copies")])
    kept = {int(document.fields["id"]) for entry in inputs for document in read_documents(entry, ReadOptions())}
    found = [index not in kept for index, value in enumerate(similarities) if value >= 0.8]
    wrong = [index for index, value in enumerate(similarities) if value < 0.8 and index not in kept]
    assert len(found) > 200 and len(wrong) <= 2
    assert sum(found) / len(found) >= 0.95
    assert planted["documents"] == len(copies) and {row["kept"] for row in report["matrix"]} >= {"originals"}

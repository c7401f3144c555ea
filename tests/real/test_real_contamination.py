"""The overlap of real benchmarks with real corpora is the one that the data's own audit lists, item by item.

All sets but BLiMP (none of whose items occur; its 67,000 would double the time) against the corpora that are concerned
and that the audit names: `python -m benchmarks.data.decontaminate` compares all sets with all corpora.
"""

import json
import os
from pathlib import Path

import pytest

from data_tools.decontaminate.passes import DecontaminateRequest, decontaminate
from data_tools.decontaminate.protected_texts import Protected

SHARED = Path(os.environ.get("CPT_SHARED_DATA", Path(__file__).parents[3] / "shared/data"))
AUDIT = SHARED / "stats/contaminated_items.json"
FILES = (
    *("en_gov_web/train", "en_speeches/train", "en_textbooks/train", "en_textbooks/valid", "en_textbooks/test"),
    *("fin_textbook/train", "fin_textbook/test", "law_uscode/train", "math_planetmath/train", "med_qa/valid"),
    *("med_textbook/train", "ja_aozora/valid"),
)
pytestmark = pytest.mark.skipif(not AUDIT.is_file(), reason=f"{AUDIT} is absent; set CPT_SHARED_DATA")


def test_the_audited_items_are_found_and_no_others(tmp_path: Path) -> None:
    sets = sorted(folder.name for folder in (SHARED / "evals").iterdir() if folder.name != "blimp")
    request = DecontaminateRequest(
        inputs=tuple(str(SHARED / "corpora" / f"{name}.jsonl.zst") for name in FILES),
        out=tmp_path / "out",
        protected=Protected(against=tuple(f"{SHARED}/evals/{name}/*.jsonl" for name in sets)),
        dry_run=True,
    )
    report = decontaminate(request)["report"]
    found = json.loads((tmp_path / "out" / "contaminated_items.json").read_text())
    corpora = {item: sorted({"/".join(Path(o.split(".jsonl")[0]).parts[-2:]) for o in origins})
               for item, origins in found.items()}  # fmt: skip
    assert corpora == json.loads(AUDIT.read_text())
    counts = {entry["name"]: entry["contaminated_items"] for entry in report["sets"] if entry["contaminated_items"]}
    assert counts == {"arc_easy": 1, "boolq": 8, "humaneval": 1, "mmlu": 78}  # the audit's prose counts 79, its list 78

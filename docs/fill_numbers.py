"""Copies measured numbers from benchmarks/results/*.json into README and docs/*.md, where a marker asks for one.

    python docs/fill_numbers.py             # after a benchmark has written its result

A marker is an HTML comment behind a number: ``21.6<!-- measured: FILE.json path/to/value .1f -->``, the last word
being a Python format and a number in the path the place in a list. What is not measured yet shows a dash. A test fails
while a page is not what this script makes of it.
"""

import json
import re
from functools import reduce
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
MARKER = re.compile(r"[^\s|<]*(?P<marker><!-- measured: (?P<file>\S+\.json) (?P<path>.+?) (?P<format>\S+) -->)")


def measured(match: re.Match[str]) -> str:
    file = RESULTS / match["file"]
    if not file.is_file():
        return f"–{match['marker']}"  # noqa: RUF001 - a dash in a table
    value = reduce(_entry, match["path"].split("/"), json.loads(file.read_text(encoding="utf-8")))
    return f"{value:{match['format']}}{match['marker']}"


def _entry(node: Any, key: str) -> Any:
    return node[int(key)] if isinstance(node, list) else node[key]


def filled(text: str) -> str:
    return MARKER.sub(measured, text)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")

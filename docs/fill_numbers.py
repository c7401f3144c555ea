"""Copies measured numbers from benchmarks/results/*.json into the README, where a marker asks for one.

    python docs/fill_numbers.py             # after a benchmark has written its result

A marker is an HTML comment behind a number: ``21.6<!-- measured: FILE.json path/to/value .1f -->``, the last word
being a Python format. What is not measured yet shows a dash. A test fails while the README is not what this script
makes of it.
"""

import json
import re
from functools import reduce
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MARKER = re.compile(r"[^\s|<]*(?P<marker><!-- measured: (?P<file>\S+\.json) (?P<path>.+?) (?P<format>\S+) -->)")


def measured(match: re.Match[str]) -> str:
    file = RESULTS / match["file"]
    if not file.is_file():
        return f"–{match['marker']}"  # noqa: RUF001 - a dash in a table
    value = reduce(lambda node, key: node[key], match["path"].split("/"), json.loads(file.read_text(encoding="utf-8")))
    return f"{value:{match['format']}}{match['marker']}"


def filled(text: str) -> str:
    return MARKER.sub(measured, text)


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(filled(readme.read_text(encoding="utf-8")), encoding="utf-8")

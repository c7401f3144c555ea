"""Items of benchmarks that are known to be in the training corpora, as ``cpt data decontaminate`` lists them. No torch.

``contaminated_items.json`` maps ``set|file|line`` to the documents that hold the item; lines count from 0, ``file`` is
the name of the item file without its ending, ``set`` the folder it lies in or the name of the benchmark:

    {"mmlu|anatomy_test|20": ["corpora/med_textbook/train.jsonl.zst:17"], "arc_easy|test|1370": ["med_qa/valid"]}

Refuses a file of another shape.
"""

import json
from collections.abc import Collection, Mapping
from pathlib import Path

from cpt.rundir import DataError


def read_overlaps(path: Path) -> dict[tuple[str, str], frozenset[int]]:
    """(set, file) -> lines from 1.

    Raises:
        DataError: not such a list.
    """
    fix = "give the contaminated_items.json of `cpt data decontaminate`"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error}); {fix}") from None
    if not isinstance(raw, dict):
        raise DataError(f"{path}: holds a {type(raw).__name__}, not an object; {fix}")
    found: dict[tuple[str, str], set[int]] = {}
    for key in raw:
        parts = key.split("|")
        if len(parts) != 3 or not parts[2].isdecimal():
            raise DataError(f"{path}: key {key!r:.80} is not set|file|line; {fix}")
        found.setdefault((parts[0], parts[1]), set()).add(int(parts[2]) + 1)
    return {place: frozenset(lines) for place, lines in found.items()}


def lines_known(
    overlaps: Mapping[tuple[str, str], frozenset[int]], file: Path, names: Collection[str]
) -> frozenset[int]:
    """Lines, from 1, of an item file that are listed under its folder's name or one of ``names``."""
    found = (overlaps.get((name, file.stem), frozenset()) for name in {file.parent.name, *names})
    return frozenset().union(*found)

"""`cpt data inspect`: one source or several side by side, and the facts that the terminal and the page share."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cpt.rundir import DataError
from data_tools.look.raw_facts import is_remote, raw_facts
from data_tools.look.store_facts import Look, find_splits, store_facts
from data_tools.readers.remote import local_name

Facts = dict[str, Any]


def inspect_sources(paths: Sequence[Path | str], look: Look) -> dict[str, list[Facts]]:
    """``{"sources": [...]}``, JSON-able: for each split of a store or a view, each stage, each folder, pattern
    or URL of raw files.

    Raises:
        DataError: nothing there, something damaged, or a tokenizer that is not a store's.
    """
    if look.seq_len < 2 or look.sample < 0:
        raise DataError(f"--seq-len is {look.seq_len}, --sample-documents {look.sample}; at least 2 and 0 are needed")
    sources: list[Facts] = []
    for given in paths:
        name = local_name(str(given))
        splits = [] if is_remote(name) else find_splits(Path(name))
        sources += [store_facts(split, look) for split in splits] or [raw_facts(name, look)]
    return {"sources": sources}


def fact_rows(sources: Sequence[Facts]) -> list[tuple[str, list[str]]]:
    """(what, its value for each source); what none of them has is left out, "-" stands for what one has not."""
    rows = [(label, [value_of(source) for source in sources]) for label, value_of in _FACTS]
    return [(label, [value or "-" for value in values]) for label, values in rows if any(values)]


def sample_note(source: Facts) -> str:
    """On how much the figures rest."""
    sample = source["sample"]
    of = f" of {sample['of']:,}" if sample["of"] is not None and sample["of"] != sample["documents"] else ""
    cut = f"; {sample['shortened']:,} long ones by their beginning" if sample["shortened"] else ""
    return f"{sample['documents']:,}{of} documents ({sample['how']}{cut})"


def missing_text(source: Facts) -> str:
    """Why a source has no facts about its text; "" where it has."""
    return "" if "languages" in source else "needs --tokenizer, to turn ids into text"


def counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def short_name(name: str) -> str:
    """Folder and file of a path: names of files repeat from folder to folder."""
    return "/".join(name.split("/")[-2:])


def _number(key: str, form: str = ",") -> Callable[[Facts], str]:
    return lambda source: format(source[key], form) if source.get(key) is not None else ""


def _lengths(source: Facts) -> str:
    values, unit = source["lengths"]["percentiles"], source["lengths"]["unit"]
    if not values:
        return ""
    return (
        f"{values['p50']:,} {unit} in the middle, 10% up to {values['p10']:,}, 90% up to {values['p90']:,}; "
        f"{values['p0']:,} to {values['p100']:,}"
    )


def _store(text_of: Callable[[Facts], str]) -> Callable[[Facts], str]:
    return lambda source: text_of(source) if source["kind"] == "store" else ""


def _files(source: Facts) -> str:
    if source["kind"] == "store":
        return "" if "view" in source else counted(source["num_shards"], "shard")
    if not source["stored_bytes"]:  # of the hub, sizes are not known
        return counted(source["num_files"], "file")
    return f"{counted(source['num_files'], 'file')}, {source['stored_bytes'] / 1e6:,.1f} MB stored"


def _view(source: Facts) -> str:
    if "view" not in source:
        return ""
    view = source["view"]
    return f"{view['store']} ({view['of_documents']:,} documents), order {view['order']}"


def _vocabulary(source: Facts) -> str:
    seen = source["tokens_seen"]
    return f"{seen['used']:,} of {seen['vocab_size']:,} ({seen['used_share']:.1%}) in {seen['counted']:,} tokens"


def _stage(source: Facts) -> str:
    if "stage" not in source:
        return ""
    stage = source["stage"]
    return f"{stage['verb']}: kept {stage['documents']:,} of {stage['records']:,}"


def _reasons(source: Facts) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in source.get("stage", {}).get("reasons", {}).items())


def _languages(source: Facts) -> str:
    shown = [f"{entry['name']} {entry['share']:.0%}" for entry in source.get("languages", ())[:4]]
    more = len(source.get("languages", ())) - 4
    return ", ".join(shown) + (f" and {more} more" if more > 0 else "")


def _duplicates(source: Facts) -> str:
    entry = source["duplicates"]
    return f"{entry['documents']:,} ({entry['share']:.2%})" if source["sample"]["documents"] else ""


_FACTS: tuple[tuple[str, Callable[[Facts], str]], ...] = (
    ("source / domain", _store(lambda source: f"{source['source']} / {source['domain']}")),
    ("view of", _view),
    ("stage", _stage),
    ("dropped for", _reasons),
    ("files", _files),
    ("documents", _store(_number("documents"))),
    ("tokens", _store(_number("tokens"))),
    ("UTF-8 bytes of text", _store(_number("utf8_bytes"))),
    ("looked at", sample_note),
    ("records that are no document", _number("bad_records")),
    ("document length", _lengths),
    ("bytes per token", _number("bytes_per_token", ".3f")),
    ("characters per token", _number("characters_per_token", ".3f")),
    ("tokens per word", _number("tokens_per_word", ".3f")),
    ("vocabulary used", _store(_vocabulary)),
    ("languages, by document", _languages),
    ("exact duplicates looked at", _duplicates),
    ("dtype, EOS id", _store(lambda source: f"{source['dtype']}, {source['eos_id']}")),
    (
        "tokenizer",
        _store(lambda source: f"{source['tokenizer']['name']} ({source['tokenizer']['fingerprint'][:16]})"),
    ),
    ("content hash", _store(lambda source: source["content_hash"][:16])),
)

"""An inspection as one HTML page that needs no network and no script, in the report's style.

All text of documents is escaped by the template engine; only the pictures, which this package draws, go in as markup.
"""

from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

from cpt.report.palette import THEMES
from cpt.rundir import write_atomic
from data_tools.look.drawings import histogram, rank_curve
from data_tools.look.inspection import Facts, fact_rows, missing_text, sample_note, short_name
from data_tools.look.terminal import one_line, visible

_COLOURS = 6


def write_page(inspection: dict[str, list[Facts]], out: Path) -> None:
    """Raises OSError: the folder cannot be made or written."""
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, render_page(inspection))


def render_page(inspection: dict[str, list[Facts]]) -> str:
    loader = ChoiceLoader([PackageLoader("data_tools.look", "templates"), PackageLoader("cpt.report", "templates")])
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"visible": visible, "one_line": one_line}
    sources = [_view(number, source) for number, source in enumerate(inspection["sources"])]
    curves = [(view["colour"], view["ranks"]) for view in sources if view["ranks"]]
    return environment.get_template("inspection.html").render(
        title=", ".join(dict.fromkeys(source["path"] for source in inspection["sources"])),
        sources=sources,
        rows=fact_rows(inspection["sources"]),
        rank_svg=rank_curve(curves) if curves else "",
        themes=THEMES,
    )


def _view(number: int, source: Facts) -> dict[str, Any]:
    """A source with all that the template asks for, "" or empty where it has none."""
    colour = f"var(--run{number % _COLOURS})"
    seen = source.get("tokens_seen") or {"top": [], "never_seen": [], "ranks": [], "used": 0, "vocab_size": 0}
    lengths = source["lengths"]
    of = f" of {lengths['of']:,}" if lengths["of"] not in (None, lengths["documents"]) else ""
    return {
        "label": source["label"],
        "colour": colour,
        "kind": source["kind"],
        "note": sample_note(source),
        "missing": missing_text(source),
        "lengths_svg": histogram(lengths["bins"], colour) if lengths["bins"] else "",
        "lengths_note": f"{lengths['unit']} per document, {lengths['documents']:,}{of} documents; bins double",
        "top": seen["top"],
        "never": seen["never_seen"],
        "num_never": seen["vocab_size"] - seen["used"],
        "ranks": seen["ranks"],
        "languages": source.get("languages", []),
        "language_rule": source.get("language_rule", ""),
        "lines": source.get("repeated_lines", []),
        "fields": source.get("fields", {}),
        "files": [(short_name(name), count) for name, count in source.get("files", [])],
        "packed": source.get("rows", []),
        "documents": [_document(source, entry) for entry in source["first_documents"]],
    }


def _document(source: Facts, entry: dict[str, Any]) -> dict[str, str]:
    if source["kind"] != "store":
        rest = entry["characters"] - len(entry["text"])
        return {
            "title": f"{short_name(entry['origin'])} · {entry['characters']:,} characters",
            "text": entry["text"] + (f" ... {rest:,} more characters" if rest else ""),
        }
    rest = entry["tokens"] - len(entry["ids"])
    text = entry.get("text", " ".join(map(str, entry["ids"])))
    return {
        "title": f"{source['label']} document {entry['document']} · {entry['tokens']:,} tokens",
        "text": text + (f" ... {rest:,} more tokens" if rest else ""),
    }

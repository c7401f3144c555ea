"""How held-out documents begin, kept once per run so that a report can show them without store or tokenizer. No torch.

Owns ``evals/documents_text.parquet`` (source, document, text) and how text from outside is shown. Its size is bounded:
``EXCERPT_CHARACTERS`` of at most ``DOCUMENTS_PER_SOURCE`` documents. Refuses a file of another shape.
"""

import io
import unicodedata
from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from cpt.rundir import DataError, write_atomic

EXCERPT_CHARACTERS = 240
DOCUMENTS_PER_SOURCE = 2000
_SCHEMA = pa.schema({"source": pa.dictionary(pa.int32(), pa.string()), "document": pa.int64(), "text": pa.string()})


def document_texts_file(evals: Path) -> Path:
    return evals / "documents_text.parquet"


def write_document_texts(path: Path, texts: Mapping[str, Mapping[int, str]]) -> None:
    """Write the beginning of documents: source -> number in its held-out split -> text, which is cut."""
    rows = [(source, number, text) for source, part in texts.items() for number, text in part.items()]
    columns = {
        "source": [source for source, _, _ in rows],
        "document": [number for _, number, _ in rows],
        "text": [text[:EXCERPT_CHARACTERS] for _, _, text in rows],
    }
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns).cast(_SCHEMA), buffer, compression="zstd")
    write_atomic(path, buffer.getvalue())


def read_document_texts(path: Path) -> dict[tuple[str, int], str]:
    """(source, document) -> text; a file that is not there holds none. Raises DataError: damaged, or no such table."""
    if not path.exists():
        return {}
    try:
        with pq.ParquetFile(path) as file:
            table = file.read(columns=_SCHEMA.names).select(_SCHEMA.names).cast(_SCHEMA)
    except (OSError, pa.ArrowException, KeyError) as error:
        fix = "delete it, the next evaluation writes it anew"
        raise DataError(f"{path}: not a table of {', '.join(_SCHEMA.names)} ({error!s:.200}); {fix}") from None
    sources, documents, texts = (table.column(name).to_pylist() for name in _SCHEMA.names)
    return dict(zip(zip(sources, documents, strict=True), texts, strict=True))


def visible(text: str) -> str:
    """Text from outside for a terminal or a page: nothing in it moves the cursor, changes a colour, turns the direction
    of writing or is lost. Line ends and tabs stay.
    """
    return "".join(_visible(character) for character in text)


def one_line(text: str, most: int) -> str:
    """The same on one line of at most ``most`` characters."""
    line = visible(" ".join(text.split()))
    return line if len(line) <= most else line[: most - 1].rstrip() + "…"


def _visible(character: str) -> str:
    code = ord(character)
    if character in "\n\t" or unicodedata.category(character) not in ("Cc", "Cf", "Cs"):
        return character
    if code < 0x20:
        return chr(0x2400 + code)  # the picture of a control character
    if character == "\u200d" or code == 0xAD:  # joins emoji; a soft hyphen
        return character
    return f"⟨{code:04x}⟩"

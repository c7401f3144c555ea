"""What a held-out evaluation leaves in the run folder: its record, its pieces of documents, and once per run how the
documents begin.

The record comes last, for it is what says that a step was evaluated. Refuses to decode with another tokenizer than the
one that made the store.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpt.data.store_selection import Split
from cpt.eval.document_pieces import to_table
from cpt.eval.document_texts import (
    DOCUMENTS_PER_SOURCE,
    EXCERPT_CHARACTERS,
    document_texts_file,
    write_document_texts,
)
from cpt.eval.perplexity import Evaluated
from cpt.eval.records import write_eval
from cpt.eval.results import pieces_file, write_pieces
from cpt.rundir import DataError, RunDir
from data_tools.encoders import Decode, load_decoder, tokenizer_fingerprint


def keep_evaluation(rundir: RunDir, found: Evaluated) -> None:
    """Write pieces and record of one step. Raises OSError: the folder cannot be written; then there is no record."""
    write_pieces(pieces_file(rundir.evals, found.record.step), to_table(found.pieces))
    write_eval(rundir.eval_file(found.record.step), found.record)


def keep_beginnings(rundir: RunDir, found: Evaluated, stores: Mapping[str, Split], tokenizer: Path | None) -> str:
    """Write how the evaluated documents begin, unless that is there or the tokenizer is not known.

    Gives back what went wrong, or "": a report without excerpts is no reason to stop anything.
    """
    file = document_texts_file(rundir.evals)
    if tokenizer is None or file.exists():
        return ""
    try:
        texts = {
            name: _beginnings(stores[name], pieces.document, store_decoder(tokenizer, stores[name]))
            for name, pieces in found.pieces.items()
        }
        write_document_texts(file, texts)
    except (OSError, DataError) as error:
        return f"the beginnings of held-out documents were not kept, so reports show none: {error}"
    return ""


def store_decoder(tokenizer: Path, store: Split) -> Decode:
    """Ids of the store to text. Raises DataError: another tokenizer than the one that made the store, or none."""
    made_with = store.manifest.tokenizer
    if tokenizer_fingerprint(tokenizer) != made_with.fingerprint:
        raise DataError(
            f"{tokenizer}: is not the tokenizer that made the store {store.path} ({made_with.name}); "
            "its ids would read as other words; fix: give the tokenizer of the store"
        )
    return load_decoder(tokenizer)


def document_ids(store: Split, number: int, most: int) -> NDArray[Any]:
    """The first ``most`` tokens of a document, BOS and EOS included."""
    start, stop = store.document_bounds(number, number + 1).tolist()
    return store.read(start, min(stop, start + most))


def _beginnings(store: Split, documents: NDArray[np.int64], decode: Decode) -> dict[int, str]:
    """Number -> text; a token is hardly ever shorter than a character."""
    marks = {store.manifest.bos_id, store.manifest.eos_id}
    found = {}
    for number in np.unique(documents)[:DOCUMENTS_PER_SOURCE].tolist():
        ids = document_ids(store, number, EXCERPT_CHARACTERS).tolist()
        found[number] = decode([token for token in ids if token not in marks])
    return found

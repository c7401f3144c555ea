"""The text of a split's documents: their ids, without the BOS and EOS that the store put around them, decoded.

Refused: a tokenizer that did not make the store.
"""

from collections.abc import Iterator
from pathlib import Path

from cpt.data.manifest import MANIFEST_NAME, VIEW_NAME, Manifest
from cpt.data.store_selection import Split
from cpt.data.token_store import Tokens
from cpt.rundir import DataError
from data_tools.encoders import Decode, load_decoder, tokenizer_fingerprint


def is_split(path: Path) -> bool:
    """Whether ``open_split`` finds a split there, of a store or of a view."""
    return any((path / name).is_file() for name in (MANIFEST_NAME, VIEW_NAME))


def matching_decoder(store: Split, tokenizer: Path) -> Decode:
    """Raises DataError: another tokenizer than the one that made the store."""
    made_with, given = store.manifest.tokenizer, tokenizer_fingerprint(tokenizer)
    if given != made_with.fingerprint:
        raise DataError(
            f"{tokenizer}: fingerprint {given[:16]}, but {store.path} was made with {made_with.name} "
            f"({made_with.fingerprint[:16]}); fix: --tokenizer with that one"
        )
    return load_decoder(tokenizer)


def text_ids(tokens: Tokens, manifest: Manifest) -> Tokens:
    """A document's ids without its BOS and its EOS; the same tokens inside of it are text."""
    first = 1 if len(tokens) and manifest.bos_id is not None and tokens[0] == manifest.bos_id else 0
    last = len(tokens) - 1 if len(tokens) > first and tokens[-1] == manifest.eos_id else len(tokens)
    return tokens[first:last]


def split_texts(store: Split, tokenizer: Path) -> Iterator[str]:
    """Every document's text in the split's order. Raises DataError as ``matching_decoder``."""
    decode = matching_decoder(store, tokenizer)
    for tokens in store.documents():
        yield decode(text_ids(tokens, store.manifest).tolist())

"""How large a store will be, from a look at the beginning of a few inputs, before anything is written."""

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_tools.corpus.document import BadRecord
from data_tools.encoders import Encoder
from data_tools.sources import Input, ReadOptions
from data_tools.tokenizing.jobs import read_records
from data_tools.tokenizing.request import BadRecords

_SAMPLE_BYTES = 1 << 19
_SAMPLE_INPUTS = 8
_RATIO_BYTES = 1 << 20
_GIVE_UP_BYTES = 16 << 20
_RECORD_BYTES = 64  # what a record without text counts
_SURE = 0.7  # the beginning of one file may need a third more tokens than the rest of it


@dataclass(frozen=True)
class Sample:
    """The first documents of some inputs, and how much text they were for how much of the files."""

    texts: list[str]
    documents: int
    text_bytes: int
    stored_bytes: int


@dataclass(frozen=True)
class Prediction:
    """What ``--dry-run`` prints; None where the inputs do not tell their size (hub data sets)."""

    sampled_documents: int
    bytes_per_token: float
    input_bytes: int
    text_bytes: int | None
    documents: int | None
    tokens: int | None
    store_bytes: int | None
    free_bytes: int
    encoder: str


def take_sample(inputs: Sequence[Input], options: ReadOptions, bad_records: BadRecords) -> Sample:
    """The beginning of up to eight inputs spread over the list, about half a megabyte of text in all."""
    chosen = inputs[:: -(-len(inputs) // _SAMPLE_INPUTS)]
    looks = [_look(entry, options, bad_records, _SAMPLE_BYTES // len(chosen)) for entry in chosen]
    return Sample(
        [text for look in looks for text in look.texts],
        sum(look.documents for look in looks),
        sum(look.text_bytes for look in looks),
        sum(look.stored_bytes for look in looks),
    )


def _look(entry: Input, options: ReadOptions, bad_records: BadRecords, room: int) -> Sample:
    """Read on until the position in the file moved far enough to tell how much text a byte of it holds.

    Where there is hardly any text, or none, ``_GIVE_UP_BYTES`` of the file or of its records are enough.
    """
    texts: list[str] = []
    documents = text_bytes = seen_bytes = position = 0
    for text in read_records(entry, options, bad_records):
        if entry.done_bytes != position:
            if position and (text_bytes >= _RATIO_BYTES or max(position, seen_bytes) >= _GIVE_UP_BYTES):
                break
            position = entry.done_bytes
        if isinstance(text, str) and text:
            if room > 0:
                texts.append(text[:room])
                room -= len(text)
            documents += 1
            size = _utf8_bytes(text)
            text_bytes += size
        else:
            size = _RECORD_BYTES + (len(text.raw) if isinstance(text, BadRecord) else 0)
        seen_bytes += size
        if not position and seen_bytes >= _GIVE_UP_BYTES:
            break
    else:
        position = entry.size_bytes
    return Sample(texts, documents, text_bytes, position)


def _utf8_bytes(text: str) -> int:
    """Without a second copy of a long text."""
    return len(text) if text.isascii() else sum(len(text[i : i + 65536].encode()) for i in range(0, len(text), 65536))


def predict(sample: Sample, inputs: Sequence[Input], encoder: Encoder, folder: Path) -> Prediction:
    """Size of the store that ``inputs`` will make; ``folder``: where it goes, for the free space there."""
    sample_bytes = sum(len(text.encode()) for text in sample.texts)
    sample_tokens = len(encoder.encode_batch(sample.texts)[0]) if sample.texts else 0
    input_bytes = sum(entry.size_bytes for entry in inputs)
    known = sample.stored_bytes and sample_tokens and all(entry.size_bytes for entry in inputs)
    text_bytes = documents = tokens = store_bytes = None
    if known:
        text_bytes = input_bytes * sample.text_bytes // sample.stored_bytes
        documents = max(1, text_bytes * sample.documents // sample.text_bytes)
        tokens = text_bytes * sample_tokens // sample_bytes + documents * (1 + (encoder.bos_id is not None))
        store_bytes = tokens * (2 if encoder.vocab_size <= 1 << 16 else 4) + documents * 8
    return Prediction(
        sampled_documents=len(sample.texts),
        bytes_per_token=round(sample_bytes / sample_tokens, 3) if sample_tokens else 0.0,
        input_bytes=input_bytes,
        text_bytes=text_bytes,
        documents=documents,
        tokens=tokens,
        store_bytes=store_bytes,
        free_bytes=shutil.disk_usage(_existing(folder)).free,
        encoder=encoder.note,
    )


def require_space(prediction: Prediction, folder: Path, present_bytes: int) -> None:
    """``present_bytes``: what finished segments take already.

    Raises:
        RuntimeError: the folder's disk has not the room that the store needs.
    """
    needed = (prediction.store_bytes or 0) - present_bytes
    if needed * _SURE > prediction.free_bytes:
        raise RuntimeError(
            f"{folder}: the store needs about {readable(needed)}, {readable(prediction.free_bytes)} are free there; "
            "fix: free some space, or --out on another disk"
        )


def readable(size: float) -> str:
    """``12_300_000_000`` -> ``12 GB``."""
    power = min(int(math.log10(max(size, 1)) / 3), 4)
    return f"{size / 1000**power:.3g} {('bytes', 'kB', 'MB', 'GB', 'TB')[power]}"


def _existing(folder: Path) -> Path:
    return next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.is_dir())

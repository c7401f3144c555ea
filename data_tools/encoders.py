"""Texts to token ids without special tokens: `gigatoken` where it is proved equal, `tokenizers`, `sentencepiece`.

An encoder is immutable and may be called from many threads at once. Ids travel as numpy arrays, end to end, with one
length per text. No BOS, no EOS: the store builder appends EOS. Long texts are cut into pieces for the two libraries
that need 40 to 100 bytes of memory per byte of text (measured: 5.4 GB and 2.1 GB for one text of 50 MB), and only at a
kind of place where a sample proved that cutting changes no id. Refused: a tokenizer without EOS unless one is named, a
folder without a tokenizer.
"""

import hashlib
import importlib.util
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from cpt.data.token_store import TokenizerFacts
from cpt.rundir import DataError

Ids = NDArray[np.uint32]
Decode = Callable[[Sequence[int]], str]
EncodeBatch = Callable[[Sequence[str]], tuple[Ids, NDArray[np.int64]]]

_LONG_TEXT = 1_000_000  # characters
_CUT = re.compile(r"(?<=[A-Za-z]) (?=[A-Za-z])")
# Strings on which byte-level BPE implementations were seen to differ: white space, marks, digits, contractions,
# scripts.
_TRICKY = (
    "  two  spaces\tand\ttabs \r\n\r\n\n  x \n ",
    "don't WE'LL it's I'm they'd 'tis ''",
    "e\u0301 \u00e9 \u1100\u1161 \ufb01 \u212b \u00a0nbsp\u2003em\u200bzero",
    "日本語の文章。한국어 русский العربية हिन्दी ไทย",
    "😀👩‍👩‍👧‍👦🇩🇪 ½²³ Ⅷ 1234567 3.14 1,000,000",
    "def f(x):\n    return x**2  # note\n\n\n        y = {'a': [1, 2]}",
    "\x00\x01\x7f \ufffd \ufeff <|endoftext|> <s> </s> <unk> [PAD]",
)


@dataclass(frozen=True)
class Encoder:
    """``encode_batch(texts)`` -> (ids end to end, tokens per text); ``note`` says which back-end was taken and why."""

    facts: TokenizerFacts
    vocab_size: int
    eos_id: int
    backend: str
    note: str
    encode_batch: EncodeBatch


def load_encoder(path: Path, *, eos_token: str | None = None, sample: Sequence[str] = ()) -> Encoder:
    """Load a ``tokenizer.json``, a Hugging Face folder or a sentencepiece ``.model``.

    ``sample``: texts of the corpus. With `gigatoken` installed and equal to `tokenizers` on every one of them (and on a
    set of tricky strings) it does the work; without a sample it is never used, because nothing then proves it equal.

    Raises:
        DataError: no tokenizer there, an unreadable one, no EOS token in it.
    """
    file = _find_tokenizer_file(path)
    encoder = _load_sentencepiece(file, eos_token) if file.suffix == ".model" else _load_tokenizers(file, eos_token)
    if sample and file.suffix != ".model":
        encoder = _prefer_gigatoken(encoder, file, sample)
    if encoder.backend == "gigatoken":  # needs little more memory than the text itself, so it takes long ones whole
        return encoder
    return replace(encoder, encode_batch=_with_long_texts(encoder.encode_batch, sample))


def load_decoder(path: Path) -> Decode:
    """Ids to text, special tokens shown; needs no EOS. Raises DataError as ``load_encoder``."""
    file = _find_tokenizer_file(path)
    if file.suffix == ".model":
        processor = _open_sentencepiece(file)
        return lambda ids: str(processor.decode(list(ids)))
    tokenizer = _open_tokenizers(file)
    return lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=False))


def tokenizer_fingerprint(path: Path) -> str:
    """sha256 hex of the tokenizer's content: key order, white space and truncation or padding settings do not count."""
    file = _find_tokenizer_file(path)
    raw = file.read_bytes()
    if file.suffix == ".model":
        return hashlib.sha256(raw).hexdigest()
    content = _parse_json(file)
    # transformers writes these two from the last call's arguments; they change no id of a whole document
    content.update(truncation=None, padding=None)
    return hashlib.sha256(orjson.dumps(content, option=orjson.OPT_SORT_KEYS)).hexdigest()


def _find_tokenizer_file(path: Path) -> Path:
    if path.is_file():
        if path.suffix in (".json", ".model"):
            return path
        raise DataError(
            f"{path}: not a tokenizer; fix: a tokenizer.json, a folder that has one, or a sentencepiece .model"
        )
    if not path.is_dir():
        raise DataError(
            f"{path}: no such tokenizer; fix: a tokenizer.json, a folder that has one, or a sentencepiece .model"
        )
    models = sorted(path.glob("*.model"))
    for file in [path / "tokenizer.json", *models]:
        if file.is_file():
            return file
    names = ", ".join(sorted(entry.name for entry in path.iterdir())[:10])
    raise DataError(
        f"{path}: neither tokenizer.json nor a .model in this folder (there is {names}); fix: save the fast tokenizer"
    )


def _parse_json(file: Path) -> dict[str, Any]:
    try:
        content = orjson.loads(file.read_bytes())
    except ValueError as error:
        raise DataError(f"{file}: not JSON ({error}); fix: copy the tokenizer again") from None
    if not isinstance(content, dict):
        raise DataError(f"{file}: holds a {type(content).__name__}, not a JSON object; fix: copy the tokenizer again")
    return content


def _name(file: Path) -> str:
    return file.parent.name or file.stem


# --- back-ends


def _open_tokenizers(file: Path) -> Any:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception for whatever its parser dislikes
        if "model" not in _parse_json(file):
            raise DataError(f"{file}: has no 'model', so it is no tokenizer.json; fix: name the right file") from None
        raise DataError(
            f"{file}: `tokenizers` cannot load it ({error}); fix: upgrade it or save the tokenizer again"
        ) from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _load_tokenizers(file: Path, eos_token: str | None) -> Encoder:
    tokenizer = _open_tokenizers(file)
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)

    def encode_batch(texts: Sequence[str]) -> tuple[Ids, NDArray[np.int64]]:
        rows = [encoding.ids for encoding in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]
        return _flatten(rows)

    settings = _tokenizer_config(file)
    eos = eos_token or _content(settings.get("eos_token"))
    return Encoder(
        facts=TokenizerFacts(
            _name(file), tokenizer_fingerprint(file), settings.get("tokenizer_class") or "tokenizer.json"
        ),
        vocab_size=max(vocabulary.values()) + 1,
        eos_id=_require_eos(eos, vocabulary, file),
        backend="tokenizers",
        note="tokenizers (no sample of the corpus to compare gigatoken on)",
        encode_batch=encode_batch,
    )


def _tokenizer_config(file: Path) -> dict[str, Any]:
    """Settings beside the tokenizer; older folders keep the EOS name in ``special_tokens_map.json`` only."""
    found: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (file.parent / name).is_file():
            found |= {key: value for key, value in _parse_json(file.parent / name).items() if value is not None}
    return found


def _content(token: Any) -> str | None:
    """``"</s>"`` or ``{"content": "</s>", ...}``."""
    return token.get("content") if isinstance(token, dict) else token


def _require_eos(eos: str | None, vocabulary: dict[str, int], file: Path) -> int:
    if eos is not None and eos in vocabulary:
        return int(vocabulary[eos])
    likely = [token for token in vocabulary if re.fullmatch(r"<.*>|\[.*\]", token)][:8]
    problem = "names no EOS token" if eos is None else f"has no token {eos!r} to end documents with"
    raise DataError(f"{file}: {problem}; fix: --eos-token TOKEN, for instance one of {likely}")


def _open_sentencepiece(file: Path) -> Any:
    from sentencepiece import SentencePieceProcessor

    try:
        return SentencePieceProcessor(model_file=str(file))
    except (RuntimeError, OSError) as error:
        raise DataError(f"{file}: sentencepiece cannot load it ({error}); fix: copy the model again") from None


def _load_sentencepiece(file: Path, eos_token: str | None) -> Encoder:
    processor = _open_sentencepiece(file)

    def encode_batch(texts: Sequence[str]) -> tuple[Ids, NDArray[np.int64]]:
        return _flatten(processor.encode(list(texts), num_threads=1))

    eos_id = processor.eos_id() if eos_token is None else processor.piece_to_id(eos_token)
    if eos_id < 0 or (eos_token is not None and processor.id_to_piece(eos_id) != eos_token):
        pieces = {processor.id_to_piece(i): i for i in range(min(processor.get_piece_size(), 300))}
        _require_eos(eos_token, pieces, file)
    return Encoder(
        facts=TokenizerFacts(_name(file), tokenizer_fingerprint(file), "sentencepiece"),
        vocab_size=processor.get_piece_size(),
        eos_id=eos_id,
        backend="sentencepiece",
        note="sentencepiece (its own library: converted models differ in some ids)",
        encode_batch=encode_batch,
    )


def _flatten(rows: Sequence[Sequence[int]]) -> tuple[Ids, NDArray[np.int64]]:
    lengths = np.fromiter((len(row) for row in rows), np.int64, len(rows))
    ids = np.empty(int(lengths.sum()), np.uint32)
    start = 0
    for row, length in zip(rows, lengths.tolist(), strict=True):
        ids[start : start + length] = row
        start += length
    return ids, lengths


def _prefer_gigatoken(encoder: Encoder, file: Path, sample: Sequence[str]) -> Encoder:
    if importlib.util.find_spec("gigatoken") is None:
        return replace(encoder, note="tokenizers (install gigatoken for 20 to 40 times the speed)")
    import gigatoken

    try:
        tokenizer = gigatoken.Tokenizer.from_json(file.read_bytes())
    except Exception as error:  # its loader panics or raises various types for models it does not know
        return replace(encoder, note=f"tokenizers (gigatoken cannot load this tokenizer: {error})")

    def encode_batch(texts: Sequence[str]) -> tuple[Ids, NDArray[np.int64]]:
        # parallel=False still releases the GIL; the callers bring the threads
        layout = tokenizer.encode_batch(list(texts), parallel=False).layout
        offsets = np.asarray(layout.offsets.data, np.int64)
        return np.asarray(layout.content.data, np.uint32)[offsets[0] : offsets[-1]], np.diff(offsets)

    difference = _first_difference(encoder.encode_batch, encode_batch, [*sample, *_TRICKY])
    if difference is not None:
        return replace(encoder, note=f"tokenizers (gigatoken gives other ids for {difference[:40]!r})")
    note = f"gigatoken (equal to tokenizers on {len(sample)} sampled documents)"
    return replace(encoder, backend="gigatoken", note=note, encode_batch=encode_batch)


def _first_difference(expected: EncodeBatch, found: EncodeBatch, texts: Sequence[str]) -> str | None:
    expected_ids, expected_lengths = expected(texts)
    found_ids, found_lengths = found(texts)
    if np.array_equal(expected_lengths, found_lengths) and np.array_equal(expected_ids, found_ids):
        return None
    for text in texts:
        if not np.array_equal(expected([text])[0], found([text])[0]):
            return text
    return texts[0]  # differs in the batch only; still a difference


# --- long texts


def _with_long_texts(encode_batch: EncodeBatch, sample: Sequence[str]) -> EncodeBatch:
    """Bounded memory for long texts: cut before a space (byte-level BPE) or at it (models that prefix one).

    The first cut that leaves every id of the sample as it was is taken; where none does, long texts stay whole.
    """
    probe = [text[:20_000] for text in sample[:64] if _CUT.search(text)]
    for keep_space in (1, 0):
        if probe and _cutting_is_exact(encode_batch, probe, keep_space):
            return _CuttingEncoder(encode_batch, keep_space)
    return encode_batch


def _cutting_is_exact(encode_batch: EncodeBatch, probe: Sequence[str], keep_space: int) -> bool:
    pieces = [piece for text in probe for piece in _pieces(text, 200, keep_space)]
    return np.array_equal(encode_batch(probe)[0], encode_batch(pieces)[0])


def _pieces(text: str, size: int, keep_space: int) -> list[str]:
    """Pieces of at least ``size`` characters, each but the first starting with its space if ``keep_space``."""
    pieces, start = [], 0
    while cut := _CUT.search(text, start + size):
        pieces.append(text[start : cut.start()])
        start = cut.end() - keep_space
    return [*pieces, text[start:]]


@dataclass(frozen=True)
class _CuttingEncoder:
    encode_batch: EncodeBatch
    keep_space: int

    def __call__(self, texts: Sequence[str]) -> tuple[Ids, NDArray[np.int64]]:
        if all(len(text) <= _LONG_TEXT for text in texts):
            return self.encode_batch(texts)
        rows = [self._encode_one(text) for text in texts]
        lengths = np.fromiter((len(row) for row in rows), np.int64, len(rows))
        return np.concatenate(rows), lengths

    def _encode_one(self, text: str) -> Ids:
        # one call per piece: the libraries hold their working memory for a whole batch
        pieces = _pieces(text, _LONG_TEXT, self.keep_space)
        return np.concatenate([self.encode_batch([piece])[0] for piece in pieces])

"""A finished BPE tokenizer as symbols that can be joined further, and its files with the new tokens added.

Two forms: ``tokenizer.json`` with a BPE model (byte-level, or sentencepiece-like with byte fallback), and a
sentencepiece BPE ``.model``. New merges are appended behind the old ones, so they come last in every encoding: a text
is cut as before, then joined further, and a text that no new merge fits keeps its ids. Characters that the base spells
in bytes may become tokens of their own. Old ids never move; new ones start behind the last, added tokens included.
Refused: unigram, WordPiece and word-level models, which have no merges; BPE with word-end marks.
"""

import struct
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from cpt.rundir import DataError
from data_tools.vocabulary.merges import BORDER, MARKS, NEVER, PLAIN, SPACE, SPACE_MARKS, SPACE_PLAIN, SPACES, NewToken

SPACE_MARK = "\u2581"
_BYTE_NAMES = {f"<0x{byte:02X}>": byte for byte in range(256)}
_SP_NORMAL, _SP_BPE = 1, 2  # of sentencepiece_model.proto
_MODEL_TYPES = {1: "unigram", 2: "BPE", 3: "word", 4: "character"}
_NO_MERGES = "only BPE has merges to add to; fix: train a new one with cpt data train-tokenizer"


@dataclass
class BaseTokenizer:
    """``pieces(texts)`` gives rows of ids with BORDER where nothing may be joined; ``write(folder, tokens)``."""

    file: Path
    texts: list[str]  # by id, "" for an id that is not used
    special: set[str]
    kind_of: Callable[[str], int]
    pieces: Callable[[Sequence[str]], Iterator[NDArray[np.int32]]]
    write: Callable[[Path, Sequence[NewToken]], None]
    byte_values: dict[int, int]  # id of a byte-fallback token -> the byte
    characters: dict[str, int] = field(default_factory=dict)  # without a token -> symbol behind the ids

    def rows(self, texts: Sequence[str]) -> Iterator[NDArray[np.int32]]:
        """As ``pieces``, characters spelled in bytes folded into one symbol each; other bytes are borders."""
        is_byte = np.zeros(len(self.texts) + 1, bool)  # the last stands for BORDER
        is_byte[list(self.byte_values)] = True
        for row in self.pieces(texts):
            yield self._fold(row, is_byte[row]) if is_byte[row].any() else row

    def _fold(self, row: NDArray[np.int32], is_byte: NDArray[np.bool_]) -> NDArray[np.int32]:
        edges = np.flatnonzero(np.diff(np.r_[False, is_byte, False].astype(np.int8)))
        parts, end = [], 0
        for start, stop in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
            raw = bytes(self.byte_values[token] for token in row[start:stop].tolist())
            parts += [row[end:start], np.array([self._character(c) for c in raw.decode(errors="ignore")], np.int32)]
            end = stop
        return np.concatenate([*parts, row[end:]])

    def _character(self, character: str) -> int:
        if len(character.encode()) == 1 or unicodedata.category(character)[0] == "C":
            return BORDER
        return self.characters.setdefault(character, len(self.texts) + len(self.characters))


def open_base(file: Path) -> BaseTokenizer:
    """Raises DataError for a tokenizer without merges."""
    return _open_piece_model(file) if file.suffix == ".model" else _open_json(file)


# --- what may be joined


@cache
def kind_of_bytes(text: str) -> int:
    """Byte-level spelling: the pre-tokenizer keeps words apart; numbers stay as they are."""
    return NEVER if not text or any(c in "0123456789" for c in text) else PLAIN


def kind_of_pieces(text: str) -> int:
    """Sentencepiece spelling: a space mark stands first; letters and marks do not mix; no digits."""
    if not text.strip(SPACE_MARK):
        return NEVER if not text else SPACE if len(text) == 1 else SPACES
    inner = text.removeprefix(SPACE_MARK)
    kinds = {_kind_of_character(character) for character in inner}
    if len(kinds) > 1 or NEVER in kinds:
        return NEVER
    kind = kinds.pop()
    return kind if inner is text or len(inner) == len(text) else {PLAIN: SPACE_PLAIN, MARKS: SPACE_MARKS}[kind]


@cache
def _kind_of_character(character: str) -> int:
    group = unicodedata.category(character)[0]
    if character == SPACE_MARK:
        return NEVER
    return PLAIN if group in "LM" else MARKS if group in "PS" else NEVER


# --- tokenizer.json


def _open_json(file: Path) -> BaseTokenizer:
    from tokenizers import Tokenizer

    content = _parse(file)
    model = content["model"]
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    texts = [""] * (max(vocabulary.values()) + 1)
    for text, token in vocabulary.items():
        texts[token] = text
    added = {token["content"] for token in content.get("added_tokens") or []}
    byte_values = {i: _BYTE_NAMES[t] for i, t in enumerate(texts) if t in _BYTE_NAMES} if model["byte_fallback"] else {}
    by_bytes = _names_byte_level(content.get("pre_tokenizer")) or _names_byte_level(content.get("decoder"))
    return BaseTokenizer(
        file=file,
        texts=texts,
        special=added,
        kind_of=kind_of_bytes if by_bytes else kind_of_pieces,
        pieces=partial(_json_pieces, tokenizer, {vocabulary[text] for text in added}),
        write=partial(_write_json, content, vocabulary),
        byte_values=byte_values,
    )


def _parse(file: Path) -> dict[str, Any]:
    try:
        content = orjson.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: cannot be read ({error}); fix: copy the tokenizer again") from None
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict) or "vocab" not in model:
        raise DataError(f"{file}: has no 'model' with a 'vocab', so it is no tokenizer.json; fix: name the right file")
    if model.get("type", "BPE") != "BPE" or "merges" not in model:
        raise DataError(f"{file}: a {model.get('type')} model cannot be extended: {_NO_MERGES}")
    marks = {name: model[name] for name in ("continuing_subword_prefix", "end_of_word_suffix") if model.get(name)}
    if marks:
        raise DataError(f"{file}: BPE with {marks} cannot be extended here; fix: train a new one with cpt data "
                        "train-tokenizer")  # fmt: skip
    model.setdefault("byte_fallback", False)
    return dict(content)


def _names_byte_level(part: Any) -> bool:
    return b'"ByteLevel"' in orjson.dumps(part)


def _json_pieces(tokenizer: Any, added: set[int], texts: Sequence[str]) -> Iterator[NDArray[np.int32]]:
    for encoding in tokenizer.encode_batch(list(texts), add_special_tokens=False):
        ids = np.array(encoding.ids, np.int32)
        words = np.array([-1 if word is None else word for word in encoding.word_ids], np.int64)
        if added:
            ids[np.isin(ids, list(added))] = BORDER
        yield np.insert(ids, np.flatnonzero(words[1:] != words[:-1]) + 1, BORDER)


def _write_json(content: dict[str, Any], vocabulary: dict[str, int], folder: Path, tokens: Sequence[NewToken]) -> None:
    model = content["model"]
    as_lines = bool(model["merges"]) and isinstance(model["merges"][0], str)
    # Added tokens that the model does not list would be numbered behind the new ones when the file is loaded.
    vocab = model["vocab"] | {token["content"]: token["id"] for token in content.get("added_tokens") or []}
    merges = list(model["merges"])
    first = max(vocabulary.values()) + 1
    spelled = {token.symbol: token.text for token in tokens}
    old = {i: text for text, i in vocabulary.items()}
    for i, token in enumerate(tokens):
        vocab[token.text] = first + i
        if token.parts:
            pair = [spelled.get(part) or old[part] for part in token.parts]
            merges.append(" ".join(pair) if as_lines else pair)
    extended = {**content, "truncation": None, "padding": None, "model": {**model, "vocab": vocab, "merges": merges}}
    (folder / "tokenizer.json").write_bytes(orjson.dumps(extended, option=orjson.OPT_INDENT_2))


# --- sentencepiece


def _open_piece_model(file: Path) -> BaseTokenizer:
    from sentencepiece import SentencePieceProcessor

    raw = file.read_bytes()
    try:
        processor = SentencePieceProcessor(model_proto=raw)
        model_type = _model_type(raw)
    except (RuntimeError, IndexError, ValueError) as error:
        raise DataError(f"{file}: sentencepiece cannot load it ({error}); fix: copy the model again") from None
    if model_type != _SP_BPE:
        raise DataError(
            f"{file}: a sentencepiece {_MODEL_TYPES.get(model_type, model_type)} model cannot be extended: {_NO_MERGES}"
        )
    size = processor.get_piece_size()
    _refuse_tokens_behind(file, size)
    texts = [processor.id_to_piece(i) for i in range(size)]
    byte_values = {i: _BYTE_NAMES[texts[i]] for i in range(size) if processor.is_byte(i)}
    normal = [i for i in range(size) if not (processor.is_control(i) or processor.is_unknown(i) or i in byte_values)]
    lowest = min(processor.get_score(i) for i in normal)
    return BaseTokenizer(
        file=file,
        texts=texts,
        special=set(texts) - {texts[i] for i in normal},
        kind_of=kind_of_pieces,
        pieces=lambda given: (np.array(ids, np.int32) for ids in processor.encode(list(given))),
        write=partial(_write_piece_model, raw, lowest, file.name),
        byte_values=byte_values,
    )


def _refuse_tokens_behind(file: Path, size: int) -> None:
    """Tokens that transformers puts behind the pieces would get the ids of the new ones."""
    behind: dict[str, int] = {}
    for name in ("added_tokens.json", "tokenizer_config.json"):
        path = file.parent / name
        content = orjson.loads(path.read_bytes()) if path.is_file() else {}
        if name == "tokenizer_config.json":
            decoder = content.get("added_tokens_decoder") or {}
            content = {token["content"]: int(number) for number, token in decoder.items()}
        behind |= {token: number for token, number in content.items() if number >= size}
    if behind:
        raise DataError(
            f"{file}: {list(behind)[:4]} are added behind its {size} pieces, where new tokens would go; fix: save the "
            "tokenizer as tokenizer.json (AutoTokenizer.from_pretrained(FOLDER).save_pretrained(OTHER)) and extend that"
        )


def _write_piece_model(raw: bytes, lowest: float, name: str, folder: Path, tokens: Sequence[NewToken]) -> None:
    """A protobuf message followed by more of its repeated field is the message with those appended."""
    pieces = []
    for i, token in enumerate(tokens):
        text = token.text.encode()
        score = struct.pack("<f", np.float32(np.floor(lowest) - 1 - i))
        piece = b"\x0a" + _varint(len(text)) + text + b"\x15" + score + b"\x18" + _varint(_SP_NORMAL)
        pieces.append(b"\x0a" + _varint(len(piece)) + piece)
    (folder / name).write_bytes(raw + b"".join(pieces))


def _varint(value: int) -> bytes:
    parts = []
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*parts, value])


def _read_varint(raw: bytes, at: int) -> tuple[int, int]:
    value, shift = 0, 0
    while True:
        value |= (raw[at] & 0x7F) << shift
        at += 1
        if raw[at - 1] < 0x80:
            return value, at
        shift += 7


def _fields(raw: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of each field of a protobuf message: varints as int, everything else as bytes."""
    at = 0
    while at < len(raw):
        key, at = _read_varint(raw, at)
        if key & 7 == 0:
            value, at = _read_varint(raw, at)
            yield key >> 3, value
            continue
        size, at = _read_varint(raw, at) if key & 7 == 2 else ({1: 8, 5: 4}[key & 7], at)
        yield key >> 3, raw[at : at + size]
        at += size


def _model_type(raw: bytes) -> int:
    """``trainer_spec.model_type``; unigram where it is not stated."""
    settings = b"".join(value for number, value in _fields(raw) if number == 2 and isinstance(value, bytes))
    return next((value for number, value in _fields(settings) if number == 3 and isinstance(value, int)), 1)

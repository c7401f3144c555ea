"""Texts to token ids without special tokens: `gigatoken` where it is proved equal, `tokenizers`, `sentencepiece`.

An encoder is immutable. Ids travel as numpy arrays, end to end, with one length per text. No BOS, no EOS among them:
the store builder puts both, the encoder knows their ids. Refused: a tokenizer without EOS unless one is named, a
folder without a tokenizer.
"""

import hashlib
import importlib.util
import itertools
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
from data_tools.tokenizing.cutting import Cut, find_cut

Ids = NDArray[np.uint32]
Decode = Callable[[Sequence[int]], str]
Texts = Sequence[str] | Sequence[bytes]
EncodeBatch = Callable[[Texts], tuple[Ids, NDArray[np.int64]]]
AUTO_BOS, NO_BOS = "auto", "none"

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
    """``encode_batch(texts)`` -> (ids end to end, tokens per text), of strings or of UTF-8 bytes.

    ``bos_id``: what stands before every document, None for nothing; ``note``: which back-end was taken, why;
    ``cut``: where long texts may be cut without changing an id, None where no such place was proved.
    """

    facts: TokenizerFacts
    vocab_size: int
    eos_id: int
    bos_id: int | None
    backend: str
    note: str
    encode_batch: EncodeBatch
    cut: Cut | None = None


def load_encoder(
    path: Path, *, eos_token: str | None = None, bos_token: str = AUTO_BOS, sample: Sequence[str] = ()
) -> Encoder:
    """Load a ``tokenizer.json``, a Hugging Face folder or a sentencepiece ``.model``.

    ``sample``: texts of the corpus. With `gigatoken` installed and equal to the tokenizer's own library on every one of
    them (and on a set of tricky strings) it does the work; without a sample it is never used, because nothing then
    proves it equal. ``bos_token``: a token, ``none``, or ``auto`` for what the tokenizer itself puts before a text.

    Raises:
        DataError: no tokenizer there, an unreadable one, no EOS token in it, no such BOS token.
    """
    file = _find_tokenizer_file(path)
    load = _load_sentencepiece if file.suffix == ".model" else _load_tokenizers
    encoder = load(file, eos_token, bos_token)
    if not sample:
        return encoder
    encoder = _prefer_gigatoken(encoder, file, sample)
    return replace(encoder, cut=find_cut(lambda texts: encoder.encode_batch(texts)[0], sample))


def load_decoder(path: Path) -> Decode:
    """Ids to text, special tokens shown; needs no EOS. Raises DataError as ``load_encoder``."""
    file = _find_tokenizer_file(path)
    if file.suffix == ".model":
        processor = _open_sentencepiece(file)
        return lambda ids: str(processor.decode(list(ids)))
    tokenizer = _open_tokenizers(file)
    return lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=False))


def load_counter(path: Path) -> Callable[[str], int]:
    """How many tokens a text has, BOS and EOS aside; needs no EOS. Raises DataError as ``load_encoder``."""
    file = _find_tokenizer_file(path)
    if file.suffix == ".model":
        processor = _open_sentencepiece(file)
        return lambda text: len(processor.encode(text))
    tokenizer = _open_tokenizers(file)
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)


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


def _load_tokenizers(file: Path, eos_token: str | None, bos_token: str) -> Encoder:
    tokenizer = _open_tokenizers(file)
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)

    def encode_batch(texts: Texts) -> tuple[Ids, NDArray[np.int64]]:
        rows = [encoding.ids for encoding in tokenizer.encode_batch_fast(_strings(texts), add_special_tokens=False)]
        return _flatten(rows)

    settings = _tokenizer_config(file)
    eos = eos_token or _content(settings.get("eos_token"))
    return Encoder(
        facts=TokenizerFacts(
            _name(file), tokenizer_fingerprint(file), settings.get("tokenizer_class") or "tokenizer.json"
        ),
        vocab_size=max(vocabulary.values()) + 1,
        eos_id=_require_eos(eos, vocabulary, file),
        bos_id=_own_bos(tokenizer, settings, vocabulary)
        if bos_token == AUTO_BOS
        else _require_bos(bos_token, vocabulary, file),
        backend="tokenizers",
        note="tokenizers (no sample of the corpus to compare gigatoken on)",
        encode_batch=encode_batch,
    )


def _strings(texts: Texts) -> list[str]:
    return [text if isinstance(text, str) else text.decode() for text in texts]


def _own_bos(tokenizer: Any, settings: dict[str, Any], vocabulary: dict[str, int]) -> int | None:
    """What the tokenizer puts before a text by itself; `transformers` lets ``add_bos_token`` overrule the file."""
    asked = settings.get("add_bos_token")
    if asked is not None:
        return vocabulary.get(_content(settings.get("bos_token")) or "") if asked else None
    encoding = tokenizer.encode("a", add_special_tokens=True)
    before = list(itertools.takewhile(bool, encoding.special_tokens_mask))
    return int(encoding.ids[0]) if len(before) == 1 and len(encoding.ids) > 1 else None


def _require_bos(bos_token: str, vocabulary: dict[str, int], file: Path) -> int | None:
    if bos_token == NO_BOS:
        return None
    if bos_token not in vocabulary:
        raise DataError(
            f"{file}: has no token {bos_token!r} to start documents with; fix: --bos-token {AUTO_BOS}, {NO_BOS} or "
            f"one of {_likely_specials(vocabulary)}"
        )
    return vocabulary[bos_token]


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
    problem = "names no EOS token" if eos is None else f"has no token {eos!r} to end documents with"
    raise DataError(f"{file}: {problem}; fix: --eos-token TOKEN, for instance one of {_likely_specials(vocabulary)}")


def _likely_specials(vocabulary: dict[str, int]) -> list[str]:
    return [token for token in vocabulary if re.fullmatch(r"<.*>|\[.*\]", token)][:8]


def _open_sentencepiece(file: Path) -> Any:
    from sentencepiece import SentencePieceProcessor

    try:
        return SentencePieceProcessor(model_file=str(file))
    except (RuntimeError, OSError) as error:
        raise DataError(f"{file}: sentencepiece cannot load it ({error}); fix: copy the model again") from None


def _load_sentencepiece(file: Path, eos_token: str | None, bos_token: str) -> Encoder:
    processor = _open_sentencepiece(file)

    def encode_batch(texts: Texts) -> tuple[Ids, NDArray[np.int64]]:
        rows = processor.encode(list(texts), num_threads=1, return_type="numpy")
        lengths = np.fromiter(map(len, rows), np.int64, len(rows))
        return np.concatenate([np.empty(0, np.int32), *rows]).astype(np.uint32), lengths

    pieces = {processor.id_to_piece(i): i for i in range(processor.get_piece_size())}
    eos_id = processor.eos_id() if eos_token is None else pieces.get(eos_token, -1)
    if eos_id < 0:
        _require_eos(eos_token, pieces, file)
    # the library adds nothing unless asked; models that define a BOS are the ones trained with it (Llama, Mistral,
    # Gemma), those without have none (T5)
    own_bos = processor.bos_id() if processor.bos_id() >= 0 else None
    settings = _tokenizer_config(file)
    return Encoder(
        facts=TokenizerFacts(_name(file), tokenizer_fingerprint(file), "sentencepiece"),
        vocab_size=processor.get_piece_size(),
        eos_id=eos_id,
        bos_id=(own_bos if settings.get("add_bos_token", True) else None)
        if bos_token == AUTO_BOS
        else _require_bos(bos_token, pieces, file),
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
    own = encoder.backend
    if importlib.util.find_spec("gigatoken") is None:
        return replace(encoder, note=f"{own} (install gigatoken, pip install 'cpt[data]', for 5 to 40 times the speed)")
    import gigatoken

    load = gigatoken.Tokenizer.from_sentencepiece if file.suffix == ".model" else gigatoken.Tokenizer.from_json
    try:
        tokenizer = load(file.read_bytes())
    except Exception as error:  # its loader panics or raises various types for models it does not know
        reason = str(error).partition("\n")[0]
        return replace(encoder, note=f"{own} (gigatoken cannot load this tokenizer: {reason})")

    def encode_whole(texts: Texts) -> tuple[Ids, NDArray[np.int64]]:
        # parallel=False: its thread pool does not survive a fork, and the callers bring the processes
        layout = tokenizer.encode_batch(list(texts), parallel=False).layout
        offsets = np.asarray(layout.offsets.data, np.int64)
        return np.asarray(layout.content.data, np.uint32)[offsets[0] : offsets[-1]], np.diff(offsets)

    encode_batch: EncodeBatch = encode_whole
    if file.suffix == ".model":
        encode_batch = _around_controls(encode_whole, encoder.encode_batch, file)
    difference = _first_difference(encoder.encode_batch, encode_batch, [*sample, *_TRICKY])
    if difference is not None:
        return replace(encoder, note=f"{own} (gigatoken gives other ids for {difference[:40]!r})")
    note = f"gigatoken (equal to {own} on {len(sample)} sampled documents)"
    return replace(encoder, backend="gigatoken", note=note, encode_batch=encode_batch)


def _around_controls(fast: EncodeBatch, exact: EncodeBatch, file: Path) -> EncodeBatch:
    """sentencepiece reads "<s>" in a text as three characters, gigatoken as the token: such texts go to the former."""
    processor = _open_sentencepiece(file)
    pieces = range(processor.get_piece_size())
    controls = [processor.id_to_piece(i).encode() for i in pieces if processor.is_control(i) or processor.is_unknown(i)]

    def encode_batch(texts: Texts) -> tuple[Ids, NDArray[np.int64]]:
        raws = [text.encode() if isinstance(text, str) else text for text in texts]
        odd = {i for i, raw in enumerate(raws) if any(control in raw for control in controls)}
        if not odd:
            return fast(raws)
        rows = [(exact if i in odd else fast)([raw])[0] for i, raw in enumerate(raws)]
        return np.concatenate(rows), np.array([len(row) for row in rows], np.int64)

    return encode_batch


def _first_difference(expected: EncodeBatch, found: EncodeBatch, texts: Sequence[str]) -> str | None:
    expected_ids, expected_lengths = expected(texts)
    found_ids, found_lengths = found(texts)
    if np.array_equal(expected_lengths, found_lengths) and np.array_equal(expected_ids, found_ids):
        return None
    for text in texts:
        if not np.array_equal(expected([text])[0], found([text])[0]):
            return text
    return texts[0]  # differs in the batch only; still a difference

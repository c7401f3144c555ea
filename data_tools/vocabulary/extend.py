"""An existing BPE tokenizer with further tokens learned from domain text, and what that gains and costs.

Tokens are learned from every source but the one named ``general``, which is only measured. The result is a tokenizer
folder with ``extension.json`` (``cpt.data.vocabulary``), from which a model's new embedding rows are made. It is
checked before it appears: on held-back texts the new ids decode to what the old ones decode to. Same texts, same bytes.
Refused: a tokenizer that is not BPE, a source without a name, fewer tokens found than one, a target that holds
something.
"""

import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpt.data.vocabulary import VocabularyExtension, write_extension
from cpt.rundir import DataError
from data_tools.encoders import Encoder, load_decoder, load_encoder, tokenizer_fingerprint
from data_tools.sources import ReadOptions
from data_tools.vocabulary.base_tokenizer import BaseTokenizer, open_base
from data_tools.vocabulary.fertility import fertility
from data_tools.vocabulary.merges import BORDER, Learned, NewToken, Symbols, learn_merges
from data_tools.vocabulary.samples import Sample, batches, cut, make_samples

MEASURED_ONLY = "general"
# What stays true of a tokenizer with more tokens; vocab.json, merges.txt or a second model file would contradict it.
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
Progress = Callable[[str], None]


@dataclass(frozen=True)
class ExtendRequest:
    """``sources``: NAME=PATTERN, learned from but for ``general``; ``min_count``: in the texts learned from."""

    tokenizer: Path
    sources: tuple[str, ...]
    out: Path
    num_tokens: int = 2000
    min_count: int = 100
    sample_bytes: int = 50_000_000
    eos_token: str | None = None
    read: ReadOptions = field(default_factory=ReadOptions)


def extend_tokenizer(request: ExtendRequest, progress: Progress = lambda said: None) -> dict[str, Any]:
    """Write the extended tokenizer to ``request.out``; returns the report (see ``render_extension``).

    Raises:
        DataError: see the module docstring.
        RuntimeError: the extended tokenizer does not decode to the same text; nothing is written.
    """
    _check(request)
    base = open_base(_tokenizer_file(request.tokenizer))
    samples = make_samples(request.sources, sample_bytes=request.sample_bytes, read=request.read, named=True)
    words, seen = _count_words(base, samples, progress)
    symbols = Symbols([*base.texts, *base.characters], len(base.texts), base.kind_of, set(base.texts) | base.special)
    progress(f"learning up to {request.num_tokens:,} tokens from {len(words):,} different words")
    learned = learn_merges(words, symbols, num_tokens=request.num_tokens, min_count=request.min_count)
    if not learned.tokens:
        raise DataError(
            f"no new token occurs {request.min_count} times in the sample; fix: more text, or a lower --min-count"
        )
    progress("comparing the tokenizers on held-back text")
    request.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{request.out.name}.", dir=request.out.parent) as scratch:
        folder = Path(scratch) / request.out.name
        folder.mkdir()
        _write(base, learned, request, folder)
        report = _report(base, learned, samples, request, folder)
        report["old_tokens_never_seen"] = int((seen == 0).sum())
        if request.out.exists():
            request.out.rmdir()
        folder.rename(request.out)
    return {"out": str(request.out), **report}


def _tokenizer_file(path: Path) -> Path:
    tokenizer_fingerprint(path)  # says what is wrong with a path that holds none
    files = [path] if path.is_file() else [path / "tokenizer.json", *sorted(path.glob("*.model"))]
    return next(file for file in files if file.is_file())


def _check(request: ExtendRequest) -> None:
    if request.num_tokens < 1:
        raise DataError(f"--num-tokens {request.num_tokens}: nothing to add; fix: give 1 or more")
    if request.out.exists() and (not request.out.is_dir() or any(request.out.iterdir())):
        raise DataError(f"{request.out}: already holds something; fix: name a new or empty folder")


def _count_words(
    base: BaseTokenizer, samples: Sequence[Sample], progress: Progress
) -> tuple[Counter[bytes], NDArray[np.int64]]:
    """Words of the sources that teach, and how often each old token stands in any source."""
    words: Counter[bytes] = Counter()
    seen = np.zeros(len(base.texts), np.int64)
    teaching = 0
    for sample in samples:
        progress(f"reading {sample.name}")
        for texts in batches(cut(sample.taught())):
            for row in base.rows(texts):
                known = row[(row >= 0) & (row < len(seen))]
                seen += np.bincount(known, minlength=len(seen))
                if sample.name != MEASURED_ONLY:
                    words.update(_words(row))
        teaching += sample.name != MEASURED_ONLY
    if not teaching:
        raise DataError(
            f"only {MEASURED_ONLY!r} is given, which is measured and not learned from; fix: --source medical='...'"
        )
    return words, seen


def _words(row: NDArray[np.int32]) -> Iterator[bytes]:
    borders = np.flatnonzero(row == BORDER)
    starts, ends = np.r_[0, borders + 1], np.r_[borders, len(row)]
    worth = ends - starts >= 1
    for start, end in zip(starts[worth].tolist(), ends[worth].tolist(), strict=True):
        yield row[start:end].tobytes()


def _write(base: BaseTokenizer, learned: Learned, request: ExtendRequest, folder: Path) -> None:
    base.write(folder, learned.tokens)
    for name in SETTINGS:
        if (base.file.parent / name).is_file():
            shutil.copyfile(base.file.parent / name, folder / name)
    write_extension(
        folder,
        VocabularyExtension(
            base_name=request.tokenizer.name,
            base_fingerprint=tokenizer_fingerprint(request.tokenizer),
            fingerprint=tokenizer_fingerprint(folder),
            base_vocab_size=len(base.texts),
            subtokens=tuple(_subtokens(base, learned.tokens)),
        ),
    )


def _subtokens(base: BaseTokenizer, tokens: Sequence[NewToken]) -> Iterator[tuple[int, ...]]:
    """The base ids that each new token stands in the place of."""
    bytes_to_id = {byte: token for token, byte in base.byte_values.items()}
    spelled: dict[int, tuple[int, ...]] = {}
    for token in tokens:
        if token.parts:
            parts = [spelled.get(part, (part,)) for part in token.parts]
            spelled[token.symbol] = parts[0] + parts[1]
        else:
            spelled[token.symbol] = tuple(bytes_to_id[byte] for byte in token.text.encode())
        yield spelled[token.symbol]


# --- report


def _report(
    base: BaseTokenizer, learned: Learned, samples: Sequence[Sample], request: ExtendRequest, folder: Path
) -> dict[str, Any]:
    texts = {sample.name: sample.measured_on() for sample in samples}
    probe = [text for of_source in texts.values() for text in of_source[:8]]
    before = load_encoder(request.tokenizer, eos_token=request.eos_token, sample=probe)
    after = load_encoder(folder, eos_token=request.eos_token, sample=probe)
    for of_source in texts.values():
        _check_same_text(request.tokenizer, folder, (before, after), of_source)
    size = len(base.texts)
    counts = {name: _token_counts(after, of_source)[size:] for name, of_source in texts.items()}
    decode = load_decoder(folder)
    in_sample = learned.counts[[token.symbol for token in learned.tokens]]
    scaffold = in_sample < request.min_count
    rows = [
        {
            "id": size + i,
            "text": decode([size + i]),
            "token": token.text,
            "in_sample": int(in_sample[i]),
            "tokens_saved_in_sample": int(in_sample[i]) * (num_parts - 1),
            "held_back": {name: int(of_source[i]) for name, of_source in counts.items()},
        }
        for i, (token, num_parts) in enumerate(zip(learned.tokens, _lengths(folder), strict=True))
    ]
    return {
        "base": str(request.tokenizer),
        "base_vocab_size": size,
        "vocab_size": size + len(learned.tokens),
        "new_tokens": len(learned.tokens),
        "asked_for": request.num_tokens,
        "encoder": after.note,
        "sources": {
            sample.name: {
                "learned_from": sample.name != MEASURED_ONLY,
                "sample_bytes": sample.taught_bytes,
                "held_back": bool(sample.held_back),
                "before": fertility(before, texts[sample.name]),
                "after": fertility(after, texts[sample.name]),
            }
            for sample in samples
        },
        "scaffold_tokens": int(scaffold.sum()),
        "tokens": sorted(rows, key=lambda row: (-row["tokens_saved_in_sample"], row["id"])),
        "left_out": [path.name for path in _left_out(base.file)],
    }


def _lengths(folder: Path) -> list[int]:
    from cpt.data.vocabulary import read_extension

    extension = read_extension(folder)
    assert extension is not None, "just written"
    return [len(parts) for parts in extension.subtokens]


def _token_counts(encoder: Encoder, texts: Sequence[str]) -> NDArray[np.int64]:
    counts = np.zeros(encoder.vocab_size, np.int64)
    for batch in batches(texts):
        counts += np.bincount(encoder.encode_batch(batch)[0], minlength=len(counts))
    return counts


def _check_same_text(base: Path, folder: Path, encoders: tuple[Encoder, Encoder], texts: Sequence[str]) -> None:
    old, new = load_decoder(base), load_decoder(folder)
    for text in islice(texts, 200):
        before, after = (encoder.encode_batch([text])[0].tolist() for encoder in encoders)
        if old(before) != new(after):
            raise RuntimeError(
                f"{base}: with the new tokens the text {text[:60]!r} decodes to something else; nothing was written; "
                "this kind of tokenizer cannot be extended here"
            )


def _left_out(file: Path) -> list[Path]:
    """Files that spell the vocabulary a second time: they would contradict the extended one."""
    names = ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer.model", "spiece.model")
    return [file.parent / name for name in names if name != file.name and (file.parent / name).is_file()]

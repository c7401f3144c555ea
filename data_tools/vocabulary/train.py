"""A new tokenizer from a bounded sample of texts: byte-level BPE, or sentencepiece BPE or unigram.

The folder is read by ``cpt data tokenize`` and by ``transformers.AutoTokenizer``, with equal ids. Every text can be
encoded and comes back as it was: bytes for what has no token, no normalisation, no space put in front, digits one by
one (sentencepiece). Two limits of sentencepiece: U+2581 stands for the space and comes back as one, and a line is
learned from in pieces of 16,000 characters. Same texts, same bytes. Memory depends on the sample alone; measured per
byte of it on German, English and Japanese together: 29 bytes for bpe (it holds the different words, so languages
written without spaces cost most), 17 for spm-unigram, 8 for spm-bpe.
"""

import io
import json
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from cpt.rundir import DataError
from data_tools.encoders import load_encoder
from data_tools.sources import ReadOptions
from data_tools.train_tokenizer import EOS_TOKEN, train_bpe
from data_tools.vocabulary.fertility import fertility
from data_tools.vocabulary.samples import Sample, make_samples

ALWAYS_THERE = {"bpe": (EOS_TOKEN,), "spm-bpe": ("<unk>", "</s>"), "spm-unigram": ("<unk>", "</s>")}
SMALLEST = {"bpe": 257, "spm-bpe": 259, "spm-unigram": 259}  # all bytes, and these; sentencepiece needs one more
_LINE_CHARACTERS = 16_000
Progress = Callable[[str], None]


@dataclass(frozen=True)
class TrainRequest:
    """``sources``: PATTERN or NAME=PATTERN; ``special_tokens``: beside EOS, never made from text."""

    sources: tuple[str, ...]
    out: Path
    vocab_size: int = 32_000
    kind: str = "bpe"
    sample_bytes: int = 100_000_000
    special_tokens: tuple[str, ...] = ()
    read: ReadOptions = field(default_factory=ReadOptions)


def train_tokenizer(request: TrainRequest, progress: Progress = lambda said: None) -> dict[str, Any]:
    """Write the tokenizer folder; returns its size and its fertility on held-back text of each source.

    Raises:
        DataError: an impossible vocabulary size, a target that holds something, unreadable or empty inputs.
    """
    _check(request)
    samples = make_samples(request.sources, sample_bytes=request.sample_bytes, read=request.read)
    request.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{request.out.name}.", dir=request.out.parent) as scratch:
        folder = Path(scratch) / request.out.name
        KINDS[request.kind](_all_taught(samples, progress), folder, request)
        if request.out.exists():
            request.out.rmdir()
        folder.rename(request.out)
    progress("measuring on held-back text")
    texts = {sample.name: sample.measured_on() for sample in samples}
    encoder = load_encoder(request.out, sample=[text for of_source in texts.values() for text in of_source[:8]])
    return {
        "out": str(request.out),
        "kind": request.kind,
        "vocab_size": encoder.vocab_size,
        "asked_for": request.vocab_size,
        "encoder": encoder.note,
        "sources": {
            sample.name: {
                "sample_bytes": sample.taught_bytes,
                "held_back": bool(sample.held_back),
                "fertility": fertility(encoder, texts[sample.name]),
            }
            for sample in samples
        },
    }


def _check(request: TrainRequest) -> None:
    if request.kind not in KINDS:
        raise DataError(f"--kind {request.kind}: unknown; fix: one of {', '.join(KINDS)}")
    taken = list(ALWAYS_THERE[request.kind])
    for token in request.special_tokens:
        if not token or token in taken:
            rule = "is there already" if token else "is empty"
            raise DataError(f"--special-token {token!r}: {rule}; fix: leave it out, or give it another text")
        taken.append(token)
    smallest = SMALLEST[request.kind] + len(request.special_tokens)
    if request.vocab_size < smallest:
        raise DataError(
            f"--vocab-size {request.vocab_size}: no room for 256 bytes and the special tokens; fix: {smallest} or more"
        )
    if request.out.exists() and (not request.out.is_dir() or any(request.out.iterdir())):
        raise DataError(f"{request.out}: already holds something; fix: name a new or empty folder")


def _all_taught(samples: Iterable[Sample], progress: Progress) -> Iterator[str]:
    for sample in samples:
        progress(f"reading {sample.name}")
        yield from sample.taught()
    progress("training")


def _train_bpe(texts: Iterator[str], folder: Path, request: TrainRequest) -> None:
    train_bpe(texts, out=folder, vocab_size=request.vocab_size, special_tokens=request.special_tokens)


def _train_spm(texts: Iterator[str], folder: Path, request: TrainRequest) -> None:
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=chain.from_iterable(map(_lines, texts)),
            model_writer=model,
            model_type=request.kind.removeprefix("spm-"),
            vocab_size=request.vocab_size,
            control_symbols=list(request.special_tokens),
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            unk_id=0,
            eos_id=1,  # documents end with it; there is no BOS, as in the byte-level kind
            bos_id=-1,
            pad_id=-1,
            max_sentence_length=4 * _LINE_CHARACTERS,
            num_threads=1,  # its sums depend on the number of threads
            hard_vocab_limit=False,  # fewer tokens where the text has no more; the report says how many
            minloglevel=2,
        )
    except RuntimeError as error:
        raise DataError(
            f"sentencepiece cannot learn {request.vocab_size} tokens from this text ({_said(error)}); fix: another "
            "--vocab-size, or more text"
        ) from None
    folder.mkdir(parents=True)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "additional_special_tokens": list(request.special_tokens),
        "model_max_length": 1 << 30,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


def _lines(text: str) -> Iterator[str]:
    """What sentencepiece takes for a sentence; line ends are left out, they are encoded as bytes."""
    for line in re.split(r"[\r\n\0]+", text):
        yield from (line[start : start + _LINE_CHARACTERS] for start in range(0, len(line), _LINE_CHARACTERS))


def _said(error: RuntimeError) -> str:
    """``Internal: file.cc(566) [condition] Vocabulary size too high (9). ...`` without its first half."""
    return str(error).rpartition("] ")[2].split(". ")[0].strip() or str(error)


KINDS: dict[str, Callable[[Iterator[str], Path, TrainRequest], None]] = {
    "bpe": _train_bpe,
    "spm-bpe": _train_spm,
    "spm-unigram": _train_spm,
}

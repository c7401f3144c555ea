"""Trains a small byte-level BPE tokenizer into a folder that `transformers` and `cpt data tokenize` both load."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from cpt.rundir import write_atomic

EOS_TOKEN = "<|endoftext|>"


def train_bpe(texts: Iterable[str], *, out: Path, vocab_size: int = 4096, special_tokens: Sequence[str] = ()) -> Path:
    """Train on ``texts``, write ``out``/tokenizer.json and tokenizer_config.json; same texts, same bytes.

    The vocabulary starts with the EOS token (id 0), further ``special_tokens`` and all 256 bytes, so any text can be
    encoded. Needs vocab_size >= 257 and one more for each of them.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    assert vocab_size >= 257 + len(special_tokens), f"vocab_size {vocab_size} leaves no room for 256 bytes and EOS"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS_TOKEN, *special_tokens],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOS_TOKEN,
        "model_max_length": 1 << 30,
        "clean_up_tokenization_spaces": False,
    }
    if special_tokens:
        settings["additional_special_tokens"] = list(special_tokens)
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / "tokenizer.json", tokenizer.to_str(pretty=False))
    write_atomic(out / "tokenizer_config.json", json.dumps(settings, indent=1) + "\n")
    return out

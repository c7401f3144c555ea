"""Claim: `cpt data extend-tokenizer` saves more domain tokens than as many added tokens; general text gets no longer.

For each pair of tokenizer and domain: fertility before and after on the corpus' own test file, seconds to learn the
tokens, and the rival in the same run: ``tokenizers`` with the domain words that save most as added tokens (what most
guides do; Japanese has no spaces, so few there), for tokenizers that come as tokenizer.json. Speed of encoding is
measured for both with ``tokenizers``.
Then what new rows start from: nats per byte of stories260K on domain text at step 0 and after a few steps, by
initializer, against rows drawn at random as transformers draws them.
"""

import argparse
import importlib.metadata
import json
import platform
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_tools.sources import ReadOptions, read_texts, resolve_inputs
from data_tools.vocabulary.extend import ExtendRequest, extend_tokenizer
from data_tools.vocabulary.fertility import compare_tokenizers
from data_tools.vocabulary.samples import Sample

RESULT = Path(__file__).parent.parent / "results" / "data_extend_tokenizer.json"
PAIRS = (("gpt2", "de_law"), ("gpt2", "ja_aozora"), ("gpt2", "math_stacks"), ("mistral_v1", "ja_aozora"))
GENERAL = "en_novels"
ROWS_DOMAIN = "de_law"
RANDOM = "random"


def main() -> None:
    shared = Path("..") / "shared" / "data"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=shared, help="folder of corpora/, tokenizers/ and weights/")
    parser.add_argument("--num-tokens", type=int, default=2000)
    parser.add_argument("--sample-bytes", type=int, default=40_000_000, help="of domain and general text together")
    parser.add_argument("--steps", type=int, default=30, help="of training, to compare starting rows")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        pairs = [measure_pair(arguments, Path(scratch), name, domain) for name, domain in PAIRS]
        rows = measure_rows(arguments, Path(scratch))
    result = {
        "claim": "appended merges save at least as many domain tokens as added tokens do; general text gets no longer",
        "holds": all(
            pair["fewer_tokens_than_added_tokens"] in (None, True) and max(pair["change_of_tokens"].values()) <= 0
            for pair in pairs
        ),
        "num_tokens": arguments.num_tokens,
        "pairs": pairs,
        "starting_rows": rows,
        "python": platform.python_version(),
        "packages": {p: importlib.metadata.version(p) for p in ("tokenizers", "sentencepiece", "gigatoken", "torch")},
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def corpus(arguments: argparse.Namespace, name: str, split: str) -> str:
    return str(arguments.shared / "corpora" / name / f"{split}.jsonl.zst")


def texts_of(arguments: argparse.Namespace, name: str, split: str) -> list[str]:
    return [
        text for entry in resolve_inputs([corpus(arguments, name, split)]) for text in read_texts(entry, ReadOptions())
    ]


def measure_pair(arguments: argparse.Namespace, scratch: Path, name: str, domain: str) -> dict[str, Any]:
    base, out = arguments.shared / "tokenizers" / name, scratch / f"{name}_{domain}"
    sources = tuple(
        f"{source}={corpus(arguments, of, 'train')}" for source, of in ((domain, domain), ("general", GENERAL))
    )
    started = time.perf_counter()
    report = extend_tokenizer(ExtendRequest(base, sources, out, arguments.num_tokens, 20, arguments.sample_bytes))
    seconds = time.perf_counter() - started
    samples = [Sample(of, [corpus(arguments, of, "test")], 10**8) for of in (domain, GENERAL)]
    found = compare_tokenizers([base, out], samples)["tokenizers"]
    before, after = (found[str(path)]["sources"] for path in (base, out))
    change = {of: round(after[of]["tokens"] / before[of]["tokens"] - 1, 4) for of in before}
    rival = measure_added_tokens(arguments, base, out, domain, report["new_tokens"])
    return {
        "tokenizer": name,
        "domain": domain,
        "new_tokens": report["new_tokens"],
        "scaffold_tokens": report["scaffold_tokens"],
        "seconds_in_all": round(seconds, 1),
        "learned_from_bytes": report["sources"][domain]["sample_bytes"],
        "bytes_per_token": {of: [before[of]["bytes_per_token"], after[of]["bytes_per_token"]] for of in before},
        "tokens_per_word": {of: [before[of]["tokens_per_word"], after[of]["tokens_per_word"]] for of in before},
        "change_of_tokens": change,
        "encoder_after": report["encoder"],
        "added_tokens": rival,
        "fewer_tokens_than_added_tokens": rival and rival["extended_tokens"] <= rival["tokens"],
    }


def measure_added_tokens(
    arguments: argparse.Namespace, base: Path, extended: Path, domain: str, num_tokens: int
) -> dict[str, Any] | None:
    """The rival: the words of the domain that save most tokens, as added tokens."""
    from tokenizers import AddedToken, Tokenizer

    if not (base / "tokenizer.json").is_file():
        return None
    tokenizers = [Tokenizer.from_file(str(folder / "tokenizer.json")) for folder in (base, extended)]
    rival = Tokenizer.from_file(str(base / "tokenizer.json"))
    words = Counter(word for text in texts_of(arguments, domain, "train") for word in text.split() if word.isalpha())
    saved = {word: n * (len(rival.encode(f" {word}").ids) - 1) for word, n in words.most_common(20_000)}
    best = sorted(saved, key=lambda word: (-saved[word], word))[:num_tokens]
    rival.add_tokens([AddedToken(word, normalized=False) for word in best])
    texts = texts_of(arguments, domain, "test")
    counts = [count_and_time(tokenizer, texts) for tokenizer in (*tokenizers, rival)]
    size = sum(len(text.encode()) for text in texts)
    (base_count, base_s), (own_count, own_s), (rival_count, rival_s) = counts
    return {
        "tokens": rival_count,
        "extended_tokens": own_count,
        "change_of_tokens": round(rival_count / base_count - 1, 4),
        "encode_mb_per_s": {
            "base": round(size / base_s / 1e6, 2),
            "extended": round(size / own_s / 1e6, 2),
            "added_tokens": round(size / rival_s / 1e6, 2),
        },
    }


def count_and_time(tokenizer: Any, texts: Sequence[str]) -> tuple[int, float]:
    started = time.perf_counter()
    count = sum(len(encoding.ids) for encoding in tokenizer.encode_batch(list(texts), add_special_tokens=False))
    return count, time.perf_counter() - started


# --- what new rows start from


def measure_rows(arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Held-out nats per byte of stories260K on a domain, at step 0 and after ``--steps`` steps on it."""
    from cpt.config import ModelSection
    from cpt.data.vocabulary import read_extension
    from cpt.model.build import Needs, build_model
    from cpt.model.vocab import INITIALIZERS, extend_vocabulary

    base, out = arguments.shared / "weights/stories260K", scratch / "stories"
    source = (f"{ROWS_DOMAIN}={corpus(arguments, ROWS_DOMAIN, 'train')}",)
    extend_tokenizer(ExtendRequest(base, source, out, 256, 100, 5_000_000))
    extension = read_extension(out)
    assert extension is not None
    section, needs = ModelSection(init_from=str(base)), Needs(256, 512, seed=0)
    found: dict[str, Any] = {"base tokenizer": train_a_little(arguments, build_model(section, needs).model, base)}
    for name, initializer in [*INITIALIZERS.items(), (RANDOM, INITIALIZERS["mean_of_all"])]:
        loaded = extend_vocabulary(build_model(section, needs), extension, initializer=initializer)
        if name == RANDOM:
            draw_at_random(loaded.model, extension.base_vocab_size)
        found[name] = train_a_little(arguments, loaded.model, out)
    return {
        "model": "stories260K",
        "domain": ROWS_DOMAIN,
        "new_tokens": len(extension.subtokens),
        "nats_per_byte": found,
    }


def draw_at_random(model: Any, first: int) -> None:
    import torch

    torch.manual_seed(1)
    with torch.no_grad():
        model.get_input_embeddings().weight[first:].normal_(std=model.config.initializer_range)


def train_a_little(arguments: argparse.Namespace, model: Any, tokenizer: Path) -> dict[str, float]:
    import torch
    from tokenizers import Tokenizer

    encoder = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))

    def rows(split: str, limit: int) -> tuple[Any, int]:
        texts = texts_of(arguments, ROWS_DOMAIN, split)
        ids, size = [], 0
        for text in texts:
            ids += encoder.encode(text, add_special_tokens=False).ids
            size += len(text.encode())
            if size > limit:
                break
        return torch.tensor(ids[: len(ids) // 256 * 256]).reshape(-1, 256), size

    (test, test_bytes), (train, _) = rows("test", 100_000), rows("train", 2_000_000)

    @torch.no_grad()
    def nats_per_byte() -> float:
        total = sum(model(input_ids=part, labels=part).loss.item() * part[:, 1:].numel() for part in test.split(16))
        return round(total / test_bytes, 4)

    found = {"step 0": nats_per_byte()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    for step in range(arguments.steps):
        part = train[torch.arange(step * 16, step * 16 + 16) % len(train)]
        optimizer.zero_grad()
        model(input_ids=part, labels=part).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return {**found, f"step {arguments.steps}": nats_per_byte()}


if __name__ == "__main__":
    main()

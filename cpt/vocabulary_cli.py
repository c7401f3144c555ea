"""`cpt data` verbs on tokenizers: train one, extend one by domain tokens, compare them."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from cpt.cli_options import Json, TextKey, local
from cpt.plan_cli import print_facts

vocabulary_app = typer.Typer()  # its verbs are `cpt data` ones, see cpt.data_cli


@vocabulary_app.command("train-tokenizer", rich_help_panel="Vocabulary")
def train_tokenizer(
    inputs: Annotated[
        list[str], typer.Option("--input", metavar="[NAME=]PATTERN", help="texts to learn from; repeatable")
    ],
    out: Annotated[Path, typer.Option(callback=local, help="new folder for the tokenizer")],
    vocab_size: Annotated[int, typer.Option(help="tokens, bytes and special ones included")] = 32_000,
    kind: Annotated[
        Literal["bpe", "spm-bpe", "spm-unigram"], typer.Option(help="byte-level BPE, or sentencepiece's BPE or unigram")
    ] = "bpe",
    sample_bytes: Annotated[int, typer.Option(help="text to learn from, spread over the inputs", min=1)] = 100_000_000,
    special_tokens: Annotated[
        list[str] | None, typer.Option("--special-token", help="a further special token, beside EOS; repeatable")
    ] = None,
    text_key: TextKey = "text",
    as_json: Json = False,
) -> None:
    """Train a tokenizer: cpt data train-tokenizer --input law='law/*.jsonl.zst' --input web.parquet --out tok"""
    from data_tools.sources import ReadOptions
    from data_tools.vocabulary.show import render_training, spoken_progress
    from data_tools.vocabulary.train import TrainRequest
    from data_tools.vocabulary.train import train_tokenizer as train

    special, read = tuple(special_tokens or []), ReadOptions(text_key=text_key)
    request = TrainRequest(tuple(inputs), out, vocab_size, kind, sample_bytes, special, read)
    with spoken_progress() as progress:
        facts = train(request, progress)
    print_facts(facts, render_training, as_json=as_json)


@vocabulary_app.command("extend-tokenizer", rich_help_panel="Vocabulary")
def extend_tokenizer(
    tokenizer: Annotated[Path, typer.Option(help="BPE tokenizer of the base model: folder, tokenizer.json or .model")],
    sources: Annotated[
        list[str],
        typer.Option("--source", metavar="NAME=PATTERN", help="learned from, but for 'general': only measured"),
    ],
    out: Annotated[Path, typer.Option(callback=local, help="new folder for the extended tokenizer")],
    num_tokens: Annotated[int, typer.Option(help="new tokens, at most")] = 2000,
    min_count: Annotated[int, typer.Option(help="times a new token must stand in the sample", min=1)] = 100,
    sample_bytes: Annotated[int, typer.Option(help="text to read, spread over the sources", min=1)] = 50_000_000,
    eos_token: Annotated[str | None, typer.Option(help="end-of-document token, where the tokenizer names none")] = None,
    text_key: TextKey = "text",
    as_json: Json = False,
) -> None:
    """Add domain or language tokens, old ids unchanged: cpt data extend-tokenizer --tokenizer base_hf --source
    medical='med/*.jsonl.zst' --source general=web.jsonl.zst --out tok_medical
    """
    from data_tools.sources import ReadOptions
    from data_tools.vocabulary.extend import ExtendRequest
    from data_tools.vocabulary.extend import extend_tokenizer as extend
    from data_tools.vocabulary.show import render_extension, spoken_progress

    read = ReadOptions(text_key=text_key)
    request = ExtendRequest(tokenizer, tuple(sources), out, num_tokens, min_count, sample_bytes, eos_token, read)
    with spoken_progress() as progress:
        facts = extend(request, progress)
    print_facts(facts, render_extension, as_json=as_json)


@vocabulary_app.command(rich_help_panel="Vocabulary")
def fertility(
    tokenizers: Annotated[list[Path], typer.Option("--tokenizer", help="tokenizers to compare; repeatable")],
    sources: Annotated[list[str], typer.Option("--source", metavar="NAME=PATTERN", help="texts; repeatable")],
    sample_bytes: Annotated[int, typer.Option(help="text to read, spread over the sources", min=1)] = 20_000_000,
    eos_token: Annotated[str | None, typer.Option(help="end-of-document token, where a tokenizer names none")] = None,
    text_key: TextKey = "text",
    as_json: Json = False,
) -> None:
    """Compare tokenizers: cpt data fertility --tokenizer base_hf --tokenizer tok_medical --source medical='med/*'"""
    from data_tools.sources import ReadOptions
    from data_tools.vocabulary.fertility import compare_tokenizers, render_comparison
    from data_tools.vocabulary.samples import make_samples

    samples = make_samples(sources, sample_bytes=sample_bytes, read=ReadOptions(text_key=text_key))
    facts = compare_tokenizers(tokenizers, samples, eos_token=eos_token)
    print_facts(facts, render_comparison, as_json=as_json)

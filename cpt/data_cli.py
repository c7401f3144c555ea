"""`cpt data VERB`: from raw files to token stores and a checked mixture. Code is imported when a verb is called."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from cpt.plan_cli import print_facts

data_app = typer.Typer(help="Corpora and token stores.", no_args_is_help=True)

TxtDocuments = Literal["file", "blank-line"]
Json = Annotated[bool, typer.Option("--json", help="print JSON instead of a table")]


@data_app.command()
def tokenize(
    inputs: Annotated[
        list[str], typer.Option("--input", help="files, globs, a saved dataset folder or hf://name; repeatable")
    ],
    tokenizer: Annotated[Path, typer.Option(help="tokenizer.json, Hugging Face folder or sentencepiece .model")],
    out: Annotated[Path, typer.Option(help="store folder; gets train/ and heldout/")],
    source: Annotated[str, typer.Option(help="name of this corpus in run files and reports")],
    domain: Annotated[
        str, typer.Option(help="label: 'general' for data to replay, anything else is a domain to learn")
    ],
    more_inputs: Annotated[
        list[str] | None, typer.Argument(metavar="[FILE]...", help="more inputs, as a shell expands a glob")
    ] = None,
    heldout_fraction: Annotated[
        float, typer.Option(help="share of documents held out, chosen by document hash")
    ] = 0.01,
    text_key: Annotated[str, typer.Option(help="JSON key or table column that holds the text")] = "text",
    txt_documents: Annotated[TxtDocuments, typer.Option(help="what one document of a .txt file is")] = "file",
    eos_token: Annotated[str | None, typer.Option(help="end-of-document token, where the tokenizer names none")] = None,
    bos_token: Annotated[
        str, typer.Option(help="token before every document; auto: what the tokenizer itself puts there; none")
    ] = "auto",
    bad_records: Annotated[
        Literal["fail", "reject"],
        typer.Option(help="a damaged record stops the build, or is counted and kept in rejects.jsonl"),
    ] = "fail",
    workers: Annotated[int, typer.Option(help="worker processes; the output does not depend on it", min=1)] = 2,
    task: Annotated[
        str,
        typer.Option(metavar="I/N", help="only part I of N, from 0; a part is whole files, so N at most their number"),
    ] = "0/1",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print the size the store will have; write nothing")
    ] = False,
    as_json: Json = False,
) -> None:
    """Build a token store, resumable: cpt data tokenize --input corpus/*.jsonl.zst --tokenizer TOKENIZER --out
    stores/medical ... With --task on many machines, then `cpt data merge stores/medical`.
    """
    from data_tools.commands import predict_and_print, tokenize_with_progress
    from data_tools.corpus.units import parse_task
    from data_tools.sources import ReadOptions
    from data_tools.store_builder import StoreRequest

    request = StoreRequest(
        inputs=(*inputs, *(more_inputs or [])),
        tokenizer=tokenizer,
        out=out,
        source=source,
        domain=domain,
        heldout_fraction=heldout_fraction,
        eos_token=eos_token,
        bos_token=bos_token,
        read=ReadOptions(text_key=text_key, txt_documents=txt_documents),
        bad_records=bad_records,
        workers=workers,
        task=parse_task(task),
    )
    (predict_and_print if dry_run else tokenize_with_progress)(request, as_json=as_json)


@data_app.command()
def merge(
    out: Annotated[Path, typer.Argument(help="the --out that tasks of one command wrote to")], as_json: Json = False
) -> None:
    """Make one of what the tasks of an array job wrote, after checking all of it: cpt data merge stores/medical"""
    if (out / "stage.json").is_file():
        from data_tools.corpus.stage import finish_stage
        from data_tools.corpus.stage_view import render_summary

        print_facts(finish_stage(out), render_summary, as_json=as_json)
        return
    from data_tools.commands import merge_and_print

    merge_and_print(out, as_json=as_json)


@data_app.command()
def verify(
    store: Annotated[Path, typer.Argument(help="store folder, or one split of it")], as_json: Json = False
) -> None:
    """Read a token store completely and compare every hash; exit code 2 names a damaged file: cpt data verify
    stores/medical
    """
    from data_tools.commands import verify_and_print

    verify_and_print(store, as_json=as_json)


@data_app.command("train-tokenizer")
def train_tokenizer(
    inputs: Annotated[
        list[str], typer.Option("--input", metavar="[NAME=]PATTERN", help="texts to learn from; repeatable")
    ],
    out: Annotated[Path, typer.Option(help="new folder for the tokenizer")],
    vocab_size: Annotated[int, typer.Option(help="tokens, bytes and special ones included")] = 32_000,
    kind: Annotated[
        Literal["bpe", "spm-bpe", "spm-unigram"], typer.Option(help="byte-level BPE, or sentencepiece's BPE or unigram")
    ] = "bpe",
    sample_bytes: Annotated[int, typer.Option(help="text to learn from, spread over the inputs", min=1)] = 100_000_000,
    special_tokens: Annotated[
        list[str] | None, typer.Option("--special-token", help="a further special token, beside EOS; repeatable")
    ] = None,
    text_key: Annotated[str, typer.Option(help="JSON key or table column that holds the text")] = "text",
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


@data_app.command("extend-tokenizer")
def extend_tokenizer(
    tokenizer: Annotated[Path, typer.Option(help="BPE tokenizer of the base model: folder, tokenizer.json or .model")],
    sources: Annotated[
        list[str],
        typer.Option("--source", metavar="NAME=PATTERN", help="learned from, but for 'general': only measured"),
    ],
    out: Annotated[Path, typer.Option(help="new folder for the extended tokenizer")],
    num_tokens: Annotated[int, typer.Option(help="new tokens, at most")] = 2000,
    min_count: Annotated[int, typer.Option(help="times a new token must stand in the sample", min=1)] = 100,
    sample_bytes: Annotated[int, typer.Option(help="text to read, spread over the sources", min=1)] = 50_000_000,
    eos_token: Annotated[str | None, typer.Option(help="end-of-document token, where the tokenizer names none")] = None,
    text_key: Annotated[str, typer.Option(help="JSON key or table column that holds the text")] = "text",
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


@data_app.command()
def fertility(
    tokenizers: Annotated[list[Path], typer.Option("--tokenizer", help="tokenizers to compare; repeatable")],
    sources: Annotated[list[str], typer.Option("--source", metavar="NAME=PATTERN", help="texts; repeatable")],
    sample_bytes: Annotated[int, typer.Option(help="text to read, spread over the sources", min=1)] = 20_000_000,
    eos_token: Annotated[str | None, typer.Option(help="end-of-document token, where a tokenizer names none")] = None,
    text_key: Annotated[str, typer.Option(help="JSON key or table column that holds the text")] = "text",
    as_json: Json = False,
) -> None:
    """Compare tokenizers: cpt data fertility --tokenizer base_hf --tokenizer tok_medical --source medical='med/*'"""
    from data_tools.sources import ReadOptions
    from data_tools.vocabulary.fertility import compare_tokenizers, render_comparison
    from data_tools.vocabulary.samples import make_samples

    samples = make_samples(sources, sample_bytes=sample_bytes, read=ReadOptions(text_key=text_key))
    facts = compare_tokenizers(tokenizers, samples, eos_token=eos_token)
    print_facts(facts, render_comparison, as_json=as_json)


@data_app.command()
def clean(
    config: Annotated[Path | None, typer.Option(help="YAML of rules, e.g. configs/corpora/clean_web.yaml")] = None,
    inputs: Annotated[
        list[str] | None, typer.Option("--input", help="files, globs or a stage folder; repeatable")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="folder for documents, rejects and counts by reason")] = None,
    text_key: Annotated[str, typer.Option(help="JSON key or table column that holds the text")] = "text",
    txt_documents: Annotated[TxtDocuments, typer.Option(help="what one document of a .txt file is")] = "file",
    workers: Annotated[int, typer.Option(help="parallel workers; the output does not depend on it", min=1)] = 2,
    task: Annotated[str, typer.Option(metavar="I/N", help="only part I of N, counted from 0")] = "0/1",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="try the rules on a sample, write nothing")] = False,
    num_documents: Annotated[int, typer.Option(help="documents of a dry run", min=1)] = 1000,
    list_rules: Annotated[bool, typer.Option("--list-rules", help="every rule, its thresholds and source")] = False,
    as_json: Json = False,
) -> None:
    """Repair, filter and mask documents by rules: cpt data clean --config configs/corpora/clean_web.yaml --input
    'raw/*.jsonl.zst' --out clean/web
    """
    from data_tools.clean import clean_corpus
    from data_tools.clean.rules import list_rules as rules
    from data_tools.corpus.stage_view import render_summary
    from data_tools.corpus.units import parse_task
    from data_tools.sources import ReadOptions

    if list_rules:
        print_facts(rules(), clean_corpus.render_rules, as_json=as_json)
        return
    missing = {"--config": config, "--input": inputs, "--out": out or (dry_run or None)}
    for name, value in missing.items():
        if not value:
            raise typer.BadParameter(f"{name} is needed", param_hint=name)
    assert config is not None
    read = ReadOptions(text_key=text_key, txt_documents=txt_documents)
    request = clean_corpus.CleanRequest(config, tuple(inputs or ()), out or Path(), read, workers, parse_task(task))
    if dry_run:
        print_facts(clean_corpus.try_rules(request, num_documents), clean_corpus.render_trial, as_json=as_json)
    else:
        print_facts(clean_corpus.clean(request), render_summary, as_json=as_json)


@data_app.command("train-ngram")
def train_ngram(
    inputs: Annotated[list[str], typer.Option("--input", help="reference texts: files or globs; repeatable")],
    out: Annotated[Path, typer.Option(help="the model, a .npz")],
    order: Annotated[int, typer.Option(help="longest n-gram", min=1, max=6)] = 3,
    prune: Annotated[int, typer.Option(help="drop n-grams of 3 words and more seen so often or less", min=0)] = 1,
    min_count: Annotated[int, typer.Option(help="words seen less often are unknown words", min=1)] = 2,
    max_words: Annotated[int, typer.Option(help="read no more; some 100 bytes of memory each", min=1)] = 20_000_000,
    text_key: Annotated[str, typer.Option(help="JSON key or table column that holds the text")] = "text",
    as_json: Json = False,
) -> None:
    """Train the word n-gram model that ngram_perplexity and `score` use: cpt data train-ngram --input
    'reference/*.jsonl.zst' --out models/medical.npz
    """
    from data_tools.clean.model_verbs import render_facts, train_and_save
    from data_tools.clean.ngram_training import TrainOptions
    from data_tools.sources import ReadOptions

    options = TrainOptions(order=order, prune=prune, min_count=min_count, max_words=max_words)
    print_facts(train_and_save(inputs, out, options, ReadOptions(text_key=text_key)), render_facts, as_json=as_json)


@data_app.command()
def score(
    store: Annotated[Path, typer.Argument(help="a split of a token store, e.g. stores/medical/train")],
    model: Annotated[Path, typer.Option(help="model of `cpt data train-ngram`")],
    tokenizer: Annotated[Path, typer.Option(help="the store's tokenizer")],
    out: Annotated[Path, typer.Option(help="the .npy of scores; a .json beside it says what they are of")],
    workers: Annotated[int, typer.Option(help="parallel workers; the output does not depend on it", min=1)] = 2,
    as_json: Json = False,
) -> None:
    """Perplexity of every document of a store, for views of it: cpt data score stores/medical/train --model
    models/medical.npz --tokenizer TOKENIZER --out scores/medical.npy
    """
    from data_tools.clean.model_verbs import render_facts, score_with_progress
    from data_tools.clean.store_scores import ScoreRequest

    request = ScoreRequest(store, model, tokenizer, out, workers)
    print_facts(score_with_progress(request), render_facts, as_json=as_json)


@data_app.command()
def decontaminate(
    inputs: Annotated[list[str], typer.Option("--input", help="files, globs or a stage folder; repeatable")],
    out: Annotated[Path, typer.Option(help="folder for documents, rejects, report.json, contaminated_items.json")],
    against: Annotated[
        list[str] | None, typer.Option(metavar="NAME=FILES", help="benchmark items, .jsonl or .parquet; repeatable")
    ] = None,
    heldout: Annotated[
        list[str] | None, typer.Option(metavar="[NAME=]PATH", help="held-out store or raw documents; repeatable")
    ] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="the held-out stores' tokenizer")] = None,
    fields: Annotated[
        list[str] | None, typer.Option("--field", help="field of the items that counts; default: every string")
    ] = None,
    ngram: Annotated[int, typer.Option(help="words in a row that tell an item", min=2)] = 13,
    heldout_ngram: Annotated[int, typer.Option(help="words in a row that tell a held-out document", min=2)] = 50,
    action: Annotated[
        Literal["drop", "cut"], typer.Option(help="drop documents, or cut 200 characters around")
    ] = "drop",
    max_documents: Annotated[
        int, typer.Option(help="ignore n-grams that more documents hold (GPT-3: 10); 0: all count", min=0)
    ] = 0,
    text_key: Annotated[str, typer.Option(help="JSON key or table column that holds the text")] = "text",
    txt_documents: Annotated[TxtDocuments, typer.Option(help="what one document of a .txt file is")] = "file",
    workers: Annotated[int, typer.Option(help="parallel workers; the output does not depend on it", min=1)] = 2,
    task: Annotated[str, typer.Option(help="i/n: only part i of n, counted from 0")] = "0/1",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="look and report, write no documents")] = False,
    as_json: Json = False,
) -> None:
    """Take documents out that hold benchmark items or held-out text: cpt data decontaminate --input 'clean/med/*'
    --against 'mmlu=evals/mmlu/*.jsonl' --out decon/med
    """
    from data_tools.corpus.units import parse_task
    from data_tools.decontaminate.passes import DecontaminateRequest
    from data_tools.decontaminate.protected_texts import Protected
    from data_tools.decontaminate.report_view import decontaminate_with_progress, render_outcome
    from data_tools.sources import ReadOptions

    read = ReadOptions(text_key=text_key, txt_documents=txt_documents)
    protected = Protected(
        tuple(against or ()), tuple(heldout or ()), tokenizer, tuple(fields or ()), ngram, heldout_ngram, read
    )
    request = DecontaminateRequest(
        tuple(inputs), out, protected, action, max_documents, read, workers, parse_task(task), dry_run
    )
    print_facts(decontaminate_with_progress(request), render_outcome, as_json=as_json)


@data_app.command()
def inspect(
    sources: Annotated[list[str], typer.Argument(metavar="PATH...", help="stores, stage folders, raw files or globs")],
    tokenizer: Annotated[Path | None, typer.Option(help="the stores' tokenizer: text instead of ids")] = None,
    num_documents: Annotated[int, typer.Option(help="documents to show from each source", min=0)] = 3,
    sample_documents: Annotated[int, typer.Option(help="documents of each source to look at", min=1)] = 2000,
    seq_len: Annotated[int, typer.Option(help="length of the packed rows shown", min=2)] = 512,
    num_rows: Annotated[int, typer.Option(help="packed rows to show from each store's split", min=0)] = 1,
    text_key: Annotated[str, typer.Option(help="JSON key or table column that holds the text")] = "text",
    html: Annotated[Path | None, typer.Option(help="write the same as one HTML page")] = None,
    as_json: Json = False,
) -> None:
    """Show what is in data, sources side by side: cpt data inspect stores/medical stores/general --tokenizer TOKENIZER
    --html look.html
    """
    from data_tools.look.inspection import inspect_sources
    from data_tools.look.store_facts import Look
    from data_tools.look.terminal import render_inspection

    look = Look(tokenizer, num_documents, sample_documents, seq_len, num_rows, text_key)
    facts = inspect_sources(sources, look)
    if html is not None:
        from data_tools.look.page import write_page

        write_page(facts, html)
    print_facts(facts, render_inspection, as_json=as_json)


@data_app.command()
def export_megatron(
    store: Annotated[Path, typer.Argument(help="a split of a token store, e.g. stores/medical/train")],
    out: Annotated[Path, typer.Option(help="prefix; gives PREFIX.bin and PREFIX.idx")],
    as_json: Json = False,
) -> None:
    """Write a split for Megatron's IndexedDataset: cpt data export-megatron stores/web/train --out megatron/web"""
    from data_tools.interop.commands import export_with_progress, render_export

    print_facts(export_with_progress(store, out), render_export, as_json=as_json)


@data_app.command()
def import_megatron(
    prefix: Annotated[Path, typer.Argument(help="prefix of PREFIX.bin and PREFIX.idx")],
    tokenizer: Annotated[Path, typer.Option(help="the tokenizer that made the file")],
    out: Annotated[Path, typer.Option(help="store folder; gets train/ and heldout/")],
    source: Annotated[str, typer.Option(help="name of this corpus in run files and reports")],
    domain: Annotated[str, typer.Option(help="label: 'general' for data to replay, else a domain to learn")],
    heldout_fraction: Annotated[float, typer.Option(help="share held out, chosen by hash of the ids")] = 0.01,
    eos_token: Annotated[str | None, typer.Option(help="end-of-document token, where the tokenizer names none")] = None,
    as_json: Json = False,
) -> None:
    """Make a token store of .bin/.idx files, resumable: cpt data import-megatron megatron/pile --tokenizer TOKENIZER
    --out stores/pile --source pile --domain general
    """
    from data_tools.interop.commands import import_with_progress, render_import
    from data_tools.interop.megatron_import import MegatronRequest

    request = MegatronRequest(prefix, tokenizer, out, source, domain, heldout_fraction, eos_token)
    print_facts(import_with_progress(request), render_import, as_json=as_json)


@data_app.command(context_settings={"allow_extra_args": True, "allow_interspersed_args": False})
def submit(
    context: typer.Context,
    executor: Annotated[Literal["local", "slurm", "ray"], typer.Option(help="where the tasks run")],
    tasks: Annotated[int, typer.Option(help="parts that the work is split into", min=1)],
    workers: Annotated[int, typer.Option(help="tasks at a time; -1: as many as there is room for", min=-1)] = -1,
    options: Annotated[
        list[str] | None,
        typer.Option("--option", metavar="KEY=VALUE", help="for slurm any option of sbatch, e.g. partition=cpu"),
    ] = None,
    logs: Annotated[Path | None, typer.Option(help="folder of the tasks' logs; default: logs/ beside --out")] = None,
) -> None:
    """Run a verb as many tasks, then merge: cpt data submit --executor slurm --tasks 64 --option partition=cpu --option
    time=04:00:00 tokenize --input 'web/*.jsonl.zst' --out stores/web ...
    """
    from data_tools.corpus.executors import Submission, out_of
    from data_tools.corpus.executors import submit as submit_tasks

    arguments = tuple(context.args)
    _check_splittable(context, arguments)
    out = out_of(arguments)
    submission = Submission(
        arguments=arguments,
        out=out,
        tasks=tasks,
        logs=(logs or out.parent / "logs" / out.name).absolute(),
        workers=workers,
        options=dict(_key_and_value(text) for text in options or []),
    )
    typer.echo(submit_tasks(executor, submission))


def _check_splittable(context: typer.Context, arguments: tuple[str, ...]) -> None:
    """A wrong argument is found here, once, not by each of many tasks."""
    commands = typer.main.get_group(data_app).commands
    splittable = sorted(name for name, verb in commands.items() if any(p.name == "task" for p in verb.params))
    if not arguments or arguments[0] not in splittable:
        named = arguments[0] if arguments else "nothing"
        raise typer.BadParameter(f"cannot split {named!r} into tasks; verbs that can be: {', '.join(splittable)}")
    commands[arguments[0]].make_context(arguments[0], list(arguments[1:]), parent=context.parent)


def _key_and_value(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals:
        raise typer.BadParameter(f"--option is {text!r}; it must be KEY=VALUE, e.g. partition=cpu")
    return key, value


@data_app.command()
def pack(
    stores: Annotated[list[Path], typer.Argument(metavar="STORE...", help="store or view folders")],
    seq_len: Annotated[
        list[int] | None, typer.Option("--seq-len", help="tokens in a row; repeatable, to compare; default 2048")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show the consequences, build no index")] = False,
    pack_dir: Annotated[
        Path | None, typer.Option(help="folder for the indexes, as data.pack_dir; default: beside each store")
    ] = None,
    figure: Annotated[Path | None, typer.Option(help="write the lengths and cuts as an .svg picture")] = None,
    as_json: Json = False,
) -> None:
    """Show what packing does to documents (fill, cuts, lengths) and build the best_fit index: cpt data pack
    stores/medical --seq-len 2048 --seq-len 8192 --dry-run
    """
    from data_tools.pack_facts import pack_facts, render_packing, write_figure

    facts = pack_facts(stores, seq_len or [2048], build=not dry_run, pack_dir=pack_dir)
    if figure:
        write_figure(figure, facts)
    print_facts(facts, render_packing, as_json=as_json)


@data_app.command()
def view(
    store: Annotated[Path, typer.Argument(help="store (or view) folder to choose documents from")],
    out: Annotated[Path, typer.Option(help="folder of the view; usable wherever a store is")],
    scores: Annotated[Path | None, typer.Option(help="scores.npy of `cpt data score`, lower is better")] = None,
    heldout_scores: Annotated[
        Path | None, typer.Option(help="scores of the held-out split, to choose from it too; default: all of it")
    ] = None,
    keep_best: Annotated[float | None, typer.Option(help="share of the documents, best scores first")] = None,
    keep_tokens: Annotated[float | None, typer.Option(help="tokens of the best documents, e.g. 5e9")] = None,
    quantile: Annotated[str | None, typer.Option(metavar="LO:HI", help="bucket by rank, e.g. 0.1:0.5")] = None,
    max_score: Annotated[float | None, typer.Option(help="highest score to keep")] = None,
    min_length: Annotated[int | None, typer.Option(help="tokens a document must have")] = None,
    max_length: Annotated[int | None, typer.Option(help="tokens a document may have")] = None,
    documents: Annotated[Path | None, typer.Option(help="numbers of documents: .npy, or a text of lines")] = None,
    order: Annotated[
        Literal["none", "ascending", "descending"], typer.Option(help="by score: a curriculum, trained in this order")
    ] = "none",
    as_json: Json = False,
) -> None:
    """Choose documents without copying a token, as a quality bucket or a curriculum: cpt data view stores/medical
    --scores scores.npy --keep-best 0.1 --out views/medical_best
    """
    from data_tools.choose_documents import Choice, make_view, parse_quantile, read_documents, render_view

    choice = Choice(
        keep_best=keep_best,
        keep_tokens=None if keep_tokens is None else int(keep_tokens),
        quantile=parse_quantile(quantile) if quantile else None,
        max_score=max_score,
        min_length=min_length,
        max_length=max_length,
        documents=read_documents(documents) if documents else None,
        order=order,
    )
    facts = make_view(store, out, choice, scores=scores, heldout_scores=heldout_scores)
    print_facts(facts, render_view, as_json=as_json)


@data_app.command()
def dedup(
    sources: Annotated[
        list[str],
        typer.Option("--source", metavar="NAME=FILES", help="order is priority, first keeps; repeatable, domain first"),
    ],
    out: Annotated[Path, typer.Option(help="folder for NAME/documents, NAME/rejects and report.json")],
    against: Annotated[
        list[str] | None, typer.Option(help="files to compare with but not to write: held-out texts; repeatable")
    ] = None,
    near: Annotated[bool, typer.Option(help="near duplicates too, not only equal texts")] = True,
    threshold: Annotated[float, typer.Option(help="similarity of shingle sets from which on one document goes")] = 0.8,
    shingle_size: Annotated[int, typer.Option(help="words per shingle; twice as many characters without spaces")] = 5,
    lines: Annotated[bool, typer.Option(help="then remove lines that repeat across the corpus")] = False,
    line_chars: Annotated[int, typer.Option(help="shortest line that --lines removes, in characters")] = 40,
    line_repeats: Annotated[int, typer.Option(help="--lines removes what comes more often than this")] = 6,
    text_key: Annotated[str, typer.Option(help="JSON key or table column that holds the text")] = "text",
    txt_documents: Annotated[TxtDocuments, typer.Option(help="what one document of a .txt file is")] = "file",
    workers: Annotated[int, typer.Option(help="parallel workers; the output does not depend on it", min=1)] = 2,
    task: Annotated[str, typer.Option(help="i/n: the i-th of n tasks, on any machine that sees --out")] = "0/1",
    wait_minutes: Annotated[float, typer.Option(help="how long a task waits for others between passes", min=0)] = 0,
    as_json: Json = False,
) -> None:
    """Remove duplicates within and across sources: cpt data dedup --source medical='med/*' --source general='web/*'
    --out dedup. Equal texts (case and white space aside), then near duplicates (MinHash; each pair compared). Name the
    domain first: what it shares with the general corpus stays domain data; replay and retention are of general text.
    """
    from data_tools.corpus.units import parse_task
    from data_tools.dedup.report import render_report
    from data_tools.dedup.request import DedupRequest, LineRule, parse_sources
    from data_tools.dedup.watch import dedup_with_progress
    from data_tools.sources import ReadOptions

    request = DedupRequest(
        sources=parse_sources(sources, against or []),
        out=out,
        near=near,
        lines=LineRule(line_chars, line_repeats) if lines else None,
        threshold=threshold,
        shingle_size=shingle_size,
        read=ReadOptions(text_key=text_key, txt_documents=txt_documents),
        workers=workers,
        task=parse_task(task),
        wait_minutes=wait_minutes,
    )
    print_facts(dedup_with_progress(request), render_report, as_json=as_json)


@data_app.command("preview-mix")
def preview_mix(
    run: Annotated[Path, typer.Argument(metavar="RUN.yaml|RUN_DIR", help="run file, or a run that has begun")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[a.b=c]...", help="fields to change, e.g. replay.share_general=0.4")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="also draw it: writes this .png and an .svg beside it")] = None,
    apply: Annotated[
        bool, typer.Option("--apply", help="give RUN_DIR this mixture from its newest checkpoint on; train nothing")
    ] = False,
    as_json: Json = False,
) -> None:
    """Shares, epochs and repeats of every source over time, as they will be trained: cpt data preview-mix RUN.yaml
    data.mix.name=temperature data.mix.tau=5 --out mix.png
    """
    from cpt.planner.picture_mix import draw_mix
    from cpt.planner.picture_style import save_figure
    from cpt.planner.preview_mix import render_mix
    from cpt.remix import change_mixture, newest_step, preview

    facts = preview(run, overrides or [])
    if apply:
        change_mixture(run, overrides or [], newest_step(run))
    if out is not None:
        save_figure(draw_mix(facts), out.absolute().with_suffix(""))
    print_facts(facts, render_mix, as_json=as_json)

"""`cpt data VERB`: from raw files to token stores and a checked mixture. Code is imported when a verb is called."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from cpt.cli_options import Json, TextKey, TxtDocuments, Workers, local
from cpt.cluster_cli import cluster_app
from cpt.plan_cli import print_facts
from cpt.store_cli import store_app
from cpt.vocabulary_cli import vocabulary_app

data_app = typer.Typer(help="Corpora and token stores.", no_args_is_help=True)
data_app.add_typer(cluster_app)
data_app.add_typer(vocabulary_app)
data_app.add_typer(store_app)

MoreInputs = Annotated[
    list[str] | None, typer.Argument(metavar="[FILE]...", help="more inputs, as a shell expands a glob")
]
BadRecords = Literal["reject", "fail"]


@data_app.command(rich_help_panel="Documents")
def inspect(
    sources: Annotated[list[str], typer.Argument(metavar="PATH...", help="stores, stage folders, raw files or globs")],
    tokenizer: Annotated[Path | None, typer.Option(help="the stores' tokenizer: text instead of ids")] = None,
    num_documents: Annotated[int, typer.Option(help="documents to show from each source", min=0)] = 3,
    sample_documents: Annotated[int, typer.Option(help="documents of each source to look at", min=1)] = 2000,
    seq_len: Annotated[int, typer.Option(help="length of the packed rows shown", min=2)] = 512,
    num_rows: Annotated[int, typer.Option(help="packed rows to show from each store's split", min=0)] = 1,
    text_key: TextKey = "text",
    html: Annotated[Path | None, typer.Option(callback=local, help="write the same as one HTML page")] = None,
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


@data_app.command(rich_help_panel="Documents")
def clean(
    config: Annotated[Path | None, typer.Option(help="YAML of rules, e.g. configs/corpora/clean_web.yaml")] = None,
    inputs: Annotated[
        list[str] | None, typer.Option("--input", help="files, globs or a stage folder; repeatable")
    ] = None,
    more_inputs: MoreInputs = None,
    out: Annotated[Path | None, typer.Option(callback=local, help="gets documents, rejects, counts by reason")] = None,
    text_key: TextKey = "text",
    txt_documents: TxtDocuments = "file",
    workers: Workers = 2,
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
    request = clean_corpus.CleanRequest(
        config, (*(inputs or ()), *(more_inputs or ())), out or Path(), read, workers, parse_task(task)
    )
    if dry_run:
        print_facts(clean_corpus.try_rules(request, num_documents), clean_corpus.render_trial, as_json=as_json)
    else:
        print_facts(clean_corpus.clean(request), render_summary, as_json=as_json)


@data_app.command("train-ngram", rich_help_panel="Documents")
def train_ngram(
    inputs: Annotated[list[str], typer.Option("--input", help="reference texts: files or globs; repeatable")],
    out: Annotated[Path, typer.Option(callback=local, help="the model, a .npz")],
    more_inputs: MoreInputs = None,
    order: Annotated[int, typer.Option(help="longest n-gram", min=1, max=6)] = 3,
    prune: Annotated[int, typer.Option(help="drop n-grams of 3 words and more seen so often or less", min=0)] = 1,
    min_count: Annotated[int, typer.Option(help="words seen less often are unknown words", min=1)] = 2,
    max_words: Annotated[int, typer.Option(help="read no more; some 100 bytes of memory each", min=1)] = 20_000_000,
    text_key: TextKey = "text",
    as_json: Json = False,
) -> None:
    """Train the word n-gram model that ngram_perplexity and `score` use: cpt data train-ngram --input
    'reference/*.jsonl.zst' --out models/medical.npz
    """
    from data_tools.clean.model_verbs import render_facts, train_and_save
    from data_tools.clean.ngram_training import TrainOptions
    from data_tools.sources import ReadOptions

    options = TrainOptions(order=order, prune=prune, min_count=min_count, max_words=max_words)
    print_facts(
        train_and_save([*inputs, *(more_inputs or ())], out, options, ReadOptions(text_key=text_key)),
        render_facts,
        as_json=as_json,
    )


@data_app.command(rich_help_panel="Documents")
def convert(
    inputs: Annotated[list[str], typer.Option("--input", help="files, globs, URLs or a stage folder; repeatable")],
    out: Annotated[str, typer.Option(help="folder or URL, e.g. s3://bucket/web; gets a file per input file")],
    more_inputs: MoreInputs = None,
    suffix: Annotated[
        Literal[".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"], typer.Option("--format", help="of the files")
    ] = ".jsonl.zst",
    text_key: TextKey = "text",
    txt_documents: TxtDocuments = "file",
    bad_records: Annotated[BadRecords, typer.Option(help="leave damaged records out, or stop at the first")] = "fail",
    as_json: Json = False,
) -> None:
    """Write documents in another format or place, goes on with what is missing: cpt data convert --input
    'crawl/*.warc.gz' --out parquet/web --format .parquet
    """
    from data_tools.corpus.convert import ConvertRequest, render_counts
    from data_tools.corpus.stage_view import convert_with_progress
    from data_tools.sources import ReadOptions

    read = ReadOptions(text_key=text_key, txt_documents=txt_documents)
    request = ConvertRequest((*inputs, *(more_inputs or ())), out, suffix, read, bad_records)
    print_facts(convert_with_progress(request), render_counts, as_json=as_json)


@data_app.command(rich_help_panel="Documents")
def dedup(
    sources: Annotated[
        list[str],
        typer.Option("--source", metavar="NAME=FILES", help="order is priority, first keeps; repeatable, domain first"),
    ],
    out: Annotated[Path, typer.Option(callback=local, help="folder for NAME/documents, NAME/rejects and report.json")],
    against: Annotated[
        list[str] | None, typer.Option(help="files to compare with but not to write: held-out texts; repeatable")
    ] = None,
    near: Annotated[bool, typer.Option(help="near duplicates too, not only equal texts")] = True,
    threshold: Annotated[float, typer.Option(help="similarity of shingle sets from which on one document goes")] = 0.8,
    shingle_size: Annotated[int, typer.Option(help="words per shingle; twice as many characters without spaces")] = 5,
    lines: Annotated[bool, typer.Option(help="then remove lines that repeat across the corpus")] = False,
    line_chars: Annotated[int, typer.Option(help="shortest line that --lines removes, in characters")] = 40,
    line_repeats: Annotated[int, typer.Option(help="--lines removes what comes more often than this")] = 6,
    text_key: TextKey = "text",
    txt_documents: TxtDocuments = "file",
    workers: Workers = 2,
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


@data_app.command(rich_help_panel="Documents")
def decontaminate(
    inputs: Annotated[list[str], typer.Option("--input", help="files, globs or a stage folder; repeatable")],
    out: Annotated[Path, typer.Option(callback=local, help="gets documents, rejects and reports")],
    more_inputs: MoreInputs = None,
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
    text_key: TextKey = "text",
    txt_documents: TxtDocuments = "file",
    workers: Workers = 2,
    task: Annotated[str, typer.Option(help="i/n: only part i of n, counted from 0")] = "0/1",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="look and report, write no documents")] = False,
    as_json: Json = False,
) -> None:
    """Take documents out that hold benchmark items or held-out text: cpt data decontaminate --input clean/med
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
        (*inputs, *(more_inputs or ())), out, protected, action, max_documents, read, workers, parse_task(task), dry_run
    )
    print_facts(decontaminate_with_progress(request), render_outcome, as_json=as_json)


@data_app.command(rich_help_panel="Token stores")
def tokenize(
    inputs: Annotated[
        list[str], typer.Option("--input", help="files, globs, a saved dataset folder or hf://name; repeatable")
    ],
    tokenizer: Annotated[Path, typer.Option(help="tokenizer.json, Hugging Face folder or sentencepiece .model")],
    out: Annotated[Path, typer.Option(callback=local, help="store folder; gets train/ and heldout/")],
    source: Annotated[str, typer.Option(help="name of this corpus in run files and reports")],
    domain: Annotated[
        str, typer.Option(help="label: 'general' for data to replay, anything else is a domain to learn")
    ],
    more_inputs: MoreInputs = None,
    heldout_fraction: Annotated[
        float, typer.Option(help="share of documents held out, chosen by document hash")
    ] = 0.01,
    text_key: TextKey = "text",
    txt_documents: TxtDocuments = "file",
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


@data_app.command(rich_help_panel="Token stores")
def verify(
    store: Annotated[Path, typer.Argument(help="store folder, or one split of it")], as_json: Json = False
) -> None:
    """Read a token store completely and compare every hash; exit code 2 names a damaged file: cpt data verify
    stores/medical
    """
    from data_tools.commands import verify_and_print

    verify_and_print(store, as_json=as_json)


@data_app.command(rich_help_panel="Token stores")
def score(
    store: Annotated[Path, typer.Argument(help="a split of a token store, e.g. stores/medical/train")],
    model: Annotated[Path, typer.Option(help="model of `cpt data train-ngram`")],
    tokenizer: Annotated[Path, typer.Option(help="the store's tokenizer")],
    out: Annotated[Path, typer.Option(callback=local, help="the .npy of scores; a .json says what they are of")],
    workers: Workers = 2,
    as_json: Json = False,
) -> None:
    """Perplexity of every document of a store, for views of it: cpt data score stores/medical/train --model
    models/medical.npz --tokenizer TOKENIZER --out scores/medical.npy
    """
    from data_tools.clean.model_verbs import render_facts, score_with_progress
    from data_tools.clean.store_scores import ScoreRequest

    request = ScoreRequest(store, model, tokenizer, out, workers)
    print_facts(score_with_progress(request), render_facts, as_json=as_json)
